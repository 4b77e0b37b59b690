"""Results on a whole split, by task and in every unit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from adapt_recipes.data import Task
from adapt_recipes.events import ByTask
from adapt_recipes.signals.passes import Scores

Split = Literal["validation", "test"]


def by_unit(scores: Scores, tasks: Sequence[Task], split: Split) -> dict[str, ByTask]:
    """``losses``, ``exact_match`` and ``bits_per_byte`` of every task.

    Args:
        scores: of these tasks.
        tasks: in the order of the scores.
        split: that was measured.
    """
    names = [task.name for task in tasks]
    units = {
        "losses": scores.losses,
        "exact_match": scores.exact_match,
        "bits_per_byte": _bits_per_byte(scores.losses, tasks, split),
    }
    return {unit: dict(zip(names, values.tolist(), strict=True)) for unit, values in units.items()}


def summarized(name: str, units: Mapping[str, ByTask]) -> dict[str, Any]:
    """The keys of ``summary.json`` about a whole split, with their means and the worst loss over tasks, unweighted.

    Args:
        name: what they are called by: ``validation``, ``test``, ``target`` or ``target_test``.
        units: of ``by_unit``.
    """
    keys: dict[str, Any] = {}
    for unit, by_task in units.items():
        known = [value for value in by_task.values() if not math.isnan(value)]
        mean = sum(known) / len(known) if known else math.nan
        keys |= {f"{name}_{unit}": by_task, f"mean_{name}_{'loss' if unit == 'losses' else unit}": mean}
        if unit == "losses":
            keys[f"worst_{name}_loss"] = max(known, default=math.nan)
    return keys


def _bits_per_byte(losses: Tensor, tasks: Sequence[Task], split: Split) -> Tensor:
    """(num_tasks,) float64: losses of a whole split in bits per byte of its answers; NaN where not known."""
    splits = [getattr(task, split) for task in tasks]
    tokens_per_byte = [math.nan if each is None else each.tokens_per_byte for each in splits]
    return losses * torch.tensor(tokens_per_byte, dtype=torch.float64) / math.log(2)
