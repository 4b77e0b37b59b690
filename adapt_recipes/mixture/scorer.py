"""MoS: a scorer that learns the mixture by REINFORCE (Mixture-of-Skills, arXiv 2406.08811).

psi gives one score per task. (1) to (5) of the paper are the loss of the model under a mixture, which the recipe
computes. The equations here have the paper's numbers, or letters where the paper has text:

    (a)  q_i ~ M_i^(1/tau)                                         the prior; M_i: supervised tokens of task i
    (b)  z = W2 tanh(W1 x + b1) + b2,   x_i = 1 where M_i > 0      psi = (W1, b1, W2, b2), a perceptron
         p_psi(i) ~ q_i exp(z_i)                                   over accessible tasks; any other has 0
    (6)  psi <- psi + gamma * sum_i R(i) * grad_psi log p_psi(i)   REINFORCE
    (11) R = (1 - ema_decay) * R_new + ema_decay * R_previous      the paper's beta, of the *new*, is 1 - ema_decay

The authors' code (github.com/minghao-wu/mixture_of_skills) differs from that, and is ``form: authors``:

    (B)  psi = z                                                   one number per task
    (C)  (6) is 200 steps of Adam with gamma = 1e-4                per update, one optimizer for the whole run
    (D)  R_previous = 1 before the first update                    in the paper's forms the first R is R_new

Two things are ours. z starts at 0 (W2 and b2 do) and the prior is a factor outside of psi, so that p starts as the
prior to the last bit (it does in the paper too, which does not say how; the authors fit z to it). All tasks start with
the same weights into the hidden layer, so that their order does not matter. The rewards, (7) to (10), are measured by
the recipe.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from adapt_recipes.errors import nearest, warn
from adapt_recipes.mixture.common import carried, carried_scores, floored, number
from adapt_recipes.mixture.prior import Prior

# Ours; the paper does not give it.
HIDDEN_UNITS = 64

FORMS = ("authors", "paper", "policy_gradient")
# (C)
AUTHORS_STEPS, AUTHORS_LEARNING_RATE = 200, 1e-4
OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}


class Scorer:
    """Learns the mixture from one reward per task.

    **A trap.** (6) sums over all tasks and counts each once. It is not a policy gradient, which would weight a task by
    p. Its fixed point is p = R / sum R. So similar rewards give a nearly uniform mixture however long it learns, and
    only ratios of rewards matter. ``form: authors`` approaches it by at most .02 per score and update, whatever the
    size of the rewards. ``form: policy_gradient`` climbs the expected reward instead. With small steps it ends with
    everything on the task with the highest reward, however small its lead.

    Args:
        task_names: the tasks, in order.
        num_supervised_tokens: (num_tasks,) supervised tokens available per task. A task with 0 is not accessible: its
            probability is always 0, and its rewards are ignored.
        budget_tokens: supervised tokens to spend; not used.
        prior, temperature: the starting p, (a): ``uniform`` (the paper's default), ``proportional``, ``temperature``
            (tau), or a weight for each task (ours; see ``adapt_recipes.mixture.prior``).
        form: ``authors``: (B) to (D). ``paper``: (b) and one step (6), which needs R >= 0. ``policy_gradient``: that
            step with sum_i p(i) R(i) grad log p(i) instead (ours).
        optimizer: of the paper's forms; ``authors`` has its own. ``sgd``, the default: (6) as it is written. ``adam``:
            its gradient with Adam, which ignores the size of rewards.
        learning_rate: gamma of (6) in the paper's forms, >= 0 (the default is the paper's 1e-4). With ``sgd`` the score
            of a task changes by about 15 gamma (R(i) - p(i) sum R) per update, so 1e-4 hardly changes the mixture in a
            short run. A rate that is too large for the rewards, such as 0.05 for gradient norms that sum to 50,
            overshoots the fixed point more and more: the mixture oscillates between tasks, and there is a warning.
            ``adam`` accepts rewards of any size.
        ema_decay: weight of the old reward in (11), 0 <= ema_decay < 1. The paper's beta = 0.9 is the weight of the new
            one, so ema_decay = 0.1. 0: rewards are not averaged.
        floor: the part of the mixture that is always the prior, 0 <= floor < 1 (the paper's 0: none).
        seed: of the first weights of the hidden layer; ``authors`` has none. The global generator is neither used nor
            changed.

    Raises:
        ValueError: an argument is out of range; one line that names it.
    """

    observes: tuple[str, ...] = ("rewards",)

    def __init__(
        self,
        *,
        task_names: Sequence[str],
        num_supervised_tokens: Tensor | Sequence[int],
        budget_tokens: int,
        prior: str | Mapping[str, float] = "uniform",
        temperature: float | None = None,
        form: str = "authors",
        optimizer: str | None = None,
        learning_rate: float | None = None,
        ema_decay: float = 0.1,
        floor: float = 0.0,
        seed: int = 0,
    ) -> None:
        # Arguments.
        for key, given in (("optimizer", optimizer), ("learning_rate", learning_rate)):
            if form == "authors" and given is not None:
                fixed = f"{AUTHORS_STEPS} steps of adam with {AUTHORS_LEARNING_RATE:g} per update"
                raise ValueError(f"mixture.{key} is for form: paper and policy_gradient; form: authors takes {fixed}")
        optimizer = "sgd" if optimizer is None else optimizer
        choices: tuple[tuple[str, str, Collection[str]], ...] = (
            ("form", form, FORMS),
            ("optimizer", optimizer, OPTIMIZERS),
        )
        for key, value, allowed in choices:
            if value not in list(allowed):
                raise ValueError(f"mixture.{key}: {value!r}{nearest(str(value), allowed)}")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ValueError(f"mixture.seed must be a whole number, not {seed!r}")
        learning_rate = number("learning_rate", 1e-4 if learning_rate is None else learning_rate, at_least=0)
        self.ema_decay = number("ema_decay", ema_decay, at_least=0, below=1)
        self.floor = number("floor", floor, at_least=0, below=1)
        self.form = form
        self.task_names = list(task_names)

        # (a): q_i ~ M_i^(1/tau)
        self.prior = Prior(
            prior, temperature, task_names=task_names, num_supervised_tokens=num_supervised_tokens
        ).shares
        self.accessible = self.prior > 0

        # State: R of (11), NaN until measured; psi and its optimizer.
        self.averaged_rewards = torch.full_like(self.prior, math.nan)
        if form == "authors":
            # (B), (C)
            self.psi: _Logits | nn.Sequential = _Logits(len(self.task_names))
            self.num_steps = AUTHORS_STEPS
            optimizer, learning_rate = "adam", AUTHORS_LEARNING_RATE
        else:
            self.psi = _perceptron(len(self.task_names), seed=seed)
            self.num_steps = 1
        self.optimizer = OPTIMIZERS[optimizer](self.psi.parameters(), lr=learning_rate, maximize=True)
        self._warned = False

    def probabilities(self) -> Tensor:
        """The mixture (b): (num_tasks,) float64 on the CPU, sums to 1; exactly 0 for a task that is not accessible."""
        prior = self.prior[self.accessible]
        with torch.no_grad():
            z = self._scores()[self.accessible]
        # (b): p_psi(i) ~ q_i exp(z_i). Divided by the sum of the prior as well, which rounding may leave unequal to 1:
        # then equal scores give the prior to the last bit.
        weights = prior * torch.exp(z - z.max())
        shares = weights / (weights.sum() / prior.sum())
        p = torch.zeros_like(self.prior)
        p[self.accessible] = floored(shares, self.floor, prior)
        return p

    def update(
        self,
        *,
        task_tokens: Tensor,  # (num_tasks,) float64, supervised tokens spent on each task; not used
        rewards: Tensor,  # (num_tasks,) float64, R_new; NaN: not measured
        **signals: Tensor,
    ) -> dict[str, Tensor]:
        """Averages the rewards (11) and takes the step (6), or the steps (C).

        A task that was not measured keeps its reward. While it has none, (6) is that of a mixture of the others.

        Returns:
            To log: ``averaged_rewards``, (num_tasks,), R of (11), NaN until measured.

        Raises:
            ValueError: a reward is infinite, or negative with ``form: paper``; it names the task.
        """
        measured = self.accessible & ~rewards.isnan()
        self._check(rewards, measured)

        # (11): R = (1 - ema_decay) * R_new + ema_decay * R_previous, (D)
        first = torch.ones_like(rewards) if self.form == "authors" else rewards
        previous = torch.where(self.averaged_rewards.isnan(), first, self.averaged_rewards)
        averaged = (1 - self.ema_decay) * rewards + self.ema_decay * previous
        self.averaged_rewards = torch.where(measured, averaged, self.averaged_rewards)

        known = ~self.averaged_rewards.isnan()
        R = self.averaged_rewards[known]
        for _ in range(self.num_steps if len(R) else 0):
            # log p, also where p itself would be rounded to 0. Without a floor the last term is log 0.
            scores = (self.prior.log() + self._scores())[known]
            least = self.floor * self.prior[known] / self.prior[known].sum()
            log_p = torch.logaddexp(torch.log_softmax(scores, dim=0) + math.log1p(-self.floor), least.log())
            # (6): psi <- psi + gamma * sum_i R(i) * grad_psi log p_psi(i); policy gradient: p grad log p = grad p
            expected = R * (log_p.exp() if self.form == "policy_gradient" else log_p)
            self.optimizer.zero_grad()
            expected.sum().backward()
            self.optimizer.step()
        self._warn_of_overshooting(R)
        return {"averaged_rewards": self.averaged_rewards.clone()}

    def state_dict(self) -> dict[str, Any]:
        """Everything that an exact resume needs."""
        state = {"averaged_rewards": self.averaged_rewards, "psi": self.psi.state_dict()}
        return copy.deepcopy({**state, "optimizer": self.optimizer.state_dict()})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a ``state_dict``; a ValueError if it is of another mixture or number of tasks."""
        own = sorted(self.state_dict())
        if sorted(state) != own:
            raise ValueError(f"mixture: the state has {sorted(state)}, and this mixture needs {own}")
        loaded_tasks, num_tasks = state["averaged_rewards"].numel(), len(self.task_names)
        if loaded_tasks != num_tasks:
            raise ValueError(f"mixture: the state is of {loaded_tasks} tasks, this run has {num_tasks}")
        # Copied, because the optimizer would continue in the tensors of ``state``.
        state = copy.deepcopy(dict(state))
        self.averaged_rewards = state["averaged_rewards"]
        self.psi.load_state_dict(state["psi"])
        self.optimizer.load_state_dict(state["optimizer"])

    def start_from(self, state: Mapping[str, Any], positions: Tensor) -> None:
        """Starts with the scores and rewards of another run; see ``interface.Mixture``."""
        if not isinstance(self.psi, _Logits) or "z" not in state["psi"]:
            raise ValueError("the network of form: paper and policy_gradient is of its tasks; both need form: authors")
        with torch.no_grad():
            self.psi.z.copy_(carried_scores(state["psi"]["z"], self.psi.z, positions, self.prior.log()))
        self.averaged_rewards = carried(state["averaged_rewards"], self.averaged_rewards, positions)

    def _check(
        self,
        rewards: Tensor,  # (num_tasks,) float64
        measured: Tensor,  # (num_tasks,) bool
    ) -> None:
        """Refuses infinite rewards, and with ``form: paper`` negative ones."""
        for task in measured.nonzero().flatten().tolist():
            reward, name = float(rewards[task]), self.task_names[task]
            if math.isinf(reward):
                raise ValueError(f"mixture: the reward of task '{name}' is {reward}; rewards have to be finite")
            if reward < 0 and self.form == "paper":
                needs = "mixture.form: paper needs rewards >= 0 (authors and policy_gradient do not)"
                raise ValueError(f"{needs}, and that of task '{name}' is {reward:g}")

    def _warn_of_overshooting(self, R: Tensor) -> None:
        """Warns once if the learning rate is too large for these rewards."""
        if self._overshoots(R) and not self._warned:
            self._warned = True
            rate, total = self.optimizer.param_groups[0]["lr"], float(R.sum())
            warn(
                f"mixture.learning_rate: {rate:g} is too large for rewards that sum to {total:.3g}: the mixture "
                "oscillates instead of converging; use a lower rate, or optimizer: adam"
            )

    def _overshoots(self, R: Tensor) -> bool:
        """Whether (6) with ``sgd`` ends no closer to its fixed point p = R / sum R than it began, to first order.

        Near the fixed point an update multiplies the distance of the scores from it by
        1 - gamma c (sum R) (diag p - p p^T), c = 1 + |hidden|^2.
        """
        if self.form != "paper" or not isinstance(self.optimizer, torch.optim.SGD) or R.sum() == 0:
            return False
        assert isinstance(self.psi, nn.Sequential)
        p = R / R.sum()
        with torch.no_grad():
            c = 1 + self.psi[:2](self.accessible.to(torch.float64)).square().sum()
        steepest = torch.linalg.eigvalsh(torch.diag(p) - torch.outer(p, p)).max()
        return bool(self.optimizer.param_groups[0]["lr"] * c * R.sum() * steepest > 2)

    def _scores(self) -> Tensor:
        """z of (b): (num_tasks,) float64, with a gradient to psi."""
        # (b): z = W2 tanh(W1 x + b1) + b2, x_i = 1 where M_i > 0; (B): z = psi
        scores: Tensor = self.psi(self.accessible.to(torch.float64))
        return scores


class _Logits(nn.Module):
    """psi of (B): z itself, 0 at first."""

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        self.z = nn.Parameter(torch.zeros(num_tasks, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.z * x


def _perceptron(num_tasks: int, *, seed: int) -> nn.Sequential:
    """psi of (b): the same random weights from every task to the hidden layer, and 0 everywhere else."""
    # Without initialization, which would use the global generator.
    hidden = skip_init(nn.Linear, num_tasks, HIDDEN_UNITS, dtype=torch.float64)
    output = skip_init(nn.Linear, HIDDEN_UNITS, num_tasks, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    start = torch.empty(HIDDEN_UNITS, 1, dtype=torch.float64).uniform_(-1, 1, generator=generator)
    with torch.no_grad():
        hidden.weight.copy_(start.expand(-1, num_tasks) / num_tasks)
        for zero in (hidden.bias, output.weight, output.bias):
            zero.zero_()
    return nn.Sequential(hidden, nn.Tanh(), output)
