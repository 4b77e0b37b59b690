"""Memory of each model of the grid on each of N GPUs, and on which GPUs of 24, 40 and 80 GB it trains.

    python benchmarks/memory.py [--models gemma3_1b,...] [--processes 1,2,4,8]

Estimated, not measured: ``adapt_recipes.planning`` runs a training step of the shipped config on fake tensors. Prints
the table of docs/scaling.md. All six models take about ten minutes.

Activations are those of a full micro-batch in which one token in eight is supervised. A model fits on a GPU of G GB if
its estimate is at most 0.9 G; the rest is for CUDA, nccl, kernels and memory that the allocator leaves unused.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import NamedTuple

import common
from omegaconf import OmegaConf

from adapt_recipes import models
from adapt_recipes.config import load
from adapt_recipes.planning.memory import CPU, Memory, Shape, estimate_memory
from adapt_recipes.planning.update import update_of

# A shipped config of each model.
MODELS = {
    "gemma3_1b": "gemma3_1b_adapt_1pct",
    "llama3_2_1b": "llama3_2_1b_adapt_1pct",
    "qwen3_0_6b": "qwen3_0_6b_adapt_1pct",
    "qwen1_5_0_5b": "qwen1_5_0_5b_multidds_3ep",
    "gemma_2b": "gemma_2b_multidds_3ep",
    "llama3_8b": "llama3_8b_multidds_3ep",
}
GPUS = (24, 40, 80)
CHECKPOINTING = ["activation_checkpointing=true"]
SMALLER = [*CHECKPOINTING, "micro_batch_tokens=1024"]
ADAPTED = ["q_proj", "v_proj"]
SHARE_FOR_US, TOKENS_PER_SUPERVISED = 0.9, 8
# ADAPT's update, with the recipe's default settings of `probe`.
OBSERVES = ("validation_losses", "gradient_dots")


class Probe(NamedTuple):
    """The defaults of ``adapt_full_finetune``, also for models whose configs are for another recipe."""

    estimator: str = "finite_difference"
    exact_lookahead: bool = False
    separate_batches: bool = True


def main(argv: Sequence[str] | None = None) -> list[str]:
    """Runs the command line ``argv``. Returns the lines that it prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--processes", default="1,2,4,8")
    arguments = parser.parse_args(argv)
    parts = ("parameters", "gradients", "optimizer", "activations", "ADAPT adds", "sum")
    columns = ("model", "GPUs", *parts, *(f"{size} GB" for size in GPUS))
    lines = [f"| {' | '.join(columns)} |", f"|---{'|---:' * (len(columns) - 1)}|"]
    print(*lines, sep="\n")
    for model in arguments.models.split(","):
        for num_processes in map(int, arguments.processes.split(",")):
            lines.append(row(model, num_processes))
            print(lines[-1], flush=True)
    return lines


def row(model: str, num_processes: int) -> str:
    """A row of the table; of two numbers in a cell the second is with activation checkpointing."""
    config = MODELS[model]
    shipped, checkpointed = (estimated(config, num_processes, switch) for switch in ([], CHECKPOINTING))
    cells = [f"{value / 1e9:.1f}" for value in (shipped.parameters, shipped.gradients, shipped.optimizer)]
    for name in ("activations", "mixture", "total"):
        cells.append(" / ".join(f"{getattr(memory, name) / 1e9:.1f}" for memory in (shipped, checkpointed)))
    decoder = OmegaConf.to_container(OmegaConf.load(common.CONFIGS / f"{config}.yaml").model)
    adapted = {"_component_": "adapt_recipes.models.with_lora", "decoder": decoder, "lora_attn_modules": ADAPTED}
    with_lora = [f"model={json.dumps(adapted)}", *CHECKPOINTING]
    totals = {"yes": shipped.total, "C": checkpointed.total}
    for size in GPUS:
        for answer, switches in (("S", SMALLER), ("L", with_lora)):
            if answer not in totals and min(totals.values()) > SHARE_FOR_US * size * 1e9:
                totals[answer] = estimated(config, num_processes, switches).total
        fitting = [answer for answer, total in totals.items() if total <= SHARE_FOR_US * size * 1e9]
        cells.append(fitting[0] if fitting else "no")
    return f"| `{model}` | {num_processes} | {' | '.join(cells)} |"


def estimated(config_name: str, num_processes: int, overrides: Sequence[str]) -> Memory:
    """The estimate for a shipped config with overrides."""
    path = common.CONFIGS / f"{config_name}.yaml"
    module = common.load_recipe(path)
    config = load(module.Config, path, overrides)
    rows, length = config.micro_batch_tokens // config.max_seq_len, config.max_seq_len
    shape = Shape(rows * length, length, rows * length // TOKENS_PER_SUPERVISED)
    update = update_of(OBSERVES, Probe())
    model = models.build(config, [], device=CPU, checkpointer=None)
    memory, _ = estimate_memory(model, config, shape, update=update, num_processes=num_processes)
    return memory


if __name__ == "__main__":
    main()
