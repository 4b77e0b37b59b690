"""One contender of ``throughput.py``, in a process of its own: ``python contenders.py NAME SETTINGS.json ANSWER.json``.

It builds the contender's training, takes a step to warm up, and measures one pass over the examples. It imports only
what the contender needs, because TRL may be in an environment without torchtune and without this project.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# The embedding, which sees every computed position; a function that trains on the examples once, or takes a single
# step; the logged losses.
Training = tuple[nn.Module, Callable[[bool], None], list[float]]


def ours(settings: dict[str, Any]) -> Training:
    """``Recipe.setup`` and ``.step`` of ``recipes/sft_full_finetune.py``, with a uniform mixture.

    Everything a step does is in it: drawing, micro-batches, clipping, the log. Left out: validation and checkpoints.
    The sampler is put back after each pass, so that every pass draws the same examples. Its size is
    ``micro_batch_tokens``.
    """
    from common import CONFIGS, ROOT, load_module

    from adapt_recipes.config import load
    from adapt_recipes.run import Run

    module = load_module("sft_full_finetune", ROOT / "recipes" / "sft_full_finetune.py")
    overrides = [*settings["overrides"], f"micro_batch_tokens={settings['size']}"]
    config = load(module.Config, CONFIGS / "smollm2_135m_uniform_10pct.yaml", overrides)
    run = Run(config).__enter__()  # until this process ends
    recipe = module.Recipe(config, run)
    recipe.setup()
    start, losses = recipe.sampler.state_dict(), []
    log_step = run.log_step

    def keep_loss(*, loss: float, **values: Any) -> None:
        losses.append(loss)
        log_step(loss=loss, **values)

    run.log_step = keep_loss  # type: ignore[method-assign]

    def train(one_step: bool) -> None:
        recipe.sampler.load_state_dict(start)
        for _ in range(1 if one_step else settings["num_examples"] // settings["batch_size"]):
            recipe.step()

    return recipe.model.decoder.tok_embeddings, train, losses


def torchtune(settings: dict[str, Any], *, packed: bool = False) -> Training:
    """torchtune's own recipe, ``full_finetune_single_device``: the class that its wheel ships, and its ``train``.

    From the library: the model, data loader and collate function (padded to the longest row, or packed up to
    ``max_seq_len`` with a mask), loss in chunks over all positions, accumulation, optimizer, clipping, logging. Its
    weights have the dtype of the matrix products. Ours: the weights are read from the Hugging Face folder by this
    project, the dataset returns token ids, and nothing is saved at the end of an epoch. Its size is the rows of a
    forward pass.
    """
    import torchtune
    from common import load_module
    from omegaconf import OmegaConf

    from adapt_recipes.models import HuggingFaceCheckpointer

    path = Path(torchtune.__file__).parents[1] / "recipes" / "full_finetune_single_device.py"
    stock: Any = load_module("torchtune_full_finetune_single_device", path).FullFinetuneRecipeSingleDevice

    class Recipe(stock):
        def load_checkpoint(self, cfg_checkpointer: Any) -> dict[str, Any]:
            return {"model": HuggingFaceCheckpointer(settings["model"]).load()}

        def save_checkpoint(self, epoch: int) -> None:
            pass

    sizes = json.loads((Path(settings["model"]) / "config.json").read_text())
    config = OmegaConf.create(
        {
            "device": "cpu",
            "dtype": settings["dtype"],
            "seed": 0,
            "output_dir": settings["folder"],
            "resume_from_checkpoint": False,
            "epochs": 0,
            "max_steps_per_epoch": None,
            "batch_size": settings["size"],
            "gradient_accumulation_steps": rows_per_step(settings, packed) // settings["size"],
            "clip_grad_norm": 1.0,
            "optimizer_in_bwd": False,
            "compile": False,
            "shuffle": False,
            "model": {
                "_component_": "torchtune.models.llama3_2.llama3_2",
                "vocab_size": sizes["vocab_size"],
                "num_layers": sizes["num_hidden_layers"],
                "num_heads": sizes["num_attention_heads"],
                "num_kv_heads": sizes["num_key_value_heads"],
                "embed_dim": sizes["hidden_size"],
                "max_seq_len": settings["max_seq_len"],
                "intermediate_dim": sizes["intermediate_size"],
                "rope_base": int(sizes.get("rope_theta") or sizes["rope_parameters"]["rope_theta"]),
                "norm_eps": sizes["rms_norm_eps"],
                "scale_factor": 1,
                "tie_word_embeddings": sizes["tie_word_embeddings"],
            },
            "tokenizer": {"_component_": "types.SimpleNamespace", "pad_id": 0},
            "dataset": {"_component_": "contenders.torchtune_dataset", "packed": packed, "settings": settings},
            "checkpointer": {"model_type": "LLAMA3_2"},
            "loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"},
            "optimizer": {"_component_": "torch.optim.AdamW", "lr": 2e-5, "fused": True},
            "metric_logger": {"_component_": "contenders.Losses"},
        }
    )
    recipe = Recipe(config)
    recipe.setup(config)

    def train(one_step: bool) -> None:
        recipe.max_steps_per_epoch = 1 if one_step else None
        recipe.total_epochs += 1
        recipe.train()

    return recipe._model.tok_embeddings, train, recipe._metric_logger.losses


def trl(settings: dict[str, Any], *, packed: bool = False) -> Training:
    """TRL's ``SFTTrainer`` on ``AutoModelForCausalLM``, on token ids, without activation checkpointing (its default).

    From the library: fp32 weights (with bf16: autocast), sorting or packing, attention, collate function, loss at the
    supervised positions, accumulation, AdamW, clipping. Its size is the rows of a forward pass.
    """
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    examples = [{"input_ids": row["tokens"], "labels": row["labels"]} for row in read_rows(settings)]
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.convert_ids_to_tokens(0)
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
    losses: list[float] = []

    def train(one_step: bool) -> None:
        arguments = SFTConfig(
            output_dir=settings["folder"],
            use_cpu=True,
            bf16=settings["dtype"] == "bf16",
            gradient_checkpointing=False,
            max_length=settings["max_seq_len"],
            packing=packed,
            train_sampling_strategy="sequential" if packed else "group_by_length",
            per_device_train_batch_size=settings["size"],
            gradient_accumulation_steps=max(1, rows_per_step(settings, packed) // settings["size"]),
            num_train_epochs=1,
            max_steps=1 if one_step else -1,
            learning_rate=2e-5,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        one = SFTTrainer(
            model=model, args=arguments, train_dataset=Dataset.from_list(examples), processing_class=tokenizer
        )
        one.train()
        losses.extend(entry["loss"] for entry in one.state.log_history if "loss" in entry)

    return model.get_input_embeddings(), train, losses


CONTENDERS: dict[str, Callable[[dict[str, Any]], Training]] = {
    "ours": ours,
    "torchtune": torchtune,
    "torchtune packed": partial(torchtune, packed=True),
    "TRL sorted": trl,
    "TRL packed": partial(trl, packed=True),
}
# The micro-batch sizes among which each looks for its best.
SIZES = {
    "ours": (1024, 2048, 4096),
    "torchtune": (1, 2, 4, 8),
    # Its data loader drops the last packs that do not fill a micro-batch.
    "torchtune packed": (1,),
    "TRL sorted": (1, 2, 4, 8),
    "TRL packed": (1, 2),
}


def why_not(name: str, settings: dict[str, Any]) -> str | None:
    """Why a contender cannot run here."""
    if name.startswith("TRL") and importlib.util.find_spec("trl") is None:
        return f"no trl in {sys.executable}"
    kind = json.loads((Path(settings["model"]) / "config.json").read_text())["model_type"]
    if name.startswith("torchtune") and kind != "llama":
        return f"it has no model of type {kind}"
    return None


def rows_per_step(settings: dict[str, Any], packed: bool) -> int:
    """Examples or packs."""
    return settings["packs_per_step"] if packed else settings["batch_size"]


def read_rows(settings: dict[str, Any]) -> list[dict[str, list[int]]]:
    """Rows of ``tokens`` and ``labels``, with the same ids where supervised; both libraries shift labels themselves."""
    return json.loads(Path(settings["examples"]).read_text())[: settings["num_examples"]]


def torchtune_dataset(tokenizer: object, *, packed: bool, settings: Any) -> Any:
    """A dataset as torchtune's recipe builds it; it passes its tokenizer as the first argument."""
    from torchtune.datasets import PackedDataset

    rows = read_rows(settings)
    return PackedDataset(rows, max_seq_len=settings["max_seq_len"]) if packed else rows


class Losses:
    """A metric logger for torchtune that keeps the losses."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def log_config(self, config: Any) -> None:
        pass

    def log_dict(self, payload: dict[str, Any], step: int) -> None:
        self.losses.append(float(payload["loss"]))


def main(name: str, settings_path: str, answer_path: str) -> None:
    settings = json.loads(Path(settings_path).read_text())
    if reason := why_not(name, settings):
        Path(answer_path).write_text(json.dumps({"skipped": reason}))
        return
    from common import memory

    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    if name.startswith("TRL"):
        import trl.trainer.sft_trainer  # noqa: F401 (memory is counted from here)
    else:
        import torchtune.training  # noqa: F401
    empty, _ = memory()
    embedding, train, losses = CONTENDERS[name](settings)
    positions = 0

    def count(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        nonlocal positions
        positions += arguments[0].numel()

    if settings["warm_up"]:
        train(True)
    losses.clear()
    embedding.register_forward_pre_hook(count)
    started = time.perf_counter()
    train(False)
    seconds = time.perf_counter() - started
    peak = memory()[1]
    answer = {"seconds": seconds, "positions": positions, "loss": sum(losses) / len(losses)}
    Path(answer_path).write_text(json.dumps({**answer, "peak_mib": peak, "growth_mib": peak - empty}))


if __name__ == "__main__":
    main(*sys.argv[1:])
