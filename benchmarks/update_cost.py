"""The cost of one mixture update, in training steps on the same tokens, for few tasks and for many.

    python benchmarks/update_cost.py [--model FOLDER] [--data FOLDER] [--tasks 2,5,20,50,200] [--strategies ...]

The same examples are distributed to 2, 5, ... tasks, so that an update always reads the same tokens: ``--examples`` of
validation, of training, or of both. For each number of tasks and each strategy the shipped recipe is set up with the
shipped config, and its ``step`` and ``update_mixture`` are timed in turn. Passes over the examples, where a forward
pass counts 1, a backward pass 2 and a step 3:

- adapt: 6: validation losses, their gradient, and dot products with it by finite differences;
- adapt_planned, dro: 1: validation losses; mos_cossim, multiuat: 1; mos_diff: 2: losses, and those of the base model;
- hbo: 3: one gradient per example; multidds: 6: one gradient per task on validation and one on training examples.

An update of forward passes only should cost at most 1.3 times a third of a step. ``share`` is the share of training
time of updates that read batches of 5 tasks, each of the size of a step's batch, every 100 steps: the setting of MoS
(arXiv 2406.08811).

A cost is the shortest time of an update divided by the shortest time of a training step (forward, backward, clipping,
AdamW; the same for all numbers of tasks), per token, because only other load on the machine makes one round longer than
another. Flatness is the largest cost divided by the smallest. These ratios are reliable, the seconds are not.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import common
import torch

from adapt_recipes.config import load
from adapt_recipes.run import Run

STRATEGIES = "adapt,adapt_planned,dro,mos_cossim,mos_diff,multiuat,hbo,multidds"
CHAT_TEMPLATE_TOKENS = 128  # a token is at least a byte; this much is left for what the template adds


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the command line ``argv``. Returns the numbers that ``--json`` writes."""
    parser = common.parser(__doc__, max_seq_len=256)
    parser.add_argument("--tasks", default="2,5,20,50,200", help="numbers of tasks, which divide the examples")
    parser.add_argument("--examples", type=int, default=200, help="of all tasks together, that an update measures on")
    parser.add_argument("--strategies", default=STRATEGIES, help="of the configs smollm2_135m_*_10pct")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args(argv)
    unread = contextlib.redirect_stdout(io.StringIO())  # what runs say
    with tempfile.TemporaryDirectory() as folder, unread, contextlib.ExitStack() as runs:
        numbers = measure(arguments, Path(folder), runs)
    costs, of = numbers["cost_in_steps"], ("flatness", "share")
    rows: list[tuple[Any, ...]] = [(count, *costs[count].values()) for count in costs]
    rows += [(name, *numbers[key].values()) for name, key in zip(("max / min", "share, %"), of, strict=True)]
    title = "one update in steps on {tokens} tokens ({examples} examples)".format(**numbers)
    common.show(title, ("tasks", *numbers["share"]), rows)
    return common.write(arguments.json, numbers)


def measure(arguments: argparse.Namespace, folder: Path, runs: contextlib.ExitStack) -> dict[str, Any]:
    """The cost for each number of tasks and each strategy, whose runs stay open in ``runs``."""
    torch.set_num_threads(arguments.threads)
    counts = [int(count) for count in arguments.tasks.split(",")]
    strategies = arguments.strategies.split(",")
    sources = common.sources(arguments, folder)
    recipes = {
        (count, strategy): set_up(arguments, sources, count, strategy, runs)
        for count in counts
        for strategy in strategies
    }
    first = recipes[counts[0], strategies[0]]
    for recipe in recipes.values():  # one model and one optimizer for all
        recipe.model = recipe.probe.model = first.model
        recipe.optimizer = first.optimizer
        if getattr(recipe, "reward", None) is not None:
            recipe.reward.model = first.model
    first.step()  # AdamW makes its state

    tokens = sum(batch.num_tokens for batch in first.probe_validation)
    seconds: dict[tuple[int, str], list[float]] = {which: [] for which in recipes}
    step_seconds = []  # on as many tokens as an update reads
    for _ in range(arguments.rounds):
        for which, recipe in recipes.items():
            assert sum(batch.num_tokens for batch in recipe.probe_validation) == tokens
            before = recipe.ledger.tokens
            step_seconds.append(timed(recipe.step) / (recipe.ledger.tokens - before) * tokens)
            seconds[which].append(timed(recipe.update_mixture))
    step = min(step_seconds)
    costs = {count: {name: min(seconds[count, name]) / step for name in strategies} for count in counts}
    by_strategy = {name: [costs[count][name] for count in counts] for name in strategies}
    return {
        "examples": arguments.examples,
        "tokens": tokens,
        "cost_in_steps": costs,
        "flatness": {name: max(values) / min(values) for name, values in by_strategy.items()},
        "share": {name: 100 * 5 * max(values) / (100 + 5 * max(values)) for name, values in by_strategy.items()},
        "seconds": {f"{name}, {count} tasks": taken for (count, name), taken in seconds.items()},
        "step_seconds": step_seconds,
    }


def set_up(
    arguments: argparse.Namespace, sources: Sequence[str], num_tasks: int, strategy: str, runs: contextlib.ExitStack
) -> Any:
    """The shipped recipe with a shipped config, on the examples split into ``num_tasks`` tasks."""
    path = common.CONFIGS / f"smollm2_135m_{strategy}_10pct.yaml"
    module = common.load_recipe(path)
    overrides = [
        *sources,
        "tasks=common.equal_tasks",
        "~tasks.types",
        f"tasks.num_tasks={num_tasks}",
        f"tasks.num_examples={arguments.examples}",
        f"tasks.max_bytes={arguments.max_seq_len - CHAT_TEMPLATE_TOKENS}",
        f"probe.examples={arguments.examples // num_tasks}",
        f"batch_size={arguments.examples}",
        "budget.epochs=1000000",
        "log_every=0",
    ]
    overrides = [f"{o}_{num_tasks}_{strategy}" if o.startswith("output_dir=") else o for o in overrides]
    config = load(module.Config, path, overrides)
    recipe = module.Recipe(config, runs.enter_context(Run(config)))
    recipe.setup()
    if hasattr(recipe, "measure_base_model"):
        recipe.measure_base_model()
    return recipe


def timed(run: Callable[[], object]) -> float:
    """Seconds that ``run`` takes."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
