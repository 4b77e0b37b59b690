"""Adaptive data optimization (ADO): more of the tasks whose scaling law predicts fast progress (arXiv 2410.11820).

A power law is fitted to each task's training losses of this run, and its slope at the tokens spent on the task, n_k,
sets the mixture. In update t, with h = prior and the mean of rho = prior at the start:

    (1)  L_k(n) = eps_k + beta_k n^-alpha_k                         the law, with eps, beta >= 0
    (2)  rho_k ~ prior_k lambda_k alpha_k (L_k(n_k) - eps_k) / n_k  the last factor is -dL_k / dn
    (3)  lambda_k = h_k^s                                           the credit of task k for what was learned
    (4)  q = (1 - d) rho + d mean(rho before)                       the average over the run so far
    (5)  p = (1 - floor) q + floor * prior                          the mixture
    (6)  h <- d h + (1 - d) p

(1), its slope, and that (2) joins it with a credit and a prior, smoothed over time and with a smallest share, are the
paper's. (3), (4), (6), s = 1/2, d = .9 and the smallest share .01 are as an independent implementation (Mixtera) gives
them for the paper; we have not checked them against the paper itself.

*Ours*: n is the supervised tokens of the task; in the paper it is the number of samples of all domains, so that a task
also has the credit for what others teach it. (5), which has the smallest share .01 with a uniform prior; the paper
raises smaller ones to it. A time t is a mixture update, not a step, and the law is fitted in each. A loss is the mean
since the last update, and counts at the middle of its tokens. The fit is by least squares, exact in eps and beta for
each alpha of a grid; the paper's minimizes a Huber loss of log L. A task with few losses keeps its prior share.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from adapt_recipes.mixture.common import carried_scores, copied_state, floored, load_state, number
from adapt_recipes.mixture.prior import Prior

# The numbers of the fit are ours. The grid of alpha in (1), in equal ratios.
EXPONENTS = torch.logspace(-2, math.log10(2), 256, dtype=torch.float64)
# Losses that are kept of each task, the newest ones, and the number of them below which no law is fitted.
MAX_LOSSES, MIN_LOSSES = 256, 8
# The paper's smallest share of a task, and the largest floor that it may add up to.
SMALLEST_SHARE, LARGEST_FLOOR = 0.01, 0.5

_STATE = ("curve_tokens", "curve_losses", "last_tokens", "credit", "mean_preferences", "shares", "num_updates")


class Ado:
    """Learns the mixture from the losses of the training steps, without a probe or a validation split.

    Args:
        task_names: the tasks, in order.
        num_supervised_tokens: (num_tasks,) supervised tokens available per task; only the prior uses it.
        budget_tokens: supervised tokens to spend; not used.
        ema_decay: d of (4) and (6), weight of the old, 0 <= ema_decay < 1.
        credit_exponent: s of (3), >= 0; 0: no credit, lambda = 1.
        floor: the part of the mixture that is always the prior, 0 <= floor < 1; null: 0.01 per task, at most 0.5.
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
        credit_exponent: float = 0.5,
        floor: float | None = None,
        prior: str | Mapping[str, float] = "uniform",
        temperature: float | None = None,
    ) -> None:
        num_tasks = len(task_names)
        self.ema_decay = number("ema_decay", ema_decay, at_least=0, below=1)
        self.credit_exponent = number("credit_exponent", credit_exponent, at_least=0)
        paper_floor = min(SMALLEST_SHARE * num_tasks, LARGEST_FLOOR)
        self.floor = number("floor", paper_floor if floor is None else floor, at_least=0, below=1)
        self.prior = Prior(prior, temperature, task_names=task_names, num_supervised_tokens=num_supervised_tokens)

        # State, float64. The last losses of each task and their tokens, newest last: (MAX_LOSSES, num_tasks) each.
        self.curve_tokens = torch.full((MAX_LOSSES, num_tasks), math.nan, dtype=torch.float64)
        self.curve_losses = self.curve_tokens.clone()
        # (num_tasks,) each: tokens at the last update, h, the mean of rho, and q; and t.
        self.last_tokens = torch.zeros(num_tasks, dtype=torch.float64)
        self.credit, self.mean_preferences, self.shares = (self.prior.shares.clone() for _ in range(3))
        self.num_updates = torch.tensor(0, dtype=torch.float64)

    def probabilities(self) -> Tensor:
        """The mixture (5): (num_tasks,) float64 on the CPU, sums to 1."""
        # (5): p = (1 - floor) q + floor * prior
        return floored(self.shares, self.floor, self.prior.shares)

    def update(
        self,
        *,
        task_tokens: Tensor,  # (num_tasks,) float64, supervised tokens spent on each task
        train_losses: Tensor,  # (num_tasks,) float64, nats per supervised token since the last update; NaN: not drawn
        **signals: Tensor,
    ) -> dict[str, Tensor]:
        """Fits the laws, and computes (2) to (6). A task that was not drawn keeps its losses.

        Returns:
            To log, each (num_tasks,), NaN without a law: ``asymptotes``, eps; ``exponents``, alpha; ``speeds``, the
            slope -dL / dn, nats per supervised token and token spent.
        """
        assert not train_losses.isinf().any(), "an infinite training loss: the model has diverged"
        middle = (self.last_tokens + task_tokens) / 2
        for task in (~train_losses.isnan()).nonzero().flatten().tolist():
            for curve, value in ((self.curve_tokens, middle[task]), (self.curve_losses, train_losses[task])):
                curve[:, task] = torch.cat([curve[1:, task], value[None]])
        self.last_tokens = task_tokens.clone()

        # (1): L_k(n) = eps_k + beta_k n^-alpha_k
        eps, beta, alpha = torch.stack([self._law(task) for task in range(len(task_tokens))], dim=1)
        # (2): rho_k ~ prior_k lambda_k alpha_k (L_k(n_k) - eps_k) / n_k
        speeds = alpha * beta * task_tokens**-alpha / task_tokens
        fitted = ~speeds.isnan()
        preferences = self.prior.shares.clone()
        # (3): lambda_k = h_k^s
        scores = (preferences * self.credit**self.credit_exponent * speeds)[fitted]
        if scores.sum() > 0:
            preferences[fitted] = preferences[fitted].sum() * scores / scores.sum()

        # (4): q = (1 - d) rho + d mean(rho before)
        self.shares = torch.lerp(preferences, self.mean_preferences, self.ema_decay)
        self.num_updates = self.num_updates + 1
        self.mean_preferences = torch.lerp(self.mean_preferences, preferences, 1 / (float(self.num_updates) + 1))
        # (6): h <- d h + (1 - d) p
        self.credit = torch.lerp(self.probabilities(), self.credit, self.ema_decay)
        return {"asymptotes": eps, "exponents": alpha, "speeds": speeds}

    def _law(self, task: int) -> Tensor:
        """eps, beta and alpha of a task, (3,); NaN while it has few losses."""
        known = ~self.curve_losses[:, task].isnan()
        if known.sum() < MIN_LOSSES:
            return torch.full((3,), math.nan, dtype=torch.float64)
        return fit_power_law(self.curve_tokens[known, task], self.curve_losses[known, task])

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that an exact resume needs."""
        return copied_state(self, _STATE)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continues from a ``state_dict``; a ValueError if it is of another mixture or number of tasks."""
        load_state(self, _STATE, state)

    def start_from(self, state: Mapping[str, Tensor], positions: Tensor) -> None:
        """Starts with the shares of another run; see ``interface.Mixture``."""
        for name in ("credit", "mean_preferences", "shares"):
            fresh = getattr(self, name).log()
            setattr(self, name, carried_scores(state[name].log(), fresh, positions).exp())
        self.num_updates = state["num_updates"].clone()


def fit_power_law(
    tokens: Tensor,  # (num_losses,) float64, n of (1), > 0, in ascending order
    losses: Tensor,  # (num_losses,) float64, L of (1), nats
) -> Tensor:
    """The law (1) of the least sum of squares. Losses that do not fall have beta = 0.

    Returns:
        (3,) float64: eps, beta and alpha.
    """
    # x is (num_exponents, num_losses), and 1 at the newest loss.
    x = (tokens / tokens[-1]) ** -EXPONENTS[:, None]
    x_mean, mean = x.mean(1), losses.mean()
    centered = x - x_mean[:, None]
    beta = (centered * (losses - mean)).sum(1) / centered.square().sum(1).clamp_min(torch.finfo(x.dtype).tiny)
    eps = mean - beta * x_mean
    # At the bounds: eps = 0 or beta = 0.
    beta = torch.where(eps < 0, (x * losses).sum(1) / x.square().sum(1), beta)
    eps = torch.where(beta < 0, mean, eps.clamp_min(0))
    beta = beta.clamp_min(0)
    squares = (eps[:, None] + beta[:, None] * x - losses).square().sum(1)
    best = squares.argmin()
    return torch.stack([eps[best], beta[best] * tokens[-1] ** EXPONENTS[best], EXPONENTS[best]])
