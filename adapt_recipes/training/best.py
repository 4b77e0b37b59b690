"""The best validation of a run: which checkpoint to keep beside the newest, and when to stop before the budget ends."""

from __future__ import annotations

import math
from typing import Any, Literal

from torch import Tensor

Objective = Literal["worst", "mean", "target"]


class BestValidation:
    """The lowest validation loss so far, and how many validations ago it was.

    The validation before the first step does not count, as there is no checkpoint of it.

    Args:
        keep_best: ``worst`` or ``mean`` over tasks, or ``target``, the mean over targets; unweighted, and without tasks
            that are not validated. None: there is no best one.
        stop_after: validations without a lower loss after which the run is over; 0: none.
        num_validated: tasks that have a validation split.
        num_targets: tasks that are validated on and never trained.

    Attributes:
        step: of the best validation; 0: there is none yet.
        loss: its loss, nats per supervised token; infinity if there is none yet.
        num_since: validations since.

    Raises:
        ValueError: nothing that ``keep_best`` names is validated.
    """

    def __init__(self, keep_best: Objective | None, stop_after: int, *, num_validated: int, num_targets: int) -> None:
        if keep_best == "target" and not num_targets:
            raise ValueError("keep_best: target needs targets, in tasks.targets; worst and mean are over tasks")
        if keep_best in ("worst", "mean") and not num_validated:
            raise ValueError(f"keep_best: {keep_best} is over tasks, and none of them has a validation split")
        self._keep_best, self._stop_after = keep_best, stop_after
        self.step, self.loss, self.num_since = 0, math.inf, 0

    @property
    def is_over(self) -> bool:
        """Whether ``stop_after`` validations have shown no progress."""
        return 0 < self._stop_after <= self.num_since

    def observe(
        self,
        step: int,
        losses: Tensor,  # (num_tasks,) float64, nats per supervised token; NaN: no validation split
        target_losses: Tensor,  # (num_targets,) float64
    ) -> None:
        """Compares a validation with the best one so far."""
        if self._keep_best is None or step == 0:
            return
        losses = target_losses if self._keep_best == "target" else losses[~losses.isnan()]
        loss = float(losses.max() if self._keep_best == "worst" else losses.mean())
        self.num_since += 1
        if loss < self.loss:
            self.step, self.loss, self.num_since = step, loss, 0

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "loss": self.loss, "num_since": self.num_since}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.loss, self.num_since = state["step"], state["loss"], state["num_since"]
