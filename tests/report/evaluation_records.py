"""Folders with scores and answers as mixture_eval writes them, without a model: the same writer, given values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adapt_recipes.evaluation import records
from adapt_recipes.evaluation.records import Sample, Score
from adapt_recipes.report.evaluation import Measured, read_measured


def write_task(
    folder: Path,
    task: str,
    values: Mapping[str, float] | Sequence[tuple[str, float | None]],
    *,
    suite: str = "suite",
    metric: str | None = "acc",
    higher_is_better: bool = True,
    value: float | None = None,
    family: str = "family",
    group: str | None = None,
    others: Mapping[str, float] | None = None,
    settings: Mapping[str, Any] | None = None,
    prompt: str = "prompt of {id}",
    answer: str = "answer to {id}",
    **fields: Any,
) -> Path:
    """Write a task.

    Args:
        values: the metric of each example by its id; None: an example does not have it.
        value: of the score; None: the mean of ``values``.
        others: of the score and of every example.
        prompt, answer: of each example.
        fields: of the score.
    """
    pairs = [*values.items()] if isinstance(values, Mapping) else [*values]
    others = dict(others or {})
    samples = [
        Sample(
            id=name,
            prompt=prompt.format(id=name),
            references=[f"reference of {name}"],
            answer=answer.format(id=name),
            values=others | ({} if number is None or metric is None else {metric: number}),
        )
        for name, number in pairs
    ]
    numbers = [number for _, number in pairs if number is not None]
    of_metric = {} if metric is None else {metric: float(np.mean(numbers)) if value is None else value}
    errors = (
        {} if metric is None or len(numbers) < 2 else {metric: float(np.std(numbers, ddof=1)) / len(numbers) ** 0.5}
    )
    score = Score(
        family=family,
        group=group,
        metric=metric,
        higher_is_better=dict.fromkeys(others, False) | dict.fromkeys(of_metric, higher_is_better),
        values=others | of_metric,
        stderrs=errors,
        **{"num_examples": len(samples), "data": "hub", "seconds": 1.5, "versions": {}} | fields,
    )
    records.add(folder, suite, task, score, samples, "model", "weights", settings or {"limit": None})
    return folder


def write_group(folder: Path, name: str, parts: Sequence[str], *, suite: str = "suite", family: str = "family") -> None:
    """The score of a group over all examples of its parts, as lm-eval has it."""
    scores = [records.scores_of(folder, suite)[part] for part in parts]
    total = sum(score.num_examples for score in scores)
    mean = math.fsum(score.values["acc"] * score.num_examples for score in scores) / total
    whole = Score(
        family=family,
        metric="acc",
        higher_is_better={"acc": True},
        values={"acc": mean},
        stderrs={},
        num_examples=total,
        data=f"{len(parts)} of {len(parts)} parts",
        seconds=1.0,
        versions={},
    )
    records.add_group(folder, suite, name, whole)


def read(folder: Path, suite: str = "suite") -> Measured:
    return read_measured(folder.name, folder, suite)


def numbered(values: Sequence[float]) -> dict[str, float]:
    """Ids for values."""
    return {f"{i:04}": float(value) for i, value in enumerate(values)}
