"""Writes the model of a run's checkpoint as a Hugging Face folder, also of a run that was stopped or has died."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass

from adapt_recipes import models
from adapt_recipes.config import STRICT, Component, load
from adapt_recipes.models.adapters import train_adapters_alone
from adapt_recipes.models.huggingface import SaveDType, adapter_folder
from adapt_recipes.run_directory import CHECKPOINTS, MODEL, RESOLVED, has_run
from adapt_recipes.runlog import read_resolved
from adapt_recipes.training.checkpoint import Checkpoints, whole_checkpoints
from adapt_recipes.training.precision import DType
from adapt_recipes.training.sharding import shard


@dataclass(kw_only=True, config=STRICT)
class _Config:
    """The keys of a run that its model depends on. Data, mixture and optimizer may be gone; see ``TrainConfig``."""

    dtype: DType
    model: Component
    tokenizer: Component
    checkpointer: Component
    max_seq_len: PositiveInt
    activation_checkpointing: bool = False
    activation_offloading: bool = False
    loss_chunk_tokens: PositiveInt | None = None


def export(
    run: Path, *, step: int | None = None, out: Path | None = None, save_dtype: SaveDType | None = None
) -> list[Path]:
    """Writes what the recipe itself writes when it ends at this step: ``model/`` and, after LoRA, ``adapter/``.

    On the CPU and one process, whatever the run had. The run directory is only read, and may be that of a run at work.

    Args:
        run: the run directory, with ``resolved.yaml`` and a checkpoint.
        step: N of ``checkpoints/step_N``; None: the newest one.
        out: the folder to write; None: ``exported_model_step_N`` in the run directory. Adapters go beside it, see
            ``adapter_folder``.
        save_dtype: of the weights; None: as the run saves them.

    Returns:
        The folders that were written.

    Raises:
        ValueError: the folder has no run or no such checkpoint, a folder to write exists, or what the model is built
            from (the folder of the base model, say) is gone or has changed.
        OSError: a file cannot be read or written.
    """
    # Which checkpoint.
    if not has_run(run):
        raise ValueError(f"{run} is no run directory")
    if not (run / RESOLVED).is_file():
        raise ValueError(f"there is no {run / RESOLVED}, the config of the run")
    steps = sorted(whole_checkpoints(run / CHECKPOINTS))
    if not steps:
        raise ValueError(f"there is no checkpoint in {run / CHECKPOINTS}")
    if step is None:
        step = steps[-1]
    if step not in steps:
        raise ValueError(f"--step {step}: there is no such checkpoint in {run / CHECKPOINTS}; {_there_are(steps)}")
    out = run / f"exported_{MODEL}_step_{step}" if out is None else out
    _refuse_existing(out)

    # The model, without data.
    unused = read_resolved(run).keys() - {field.name for field in fields(_Config)}
    overrides = [f"~{key}" for key in unused] + ([f"checkpointer.save_dtype={save_dtype}"] if save_dtype else [])
    config: Any = load(_Config, run / RESOLVED, overrides)
    tokenizer, checkpointer = config.tokenizer.build(), config.checkpointer.build()
    cpu = torch.device("cpu")
    model = models.build(config, (), device=cpu, checkpointer=checkpointer)
    shard(model, model.decoder.layers, device=cpu)

    # Its weights, and the folders.
    written = [out]
    if train_adapters_alone(model.decoder) is not None:
        written.append(adapter_folder(out))
        _refuse_existing(written[-1])
    checkpoints = Checkpoints(run / CHECKPOINTS, keep=len(steps), asynchronous=False)
    try:
        checkpoints.load_weights(step, model)
    except ValueError as error:
        raise ValueError(f"{error}; {_there_are(steps)}") from error
    models.save(model, checkpointer, out, tokenizer=tokenizer)
    return written


def _refuse_existing(folder: Path) -> None:
    if folder.exists() or folder.is_symlink():
        raise ValueError(f"--out: {folder} is there already; remove it, or choose another folder")


def _there_are(steps: list[int]) -> str:
    return f"there {'is step' if len(steps) == 1 else 'are steps'} {', '.join(map(str, steps))}"
