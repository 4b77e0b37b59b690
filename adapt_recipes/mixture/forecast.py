"""ADAPT with forecast learning curves: its objective at the end of the budget, from the mean to the worst task.

*Ours, not the paper's* (arXiv 2512.04555), and the second form of ``adapt_recipes.mixture.planned``. The losses that
tasks will end with are forecast by curves L that are fitted to their losses so far, y_t
(``adapt_recipes.mixture.curves``), and the shares are those with the best forecast:

    (1)  p = (1 - floor) s + floor * prior                                      the mixture
    (2)  rho(p) = sum_L P(L) L((n + h p) / fair) + G p' / p                     the forecast; n: tokens so far
         G = max(0, sum_t a_t (y_t - sum_L P(L) L(x_t))) / (1 + sum_t a_t)      forgotten, at the present share p'
    (3)  R(p) = rho(p) - rho(1)                                                 the regret
    (4)  F(s) = (1 - risk) mean_i R_i + risk M(R) + lambda max_i R_i KL(s | prior)
         M(R) = max_i R_i (1 + 1/b log mean_i exp(b (R_i / max_j R_j - 1)))     the smooth worst case
    (5)  s_i <- s_i exp(-eta_j dF/ds_i) / Z                                     steps j from the prior; the best is kept

T is the budget, fair = T / N, h the tokens that are left of it. A loss counts as d_t = v_t d^age, where the newest has
age 0, and v_t is 1, or for a training loss its tokens relative to the mean of all tasks; or, if only the last ones
matter, as a_t = v_t 0.7^age. Its size m_t is the mean of the losses up to y_t with these weights, and the lowest loss l
the mean of all with v_t d^(3 age).

Before its losses show an asymptote, a task is expected to be learned: P(phi) is ``asymptote_prior`` of k = 1 + 3 h / T,
which prefers low asymptotes at first and none in the end.

A curve only falls. What a task that gets few tokens loses again is G: with the speed of forgetting f and that of
learning again r p G, it stays at f / (r p), so half of the present share would double it.

(3) leaves out what no tokens of this run could change: the loss of a task that cannot be learned. With risk = 0 that
changes nothing but the weight of the entropy.

Nothing is measured but losses. Those of the training steps are free; in the second and later epochs they are too low,
and those of validation are needed. What a task learns from the tokens of others counts as if learned from its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from adapt_recipes.errors import nearest
from adapt_recipes.mixture.common import carried_scores, copied_state, floored, load_state, number
from adapt_recipes.mixture.curves import Curves, asymptote_prior, fit, shapes
from adapt_recipes.mixture.prior import Prior

# The signal that each value of ``losses`` observes.
SIGNALS = {"train": "train_losses", "validation": "validation_losses"}
# Losses that are kept of each task, the newest ones, and the number of them below which it keeps its share.
MAX_LOSSES, MIN_LOSSES = 256, 2
# The least h, as a share of the budget.
MIN_HORIZON = 0.05
# The weight of a loss in m and G relative to the next one.
SMOOTHING = 0.7
# Of (5): how many, and the last eta relative to the first.
STEPS, LAST_RATE = 100, 0.01
TINY = 1e-12

_STATE = ("shares", "curve_tokens", "curve_losses", "curve_weights", "last_tokens")


class _Forecast(NamedTuple):
    """The forecast (2) of n tasks as a function of their shares. It is convex, as every curve is."""

    E: Tensor  # (n,) float64, nats: the mean over the curves
    C: Tensor  # (S, n) float64, nats: of each shape, times its probability
    G: Tensor  # (n,) float64, nats
    x: Tensor  # (n,) float64, tokens so far, in fair shares
    h: float  # tokens that are left, in fair shares
    present: Tensor  # (n,) float64, p'

    def __call__(
        self,
        p: Tensor,  # (n,) float64
    ) -> tuple[Tensor, Tensor]:
        """rho(p), and d rho / dp; (n,) float64 each."""
        # (2): rho(p) = sum_L P(L) L((n + h p) / fair) + G p' / p
        g, speeds = shapes(self.x + self.h * p)
        learned, forgotten = self.C * g, self.G * self.present / p
        return self.E + learned.sum(0) + forgotten, -self.h * (learned * speeds).sum(0) - forgotten / p


class AdaptForecast:
    """Plans the rest of the budget by a forecast of every task's loss at its end.

    Every default is ours. In parentheses the symbol in the equations above.

    Args:
        task_names: the tasks, in order.
        num_supervised_tokens: (num_tasks,) supervised tokens available per task; only the prior uses it.
        budget_tokens: (T) supervised tokens to spend; T / num_tasks is the fair share of a task.
        risk: 0 minimizes the mean of the losses, 1 the largest regret, 0.5 half of each.
        losses: ``train`` or ``validation``: the losses y_t. Take ``validation`` if a task is repeated.
        entropy_weight: (lambda) > 0; weight of the entropy, relative to the largest regret.
        sharpness: (b) > 0; inverse temperature of the regrets, relative to the largest.
        discount: (d) weight of a loss relative to the next one, 0 < discount <= 1.
        floor: the part of the mixture that is always the prior, in [0, 1).
        prior, temperature: see ``adapt_recipes.mixture.prior``.
        measure_after: share of the budget, in [0, 1), whose losses do not count. A model first learns the form of the
            answers, in every task alike, whatever it is trained on.

    Raises:
        ValueError: an argument is out of range; one line that names it.
    """

    def __init__(
        self,
        *,
        task_names: Sequence[str],
        num_supervised_tokens: Tensor | Sequence[int],
        budget_tokens: int,
        risk: float = 0.5,
        losses: str = "train",
        entropy_weight: float = 0.1,
        sharpness: float = 10.0,
        discount: float = 0.97,
        floor: float = 0.05,
        prior: str | Mapping[str, float] = "uniform",
        temperature: float | None = None,
        measure_after: float = 0.05,
    ) -> None:
        # Arguments.
        if losses not in SIGNALS:
            raise ValueError(f"mixture.losses: {losses!r}{nearest(str(losses), list(SIGNALS))}")
        self.observes: tuple[str, ...] = (SIGNALS[losses],)
        self.risk = number("risk", risk, at_least=0, at_most=1)
        self.entropy_weight = number("entropy_weight", entropy_weight, above=0)
        self.sharpness = number("sharpness", sharpness, above=0)
        self.discount = number("discount", discount, above=0, at_most=1)
        self.floor = number("floor", floor, at_least=0, below=1)
        self.measure_after = number("measure_after", measure_after, at_least=0, below=1)
        self.prior = Prior(prior, temperature, task_names=task_names, num_supervised_tokens=num_supervised_tokens)
        num_tasks = len(task_names)
        self.budget_tokens = budget_tokens
        self.fair_tokens = budget_tokens / num_tasks

        # State, float64. s, (num_tasks,); n, y and v of the last losses of each task, the newest last, NaN where there
        # are fewer, (MAX_LOSSES, num_tasks) each; and the tokens at the last update, (num_tasks,).
        self.shares = self.prior.shares.clone()
        self.curve_tokens = torch.full((MAX_LOSSES, num_tasks), math.nan, dtype=torch.float64)
        self.curve_losses, self.curve_weights = self.curve_tokens.clone(), self.curve_tokens.clone()
        self.last_tokens = torch.zeros(num_tasks, dtype=torch.float64)

    def probabilities(self) -> Tensor:
        """The mixture (1): (num_tasks,) float64 on the CPU, sums to 1."""
        # (1): p = (1 - floor) s + floor * prior
        return floored(self.shares, self.floor, self.prior.shares)

    def update(
        self,
        *,
        task_tokens: Tensor,  # (num_tasks,) float64, supervised tokens spent on each task
        **signals: Tensor,  # ``train_losses`` or ``validation_losses``: (num_tasks,) float64, nats per supervised token
    ) -> dict[str, Tensor]:
        """Forecasts the loss of every task, and plans the rest of the budget.

        A task without a loss (NaN) keeps those it has. One with fewer than two losses keeps its share.

        Returns:
            To log, each (num_tasks,), NaN for a task without a forecast: ``forecast_losses``, rho under the new
            mixture; ``forecast_errors``, the standard deviation of the curves; ``asymptotes``, the mean of E;
            ``regrets``, R.
        """
        losses = signals[self.observes[0]]
        assert not losses.isinf().any(), "an infinite loss: the model has diverged"
        new = task_tokens - self.last_tokens
        at, weights = task_tokens, torch.ones_like(losses)
        if "train_losses" in self.observes:
            # The mean of what was drawn since the last update.
            at, weights = task_tokens - new / 2, new / new.mean().clamp_min(TINY)
        self.last_tokens = task_tokens.clone()
        spent = float(task_tokens.sum()) / self.budget_tokens
        if spent < self.measure_after:
            return {}
        for task in (~losses.isnan() & (weights > 0)).nonzero().flatten().tolist():
            self.curve_tokens[:, task] = torch.cat([self.curve_tokens[1:, task], at[task, None]])
            self.curve_losses[:, task] = torch.cat([self.curve_losses[1:, task], losses[task, None]])
            self.curve_weights[:, task] = torch.cat([self.curve_weights[1:, task], weights[task, None]])
        ready = (~self.curve_losses.isnan()).sum(0) >= MIN_LOSSES
        logged = torch.full((4, len(losses)), math.nan, dtype=torch.float64)
        if ready.any():
            horizon = max(1 - spent, MIN_HORIZON) * self.budget_tokens
            logged[:, ready] = self._plan(ready, task_tokens[ready], horizon)
        return dict(zip(("forecast_losses", "forecast_errors", "asymptotes", "regrets"), logged, strict=True))

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that an exact resume needs."""
        return copied_state(self, _STATE)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continues from a ``state_dict``; a ValueError if it is of another mixture or number of tasks."""
        load_state(self, _STATE, state)

    def start_from(self, state: Mapping[str, Tensor], positions: Tensor) -> None:
        """Starts with the shares of another run; see ``interface.Mixture``."""
        self.shares = carried_scores(state["shares"].log(), self.shares.log(), positions).exp()

    def _plan(
        self,
        ready: Tensor,  # (num_tasks,) bool: the tasks with a forecast, n of them; the others keep their shares
        tokens: Tensor,  # (n,) float64, spent on each
        horizon: float,  # h, tokens
    ) -> Tensor:
        """Computes (2) to (5), and sets the shares of the n tasks. Returns what is logged: (4, n) float64."""
        curves, G = self._fit(ready, asymptote_prior(1 + 3 * horizon / self.budget_tokens))
        E, C = curves.averaged()
        x, h = tokens / self.fair_tokens, horizon / self.fair_tokens
        forecast = _Forecast(E, C, G, x, h, self.probabilities()[ready])
        prior = self.prior.shares[ready]
        self.shares = self.shares.clone()
        self.shares[ready] = self._minimize(forecast, prior * self.shares[ready].sum() / prior.sum())

        p = self.probabilities()[ready]
        rho, _ = forecast(p)
        at_end = curves.at(x + h * p)
        errors = (curves.P * (at_end - (curves.P * at_end).sum((0, 1))).square()).sum((0, 1)).sqrt()
        return torch.stack([rho, errors, E, rho - forecast(torch.ones_like(p))[0]])

    def _fit(
        self,
        ready: Tensor,  # (num_tasks,) bool, n of them
        prior: Tensor,  # P(phi)
    ) -> tuple[Curves, Tensor]:
        """The curves, and G of (2): (n,) float64."""
        known = (~self.curve_losses[:, ready].isnan()).sum(0)
        last = slice(-int(known.max()), None)
        x = self.curve_tokens[last, ready].nan_to_num() / self.fair_tokens  # (T, n)
        y, v = self.curve_losses[last, ready].nan_to_num(), self.curve_weights[last, ready].nan_to_num()
        age = torch.arange(len(y) - 1, -1, -1, dtype=torch.float64)[:, None]
        earlier = torch.tril(SMOOTHING ** (age.T - age).clamp_min(0))  # (T, T)
        m = (earlier @ (v * y)) / (earlier @ v).clamp_min(TINY)
        newest = v * self.discount ** (3 * age)
        level = (newest * y).sum(0) / newest.sum(0)
        fitted = fit(x, y, v * self.discount**age, m, level, prior)
        # (2): G = max(0, sum_t a_t (y_t - sum_L P(L) L(x_t))) / (1 + sum_t a_t)
        a = v * SMOOTHING**age
        return fitted, (a * (y - fitted.mean(x))).sum(0).clamp_min(0) / (1 + a.sum(0))

    def _minimize(
        self,
        forecast: _Forecast,  # of n tasks
        prior: Tensor,  # (n,) float64, the shares that the tasks divide among themselves
    ) -> Tensor:
        """The shares s of (4), found by (5): (n,) float64, with the sum of ``prior``."""
        s, total = prior, prior.sum()
        least, _ = forecast(torch.ones_like(prior))
        best, lowest = s, math.inf
        for step in range(STEPS):
            # (3): R(p) = rho(p) - rho(1)
            rho, slopes = forecast(floored(s, self.floor, prior))
            R = rho - least
            largest = R.max().clamp_min(TINY)
            exponents = self.sharpness * (R / largest - 1)
            log_ratio = torch.log((s / prior).clamp_min(TINY))
            # (4): F(s) = (1 - risk) mean_i R_i + risk M(R) + lambda max_i R_i KL(s | prior)
            worst = largest * (1 + exponents.exp().mean().log() / self.sharpness)
            entropy = self.entropy_weight * largest * (s * log_ratio).sum()
            F = float((1 - self.risk) * R.mean() + self.risk * worst + entropy)
            if lowest > F:
                best, lowest = s, F
            # (5): s_i <- s_i exp(-eta_j dF/ds_i) / Z, with the largest R as a constant; eta_j max_i |dF/ds_i| <= 1
            weights = (1 - self.risk) / len(R) + self.risk * torch.softmax(exponents, 0)
            gradient = (1 - self.floor) * weights * slopes + self.entropy_weight * largest * log_ratio
            gradient = gradient - (s * gradient).sum() / total
            eta = LAST_RATE ** (step / STEPS) / gradient.abs().max().clamp_min(torch.finfo(R.dtype).tiny)
            s = total * torch.softmax(torch.log(s.clamp_min(TINY)) - eta * gradient, 0)
        return best
