"""The prior of a learned mixture: where it starts, what its floor consists of, and where it stays without evidence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adapt_recipes.errors import nearest
from adapt_recipes.mixture import static

# The temperature of each named prior; None: the argument ``temperature``.
PRIORS = {"uniform": math.inf, "proportional": 1.0, "temperature": None}


class Prior:
    """A distribution over tasks that is known before the run.

    Args:
        prior: ``uniform``, ``proportional`` to the available supervised tokens, ``temperature``, or a mapping of each
            task's name to a weight > 0.
        temperature: > 0, for ``temperature`` only: shares ~ size^(1/temperature).
        task_names: the tasks, in order.
        num_supervised_tokens: (num_tasks,) supervised tokens available per task.

    Attributes:
        shares: (num_tasks,) float64, on the simplex.
        logits: (num_tasks,) float64, log(shares / max shares): added to the logits of a mixture, they make it start as
            the prior. Exactly 0 for a uniform one.

    Raises:
        ValueError: an argument is unknown, missing or out of range; one line that names it.
    """

    def __init__(
        self,
        prior: str | Mapping[str, float],
        temperature: float | None,
        *,
        task_names: Sequence[str],
        num_supervised_tokens: Tensor | Sequence[int],
    ) -> None:
        if not isinstance(prior, Mapping) and prior not in list(PRIORS):
            allowed = [*PRIORS, "a weight for each task"]
            raise ValueError(f"mixture.prior: {prior!r}{nearest(str(prior), allowed)}")
        if prior == "temperature" and temperature is None:
            raise ValueError("missing key 'mixture.temperature', for mixture.prior: temperature; a number > 0")
        if prior != "temperature" and temperature is not None:
            given = "given weights" if isinstance(prior, Mapping) else prior
            raise ValueError(f"mixture.temperature is for mixture.prior: temperature, not for {given}")
        if isinstance(prior, Mapping):
            # A task of weight 0 would never be drawn, and nothing could be learned about it.
            self.shares = static.given_shares("prior", prior, task_names=task_names, above=0)
        else:
            tau: Any = temperature if prior == "temperature" else PRIORS[prior]
            self.shares = static.temperature(
                task_names=task_names, num_supervised_tokens=num_supervised_tokens, budget_tokens=0, temperature=tau
            ).probabilities()
        tiny = torch.finfo(self.shares.dtype).tiny
        self.logits = (self.shares / self.shares.max()).clamp_min(tiny).log()
