"""DynamixSFT: more of the tasks whose loss falls most by one step on them (Shin et al., arXiv 2508.12116).

A bandit with one arm per task. At every mixture update, with Q = 0 at the start:

    (1)  r_i = (L_i(theta) - L_i(theta_i)) / (L_i(theta) + eps)     theta_i: theta after one step on task i alone
    (2)  R_i = (r_i - min_j r_j) / (max_j r_j - min_j r_j)          between 0 and 1
    (3)  Q_i <- alpha Q_i + (1 - alpha) R_i                         the running mean
    (4)  q = softmax(beta Q + log prior)                            prior-scaled Boltzmann exploration
    (5)  p = (1 - gamma) q + gamma / K                              the mixture

To first order r_i is eta |g_i|^2 / L_i: a task that has been learned, or that cannot be, has a small one. By (2) Q is
between 0 and 1, so that the odds of two tasks in q differ from those in the prior by at most a factor of exp(beta),
whatever the model; it also cancels the size of the step, to first order. With alpha = 0.95 half of Q is from the last
14 updates.

*Our readings*: (5) sums to 1, which the paper's line does not; L_i is the mean loss of a task's supervised tokens,
where the paper has the mean of (1) over examples; the step is one of plain SGD with ``lookahead_lr``, with no trace in
the optimizer; and if all r_i are equal, all R_i are 0. (1) is measured by the recipe (``signals.passes.step_gains``).
The numbers 4, 0.95, 0.3 and the prior, shares in proportion to the tasks' sizes, are the paper's; there an update comes
every 50 steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from adapt_recipes.mixture.common import carried, copied_state, filled, load_state, number
from adapt_recipes.mixture.prior import Prior

_STATE = ("rewards",)


class Dynamix:
    """Learns the mixture from what one step on each task alone would bring.

    **A trap.** (2) compares only: if every task is as good as learned, noise decides which of them has R = 1.

    Args:
        task_names: the tasks, in order; K of them.
        num_supervised_tokens: (num_tasks,) supervised tokens available per task; only the prior uses it.
        budget_tokens: supervised tokens to spend; not used.
        sharpness: beta of (4), >= 0; 0 stays at the prior but for (5).
        ema_decay: alpha of (3), weight of the old, 0 <= ema_decay < 1.
        exploration: gamma of (5), the part of the mixture that is always uniform, 0 <= exploration < 1.
        lookahead_lr: the size of the step in (1), > 0 (ours).
        prior, temperature: see ``adapt_recipes.mixture.prior``.

    Raises:
        ValueError: an argument is out of range; one line that names it.
    """

    observes: tuple[str, ...] = ("step_gains",)

    def __init__(
        self,
        *,
        task_names: Sequence[str],
        num_supervised_tokens: Tensor | Sequence[int],
        budget_tokens: int,
        sharpness: float = 4.0,
        ema_decay: float = 0.95,
        exploration: float = 0.3,
        lookahead_lr: float = 0.1,
        prior: str | Mapping[str, float] = "proportional",
        temperature: float | None = None,
    ) -> None:
        self.sharpness = number("sharpness", sharpness, at_least=0)
        self.ema_decay = number("ema_decay", ema_decay, at_least=0, below=1)
        self.exploration = number("exploration", exploration, at_least=0, below=1)
        self.lookahead_lr = number("lookahead_lr", lookahead_lr, above=0)
        self.prior = Prior(prior, temperature, task_names=task_names, num_supervised_tokens=num_supervised_tokens)
        # State: Q, (num_tasks,) float64.
        self.rewards = torch.zeros(len(task_names), dtype=torch.float64)

    def probabilities(self) -> Tensor:
        """The mixture (5): (num_tasks,) float64 on the CPU, sums to 1."""
        # (4): q = softmax(beta Q + log prior)
        q = torch.softmax(self.sharpness * self.rewards + self.prior.logits, dim=0)
        # (5): p = (1 - gamma) q + gamma / K
        return torch.lerp(q, torch.full_like(q, 1 / len(q)), self.exploration)

    def update(
        self,
        *,
        task_tokens: Tensor,  # (num_tasks,) float64, supervised tokens spent on each task; not used
        step_gains: Tensor,  # (num_tasks,) float64, r of (1); NaN: the probe had no token of the task
        **signals: Tensor,
    ) -> dict[str, Tensor]:
        """One step, (2) and (3). A task that was not measured keeps its Q.

        Returns:
            To log, (num_tasks,): ``estimated_rewards``, Q.
        """
        assert not step_gains.isinf().any(), "an infinite loss: the model has diverged"
        measured = ~step_gains.isnan()
        if measured.any():
            r = step_gains[measured]
            # (2): R_i = (r_i - min_j r_j) / (max_j r_j - min_j r_j)
            spread = r.max() - r.min()
            scaled = (r - r.min()) / spread if spread > 0 else torch.zeros_like(r)
            # (3): Q_i <- alpha Q_i + (1 - alpha) R_i
            self.rewards[measured] = self.ema_decay * self.rewards[measured] + (1 - self.ema_decay) * scaled
        return {"estimated_rewards": self.rewards.clone()}

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that an exact resume needs."""
        return copied_state(self, _STATE)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continues from a ``state_dict``; a ValueError if it is of another mixture or number of tasks."""
        load_state(self, _STATE, state)

    def start_from(self, state: Mapping[str, Tensor], positions: Tensor) -> None:
        """Starts with the rewards of another run; see ``interface.Mixture``."""
        # A new task has the mean of the others, weighted by the prior.
        never = torch.full_like(self.rewards, math.nan)
        self.rewards = filled(carried(state["rewards"], never, positions), self.prior.shares)
