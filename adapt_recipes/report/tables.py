"""The numbers of a report: groups of runs that differ only in seed, means, ranges, tokens to reach a loss, winners."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from adapt_recipes.report.read import Array, Run, mean_over_tasks, worst_over_tasks

# Keys in which runs of a group may differ besides the seed.
NOT_COMPARED = (
    "output_dir",
    "resume",
    "change_budget",
    "versions",
    "metric_logger",
    "log_every",
    "checkpoint_every",
    "keep_checkpoints",
    "async_checkpointing",
)

COUNTERS = {
    "budget_tokens": "supervised tokens the run may spend",
    "supervised_tokens": "labels that counted in the loss of training steps",
    "unique_supervised_tokens": "those of examples seen for the first time",
    "total_tokens": "tokens read in training steps, by mixture updates, validations and test, excluding padding",
    "tokens": "tokens read in training steps, including prompts, excluding padding",
    "computed_tokens": "those that were computed: beginnings that examples share are computed once",
    "probe_tokens": "supervised tokens read by mixture updates in addition",
    "probe_total_tokens": "tokens read by mixture updates in addition, excluding padding",
    "validation_tokens": "supervised tokens read by validations and test in addition",
    "validation_total_tokens": "tokens read by validations and test in addition, excluding padding",
    "steps": "optimizer steps",
    "mixture_updates": "updates of the probabilities",
    "seconds": "wall-clock time, excluding down time",
    "mixture_seconds": "time of mixture updates",
    "validation_seconds": "time of validations and test",
}


@dataclass(frozen=True)
class Group:
    """Runs that differ only in seed; either all or none of them are finished."""

    name: str
    runs: tuple[Run, ...]

    @property
    def is_finished(self) -> bool:
        return bool(self.runs[0].summary)

    @property
    def split(self) -> str:
        """The split by which the runs are compared, the same in all groups: test or validation."""
        return self.runs[0].split

    @property
    def seeds(self) -> str:
        return ", ".join(str(run.seed) for run in self.runs if run.seed is not None)


class Spread(NamedTuple):
    """Mean and range of a number over runs; NaN if a run does not have it."""

    mean: float
    low: float
    high: float


def spread(values: Iterable[float]) -> Spread:
    """Mean, lowest and highest, exact if all are equal; NaN if one is NaN."""
    numbers = sorted(values)
    if any(math.isnan(number) for number in numbers):
        return Spread(math.nan, math.nan, math.nan)
    low, high = numbers[0], numbers[-1]
    return Spread(low if low == high else math.fsum(numbers) / len(numbers), low, high)


def on_shared_tasks(runs: Sequence[Run]) -> tuple[list[Run], list[str]]:
    """The runs restricted to the tasks that all of them have, and a note if tasks are left out.

    Raises:
        ValueError: they share no task.
    """
    shared = [task for task in runs[0].tasks if all(task in run.tasks for run in runs)]
    left_out = sorted({task for run in runs for task in run.tasks} - set(shared))
    if not shared:
        other = next(run for run in runs if not set(run.tasks) & set(runs[0].tasks))
        raise ValueError(f"{runs[0].folder} and {other.folder} have no task in common, there is nothing to compare")
    if not left_out:
        return [run.only(shared) for run in runs], []
    named = ", ".join(left_out[:5]) + (f" and {len(left_out) - 5} more" if len(left_out) > 5 else "")
    note = f"The runs are over different tasks. They are compared on the {len(shared)} they share; left out: "
    note += f"{named}. Totals of tokens and time still include the tasks left out."
    return [run.only(shared) for run in runs], [note]


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Groups runs that differ only in seed; the lowest worst loss first, groups that are not finished last.

    A group is named by its strategy, and by the settings in which it differs from others of the same strategy.
    """
    by_settings: dict[str, list[Run]] = {}
    for run in runs:
        key = json.dumps([bool(run.summary), run.strategy, dict(_settings(run.config))], sort_keys=True, default=str)
        by_settings.setdefault(key, []).append(run)
    grouped = [sorted(members, key=lambda run: run.seed or 0) for members in by_settings.values()]
    groups = [Group(name, tuple(members)) for name, members in zip(_names(grouped), grouped, strict=True)]
    return sorted(groups, key=lambda group: (not group.is_finished, _nan_last(final_worst(group).mean)))


def _settings(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of a config, without seeds and ``NOT_COMPARED``."""
    for key, value in config.items():
        if key == "seed" or (not prefix and key in NOT_COMPARED):
            continue
        if isinstance(value, dict):
            yield from _settings(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _names(grouped: Sequence[Sequence[Run]]) -> list[str]:
    names: list[str] = []
    for members in grouped:
        first = members[0]
        alike = [dict(_settings(others[0].config)) for others in grouped if others[0].strategy == first.strategy]
        keys = [key for key in _union(alike) if len({str(settings.get(key)) for settings in alike}) > 1]
        mine = dict(_settings(first.config))
        words = [first.strategy, *(f"{key}={mine.get(key)}" for key in keys[:3])]
        names.append(", ".join(words if first.summary else [*words, "unfinished"]))
    return [
        name if names.count(name) == 1 else f"{name} ({names[: i + 1].count(name)})" for i, name in enumerate(names)
    ]


def _union(mappings: Iterable[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))


def differing_settings(groups: Sequence[Group]) -> dict[str, list[Any]]:
    """For every config key in which groups differ, the value of each group; None if it has no such key."""
    settings = [dict(_settings(group.runs[0].config)) for group in groups]
    values = {key: [one.get(key) for one in settings] for key in _union(settings)}
    return {key: row for key, row in values.items() if len({str(value) for value in row}) > 1}


# ---- losses


def final_worst(group: Group) -> Spread:
    """The worst loss over tasks at the end of each run, on the split by which the runs are compared."""
    return spread(float(worst_over_tasks(run.result_losses)) for run in group.runs)


def final_mean(group: Group) -> Spread:
    """The mean loss over tasks at the end of each run, on the split by which the runs are compared."""
    return spread(float(mean_over_tasks(run.result_losses)) for run in group.runs)


def final_mean_in(group: Group, unit: str) -> Spread:
    """The same mean in one of ``read.UNITS``; NaN if a run does not say."""
    return spread(float(mean_over_tasks(run.results_in(unit))) for run in group.runs)


def final_targets(group: Group) -> tuple[Spread, Spread]:
    """The worst and the mean loss over targets at the end, on the same split; NaN if there are none."""
    losses = [run.result_target_losses for run in group.runs]
    if not all(each.size for each in losses):
        return spread([math.nan]), spread([math.nan])
    return spread(float(worst_over_tasks(each)) for each in losses), spread(
        float(mean_over_tasks(each)) for each in losses
    )


def _last(values: Array) -> float:
    return float(values[-1]) if len(values) else math.nan


def tokens_to_reach(run: Run, worst: float) -> float:
    """Supervised tokens at the first validation whose worst loss is at most ``worst``; NaN: never.

    The last validation counts even if the log is truncated before it.
    """
    reached = np.flatnonzero(run.worst <= worst)
    if len(reached):
        return float(run.validations.supervised_tokens[reached[0]])
    return float(run.spent) if worst_over_tasks(run.final_losses) <= worst else math.nan


def all_tokens_to_reach(group: Group, target: Group) -> list[float]:
    """Supervised tokens after which the runs of a group reach the final worst validation loss of those of another.

    Runs with the same seed are compared; if no seed is in both groups, all pairs are.
    """
    pairs = [(run, other) for run in group.runs for other in target.runs]
    same = [(run, other) for run, other in pairs if run.seed is not None and run.seed == other.seed]
    return [tokens_to_reach(run, float(worst_over_tasks(other.final_losses))) for run, other in same or pairs]


class TaskResult(NamedTuple):
    """The losses of one task."""

    task: str
    losses: list[Spread]
    """final, of each group"""
    winner: int | None
    """the group with the lowest mean; None if nothing was measured, two are equal, or there is no other group"""
    is_clear: bool
    """whether the worst seed of the winner is below the best seed of every other group, and all have several seeds"""


def task_results(groups: Sequence[Group]) -> list[TaskResult]:
    """The final losses of each task, and the winner among finished groups if there are at least two."""
    results = []
    for i, task in enumerate(groups[0].runs[0].tasks):
        losses = [spread(float(run.result_losses[i]) for run in group.runs) for group in groups]
        ranked = sorted(
            (j for j, group in enumerate(groups) if group.is_finished), key=lambda j: _nan_last(losses[j].mean)
        )
        best = ranked[0] if len(ranked) > 1 else None
        others = [losses[j] for j in ranked[1:]]
        if best is None or math.isnan(losses[best].mean) or any(losses[best].mean == other.mean for other in others):
            results.append(TaskResult(task, losses, None, False))
            continue
        is_clear = all(len(groups[j].runs) > 1 for j in ranked) and all(
            math.isnan(other.low) or losses[best].high < other.low for other in others
        )
        results.append(TaskResult(task, losses, best, is_clear))
    return results


def _nan_last(value: float) -> float:
    return math.inf if math.isnan(value) else value


# ---- costs


def counters(run: Run) -> dict[str, float]:
    """``COUNTERS`` of a run from its summary; for an unfinished run from its log, and NaN if it is not there."""
    if run.summary:
        return {key: float(run.summary.get(key, math.nan)) for key in COUNTERS}
    steps, mixtures = run.steps, run.mixtures
    known = {key: _last(getattr(steps, key)) for key in ("supervised_tokens", "tokens", "computed_tokens", "seconds")}
    known |= {key: _last(getattr(mixtures, key)) for key in ("probe_tokens", "mixture_seconds")}
    known |= {"steps": _last(steps.step), "mixture_updates": float(run.num_updates)}
    if run.budget:
        known["budget_tokens"] = float(run.budget)
    return {key: known.get(key, math.nan) for key in COUNTERS}
