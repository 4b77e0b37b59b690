"""``tune plan --pilot``: two short runs, from which the losses under several mixtures are predicted (ours).

The tasks are trained with uniform shares for a third and for two thirds of the pilot's tokens. Each run has its whole
learning rate schedule, because losses before the learning rate has decayed are too high. Learning curves are fitted to
the two losses that each task ends with (``adapt_recipes.mixture.curves``; what a task learns from the tokens of others
counts as if learned from its own). As two losses do not say how a curve goes on, worlds are drawn: in each, every task
has one curve, drawn by how well it fits. There every mixture spends the budget, those that learn by learning.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table
from torch import Tensor

from adapt_recipes import mixture
from adapt_recipes.config import TrainConfig
from adapt_recipes.files import atomic_file, remove_folder
from adapt_recipes.mixture.curves import Curves, asymptote_prior, fit
from adapt_recipes.mixture.interface import Mixture
from adapt_recipes.planning.plan import Plan
from adapt_recipes.run_directory import ADAPTER, CHECKPOINTS, MODEL, SUMMARY
from adapt_recipes.strict import to_dict

# Shares of the pilot's tokens.
PARTS = (1 / 3, 2 / 3)
# Worlds, mixture updates in each, the ends of the interval, and the weight of the worst task in the recommendation.
WORLDS, UPDATES, INTERVAL, RISK = 20, 12, (0.1, 0.9), 0.5


@dataclass(frozen=True)
class Prediction:
    """Of a mixture; each a mean over worlds with the ends of an 80 % interval, nats per supervised token.

    Attributes:
        mean: of the tasks' losses at the end of the budget.
        worst: the highest of them.
        task_tokens: the mean supervised tokens spent on each task.
    """

    mean: tuple[float, float, float]
    worst: tuple[float, float, float]
    task_tokens: dict[str, float]


@dataclass(frozen=True)
class Pilot:
    """What the short runs say.

    Attributes:
        folder: of the short runs.
        tokens: supervised tokens of each.
        predictions: by the name of the mixture in ``adapt_recipes.mixture``.
        best: the mixture with the lowest (1 - 0.5) mean + 0.5 worst.
    """

    folder: str
    tokens: list[int]
    predictions: dict[str, Prediction]
    best: str

    def to_dict(self) -> dict[str, Any]:
        """What ``tune plan --json`` prints as ``pilot``."""
        return asdict(self)


def run_pilot(config: TrainConfig, share: float, plan: Plan, *, num_processes: int) -> Pilot:
    """Runs the pilot, or reads what is there of it, and predicts.

    Args:
        config: of the run to plan. The pilot has its model, data and optimizer, and lies beside its ``output_dir``.
        share: of the budget that the pilot spends, 0 < share <= 1.
        plan: of the run to plan.
        num_processes: of each run.

    Raises:
        ValueError: the tasks have no validation split, the pilot would be too short, its folder has another one, or a
            run failed; one line.
    """
    folder = Path(f"{config.output_dir.rstrip('/')}_pilot")
    available = [task.supervised_tokens for task in plan.tasks.values()]
    tokens = [round(plan.budget_tokens * share * part) for part in PARTS]
    if tokens[0] < len(available):
        raise ValueError(f"--pilot: {tokens[0]} supervised tokens are too few for {len(available)} tasks")
    summaries = []
    for count in tokens:
        summaries.append(_run(config, folder / f"tokens_{count}", count, num_processes))
        losses = summaries[-1]["validation_losses"] or {}
        if missing := [name for name in summaries[-1]["task_tokens"] if losses.get(name) is None]:
            raise ValueError(f"--pilot: the task {missing[0]} has no validation split (tasks.validation_examples)")
    names = list(summaries[0]["task_tokens"])
    spent, ends = (
        torch.tensor([[summary[key][name] for name in names] for summary in summaries])
        for key in ("task_tokens", "validation_losses")
    )
    curves = fit_ends(spent, ends, plan.budget_tokens)
    arguments = {"task_names": names, "num_supervised_tokens": available, "budget_tokens": plan.budget_tokens}
    predictions = predict(curves, arguments, seed=config.seed)
    best = min(predictions, key=lambda name: _objective(predictions[name]))
    return Pilot(str(folder), tokens, predictions, best)


def fit_ends(
    task_tokens: Tensor,  # (num_runs, num_tasks)
    losses: Tensor,  # (num_runs, num_tasks) nats, that the runs ended with
    budget_tokens: int,
) -> Curves:
    """Learning curves through the ends of runs."""
    x, y = task_tokens.double() * losses.shape[1] / budget_tokens, losses.double()
    # Early losses are far above what they will end at.
    return fit(x, y, torch.ones_like(y), y, y.min(0).values, asymptote_prior(4))


def predict(curves: Curves, arguments: dict[str, Any], *, seed: int) -> dict[str, Prediction]:
    """The mean and the worst loss under each mixture, in worlds that are drawn from the curves.

    Args:
        curves: of all tasks.
        arguments: those that every mixture is built with.
        seed: of the worlds.
    """
    generator = torch.Generator().manual_seed(seed)
    names, budget = arguments["task_names"], arguments["budget_tokens"]
    ends: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in _mixtures(arguments)}
    for _ in range(WORLDS):
        world = curves.draw(generator)
        for name, built in _mixtures(arguments).items():
            ends[name].append(spend(built, world, budget))
    predictions = {}
    for name, of_worlds in ends.items():
        tokens, losses = (torch.stack(each) for each in zip(*of_worlds, strict=True))
        spent = dict(zip(names, tokens.mean(0).tolist(), strict=True))
        predictions[name] = Prediction(_interval(losses.mean(1)), _interval(losses.max(1).values), spent)
    return predictions


def spend(built: Mixture, curves: Curves, budget_tokens: int) -> tuple[Tensor, Tensor]:
    """Spends the budget where the losses follow the curves: the tokens and the loss of each task, (num_tasks,) each."""
    tokens = torch.zeros_like(built.probabilities())
    fair = budget_tokens / len(tokens)
    for _ in range(UPDATES):
        tokens = tokens + built.probabilities() * budget_tokens / UPDATES
        if built.observes:
            built.update(task_tokens=tokens, **dict.fromkeys(built.observes, curves.mean(tokens / fair)))
    return tokens, curves.mean(tokens / fair)


def show_pilot(pilot: Pilot, *, console: Console | None = None) -> None:
    """Prints what a pilot says, on standard output by default."""
    console = console or (Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=200))
    table = Table("mixture", "mean loss (80 % interval)", "worst loss (80 % interval)", "most tokens for", box=None)
    for name, each in pilot.predictions.items():
        most = max(each.task_tokens, key=each.task_tokens.__getitem__)
        share = each.task_tokens[most] / sum(each.task_tokens.values())
        losses = [f"{center:.3f} ({low:.3f} to {high:.3f})" for center, low, high in (each.mean, each.worst)]
        table.add_row(name, *losses, f"{most} {share:.0%}")
    runs = " and ".join(f"{tokens:,}" for tokens in pilot.tokens)
    console.print(
        f"pilot: runs of {runs} supervised tokens, in {pilot.folder}; predicted for the whole budget", markup=False
    )
    console.print(table)
    console.print(f"best, mean and worst loss alike: mixture=adapt_recipes.mixture.{pilot.best}", markup=False)


def _mixtures(arguments: dict[str, Any]) -> dict[str, Mixture]:
    """The mixtures that are compared, as they are before a run."""
    return {
        "uniform": mixture.uniform(**arguments),
        "proportional": mixture.proportional(**arguments),
        "GroupDRO": mixture.GroupDRO(**arguments),
        "AdaptForecast": mixture.AdaptForecast(**arguments, losses="validation"),
    }


def _run(config: TrainConfig, folder: Path, tokens: int, num_processes: int) -> dict[str, Any]:
    """The summary of a short run, which is made unless it is there."""
    given = to_dict(config)
    changes: dict[str, Any] = {
        "recipe": None,
        "strategy": "pilot",
        "output_dir": str(folder),
        "resume": True,
        "metric_logger": None,
        "budget": {"tokens": tokens},
        "mixture": {"_component_": "adapt_recipes.mixture.uniform"},
        "checkpoint_every": 0,
        "validate_every": 0,
        "keep_best": None,
        "stop_after": 0,
    }
    shared = {field.name: given[field.name] for field in fields(TrainConfig)}
    text = yaml.safe_dump(shared | changes, sort_keys=False)
    written = folder.with_suffix(".yaml")
    if written.exists() and written.read_text(encoding="utf-8") != text:
        raise ValueError(f"--pilot: {written} is of a pilot with other settings; remove {folder.parent}, or rename it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(written) as file:
        file.write_text(text, encoding="utf-8")
    if not (folder / SUMMARY).exists():
        command = [sys.executable, "-m", "tune_cli_ext", "run"]
        command += ["--nproc_per_node", str(num_processes)] if num_processes > 1 else []
        # A run's output is progress here. 2 is stderr.
        done = subprocess.run([*command, "sft_full_finetune", "--config", str(written)], stdout=2)
        if done.returncode or not (folder / SUMMARY).exists():
            raise ValueError(f"--pilot: the run in {folder} did not finish (status {done.returncode})")
        # Only the summary is needed.
        for path in (folder / CHECKPOINTS, folder / MODEL, folder / ADAPTER):
            if path.exists():
                remove_folder(path)
    return json.loads((folder / SUMMARY).read_text(encoding="utf-8"))


def _interval(values: Tensor) -> tuple[float, float, float]:
    low, high = values.quantile(torch.tensor(INTERVAL, dtype=values.dtype)).tolist()
    return float(values.mean()), low, high


def _objective(prediction: Prediction) -> float:
    return (1 - RISK) * prediction.mean[0] + RISK * prediction.worst[0]
