"""Online data mixing (ODM): the mixture as an adversarial bandit with the training loss as reward (arXiv 2312.02406).

Exp3 over K tasks. A task with a high loss gets more tokens; the loss of a task that is drawn rarely counts for more. In
turn t, with R_i = 0 and eps_0 = 1 / K at the start (the numbers are ours):

    (1)  eps_t = min(1 / K, sqrt(ln K / (K t)))                                    the exploration
    (2)  pi_t(i) = (1 - K eps_t) softmax(eps_{t-1} R + log prior)_i + K eps_t prior_i    the mixture
    (3)  R_i <- alpha R_i + (1 - alpha) L_i / pi_t(i)                              importance-weighted rewards

The prior is ours; a uniform one gives the paper's (2), whose last term is eps_t.

*Our reading*: a turn is a mixture update. In the paper it is a training step, which draws some of the tasks, and the
division by pi(i) compensates for the steps without task i. Here most tasks are drawn in every turn, as often as pi
says, and L_i is the mean training loss of task i since the last update. (3) is unchanged, so the loss of a rare task
counts for more. The paper's warm-up with given weights is not implemented.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from adapt_recipes.mixture.common import carried, copied_state, filled, floored, load_state, number
from adapt_recipes.mixture.prior import Prior

_STATE = ("rewards", "turn")


class Exp3:
    """Learns the mixture from the losses of the training steps, without a probe or a validation split.

    The exploration decreases slowly: with 7 tasks the mixture only explores until turn 13, and half of it still does in
    turn 55. The exponent of the softmax, eps R, is close to the loss (R is close to K L), so the mixture stays mild.

    Args:
        task_names: the tasks, in order; K of them.
        num_supervised_tokens: (num_tasks,) supervised tokens available per task; only the prior uses it.
        budget_tokens: supervised tokens to spend; not used.
        ema_decay: alpha of (3), weight of the old, 0 <= ema_decay < 1. The moving average is the paper's, 0.9 is ours.
        prior, temperature: see ``adapt_recipes.mixture.prior``.

    Raises:
        ValueError: an argument is out of range; one line that names it.
    """

    observes: tuple[str, ...] = ("train_losses",)

    def __init__(
        self,
        *,
        task_names: Sequence[str],
        num_supervised_tokens: Tensor | Sequence[int],
        budget_tokens: int,
        ema_decay: float = 0.9,
        prior: str | Mapping[str, float] = "uniform",
        temperature: float | None = None,
    ) -> None:
        self.ema_decay = number("ema_decay", ema_decay, at_least=0, below=1)
        self.prior = Prior(prior, temperature, task_names=task_names, num_supervised_tokens=num_supervised_tokens)
        # State: R, (num_tasks,) float64, and t.
        self.rewards = torch.zeros(len(task_names), dtype=torch.float64)
        self.turn = torch.tensor(1, dtype=torch.float64)

    def exploration(self, turn: float) -> float:
        """K eps_t of (1): the part of the mixture that is the prior, a decreasing floor; 1 in turn 0."""
        num_tasks = len(self.rewards)
        # (1): K eps_t = min(1, sqrt(K ln K / t))
        return min(1.0, math.sqrt(num_tasks * math.log(num_tasks) / turn)) if turn else 1.0

    def probabilities(self) -> Tensor:
        """The mixture (2): (num_tasks,) float64 on the CPU, sums to 1."""
        turn = float(self.turn)
        # (2): pi_t(i) = (1 - K eps_t) softmax(eps_{t-1} R + log prior)_i + K eps_t prior_i; safe for any R
        scores = self.exploration(turn - 1) / len(self.rewards) * self.rewards + self.prior.logits
        return floored(torch.softmax(scores, dim=0), self.exploration(turn), self.prior.shares)

    def update(
        self,
        *,
        task_tokens: Tensor,  # (num_tasks,) float64, supervised tokens spent on each task; not used
        train_losses: Tensor,  # (num_tasks,) float64, nats per supervised token since the last update; NaN: not drawn
        **signals: Tensor,
    ) -> dict[str, Tensor]:
        """Computes the rewards (3) of this turn, and starts the next turn. A task that was not drawn keeps its reward.

        Returns:
            To log: ``estimated_rewards``, R, (num_tasks,); ``exploration``, K eps of the next turn, a scalar.
        """
        assert not train_losses.isinf().any(), "an infinite training loss: the model has diverged"
        # (3): R_i <- alpha R_i + (1 - alpha) L_i / pi_t(i)
        weighted = train_losses / self.probabilities()
        averaged = self.ema_decay * self.rewards + (1 - self.ema_decay) * weighted
        self.rewards = torch.where(train_losses.isnan(), self.rewards, averaged)
        self.turn = self.turn + 1
        exploration = torch.tensor(self.exploration(float(self.turn)), dtype=torch.float64)
        return {"estimated_rewards": self.rewards.clone(), "exploration": exploration}

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that an exact resume needs."""
        return copied_state(self, _STATE)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continues from a ``state_dict``; a ValueError if it is of another mixture or number of tasks."""
        load_state(self, _STATE, state)

    def start_from(self, state: Mapping[str, Tensor], positions: Tensor) -> None:
        """Starts with the rewards and the turn of another run; see ``interface.Mixture``."""
        never = torch.full_like(self.rewards, math.nan)
        # A new task has the mean of the others, weighted by the prior.
        self.rewards = filled(carried(state["rewards"], never, positions), self.prior.shares)
        self.turn = state["turn"].clone()
