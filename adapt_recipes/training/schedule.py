"""Learning rate schedules over the share of the budget that is spent; ``lr_schedule._component_`` names one.

A schedule takes a share x in [0, 1] and returns a multiplier of the optimizer's learning rate, in [0, 1]:

    (1)  m(x) = x / warmup                                                   while x < warmup
    (2)  m(x) = final + (1 - final) decay((x - warmup) / (1 - warmup))       after that

``decay`` falls from 1 to 0. A recipe evaluates the schedule in the middle of each step, so that neither the first nor
the last step has rate 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[float], float]


def cosine(*, warmup: float = 0.1, final: float = 0.0) -> Schedule:
    """Linear warm-up from 0 to 1 over the share ``warmup`` of the budget, then half a cosine down to ``final``."""
    return _schedule(warmup, final, lambda progress: (1 + math.cos(math.pi * progress)) / 2)


def linear(*, warmup: float = 0.1, final: float = 0.0) -> Schedule:
    """Linear warm-up from 0 to 1 over the share ``warmup`` of the budget, then linearly down to ``final``."""
    return _schedule(warmup, final, lambda progress: 1 - progress)


def constant(*, warmup: float = 0.0) -> Schedule:
    """Linear warm-up from 0 to 1 over the share ``warmup`` of the budget, then 1."""
    return _schedule(warmup, 1.0, lambda progress: 1.0)


def _schedule(warmup: float, final: float, decay: Callable[[float], float]) -> Schedule:
    """(1) and (2) with a given ``decay``."""
    for name, value, allowed, valid in (
        ("warmup", warmup, "a share of the budget, at least 0 and below 1", lambda x: 0 <= x < 1),
        ("final", final, "a share of the learning rate, from 0 to 1", lambda x: 0 <= x <= 1),
    ):
        if isinstance(value, bool) or not isinstance(value, int | float) or not valid(value):
            raise ValueError(f"lr_schedule.{name}: {value!r}; allowed: {allowed}")

    def multiplier(share: float) -> float:
        assert 0 <= share <= 1, share
        # (1): m(x) = x / warmup
        if share < warmup:
            return share / warmup
        # (2): m(x) = final + (1 - final) decay((x - warmup) / (1 - warmup))
        return final + (1 - final) * decay((share - warmup) / (1 - warmup))

    return multiplier
