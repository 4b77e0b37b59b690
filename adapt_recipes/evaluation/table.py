"""The scores of a suite as a table: tasks by family, a column for each model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table

from adapt_recipes.evaluation.records import Score, read_evaluation


def measured(scores: Mapping[str, Score]) -> dict[str, Score]:
    """The scores that stand in tables and means: those with a metric, without the parts of a group."""
    return {task: score for task, score in scores.items() if score.group is None and score.metric is not None}


def family_means(scores: Mapping[str, Score], metric: str | None = None) -> dict[str, float]:
    """The unweighted mean over the tasks of each family, in the order of the first task of each.

    Args:
        scores: by task.
        metric: of which; None: that of each task. A family with a task that does not have it is left out.
    """
    by_family: dict[str, list[float]] = {}
    for score in measured(scores).values():
        by_family.setdefault(score.family, []).append(score.values.get(metric or str(score.metric), math.nan))
    means = {family: sum(values) / len(values) for family, values in by_family.items()}
    return {family: mean for family, mean in means.items() if metric is None or not math.isnan(mean)}


def overall_mean(scores: Mapping[str, Score]) -> float | None:
    """The unweighted mean over all tasks; None: there is none."""
    values = [score.values[score.metric] for score in measured(scores).values() if score.metric is not None]
    return sum(values) / len(values) if values else None


def score_table(suite: str, folders: Sequence[Path]) -> Table:
    """What has been measured of a suite, with standard errors; the means are unweighted."""
    found = [read_evaluation(folder) for folder in folders]
    of_each = [each.suites[suite].scores if each and suite in each.suites else {} for each in found]
    table = Table("task", "metric", *map(str, folders), title=suite, title_justify="left")
    families = list(dict.fromkeys(score.family for scores in of_each for score in measured(scores).values()))
    for family in families:
        tasks = {
            task: score for scores in of_each for task, score in measured(scores).items() if score.family == family
        }
        for task, score in tasks.items():
            table.add_row(task, score.metric, *(_cell(measured(scores).get(task)) for scores in of_each))
        if len(tasks) > 1:
            table.add_row(f"mean of {family}", "", *(_number(family_means(scores).get(family)) for scores in of_each))
        # The better signal where few answers are right.
        bits = [family_means(scores, "bits_per_byte").get(family) for scores in of_each]
        if any(value is not None for value in bits):
            table.add_row("  lower is better", "bits_per_byte", *map(_number, bits))
        table.add_section()
    if len(families) > 1:
        table.add_row("mean over tasks", "", *(_number(overall_mean(scores)) for scores in of_each))
    return table


def _cell(score: Score | None) -> str:
    if score is None or score.metric is None:
        return "–"
    error = score.stderrs.get(score.metric)
    return _number(score.values[score.metric]) + (f" ± {error:.3f}" if error is not None else "")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
