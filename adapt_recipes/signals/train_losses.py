"""What training itself says of each task: its mean loss since the last mixture update."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class TrainLosses:
    """Sums of training losses and the supervised tokens they are of, since the last ``reset``.

    Args:
        num_tasks: tasks in the run.
    """

    def __init__(self, num_tasks: int) -> None:
        self.sums = torch.zeros(num_tasks, dtype=torch.float64)  # (num_tasks,) nats
        self.tokens = torch.zeros(num_tasks, dtype=torch.float64)  # (num_tasks,)

    def add(
        self,
        loss_sums: Tensor,  # (num_tasks,) float64, nats
        task_tokens: Tensor,  # (num_tasks,) int64, supervised
    ) -> None:
        """One training step."""
        self.sums += loss_sums
        self.tokens += task_tokens

    def mean(self) -> Tensor:
        """(num_tasks,) float64, nats per supervised token; NaN for a task that was not drawn."""
        return self.sums / self.tokens

    def reset(self) -> None:
        """After a mixture update."""
        self.sums.zero_()
        self.tokens.zero_()

    def state_dict(self) -> dict[str, Tensor]:
        return {"sums": self.sums.clone(), "tokens": self.tokens.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.sums.copy_(state["sums"])
        self.tokens.copy_(state["tokens"])
