"""ADAPT with a measured response: the paper's objective, with a look-ahead over the whole remaining budget.

*Ours, not the paper's* (arXiv 2512.04555). The objective F is that of ``adapt_recipes.mixture.adapt``, but theta'(p) is
the model after the *remaining budget*, not after one step. Its validation losses are predicted by a saturating response
to each task's own tokens, measured from the run's own validation losses. With one logit a per task:

    (1)  s = softmax(a + log prior),   p = (1 - floor) s + floor * prior        the mixture
    (2)  E <- alpha E + (1 - alpha) L_val,   m <- min(m, E)                     the loss, and the lowest so far
    (3)  delta = log((m_before + d) / (m + d)),   n = new tokens of the task    progress: only new minima count
    (4)  W <- g W + n,   D <- g D + delta;   W2, D2 with g2                     discounted sums, fast and slow
    (5)  k = max( D / (W + kappa fair), (D2 + kappa k0 (1 - f)) / (W2 + kappa fair) ) - kub / fair          the speed
    (6)  h = max(1 - f, 0.05) T,   A = m (1 - exp(-k max(1 - f, 0.1) T)),   G = E - m
    (7)  rho(p) = A exp(-h k p) + G exp(-h r p),   r = kr / fair                the measured response
    (8)  F(p) = (1/b) log( mean_j exp(b rho_j(p_j)) ) - lambda H(p),   b = b0 / max_j rho_j
         u ~ softmax(b rho) * (k A exp(-h k p) + r G exp(-h r p))               -dF/dp without the entropy, max u = 1
    (9)  a <- 0.9 a + 0.1 u / lambda,   a <- a - mean a                         60 times with p = s

(9) converges to the fixed point s = softmax(u(s) / lambda + log prior), as H is relative to the prior. T is the
budget, fair = T / N, f the share of the budget that is spent, h the horizon in tokens. A is the loss that a task can
still lose, at the speed k (1/token) at which it has been losing. G is the loss that it has forgotten and would win
back, at the speed r. The slow estimate of (5) has an optimistic prior speed k0 that decreases with the budget.

This needs no backward pass and a few numbers per task. One gradient step shows almost no progress of a slow task, and a
task that cannot be learned has a high loss forever; their speeds distinguish them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from adapt_recipes.mixture.common import carried, carried_scores, copied_state, floored, load_state, number
from adapt_recipes.mixture.prior import Prior

# Shares of the budget: the shortest horizon h of (6), and the shortest horizon for A.
MIN_HORIZON, MIN_REACH = 0.05, 0.1
# The lowest speed k, in 1/token.
MIN_SPEED = 1e-9
# Of the damped iteration (9).
ITERATIONS, DAMPING = 60, 0.9
# Consecutive updates with too few tokens after which a task counts as locked out.
STARVED_UPDATES = 3

_STATE = (
    "logits",
    "losses",
    "best_losses",
    "first_losses",
    "tokens",
    "fast_tokens",
    "fast_progress",
    "slow_tokens",
    "slow_progress",
    "starved_updates",
)


class _Response(NamedTuple):
    """The response (7) of every task to its share of the remaining budget."""

    reachable: Tensor  # A: (num_tasks,) float64, nats
    forgotten: Tensor  # G: (num_tasks,) float64, nats
    speeds: Tensor  # k: (num_tasks,) float64, 1/token
    recovery_speed: float  # r, 1/token
    horizon: float  # h, tokens

    def __call__(
        self,
        p: Tensor,  # (num_tasks,) float64
    ) -> tuple[Tensor, Tensor]:
        """rho(p), and -d rho / dp / h; (num_tasks,) float64 each."""
        # (7): rho(p) = A exp(-h k p) + G exp(-h r p)
        still = self.reachable * torch.exp(-self.horizon * self.speeds * p)
        back = self.forgotten * torch.exp(-self.horizon * self.recovery_speed * p)
        return still + back, self.speeds * still + self.recovery_speed * back


class AdaptPlanned:
    """Plans the rest of the budget by how fast the validation loss of each task has responded to its own tokens.

    Every default is ours. In parentheses the symbol in the equations above.

    Args:
        task_names: the tasks, in order.
        num_supervised_tokens: (num_tasks,) supervised tokens available per task; only the prior uses it.
        budget_tokens: (T) supervised tokens to spend; T / num_tasks is the fair share of a task.
        entropy_weight: (lambda) > 0; keeps the plan from being greedy. Half or twice the default is clearly worse.
        sharpness: (b0) > 0; inverse temperature of the predicted losses, relative to the largest.
        prior_speed: (k0) >= 0; log loss per fair share that a task is assumed to learn before it is measured.
        prior_weight: (kappa) > 0; weight of the prior in fair shares of tokens. The prior decreases with the budget.
        speed_discount: (kub) >= 0; log loss per fair share that is subtracted from every speed, so that noise does not
            count as progress.
        fast_discount: (g) factor of the fast sums of tokens and progress at each update, in [0, 1).
        slow_discount: (g2) factor of the slow sums.
        recovery_speed: (kr) > 0; log loss per fair share at which forgotten loss is won back.
        ema_decay: (alpha) weight of the old in the running mean of the validation losses, in [0, 1).
        floor: the part of the mixture that is always the prior, in [0, 1). With a share of 1 % a task is forgotten.
        prior, temperature: see ``adapt_recipes.mixture.prior``.
        loss_offset: (d) > 0, nats; relative gains of losses below it do not count as progress.
        measure_after: share of the budget, in [0, 1), that is spent as the prior says before the first measurement. A
            model first learns the form of the answers and how often each occurs, in every task alike. If that counted
            as progress, a task of pure noise would look as if it could be learned.

    Raises:
        ValueError: an argument is out of range; one line that names it.
    """

    observes: tuple[str, ...] = ("validation_losses",)

    def __init__(
        self,
        *,
        task_names: Sequence[str],
        num_supervised_tokens: Tensor | Sequence[int],
        budget_tokens: int,
        entropy_weight: float = 0.3,
        sharpness: float = 6.0,
        prior_speed: float = 1.0,
        prior_weight: float = 0.06,
        speed_discount: float = 0.05,
        fast_discount: float = 0.9,
        slow_discount: float = 0.98,
        recovery_speed: float = 2.0,
        ema_decay: float = 0.5,
        floor: float = 0.05,
        prior: str | Mapping[str, float] = "uniform",
        temperature: float | None = None,
        loss_offset: float = 0.02,
        measure_after: float = 0.05,
    ) -> None:
        # Arguments.
        self.entropy_weight = number("entropy_weight", entropy_weight, above=0)
        self.sharpness = number("sharpness", sharpness, above=0)
        self.prior_speed = number("prior_speed", prior_speed, at_least=0)
        self.prior_weight = number("prior_weight", prior_weight, above=0)
        self.speed_discount = number("speed_discount", speed_discount, at_least=0)
        self.fast_discount = number("fast_discount", fast_discount, at_least=0, below=1)
        self.slow_discount = number("slow_discount", slow_discount, at_least=0, below=1)
        self.recovery_speed = number("recovery_speed", recovery_speed, above=0)
        self.ema_decay = number("ema_decay", ema_decay, at_least=0, below=1)
        self.floor = number("floor", floor, at_least=0, below=1)
        self.loss_offset = number("loss_offset", loss_offset, above=0)
        self.measure_after = number("measure_after", measure_after, at_least=0, below=1)
        self.prior = Prior(prior, temperature, task_names=task_names, num_supervised_tokens=num_supervised_tokens)
        self.task_names = list(task_names)
        self.budget_tokens = budget_tokens
        self.fair_tokens = budget_tokens / len(task_names)

        # State, (num_tasks,) float64 each: a; E, m and the first E, NaN until measured; the tokens at the last update;
        # W, D, W2 and D2; consecutive starved updates.
        zeros = torch.zeros(len(task_names), dtype=torch.float64)
        never = torch.full_like(zeros, math.nan)
        self.logits = zeros
        self.losses, self.best_losses, self.first_losses = never, never, never
        self.tokens = zeros
        self.fast_tokens, self.fast_progress = zeros, zeros
        self.slow_tokens, self.slow_progress = zeros, zeros
        self.starved_updates = zeros

    def probabilities(self) -> Tensor:
        """The mixture (1): (num_tasks,) float64 on the CPU, sums to 1."""
        # (1): s = softmax(a + log prior), p = (1 - floor) s + floor * prior
        return floored(torch.softmax(self.logits + self.prior.logits, dim=0), self.floor, self.prior.shares)

    @property
    def locked_out(self) -> tuple[str, ...]:
        """Tasks that had too few tokens in ``STARVED_UPDATES`` consecutive updates to show that they can be learned.

        Too few is a share below 1 / (4 num_tasks) while the loss is above half of the first one. This is how the method
        is known to fail: it locks out a task that starts to learn late. A task that cannot be learned looks the same.
        """
        starved = zip(self.task_names, self.starved_updates.tolist(), strict=True)
        return tuple(name for name, updates in starved if updates >= STARVED_UPDATES)

    def update(
        self,
        *,
        task_tokens: Tensor,  # (num_tasks,) float64, supervised tokens spent on each task
        validation_losses: Tensor,  # (num_tasks,) float64, nats per supervised token, always of the same examples
        **signals: Tensor,
    ) -> dict[str, Tensor]:
        """Measures the speed of every task and plans the rest of the budget.

        The first losses of a task are its starting point: neither they nor the tokens before them count, and its speed
        is that of the prior. A task with a loss of NaN keeps its last losses; one that was never measured is not in the
        objective: its value u is 0, and its share is that of the entropy and the floor.

        Returns:
            To log, each (num_tasks,): ``values``, u; ``speeds``, k in log loss per fair share; ``reachable_losses``, A;
            ``forgotten_losses``, G; ``predicted_losses``, rho at the end of the budget; ``locked_out``, 1 for the tasks
            of ``locked_out``.
        """
        assert not validation_losses.isinf().any(), "an infinite validation loss: the model has diverged"
        spent = min(float(task_tokens.sum()) / self.budget_tokens, 1.0)
        if spent < self.measure_after:
            return {}
        progress, tokens = self._measure_progress(validation_losses, task_tokens)
        response = self._respond(self._speeds(progress, tokens, spent), spent)
        values = self._plan(response)

        # Tasks that get too few tokens to show that they can be learned. A task that was never measured is not one of
        # them, because NaN compares as false.
        share, few = self.probabilities(), 1 / (4 * len(self.task_names))
        starved = (share < few) & (self.losses > self.first_losses / 2)
        self.starved_updates = torch.where(starved, self.starved_updates + 1, 0.0)
        return {
            "values": values,
            "speeds": response.speeds * self.fair_tokens,
            "reachable_losses": response.reachable,
            "forgotten_losses": response.forgotten,
            "predicted_losses": response(share)[0],
            "locked_out": (self.starved_updates >= STARVED_UPDATES).to(torch.float64),
        }

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that an exact resume needs."""
        return copied_state(self, _STATE)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continues from a ``state_dict``; a ValueError if it is of another mixture or number of tasks."""
        load_state(self, _STATE, state)

    def start_from(self, state: Mapping[str, Tensor], positions: Tensor) -> None:
        """Starts with the logits and measured speeds of another run; see ``interface.Mixture``."""
        self.logits = carried_scores(state["logits"], self.logits, positions, self.prior.logits)
        for name in ("fast_tokens", "fast_progress", "slow_tokens", "slow_progress"):
            setattr(self, name, carried(state[name], getattr(self, name), positions))

    def _measure_progress(
        self,
        validation_losses: Tensor,  # (num_tasks,) float64, nats per supervised token
        task_tokens: Tensor,  # (num_tasks,) float64
    ) -> tuple[Tensor, Tensor]:
        """Progress delta in log loss, and new tokens n, since the last update; (num_tasks,) float64 each."""
        first, missing = self.losses.isnan(), validation_losses.isnan()

        # (2): E <- alpha E + (1 - alpha) L_val, m <- min(m, E)
        averaged = self.ema_decay * self.losses + (1 - self.ema_decay) * validation_losses
        measured = torch.where(first, validation_losses, averaged).clamp_min(0.0)
        self.losses = torch.where(missing, self.losses, measured)
        self.first_losses = torch.where(first, self.losses, self.first_losses)
        before = torch.where(first, self.losses, self.best_losses)
        self.best_losses = torch.minimum(before, self.losses)

        # (3): delta = log((m_before + d) / (m + d)), n = new tokens of the task
        progress = torch.log((before + self.loss_offset) / (self.best_losses + self.loss_offset)).nan_to_num()
        tokens = torch.where(first, 0.0, task_tokens - self.tokens)
        self.tokens = task_tokens.clone()
        return progress, tokens

    def _speeds(
        self,
        progress: Tensor,  # (num_tasks,) float64, log loss
        tokens: Tensor,  # (num_tasks,) float64
        spent: float,  # share of the budget
    ) -> Tensor:
        """The speeds k: (num_tasks,) float64, 1/token."""
        # (4): W <- g W + n, D <- g D + delta; W2, D2 with g2
        self.fast_tokens = self.fast_discount * self.fast_tokens + tokens
        self.fast_progress = self.fast_discount * self.fast_progress + progress
        self.slow_tokens = self.slow_discount * self.slow_tokens + tokens
        self.slow_progress = self.slow_discount * self.slow_progress + progress

        # (5): k = max( D / (W + kappa fair), (D2 + kappa k0 (1 - f)) / (W2 + kappa fair) ) - kub / fair
        fair, prior = self.fair_tokens, self.prior_weight * self.prior_speed * (1 - spent)
        slow = (self.slow_progress + prior) / (self.slow_tokens + self.prior_weight * fair)
        fast = self.fast_progress / (self.fast_tokens + self.prior_weight * fair)
        return (torch.maximum(fast, slow) - self.speed_discount / fair).clamp_min(MIN_SPEED)

    def _respond(
        self,
        speeds: Tensor,  # (num_tasks,) float64, 1/token
        spent: float,  # share of the budget
    ) -> _Response:
        """The response over the rest of the budget; A and G are 0 for a task that is not in the objective."""
        # (6): h = max(1 - f, 0.05) T, A = m (1 - exp(-k max(1 - f, 0.1) T)), G = E - m
        T = self.budget_tokens
        remaining = T * (1 - spent)
        horizon = max(remaining, MIN_HORIZON * T)
        reachable = self.best_losses.nan_to_num() * (1 - torch.exp(-speeds * max(remaining, MIN_REACH * T)))
        forgotten = (self.losses - self.best_losses).nan_to_num()
        return _Response(reachable, forgotten, speeds, self.recovery_speed / self.fair_tokens, horizon)

    def _plan(self, response: _Response) -> Tensor:
        """Moves the logits to the fixed point of (9); returns the values u, (num_tasks,) float64."""
        # If there is nothing left to lose, all values are 0, and the plan returns to the prior.
        tiny = torch.finfo(response.speeds.dtype).tiny
        for _ in range(ITERATIONS):
            # (8): u ~ softmax(b rho) * (k A exp(-h k p) + r G exp(-h r p)), b = b0 / max_j rho_j, max u = 1
            predicted, gain = response(torch.softmax(self.logits + self.prior.logits, dim=0))
            u = torch.softmax(self.sharpness * predicted / predicted.max().clamp_min(tiny), dim=0) * gain
            u = u / u.max().clamp_min(tiny)
            # (9): a <- 0.9 a + 0.1 u / lambda, a <- a - mean a
            self.logits = DAMPING * self.logits + (1 - DAMPING) * u / self.entropy_weight
            self.logits = self.logits - self.logits.mean()
        return u
