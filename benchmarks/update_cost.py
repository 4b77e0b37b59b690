"""What one mixture update costs, in training steps on the same tokens, for few tasks and for many.

    python benchmarks/update_cost.py [--model FOLDER] [--data FOLDER] [--tasks 2,5,20,50,200]

The same examples are dealt out to 2, 5, ... tasks, so that an update reads the same tokens whatever their number: each
time ``--examples`` of validation and, for gradient dots, as many of training. For each number of tasks the shipped
recipe is set up, and its own ``step`` and ``update_mixture`` are timed one after the other, all in turns:

- adapt: the one-step form: validation losses, the gradient of the objective, dot products with it by finite difference;
- adapt_planned: validation losses alone.

A cost is the shortest time of an update over that of a training step (forward, backward, clipping, AdamW; one for all
numbers of tasks), per token: nothing but other work on the machine makes one round longer than another. Flatness is the
largest over the smallest cost. Trust these ratios, not the seconds.
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

from adapt_recipes import mixture
from adapt_recipes.config import load

MIXTURES = {"adapt": mixture.Adapt, "adapt_planned": mixture.AdaptPlanned}
CHAT_TEMPLATE_TOKENS = 128  # a token is at least a byte; this much is left for what the template adds


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the command line ``argv``. Returns the numbers that ``--json`` writes."""
    parser = common.parser(__doc__, max_seq_len=256)
    parser.add_argument("--tasks", default="2,5,20,50,200", help="numbers of tasks, which divide the examples")
    parser.add_argument("--examples", type=int, default=200, help="of all tasks together, that an update measures on")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        numbers = measure(arguments, Path(folder))
    rows = [(count, *of.values()) for count, of in numbers["cost_in_steps"].items()]
    title = "one update in steps on {tokens} tokens ({examples} examples)".format(**numbers)
    common.show(title, ("tasks", *MIXTURES), [*rows, ("max / min", *map(float, numbers["flatness"].values()))])
    return common.write(arguments.json, numbers)


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The cost for each number of tasks and each mixture."""
    torch.set_num_threads(arguments.threads)
    counts = [int(count) for count in arguments.tasks.split(",")]
    sources = common.sources(arguments, folder)
    recipes = {count: set_up(arguments, sources, count) for count in counts}
    first = recipes[counts[0]]
    for recipe in recipes.values():  # one model and one optimizer for all
        recipe.model, recipe.optimizer = first.model, first.optimizer
    mixtures = {count: {name: build(kind, recipes[count]) for name, kind in MIXTURES.items()} for count in counts}
    first.step()  # AdamW makes its state

    tokens = sum(batch.num_tokens for batch in first.probe_validation)
    seconds: dict[int, dict[str, list[float]]] = {count: {name: [] for name in MIXTURES} for count in counts}
    step_seconds = []  # on as many tokens as an update reads
    for _ in range(arguments.rounds):
        for count, recipe in recipes.items():
            assert sum(batch.num_tokens for batch in recipe.probe_validation) == tokens
            before = recipe.ledger.tokens
            step_seconds.append(timed(recipe.step) / (recipe.ledger.tokens - before) * tokens)
            for name, learned in mixtures[count].items():
                recipe.mixture = learned
                seconds[count][name].append(timed(recipe.update_mixture))
    for recipe in recipes.values():
        recipe.cleanup()
    costs = {count: {name: min(of[name]) / min(step_seconds) for name in MIXTURES} for count, of in seconds.items()}
    by_mixture = {name: [of[name] for of in costs.values()] for name in MIXTURES}
    flatness = {name: max(values) / min(values) for name, values in by_mixture.items()}
    return {
        "examples": arguments.examples,
        "tokens": tokens,
        "cost_in_steps": costs,
        "flatness": flatness,
        "seconds": seconds,
        "step_seconds": step_seconds,
    }


def set_up(arguments: argparse.Namespace, sources: Sequence[str], num_tasks: int) -> Any:
    """The shipped recipe with its shipped settings, on the examples dealt out to ``num_tasks`` tasks."""
    module = common.load_module("adapt_full_finetune", common.ROOT / "recipes" / "adapt_full_finetune.py")
    overrides = [
        *sources,
        "tasks=common.equal_tasks",
        "~tasks.types",
        f"tasks.num_tasks={num_tasks}",
        f"tasks.num_examples={arguments.examples}",
        f"tasks.max_bytes={arguments.max_seq_len - CHAT_TEMPLATE_TOKENS}",
        f"probe.examples={arguments.examples // num_tasks}",
        f"batch_size={arguments.examples}",
        "budget.tokens=1000000000",
        "budget.allow_repeats=true",
        "log_every=0",
    ]
    overrides = [f"{o}_{num_tasks}" if o.startswith("output_dir=") else o for o in overrides]
    recipe = module.AdaptFullFinetune(load(module.Config, common.CONFIGS / "smollm2_135m_adapt_10pct.yaml", overrides))
    with contextlib.redirect_stdout(io.StringIO()):
        recipe.setup()
    recipe.display.close()
    recipe.display.mixture = recipe.display.step = lambda *_, **__: None
    recipe.clock = time.perf_counter()
    return recipe


def build(kind: Callable[..., Any], recipe: Any) -> Any:
    """A mixture of the recipe's tasks, with its default settings."""
    available = torch.stack([task.train.num_supervised.sum() for task in recipe.tasks])
    budget = recipe.ledger.budget_tokens
    return kind(task_names=recipe.task_names, num_supervised_tokens=available, budget_tokens=budget)


def timed(run: Callable[[], object]) -> float:
    """Seconds that ``run`` takes."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
