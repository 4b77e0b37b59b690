"""The budget of supervised tokens, and the ledger that counts what a run has spent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from adapt_recipes.mixture.caps import capped
from adapt_recipes.strict import BUDGETS, STRICT


@dataclass(kw_only=True, config=STRICT)
class BudgetConfig:
    """How many supervised tokens a run may spend: exactly one of ``fraction``, ``tokens`` and ``epochs``."""

    fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    """share of the available supervised tokens, in (0, 1]"""
    tokens: Annotated[int, Field(ge=1)] | None = None
    """supervised tokens; more than there are only with ``tasks.max_epochs_per_task``"""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """times the available supervised tokens"""

    def __post_init__(self) -> None:
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(f"budget.{name}" for name in given) or "none"
            raise ValueError(f"budget: give exactly one of {', '.join(BUDGETS)}, not {found}")

    def num_tokens(self, available: int, *, max_epochs: float | None = None) -> int:
        """The budget in supervised tokens.

        Args:
            available: supervised tokens of the training split.
            max_epochs: ``tasks.max_epochs_per_task``.

        Raises:
            ValueError: ``tokens`` is more than one epoch of all tasks, and ``max_epochs`` does not say how often a task
                may repeat.
        """
        if self.tokens is not None:
            if self.tokens > available and max_epochs is None:
                raise ValueError(
                    f"budget.tokens: {self.tokens} is more than the {available} supervised tokens there are; "
                    "lower it, or set tasks.max_epochs_per_task"
                )
            return self.tokens
        share = self.fraction if self.fraction is not None else self.epochs
        assert share is not None
        return max(1, round(share * available))


class Ledger:
    """Counts what a run has read. Every count is a total since the run began.

    Args:
        budget_tokens: supervised tokens the run may spend.
        num_tasks: number of tasks.
        caps: (num_tasks,) int64, supervised tokens that the run may spend on each task; None: any number.

    Attributes:
        steps: optimizer steps.
        task_tokens: (num_tasks,) int64, supervised tokens spent on each task.
        tokens: positions read in training, without padding.
        computed_tokens: positions computed in training, without padding, and beginnings that examples share once.
        unique_supervised_tokens: supervised tokens spent on examples seen for the first time.
        probe_tokens: supervised tokens read by mixture updates, which are not part of the budget.
        probe_total_tokens: all positions read by them, without padding.
        validation_tokens: supervised tokens read by validations and the test, which are not part of it either.
        validation_total_tokens: all positions read by them, without padding.
    """

    COUNTS = (
        "tokens",
        "computed_tokens",
        "unique_supervised_tokens",
        "probe_tokens",
        "probe_total_tokens",
        "validation_tokens",
        "validation_total_tokens",
    )

    def __init__(self, budget_tokens: int, num_tasks: int, *, caps: Tensor | None = None) -> None:
        self.budget_tokens = budget_tokens
        self.caps = caps
        self.steps = 0
        self.task_tokens = torch.zeros(num_tasks, dtype=torch.int64)
        self.tokens = 0
        self.computed_tokens = 0
        self.unique_supervised_tokens = 0
        self.probe_tokens = 0
        self.probe_total_tokens = 0
        self.validation_tokens = 0
        self.validation_total_tokens = 0

    @property
    def supervised_tokens(self) -> int:
        """Supervised tokens spent."""
        return int(self.task_tokens.sum())

    @property
    def total_tokens(self) -> int:
        """All positions read: in training, by mixture updates, validations and the test, without padding."""
        return self.tokens + self.probe_total_tokens + self.validation_total_tokens

    @property
    def left(self) -> int:
        """Supervised tokens that may still be spent."""
        return self.budget_tokens - self.supervised_tokens

    def share(self, pending: float = 0) -> float:
        """Share of the budget that is spent after ``pending`` more tokens."""
        return (self.supervised_tokens + pending) / self.budget_tokens

    def step_target(self, batch_tokens: int | None) -> int | None:
        """Supervised tokens to draw for the next step, so that k steps spend k * ``batch_tokens`` to within an example.

        It is 0 or negative after a step that took more than the next one was to have. None: ``batch_size`` is given.
        """
        return None if batch_tokens is None else (self.steps + 1) * batch_tokens - self.supervised_tokens

    def capped(self, probabilities: Tensor) -> Tensor:
        """The shares to draw by: ``probabilities`` where no cap is in their way, see ``mixture.caps``.

        They follow from what is spent and what is left, so a resume has nothing to restore.

        Args:
            probabilities: (num_tasks,) float64, of the mixture.
        """
        if self.caps is None or self.left == 0:
            return probabilities
        return capped(probabilities, self.caps - self.task_tokens, self.left)

    def spend(self, task_tokens: Tensor, *, unique: int, batches: Sequence[Any]) -> None:
        """Counts one training step.

        Args:
            task_tokens: (num_tasks,) int64, supervised tokens of the step by task.
            unique: those of examples that were not seen before.
            batches: micro-batches of the step.
        """
        assert int(task_tokens.sum()) <= self.left, "a step may not spend more than is left"
        self.steps += 1
        self.task_tokens += task_tokens
        self.unique_supervised_tokens += unique
        self.tokens += sum(batch.num_tokens for batch in batches)
        self.computed_tokens += sum(batch.computed_tokens for batch in batches)

    def probe(self, batches: Sequence[Any]) -> None:
        """Counts micro-batches read by a mixture update."""
        self.probe_tokens += sum(batch.num_supervised_tokens for batch in batches)
        self.probe_total_tokens += sum(batch.num_tokens for batch in batches)

    def validate(self, batches: Sequence[Any]) -> None:
        """Counts micro-batches read by a validation or the test."""
        self.validation_tokens += sum(batch.num_supervised_tokens for batch in batches)
        self.validation_total_tokens += sum(batch.num_tokens for batch in batches)

    def state_dict(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "task_tokens": self.task_tokens.clone(),
            **{name: getattr(self, name) for name in self.COUNTS},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.task_tokens.copy_(state["task_tokens"])
        for name in ("steps", *self.COUNTS):
            setattr(self, name, state[name])
