"""A fixed schedule: other shares in each stage of the budget (ours), such as all tasks first and the largest later.

    (1)  b_j = round(budget * (s_1 + ... + s_j))      where stage j ends, in supervised tokens of all tasks
    (2)  p = shares of the first stage j with spent < b_j

The schedule learns nothing. A recipe updates only a mixture that observes something, so this one observes the training
losses, which cost nothing, and ignores them. It switches at the first mixture update at or after a boundary: exactly
there if one falls on it, and with ``mixture_update_every: 1`` at most one step later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from adapt_recipes.errors import nearest
from adapt_recipes.mixture.common import copied_state, load_state, number
from adapt_recipes.mixture.static import given_shares

_STATE = ("stage",)
_KEYS = ("share", "weights")
# By how much the shares of the stages may miss 1, so that a third is .333; the last stage ends with the budget.
_TOLERANCE = 2e-3


class Staged:
    """The shares of the tasks by stage of the budget.

    Args:
        task_names: the tasks, in order.
        num_supervised_tokens: (num_tasks,) supervised tokens available per task; not used.
        budget_tokens: supervised tokens to spend.
        stages: in order, each with ``share``, its share of the budget (> 0, all sum to 1), and ``weights``, a weight
            >= 0 for each task, by name; a task of weight 0 is not drawn in this stage.

    Raises:
        ValueError: a stage is no such mapping, the shares of the budget do not sum to 1, a task is missing or unknown,
            or a weight is out of range; one line that names it.
    """

    observes: tuple[str, ...] = ("train_losses",)

    def __init__(
        self,
        *,
        task_names: Sequence[str],
        num_supervised_tokens: Tensor | Sequence[int],
        budget_tokens: int,
        stages: Sequence[Mapping[str, Any]],
    ) -> None:
        if not isinstance(stages, list | tuple) or not stages:
            raise ValueError(f"mixture.stages must be a list of stages, each with share and weights, not {stages!r}")
        for i, stage in enumerate(stages):
            if not isinstance(stage, Mapping):
                raise ValueError(f"mixture.stages[{i}] must have the keys share and weights, not be {stage!r}")
            for key in stage:
                if key not in _KEYS:
                    raise ValueError(f"mixture.stages[{i}]: unknown key {key!r}{nearest(str(key), _KEYS)}")
            for key in _KEYS:
                if key not in stage:
                    raise ValueError(f"missing key 'mixture.stages[{i}].{key}'")
        ends = list(accumulate(number(f"stages[{i}].share", stage["share"], above=0) for i, stage in enumerate(stages)))
        if abs(ends[-1] - 1) > _TOLERANCE:
            raise ValueError(f"mixture.stages: their shares of the budget must sum to 1, not {ends[-1]:g}")
        # (1): b_j = round(budget * (s_1 + ... + s_j)); the last stage has no end
        self.ends = [round(budget_tokens * end) for end in ends[:-1]]
        self.shares = [
            given_shares(f"stages[{i}].weights", stage["weights"], task_names=task_names, at_least=0)
            for i, stage in enumerate(stages)
        ]
        # State: the number of stages that are over.
        self.stage = torch.tensor(0, dtype=torch.int64)

    def probabilities(self) -> Tensor:
        """The shares of the current stage: (num_tasks,) float64 on the CPU, sums to 1."""
        return self.shares[int(self.stage)].clone()

    def update(
        self,
        *,
        task_tokens: Tensor,  # (num_tasks,) float64, supervised tokens spent on each task
        **signals: Tensor,
    ) -> dict[str, Tensor]:
        """Switches to the stage (2) of the tokens spent.

        Returns:
            To log: ``stage``, a scalar, from 1.
        """
        # (2): the first stage j with spent < b_j
        spent = round(float(task_tokens.sum()))
        self.stage = torch.tensor(sum(spent >= end for end in self.ends), dtype=torch.int64)
        return {"stage": (self.stage + 1).double()}

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that an exact resume needs."""
        return copied_state(self, _STATE)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continues from a ``state_dict``; a ValueError if it is of another mixture."""
        load_state(self, _STATE, state)
