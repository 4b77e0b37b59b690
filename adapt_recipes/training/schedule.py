"""Learning rates as a function of the share of the budget that is spent; ``lr_schedule._component_`` names one.

A schedule takes a share in [0, 1] and returns what multiplies the optimizer's learning rate, in [0, 1]. A recipe asks
at the middle of each step, so that neither the first step nor the last has rate 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[float], float]


def cosine(*, warmup: float = 0.1, final: float = 0.0) -> Schedule:
    """Up in a line from 0 to 1 over the share ``warmup`` of the budget, then down half a cosine to ``final``."""
    return _schedule(warmup, final, lambda progress: (1 + math.cos(math.pi * progress)) / 2)


def linear(*, warmup: float = 0.1, final: float = 0.0) -> Schedule:
    """Up in a line from 0 to 1 over the share ``warmup`` of the budget, then down in a line to ``final``."""
    return _schedule(warmup, final, lambda progress: 1 - progress)


def constant(*, warmup: float = 0.0) -> Schedule:
    """Up in a line from 0 to 1 over the share ``warmup`` of the budget, then 1."""
    return _schedule(warmup, 1.0, lambda progress: 1.0)


def _schedule(warmup: float, final: float, decay: Callable[[float], float]) -> Schedule:
    """``decay`` falls from 1 to 0 as what follows the warm-up is spent."""
    for name, value, allowed, valid in (
        ("warmup", warmup, "a share of the budget, at least 0 and below 1", lambda x: 0 <= x < 1),
        ("final", final, "a share of the learning rate, from 0 to 1", lambda x: 0 <= x <= 1),
    ):
        if isinstance(value, bool) or not isinstance(value, int | float) or not valid(value):
            raise ValueError(f"lr_schedule.{name}: {value!r}; allowed: {allowed}")

    def multiplier(share: float) -> float:
        assert 0 <= share <= 1, share
        if share < warmup:
            return share / warmup
        return final + (1 - final) * decay((share - warmup) / (1 - warmup))

    return multiplier
