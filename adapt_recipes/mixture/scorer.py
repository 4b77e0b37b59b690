"""MoS: a scorer network that learns the mixture by REINFORCE (Mixture-of-Skills, arXiv 2406.08811).

psi is a perceptron of two layers. Its input says which tasks are accessible, its output is one score a task. (1) to (5)
of the paper are the model's loss under a mixture, the recipe's business. What is here has the paper's numbers, or
letters where the paper has words:

    (a)  q_i ~ M_i^(1/tau)                                         the prior; M_i: supervised tokens of task i
    (b)  z = W2 tanh(W1 x + b1) + b2,   x_i = 1 where M_i > 0      psi = (W1, b1, W2, b2)
         p_psi(i) ~ q_i exp(z_i)                                   over accessible tasks; any other has 0
    (6)  psi <- psi + gamma * sum_i R(i) * grad_psi log p_psi(i)   REINFORCE
    (11) R = (1 - ema_decay) * R_new + ema_decay * R_previous      the paper's beta, of the *new*, is 1 - ema_decay

Two things are ours. W2 and b2 start at 0 with the prior outside of them, so that p starts as the prior to the last bit
(the paper starts it there; how, it does not say). All tasks start with the same weights into the hidden layer, so that
their order does not matter. The rewards, (7) to (10), are measured by the recipe.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from adapt_recipes.errors import nearest, warn
from adapt_recipes.mixture import static
from adapt_recipes.mixture.common import floored, number

HIDDEN_UNITS = 64  # ours; the paper does not say

FORMS = ("paper", "policy_gradient")
OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
PRIORS = {"uniform": math.inf, "proportional": 1.0, "temperature": None}  # tau; None: an argument


class Scorer:
    """Learns the mixture from one reward a task.

    **A trap.** (6) sums over all tasks, each counted once: it is no policy gradient, which would weigh a task by p. Its
    fixed point is p = R / sum R. So it needs R >= 0, similar rewards give a nearly uniform mixture however long it
    learns, and only ratios of rewards matter. ``form: policy_gradient`` climbs the expected reward instead, and
    with small steps ends with everything on the task of the highest reward, however small its lead.

    Args:
        task_names: the tasks, in order.
        num_supervised_tokens: (num_tasks,) supervised tokens available per task; a task of 0 is not accessible: its
            probability is 0 for good, and its rewards are not looked at.
        budget_tokens: supervised tokens to spend; not used.
        prior: what p starts as: ``uniform`` (the paper's default), ``proportional``, or ``temperature``.
        temperature: tau of (a), > 0; for ``prior: temperature`` only. 1 is proportional, infinity uniform.
        form: ``paper``: (6) (the paper's). ``policy_gradient``: sum_i p(i) R(i) grad log p(i) in its place (ours).
        optimizer: ``sgd``: (6) as it is written. ``adam``: its gradient through Adam, which ignores the rewards' size.
        learning_rate: gamma of (6), >= 0 (the paper's 1e-4). With ``sgd`` a task's score moves by some
            15 gamma (R(i) - p(i) sum R) an update: in a short run, 1e-4 leaves the mixture where it was. Too large for
            the rewards, as .05 for gradient norms that sum to 50, it jumps across the fixed point, ever further: the
            mixture swings from task to task, and a warning says so. ``adam`` does not care how large rewards are.
        ema_decay: weight of the old reward in (11), 0 <= ema_decay < 1. The paper's beta = 0.9 is the weight of the new
            one, so ema_decay = 0.1. 0: rewards are not averaged. A first reward is taken whole.
        floor: the part of the mixture spread evenly over the accessible tasks, 0 <= floor < 1 (the paper's 0: none).
        seed: of the hidden layer's first weights. The global generator is neither used nor changed.

    Raises:
        ValueError: if an argument is out of range; one line that names it.
    """

    observes: tuple[str, ...] = ("rewards",)

    def __init__(
        self,
        *,
        task_names: Sequence[str],
        num_supervised_tokens: Tensor | Sequence[int],
        budget_tokens: int,
        prior: str = "uniform",
        temperature: float | None = None,
        form: str = "paper",
        optimizer: str = "sgd",
        learning_rate: float = 1e-4,
        ema_decay: float = 0.1,
        floor: float = 0.0,
        seed: int = 0,
    ) -> None:
        words = (("prior", prior, PRIORS), ("form", form, FORMS), ("optimizer", optimizer, OPTIMIZERS))
        for key, value, allowed in words:
            if value not in list(allowed):
                raise ValueError(f"mixture.{key}: {value!r}{nearest(str(value), allowed)}")
        if prior == "temperature" and temperature is None:
            raise ValueError("missing key 'mixture.temperature', for mixture.prior: temperature; a number > 0")
        if prior != "temperature" and temperature is not None:
            raise ValueError(f"mixture.temperature is for mixture.prior: temperature, not for {prior}")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ValueError(f"mixture.seed must be a whole number, not {seed!r}")
        learning_rate = number("learning_rate", learning_rate, at_least=0)
        self.ema_decay = number("ema_decay", ema_decay, at_least=0, below=1)
        self.floor = number("floor", floor, at_least=0, below=1)
        self.form = form
        self.task_names = list(task_names)
        tau: Any = temperature if prior == "temperature" else PRIORS[prior]
        self.prior = static.temperature(
            task_names=task_names,
            num_supervised_tokens=num_supervised_tokens,
            budget_tokens=budget_tokens,
            temperature=tau,
        ).probabilities()
        self.accessible = self.prior > 0
        self.averaged_rewards = torch.full_like(self.prior, math.nan)  # R of (11); NaN: never measured
        self._warned = False

        num_tasks = len(self.task_names)
        hidden = skip_init(nn.Linear, num_tasks, HIDDEN_UNITS, dtype=torch.float64)  # draws nothing
        output = skip_init(nn.Linear, HIDDEN_UNITS, num_tasks, dtype=torch.float64)
        self.psi = nn.Sequential(hidden, nn.Tanh(), output)
        generator = torch.Generator().manual_seed(seed)
        start = torch.empty(HIDDEN_UNITS, 1, dtype=torch.float64).uniform_(-1, 1, generator=generator)
        with torch.no_grad():
            hidden.weight.copy_(start.expand(-1, num_tasks) / num_tasks)
            for zero in (hidden.bias, output.weight, output.bias):
                zero.zero_()
        self.optimizer = OPTIMIZERS[optimizer](self.psi.parameters(), lr=learning_rate, maximize=True)

    def probabilities(self) -> Tensor:
        """The mixture (b): (num_tasks,) float64 on the CPU, sums to 1; exactly 0 for a task that is not accessible."""
        prior = self.prior[self.accessible]
        with torch.no_grad():
            z = self._scores()[self.accessible]
        weights = prior * torch.exp(z - z.max())
        # Over the prior's own sum, which rounding may leave beside 1: equal scores give the prior to the last bit.
        shares = weights / (weights.sum() / prior.sum())
        p = torch.zeros_like(self.prior)
        p[self.accessible] = floored(shares, self.floor)
        return p

    def update(self, *, task_tokens: Tensor, rewards: Tensor, **signals: Tensor) -> dict[str, Tensor]:
        """Averages the rewards (11) and takes one step (6).

        Args:
            task_tokens: (num_tasks,) supervised tokens each task has had; not used.
            rewards: (num_tasks,) float64, R_new. NaN for a task that was not measured: it keeps its reward. While
                it has none, (6) is that of a mixture of the others.

        Returns:
            To log: ``averaged_rewards``, (num_tasks,), R of (11), NaN where never measured.

        Raises:
            ValueError: a reward is infinite, or negative with ``form: paper``; it names the task.
        """
        measured = self.accessible & ~rewards.isnan()
        for task in measured.nonzero().flatten().tolist():
            reward, name = float(rewards[task]), self.task_names[task]
            if math.isinf(reward):
                raise ValueError(f"mixture: the reward of task '{name}' is {reward}; rewards have to be finite")
            if reward < 0 and self.form == "paper":
                needs = "mixture.form: paper needs rewards >= 0 (policy_gradient does not)"
                raise ValueError(f"{needs}, and that of task '{name}' is {reward:g}")
        previous = torch.where(self.averaged_rewards.isnan(), rewards, self.averaged_rewards)
        averaged = (1 - self.ema_decay) * rewards + self.ema_decay * previous  # (11)
        self.averaged_rewards = torch.where(measured, averaged, self.averaged_rewards)

        known = ~self.averaged_rewards.isnan()
        if known.any():
            R = self.averaged_rewards[known]
            scores = (self.prior.log() + self._scores())[known]
            even = torch.full_like(R, self.floor / len(R)).log()  # log 0 where there is no floor
            # Also where p itself would be rounded to 0.
            log_p = torch.logaddexp(torch.log_softmax(scores, dim=0) + math.log1p(-self.floor), even)
            expected = R * (log_p if self.form == "paper" else log_p.exp())  # p grad log p = grad p
            self.optimizer.zero_grad()
            expected.sum().backward()
            self.optimizer.step()  # (6)
            if self._overshoots(R) and not self._warned:
                self._warned = True
                rate, total = self.optimizer.param_groups[0]["lr"], float(R.sum())
                warn(
                    f"mixture.learning_rate: {rate:g} is too large for rewards that sum to {total:.3g}: the mixture "
                    "swings instead of settling; take less, or optimizer: adam"
                )
        return {"averaged_rewards": self.averaged_rewards.clone()}

    def state_dict(self) -> dict[str, Any]:
        """All that ``load_state_dict`` needs to continue as if never stopped."""
        state = {"averaged_rewards": self.averaged_rewards, "psi": self.psi.state_dict()}
        return copy.deepcopy({**state, "optimizer": self.optimizer.state_dict()})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a ``state_dict``; a ValueError if it is of another mixture or number of tasks."""
        here = sorted(self.state_dict())
        if sorted(state) != here:
            raise ValueError(f"mixture: the state holds {sorted(state)}, this mixture's is {here}")
        there, num_tasks = state["averaged_rewards"].numel(), len(self.task_names)
        if there != num_tasks:
            raise ValueError(f"mixture: the state is of {there} tasks, this run has {num_tasks}")
        state = copy.deepcopy(dict(state))  # the optimizer would go on in the tensors it is given
        self.averaged_rewards = state["averaged_rewards"]
        self.psi.load_state_dict(state["psi"])
        self.optimizer.load_state_dict(state["optimizer"])

    def _overshoots(self, R: Tensor) -> bool:
        """Whether (6) with ``sgd`` ends no nearer to its fixed point p = R / sum R than it began, to first order.

        An update multiplies what the scores lack there by 1 - gamma c (sum R) (diag p - p p^T), c = 1 + |hidden|^2.
        """
        if self.form != "paper" or not isinstance(self.optimizer, torch.optim.SGD) or R.sum() == 0:
            return False
        p = R / R.sum()
        with torch.no_grad():
            c = 1 + self.psi[:2](self.accessible.to(torch.float64)).square().sum()
        steepest = torch.linalg.eigvalsh(torch.diag(p) - torch.outer(p, p)).max()
        return bool(self.optimizer.param_groups[0]["lr"] * c * R.sum() * steepest > 2)

    def _scores(self) -> Tensor:
        """z of (b): (num_tasks,), with a gradient to psi."""
        return self.psi(self.accessible.to(torch.float64))
