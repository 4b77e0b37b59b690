"""ADAPT with a measured response: the paper's objective, looked ahead over the whole remaining budget.

*Ours, not the paper's* (arXiv 2512.04555). The objective is that of ``adapt_recipes.mixture.adapt``,

    F(p) = (1/b) log( mean_j exp(b rho_j(p)) ) - lambda H(p)

but theta'(p) is the state after the *remaining budget*, not after one step, and its effect on a validation loss is a
saturating response in the task's own tokens, measured from the run's own validation curve:

    rho_j(p) = A_j exp(-h k_j p_j) + G_j exp(-h r p_j)        h: tokens left to spend

A_j is what the task could still lose, at the speed k_j (1/token) at which it has been losing; G_j is what it has
forgotten and would win back, at the speed r. No backward pass and a few floats a task. One gradient step shows a slow
task next to nothing, and a task that cannot be learned has a high loss for ever: the speed tells them apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from adapt_recipes.mixture.common import copied_state, floored, load_state, number

# Shares of the budget: the shortest look-ahead, and the shortest one for what could still be lost.
SHORTEST_HORIZON, SHORTEST_REACH = 0.05, 0.1
SLOWEST = 1e-9  # 1/token
# The fixed point p = softmax(u(p) / lambda) is found by damped iteration.
ITERATIONS, DAMPING = 60, 0.9
STARVED_UPDATES = 3  # in a row, before a task is said to be locked out

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


class AdaptPlanned:
    """Plans the rest of the budget from how fast each task's validation loss has answered to its own tokens.

    Every default is ours. In brackets the symbol of the pseudo-code in ``update``.

    Args:
        task_names: the tasks, in order.
        num_supervised_tokens: (num_tasks,) supervised tokens available per task; not used.
        budget_tokens: supervised tokens to spend (T); T / num_tasks is a task's fair share.
        entropy_weight: (lambda) > 0; what keeps the plan from being greedy. Halved or doubled it is clearly worse.
        sharpness: (b0) > 0; how much the worst predicted loss counts for more, relative to the largest.
        prior_speed: (k0) >= 0; log loss units a fair share, what a task is believed to learn before it is measured.
        prior_weight: (kappa) > 0; fair shares of tokens that the prior counts for. The belief fades as the budget goes.
        speed_discount: (kub) >= 0; log loss units a fair share taken off every speed: noise is no progress.
        fast_discount: (g) share of the sums of tokens and progress that the fast estimate keeps at each update, in
            [0, 1).
        slow_discount: (g2) the same for the slow estimate.
        recovery_speed: (kr) > 0; log loss units a fair share at which what was forgotten comes back.
        ema_decay: (ema) weight of the old in the running mean of the validation losses, in [0, 1).
        floor: the part of the mixture spread evenly, in [0, 1). A task at a 1 % share un-learns.
        loss_offset: (d) > 0, nats; below it a relative gain is no progress.
        measure_after: share of the budget, in [0, 1), spent evenly before anything is measured. What a model learns
            first, the form of the answers and how often each occurs, it learns of every task alike: counted as
            progress, it makes a task of pure noise look as if it could be learned.

    Raises:
        ValueError: if an argument is out of range; one line that names it.
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
        loss_offset: float = 0.02,
        measure_after: float = 0.05,
    ) -> None:
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
        self.task_names = list(task_names)
        self.budget_tokens = budget_tokens
        self.fair_tokens = budget_tokens / len(task_names)
        zeros = torch.zeros(len(task_names), dtype=torch.float64)
        never = torch.full_like(zeros, math.nan)
        self.logits = zeros  # a
        self.losses, self.best_losses, self.first_losses = never, never, never  # E, m and the first E; NaN: unmeasured
        self.tokens = zeros  # of each task at the last update
        self.fast_tokens, self.fast_progress = zeros, zeros  # W, D
        self.slow_tokens, self.slow_progress = zeros, zeros  # W2, D2
        self.starved_updates = zeros  # in a row, up to the last

    def probabilities(self) -> Tensor:
        """The mixture: (num_tasks,) float64 on the CPU, sums to 1."""
        return floored(torch.softmax(self.logits, dim=0), self.floor)

    @property
    def locked_out(self) -> tuple[str, ...]:
        """Tasks that look locked out: ``STARVED_UPDATES`` updates with too little to show that they learn.

        That is a share below 1 / (4 num_tasks) while the loss is above half its start. The known way for this
        method to fail is a slow starter; a task that cannot be learned looks the same.
        """
        starved = zip(self.task_names, self.starved_updates.tolist(), strict=True)
        return tuple(name for name, updates in starved if updates >= STARVED_UPDATES)

    def update(self, *, task_tokens: Tensor, validation_losses: Tensor, **signals: Tensor) -> dict[str, Tensor]:
        """Measures every task's speed and plans the rest of the budget.

        The first losses of a task are its starting point and no progress; tokens it had before them count for no speed.
        The speeds are then the prior's.

        Args:
            task_tokens: (num_tasks,) float64, supervised tokens each task has had so far.
            validation_losses: (num_tasks,) float64, nats a supervised token, of the same examples every time; NaN for a
                task left out of the objective: nothing to lose, so that its value u is 0 and it gets what the entropy
                and the floor leave it. A task measured before keeps its last losses.

        Returns:
            To log, each (num_tasks,): ``values``, u; ``speeds``, k in log loss units a fair share;
            ``reachable_losses``, A; ``forgotten_losses``, G; ``predicted_losses``, rho at the end of the budget;
            ``locked_out``, 1 for the tasks of ``locked_out``.
        """
        assert not validation_losses.isinf().any(), "an infinite validation loss: the model has diverged"
        T, fair = self.budget_tokens, self.fair_tokens
        spent = min(float(task_tokens.sum()) / T, 1.0)  # f
        if spent < self.measure_after:
            return {}
        first, missing = self.losses.isnan(), validation_losses.isnan()

        # Only new ground counts as progress.
        averaged = self.ema_decay * self.losses + (1 - self.ema_decay) * validation_losses
        measured = torch.where(first, validation_losses, averaged).clamp_min(0.0)
        self.losses = torch.where(missing, self.losses, measured)
        self.first_losses = torch.where(first, self.losses, self.first_losses)
        before = torch.where(first, self.losses, self.best_losses)
        self.best_losses = torch.minimum(before, self.losses)
        progress = torch.log((before + self.loss_offset) / (self.best_losses + self.loss_offset)).nan_to_num()  # delta
        tokens = torch.where(first, 0.0, task_tokens - self.tokens)  # n
        self.tokens = task_tokens.clone()

        # The faster of two estimates, the slow one with an optimistic prior that is annealed.
        self.fast_tokens = self.fast_discount * self.fast_tokens + tokens
        self.fast_progress = self.fast_discount * self.fast_progress + progress
        self.slow_tokens = self.slow_discount * self.slow_tokens + tokens
        self.slow_progress = self.slow_discount * self.slow_progress + progress
        prior = self.prior_weight * self.prior_speed * (1 - spent)
        slow = (self.slow_progress + prior) / (self.slow_tokens + self.prior_weight * fair)
        fast = self.fast_progress / (self.fast_tokens + self.prior_weight * fair)
        k = (torch.maximum(fast, slow) - self.speed_discount / fair).clamp_min(SLOWEST)
        r = self.recovery_speed / fair

        # What could still be lost, and what was forgotten; both 0 for a task left out of the objective.
        remaining = T * (1 - spent)
        horizon = max(remaining, SHORTEST_HORIZON * T)  # h
        reachable = self.best_losses.nan_to_num() * (1 - torch.exp(-k * max(remaining, SHORTEST_REACH * T)))  # A
        forgotten = (self.losses - self.best_losses).nan_to_num()  # G

        def response(p: Tensor) -> tuple[Tensor, Tensor]:
            """rho, and -d rho / dp up to the factor h."""
            still, back = reachable * torch.exp(-horizon * k * p), forgotten * torch.exp(-horizon * r * p)
            return still + back, k * still + r * back

        tiny = torch.finfo(k.dtype).tiny  # nothing left to lose: all values are 0, and the plan goes back to uniform
        for _ in range(ITERATIONS):
            predicted, gain = response(torch.softmax(self.logits, dim=0))
            u = torch.softmax(self.sharpness * predicted / predicted.max().clamp_min(tiny), dim=0) * gain
            u = u / u.max().clamp_min(tiny)
            self.logits = DAMPING * self.logits + (1 - DAMPING) * u / self.entropy_weight
            self.logits = self.logits - self.logits.mean()

        share, few = self.probabilities(), 1 / (4 * len(self.task_names))
        starved = (share < few) & (
            self.losses > self.first_losses / 2
        )  # not where it is left out: NaN compares as false
        self.starved_updates = torch.where(starved, self.starved_updates + 1, 0.0)
        return {
            "values": u,
            "speeds": k * fair,
            "reachable_losses": reachable,
            "forgotten_losses": forgotten,
            "predicted_losses": response(share)[0],
            "locked_out": (self.starved_updates >= STARVED_UPDATES).to(torch.float64),
        }

    def state_dict(self) -> dict[str, Tensor]:
        """All that ``load_state_dict`` needs to continue as if never stopped."""
        return copied_state(self, _STATE)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continues from a ``state_dict``; a ValueError if it is of another mixture or number of tasks."""
        load_state(self, _STATE, state)
