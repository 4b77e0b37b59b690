"""A mixture of one's own: the share of a task is in proportion to its training loss.

    tune run adapt_full_finetune --config examples/own_mixture.yaml [key=value ...]

Start it in the folder above this one: the config names the class by its import path from there. The interface is
``adapt_recipes.mixture.interface.Mixture``. This mixture is an illustration, and no paper's. With ``tasks.noise=true``
it spends 42 % of the budget on labels at random, which cannot be learned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class LossShares:
    """p = (1 - floor) q + floor / num_tasks, where q_i is in proportion to the last known training loss of task i.

    Args:
        task_names: the tasks, in order.
        num_supervised_tokens: (num_tasks,) available per task; not used.
        budget_tokens: supervised tokens to spend; not used.
        floor: the part of the mixture that is always uniform, in (0, 1): no task is left out, so all have losses.

    Raises:
        ValueError: ``floor`` is out of range.
    """

    # The recipe measures these, and no others. Each is an argument of ``update``.
    observes = ("train_losses",)

    def __init__(
        self,
        *,
        task_names: Sequence[str],
        num_supervised_tokens: Tensor | Sequence[int],
        budget_tokens: int,
        floor: float = 0.1,
    ) -> None:
        if not 0 < floor < 1:
            raise ValueError(f"mixture.floor: has to be above 0 and below 1, not {floor}")
        self.floor = floor
        # Equal losses at first, so p starts uniform.
        self.losses = torch.ones(len(task_names), dtype=torch.float64)  # (num_tasks,) nats per supervised token

    def probabilities(self) -> Tensor:
        """(num_tasks,) float64 on the CPU, sums to 1: the share of supervised tokens of each task."""
        q = self.losses / self.losses.sum()
        return (1 - self.floor) * q + self.floor / len(q)

    def update(self, *, task_tokens: Tensor, train_losses: Tensor) -> dict[str, Tensor]:
        """Called every ``mixture_update_every`` steps, with the same values on every rank.

        Args:
            task_tokens: (num_tasks,) float64, supervised tokens spent on each task so far; not used.
            train_losses: (num_tasks,) float64, nats per supervised token since the last update; NaN: not drawn.

        Returns:
            What the log is to have of this update: tensors (num_tasks,) or ().
        """
        self.losses = torch.where(train_losses.isnan(), self.losses, train_losses)
        return {"last_losses": self.losses}

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that an exact resume needs."""
        return {"losses": self.losses.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.losses = state["losses"]
