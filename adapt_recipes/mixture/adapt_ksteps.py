"""ADAPT by K look-ahead steps: a task mixture learned by a bilevel meta-gradient over more than one step.

ADAPT (arXiv 2512.04555) updates the mixture by meta-gradients of a smooth worst-case validation loss; ``adapt.py`` is
its form of one look-ahead step. This form takes K, as TANDEM's K-step probing does (arXiv 2606.04401), because the
gradient product of a single step is noisy. With one logit a_i per task, and theta_0 = theta'_0 the weights of the run:

    (1)  s = softmax(a + log prior),   p = (1 - floor) s + floor * prior                       the mixture
    (2)  theta_k+1  = theta_k  - eta  sum_i p_i grad L_i(theta_k)                              K steps -> theta_K
         theta'_k+1 = theta'_k - eta (sum_i p_i grad L_i(theta'_k) + lambda v(theta'_k))       K steps -> theta'_K
    (3)  F = (1/beta) log( mean_j exp(beta l_j) ),   l_j = L_val_j / c_j                       smooth worst case
    (4)  v = sum_j w_j / c_j * grad L_val_j,   w = softmax(beta l)                             the objective's gradient
    (5)  u_i = (L_i(theta_K) - L_i(theta'_K)) / lambda                                         decrease of F per p_i
    (6)  a <- a + rho (1 - floor) s * (m - sum_k s_k m_k),   m_i = z_i - gamma (log(p_i / q_i) + 1)

The recipe measures (2) and (5), as ``signals/ksteps.py`` says, with the same batches on both paths. These are TANDEM's:
a task rises whose training loss falls more when validation is trained on too. Its update is a_i <- a_i + rho u_i.

*Ours* are (3), with w and c_j as they are before the K steps; the entropy term of (6), where q = prior / max prior; and
as in ``adapt.py`` that (6) is gradient descent through (1), and that z are the u, averaged over updates, centered and
divided by their root mean square, with rho times the number of tasks. K, lambda and estimator are keys of ``probe``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from adapt_recipes.mixture.adapt import MIN_NORMALIZER
from adapt_recipes.mixture.common import (
    averaged,
    carried_scores,
    centered_and_scaled,
    copied_state,
    filled,
    floored,
    load_state,
    number,
    worst_case,
)
from adapt_recipes.mixture.prior import Prior

_STATE = ("logits", "values", "first_losses")


class AdaptKSteps:
    """Learns the mixture by what K look-ahead steps with and without the objective do to the training losses.

    Args:
        task_names: the tasks, in order.
        num_supervised_tokens: (num_tasks,) supervised tokens available per task; only the prior uses it.
        budget_tokens: unused.
        meta_lr: rho of (6), >= 0 (ours); with 0 the mixture stays the prior.
        entropy_weight: gamma of (6), >= 0 (ours).
        sharpness: beta of (3), > 0 (ours): near 0 the mean of the losses, if large their maximum.
        floor: the part of the mixture that is always the prior, 0 <= floor < 1 (ours).
        prior, temperature: see ``adapt_recipes.mixture.prior`` (ours).
        ema_decay: weight of the old in the exponential average of u over updates, 0 <= ema_decay < 1 (ours); 0: the
            newest u.
        lookahead_lr: eta of (2), > 0 (ours), which is not the optimizer's learning rate.

    Raises:
        ValueError: an argument is out of range; one line that names it.
    """

    observes = ("validation_losses", "kstep_differences")

    def __init__(
        self,
        *,
        task_names: Sequence[str],
        num_supervised_tokens: Tensor | Sequence[int],
        budget_tokens: int,
        meta_lr: float = 0.1,
        entropy_weight: float = 0.5,
        sharpness: float = 1.0,
        floor: float = 0.05,
        prior: str | Mapping[str, float] = "uniform",
        temperature: float | None = None,
        ema_decay: float = 0.7,
        lookahead_lr: float = 0.1,
    ) -> None:
        self.meta_lr = number("meta_lr", meta_lr, at_least=0)
        self.entropy_weight = number("entropy_weight", entropy_weight, at_least=0)
        self.sharpness = number("sharpness", sharpness, above=0)
        self.floor = number("floor", floor, at_least=0, below=1)
        self.ema_decay = number("ema_decay", ema_decay, at_least=0, below=1)
        self.lookahead_lr = number("lookahead_lr", lookahead_lr, above=0)
        self.prior = Prior(prior, temperature, task_names=task_names, num_supervised_tokens=num_supervised_tokens)

        # State, (num_tasks,) float64: a, the average of u, and the first validation losses. NaN until measured.
        self.logits = torch.zeros(len(task_names), dtype=torch.float64)
        self.values = torch.full_like(self.logits, math.nan)
        self.first_losses = torch.full_like(self.logits, math.nan)

    def probabilities(self) -> Tensor:
        """The mixture (1): (num_tasks,) float64 on the CPU, sums to 1."""
        # (1): s = softmax(a + log prior), p = (1 - floor) s + floor * prior
        return floored(self._shares(), self.floor, self.prior.shares)

    def objective_weights(
        self,
        validation_losses: Tensor,  # (num_tasks,) float64, nats per supervised token; NaN: no validation split
    ) -> Tensor:
        """The weights w_j / c_j of the validation gradients in (4): (num_tasks,) float64, 0 without a split."""
        _, weights = self._worst_case(validation_losses)
        # (4): v = sum_j w_j / c_j * grad L_val_j
        return weights / torch.nan_to_num(self._normalizers(validation_losses), nan=1.0)

    def update(
        self,
        *,
        task_tokens: Tensor,  # (num_tasks,) float64, supervised tokens spent on each task
        validation_losses: Tensor,  # (num_tasks,) float64, the same as given to ``objective_weights``
        kstep_differences: Tensor,  # (num_tasks,) float64, u of (5); NaN: the probe had no token of the task
        **signals: Tensor,
    ) -> dict[str, Tensor]:
        """One step (6) on the logits.

        Returns:
            To log: ``objective``, F less gamma times the entropy of the mixture in use, a scalar; ``weights``, w;
            ``values``, the average of u.
        """
        assert not kstep_differences.isinf().any(), "an infinite loss: the model has diverged"
        worst, weights = self._worst_case(validation_losses)
        self.first_losses = torch.where(self.first_losses.isnan(), validation_losses, self.first_losses)

        # (5): u averaged over updates, centered and scaled
        s, p = self._shares(), self.probabilities()
        self.values = averaged(self.values, kstep_differences, self.ema_decay)
        z, differ = centered_and_scaled(filled(self.values, s))
        rate = self.meta_lr * len(z) if differ else 0.0

        # (6): a <- a + rho (1 - floor) s * (m - sum_k s_k m_k), where p_i log p_i -> 0 as p_i -> 0
        log_p = p.clamp_min(torch.finfo(p.dtype).tiny).log() - self.prior.logits
        m = z - self.entropy_weight * (log_p + 1)
        self.logits = self.logits + rate * (1 - self.floor) * s * (m - (s * m).sum())
        objective = worst + self.entropy_weight * (p * log_p).sum()
        return {"objective": objective, "weights": weights, "values": torch.nan_to_num(self.values)}

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that an exact resume needs."""
        return copied_state(self, _STATE)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continues from a ``state_dict``; a ValueError if it is of another mixture or number of tasks."""
        load_state(self, _STATE, state)

    def start_from(self, state: Mapping[str, Tensor], positions: Tensor) -> None:
        """Starts with the logits of another run; see ``interface.Mixture``."""
        self.logits = carried_scores(state["logits"], self.logits, positions, self.prior.logits)

    def _shares(self) -> Tensor:
        """s of (1): (num_tasks,) float64."""
        return torch.softmax(self.logits + self.prior.logits, dim=0)

    def _normalizers(self, losses: Tensor) -> Tensor:
        """c_j of (3): the first validation losses, at least ``MIN_NORMALIZER``; (num_tasks,) float64."""
        return torch.where(self.first_losses.isnan(), losses, self.first_losses).clamp_min(MIN_NORMALIZER)

    def _worst_case(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        """(3), a scalar, and w of (4), which is 0 for tasks that are not in the objective."""
        assert not losses.isinf().any(), "an infinite validation loss: the model has diverged"
        # (3): F = (1/beta) log( mean_j exp(beta l_j) ), l_j = L_val_j / c_j; (4): w = softmax(beta l)
        return worst_case(losses / self._normalizers(losses), torch.ones_like(losses), self.sharpness)
