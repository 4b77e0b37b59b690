"""Training loops of other libraries for ``gpu.py``, on the same examples and with random weights.

Each trains until ``step``, called after every step, raises an exception. ``start`` is called directly before, with a
function that returns the real tokens and the computed positions so far.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from adapt_recipes import data
from adapt_recipes.config import TrainConfig

Rows = list[dict[str, list[int]]]
Examples = Sequence[data.Example]
Counts = Callable[[], tuple[float, float]]

# Tokens of a packed row, and rows of a forward pass of the Trainer.
PACK_TOKENS, TRAINER_ROWS = 4096, 8


def torchtune(
    config: TrainConfig,
    examples: Examples,
    device: torch.device,
    start: Callable[[Counts], None],
    step: Callable[[], None],
) -> None:
    """torchtune's own recipe, ``full_finetune_single_device``, with the config that torchtune ships for Llama 3.2 1B.

    From the library: the model with bf16 weights, packing, block mask, loss in chunks over all positions, loop. Not
    from its config: the accumulation of as many tokens as the others have in a step, clipping, and torch's AdamW.
    """
    import torchtune
    from common import load_module
    from omegaconf import OmegaConf
    from torchtune.config import instantiate
    from torchtune.training import set_default_dtype

    shipped = Path(torchtune.__file__).parents[1] / "recipes"
    path = shipped / "full_finetune_single_device.py"
    stock: Any = load_module("torchtune_full_finetune_single_device", path).FullFinetuneRecipeSingleDevice

    class Recipe(stock):
        def load_checkpoint(self, cfg_checkpointer: Any) -> dict[str, Any]:
            with set_default_dtype(self._dtype), self._device:
                return {"model": instantiate(settings.model).state_dict()}

        def save_checkpoint(self, epoch: int) -> None:
            pass

    folder = Path(config.output_dir)
    rows = unshifted(examples)
    (folder / "rows.json").write_text(json.dumps(rows))
    length = min(PACK_TOKENS, config.micro_batch_tokens)
    assert config.batch_size is not None
    tokens = config.batch_size * sum(len(row["tokens"]) for row in rows) / len(rows)
    settings = OmegaConf.load(shipped / "configs" / "llama3_2" / "1B_full_single_device.yaml")
    settings.update(
        {
            "output_dir": str(folder),
            "device": device.type,
            "seed": 0,
            # Until ``step`` ends it.
            "epochs": 1000,
            "shuffle": False,
            "model": {"_component_": config.model.component, **config.model.arguments},
            "tokenizer": {"_component_": "types.SimpleNamespace", "pad_id": 0},
            "dataset": {"_component_": "gpu_libraries.packed", "packed": True, "max_seq_len": length}
            | {"path": str(folder / "rows.json")},
            "batch_size": 1,
            "gradient_accumulation_steps": round(tokens / length),
            "optimizer": {"_component_": config.optimizer.component, **config.optimizer.arguments},
            "optimizer_in_bwd": False,
            "clip_grad_norm": config.clip_grad_norm,
            "compile": config.compile,
            "log_peak_memory_stats": False,
        }
    )
    recipe = Recipe(settings)
    recipe.setup(settings)
    recipe._metric_logger = SimpleNamespace(log_dict=lambda *_, **__: step())
    start(counted(recipe._model, lambda batch: (batch["tokens"] != 0, batch["input_pos"] == 0)))
    recipe.train()


def packed(tokenizer: object, *, path: str, max_seq_len: int, packed: bool) -> Any:
    """A ``dataset._component_``; torchtune passes its tokenizer."""
    from torchtune.datasets import PackedDataset

    return PackedDataset(json.loads(Path(path).read_text()), max_seq_len=max_seq_len)


def trainer(
    config: TrainConfig,
    examples: Examples,
    device: torch.device,
    start: Callable[[Counts], None],
    step: Callable[[], None],
) -> None:
    """``transformers.Trainer`` with ``bf16=True`` on the same architecture.

    From the library: fp32 weights with bf16 autocast, attention, loss over all positions, accumulation, AdamW,
    clipping. Ours: the collate function, which pads to the longest row with an attention mask, as the library's do.
    """
    from torch.nn.utils.rnn import pad_sequence
    from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from adapt_recipes.models import huggingface_config
    from adapt_recipes.training.sharding import on_meta

    def collate(rows: Rows) -> dict[str, Tensor]:
        def padded(key: str, value: int) -> Tensor:
            return pad_sequence([torch.tensor(row[key]) for row in rows], batch_first=True, padding_value=value)

        tokens = padded("tokens", 0)
        return {
            "input_ids": tokens,
            "labels": padded("labels", data.IGNORE_INDEX),
            "attention_mask": (tokens != 0).long(),
        }

    class Steps(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            step()

    assert config.batch_size is not None
    with on_meta():
        settings = huggingface_config(config.model.build())
    with device:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), dtype=torch.float32)
    arguments = TrainingArguments(
        output_dir=config.output_dir,
        use_cpu=device.type == "cpu",
        bf16=True,
        per_device_train_batch_size=TRAINER_ROWS,
        gradient_accumulation_steps=config.batch_size // TRAINER_ROWS,
        # Until ``step`` ends it.
        num_train_epochs=1000,
        learning_rate=config.optimizer.arguments["lr"],
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    one = Trainer(
        model=model, args=arguments, train_dataset=unshifted(examples), data_collator=collate, callbacks=[Steps()]
    )
    start(counted(model, lambda batch: (batch["attention_mask"], batch["attention_mask"][:, 0])))
    one.train()


def unshifted(examples: Examples) -> Rows:
    """Token ids, and labels with the same ids where supervised: both libraries shift labels themselves."""
    return [
        {"tokens": [*tokens.tolist(), int(labels[-1])], "labels": [data.IGNORE_INDEX, *labels.tolist()]}
        for tokens, labels in examples
    ]


def counted(model: nn.Module, masks: Callable[[dict[str, Tensor]], tuple[Tensor, Tensor]]) -> Counts:
    """Counts what a model computes.

    Args:
        model: called with keywords, (batch, length) each.
        masks: returns masks of the tokens and of the first token of each example, from those keywords.
    """
    totals: list[float | Tensor] = [0, 0]

    def count(_: nn.Module, arguments: object, batch: dict[str, Tensor]) -> None:
        tokens, starts = masks(batch)
        # The last token of an example is not counted: nothing follows that it could predict.
        totals[0] = totals[0] + tokens.sum() - starts.sum()
        totals[1] += tokens.numel()

    model.register_forward_pre_hook(count, with_kwargs=True)
    return lambda: (float(totals[0]), float(totals[1]))
