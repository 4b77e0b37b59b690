"""One contender of ``throughput.py``, in a process of its own: ``python contenders.py NAME SETTINGS.json ANSWER.json``.

It builds the contender's training, trains over the examples twice, and writes the time of the second epoch. It imports
only what the contender needs, because the Trainer may be in an environment without torchtune and without this project.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

IGNORE_INDEX = -100

# The embedding, which sees every computed position; a function that trains one epoch; the logged losses.
Training = tuple[nn.Module, Callable[[], None], list[float]]


def ours(settings: dict[str, Any]) -> Training:
    """``Recipe.setup`` and ``.step`` of ``recipes/sft_full_finetune.py``, with a uniform mixture.

    Everything a step does is in it: drawing, micro-batches, clipping, the log. Left out: validation and checkpoints.
    The sampler is put back after each pass, so that every pass draws the same examples.
    """
    from common import CONFIGS, ROOT, load_module

    from adapt_recipes.config import load
    from adapt_recipes.run import Run

    module = load_module("sft_full_finetune", ROOT / "recipes" / "sft_full_finetune.py")
    config = load(module.Config, CONFIGS / "smollm2_135m_uniform_10pct.yaml", settings["overrides"])
    run = Run(config).__enter__()  # until this process ends
    recipe = module.Recipe(config, run)
    recipe.setup()
    start, losses = recipe.sampler.state_dict(), []
    log_step = run.log_step

    def keep_loss(*, loss: float, **values: Any) -> None:
        losses.append(loss)
        log_step(loss=loss, **values)

    run.log_step = keep_loss  # type: ignore[method-assign]

    def train() -> None:
        recipe.sampler.load_state_dict(start)
        before = recipe.ledger.tokens, recipe.ledger.supervised_tokens
        for _ in range(settings["num_examples"] // settings["batch_size"]):
            recipe.step()
        read = recipe.ledger.tokens - before[0], recipe.ledger.supervised_tokens - before[1]
        assert read == (settings["num_tokens"], settings["num_supervised_tokens"]), "not the examples of the others"

    return recipe.model.decoder.tok_embeddings, train, losses


def torchtune(settings: dict[str, Any]) -> Training:
    """torchtune's own recipe, ``full_finetune_single_device``: the class that its wheel ships, and its ``train``.

    From the library: the model (bf16 weights), data loader and collate function (padded to the longest row), loss in
    chunks over all positions, accumulation, optimizer, clipping, logging. Ours: the weights are read from the Hugging
    Face folder by this project, the dataset returns token ids, and nothing is saved at the end of an epoch.
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
            "dtype": "bf16",
            "seed": 0,
            "output_dir": settings["folder"],
            "resume_from_checkpoint": False,
            "epochs": 0,
            "max_steps_per_epoch": None,
            "batch_size": settings["stock_batch_size"],
            "gradient_accumulation_steps": settings["batch_size"] // settings["stock_batch_size"],
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
            "dataset": {"_component_": "contenders.TokenIds", "path": settings["examples"]},
            "checkpointer": {"model_type": "LLAMA3_2"},
            "loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"},
            "optimizer": {"_component_": "torch.optim.AdamW", "lr": 2e-5, "fused": True},
            "metric_logger": {"_component_": "contenders.Losses"},
        }
    )
    recipe = Recipe(config)
    recipe.setup(config)

    def train() -> None:
        recipe.total_epochs += 1
        recipe.train()

    return recipe._model.tok_embeddings, train, recipe._metric_logger.losses


def trainer(settings: dict[str, Any]) -> Training:
    """``transformers.Trainer`` on ``AutoModelForCausalLM`` with ``bf16=True``, over the examples in the same order.

    From the library: fp32 weights with bf16 autocast, attention, loss over all positions, accumulation, AdamW,
    clipping. Ours: the collate function, which pads to the longest row with an attention mask, as the library's do.
    """
    from torch.nn.utils.rnn import pad_sequence
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    def collate(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        def padded(key: str, value: int) -> Tensor:
            return pad_sequence([torch.tensor(row[key]) for row in rows], batch_first=True, padding_value=value)

        mask = [torch.ones(len(row["tokens"]), dtype=torch.int64) for row in rows]
        return {
            "input_ids": padded("tokens", 0),
            "labels": padded("labels", IGNORE_INDEX),
            "attention_mask": pad_sequence(mask, batch_first=True),
        }

    class InOrder(Trainer):
        def _get_train_sampler(self, *arguments: Any) -> Any:
            return torch.utils.data.SequentialSampler(examples)

    examples = TokenIds(path=settings["examples"])
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
    arguments = TrainingArguments(
        output_dir=settings["folder"],
        use_cpu=True,
        bf16=True,
        per_device_train_batch_size=settings["stock_batch_size"],
        gradient_accumulation_steps=settings["batch_size"] // settings["stock_batch_size"],
        num_train_epochs=1,
        learning_rate=2e-5,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    losses: list[float] = []

    def train() -> None:
        one = InOrder(model=model, args=arguments, train_dataset=examples, data_collator=collate)
        one.train()
        losses.extend(entry["loss"] for entry in one.state.log_history if "loss" in entry)

    return model.get_input_embeddings(), train, losses


CONTENDERS: dict[str, Callable[[dict[str, Any]], Training]] = {"ours": ours, "torchtune": torchtune, "Trainer": trainer}
NEEDS = {"ours": (), "torchtune": (), "Trainer": ("transformers", "accelerate")}


class TokenIds(torch.utils.data.Dataset):
    """Rows of ``tokens`` and ``labels``, with the same ids where supervised; both libraries shift labels themselves.

    torchtune passes its tokenizer as the first argument.
    """

    def __init__(self, tokenizer: object = None, *, path: str) -> None:
        self.rows = json.loads(Path(path).read_text())

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return dict(self.rows[index])


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
    if missing := [package for package in NEEDS[name] if importlib.util.find_spec(package) is None]:
        reason = f"no {' and no '.join(missing)} in {sys.executable}"
        Path(answer_path).write_text(json.dumps({"skipped": reason}))
        return
    from common import memory

    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    if name == "Trainer":
        import transformers.trainer  # noqa: F401 (memory is counted from here)
    else:
        import torchtune.training  # noqa: F401
    empty, _ = memory()
    embedding, train, losses = CONTENDERS[name](settings)
    positions = 0

    def count(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        nonlocal positions
        positions += arguments[0].numel()

    train()
    embedding.register_forward_pre_hook(count)
    started = time.perf_counter()
    train()
    answer = {"seconds": time.perf_counter() - started, "positions": positions, "first_loss": losses[0]}
    peak = memory()[1]
    Path(answer_path).write_text(json.dumps({**answer, "peak_mib": peak, "growth_mib": peak - empty}))


if __name__ == "__main__":
    main(*sys.argv[1:])
