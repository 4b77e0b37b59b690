"""GRAPE: more of the tasks that help those which improve least, relative to their loss (Fan et al., arXiv 2505.20380).

A minimax problem: the weights z_j of what is validated on follow the slowest relative improvement, as in group DRO, and
the shares of the training tasks follow what improves the weighted sum. At every mixture update, with the validation
losses L and the gradients g of training and validation losses, z = o and q = prior at the start:

    (1)  r_j = (L_j(before) - L_j(now)) / c_j(before)       the relative improvement since the last update
    (2)  z_j <- z_j exp(-rho r_j) / Z                       group DRO: what improves least gets weight
    (3)  v = sum_j z_j / c_j(now) * grad L_val_j            the gradient of the weighted relative losses
    (4)  u_i = eta <v, g_i>, within -1 and 1                what one step on task i alone improves them, first order
    (5)  q_i <- q_i exp(rho u_i) / Z                        sources that improve them get tokens
    (6)  p = (1 - floor) q + floor * prior                  the mixture

j runs over the tasks, o_j = 1 / their number; with targets, which are validated on and never trained, over both, and o
is given. (2) and (5) are exponentiated gradient steps on one function, sum_j z_j r_j: down in z, up in q.

That both weights are updated so, by relative improvement and by the gradient products, is the paper's. *Our readings*:
(1) is measured over an interval of ``mixture_update_every`` steps, where the paper has one step; z is updated before q,
and both with one step size; in (3) the gradients are divided by the losses, so that (4) is the improvement that (1)
measures; and c_j is L_j, at least ``MIN_NORMALIZER``, without which the noise of a task that has been learned would
decide. *Ours* are the prior, (6), the bounds of (4), and all numbers. No loss can improve by more than itself: a larger
u is outside of what the first order describes. Without the bounds one such u, of a task that was forgotten for a
moment, took nearly all tokens for the rest of a toy run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from adapt_recipes.mixture.adapt import MIN_NORMALIZER
from adapt_recipes.mixture.common import carried_scores, copied_state, floored, joined, load_state, number
from adapt_recipes.mixture.prior import Prior

_STATE = ("log_shares", "log_weights", "last_losses")


class Grape:
    """Learns the mixture from gradient products with the tasks that improve least.

    **A trap.** A task that cannot be learned improves least, and takes the weight z. No training gradient points along
    its validation gradient for long, so that u then has no direction but noise, and the mixture drifts.

    **Another.** The exponents of (5) have the size of ``lookahead_lr`` times inner products of gradients, which depends
    on model and data: see the logged ``values``. Both exponents add up over the run, so what has grown for long takes
    long to fall.

    Args:
        task_names: the tasks, in order.
        num_supervised_tokens: (num_tasks,) supervised tokens available per task; only the prior uses it.
        budget_tokens: supervised tokens to spend; not used.
        step_size: rho of (2) and (5), >= 0, per unit of relative improvement (ours). 0 stays at the prior.
        lookahead_lr: eta of (4), > 0 (ours), which is not the optimizer's learning rate.
        floor: the part of the mixture that is always the prior, 0 <= floor < 1 (ours).
        prior, temperature: see ``adapt_recipes.mixture.prior`` (ours; the paper starts uniform).
        target_names: the targets, in order, from the recipe.
        target_weights: (num_tasks + num_targets,) o, up to a factor, from the recipe.

    Raises:
        ValueError: an argument is out of range; one line that names it.
    """

    def __init__(
        self,
        *,
        task_names: Sequence[str],
        num_supervised_tokens: Tensor | Sequence[int],
        budget_tokens: int,
        step_size: float = 1.0,
        lookahead_lr: float = 0.1,
        floor: float = 0.05,
        prior: str | Mapping[str, float] = "uniform",
        temperature: float | None = None,
        target_names: Sequence[str] = (),
        target_weights: Tensor | None = None,
    ) -> None:
        self.step_size = number("step_size", step_size, at_least=0)
        self.lookahead_lr = number("lookahead_lr", lookahead_lr, above=0)
        self.floor = number("floor", floor, at_least=0, below=1)
        self.prior = Prior(prior, temperature, task_names=task_names, num_supervised_tokens=num_supervised_tokens)
        self.observes: tuple[str, ...] = ("validation_losses", "gradient_dots")
        if target_names:
            self.observes += ("target_losses",)
        o = torch.ones(len(task_names) + len(target_names), dtype=torch.float64)
        o = o if target_weights is None else target_weights

        # State, float64: log q, (num_tasks,); log z up to a constant, -inf for what is not in the objective, and the
        # losses at the last update, NaN: never measured, (num_tasks + num_targets,).
        self.log_shares = torch.log_softmax(self.prior.logits, dim=0)
        self.log_weights = o.log()
        self.last_losses = torch.full_like(o, math.nan)

    def probabilities(self) -> Tensor:
        """The mixture (6): (num_tasks,) float64 on the CPU, sums to 1."""
        # (6): p = (1 - floor) q + floor * prior
        return floored(torch.softmax(self.log_shares, dim=0), self.floor, self.prior.shares)

    def objective_weights(
        self,
        validation_losses: Tensor,  # (num_tasks,) float64, nats per supervised token; NaN: no validation split
        target_losses: Tensor | None = None,  # (num_targets,) float64, nats per supervised token
    ) -> Tensor:
        """The weights z_j / c_j of the validation gradients in (3), with the z of the update that follows.

        Returns:
            (num_tasks + num_targets,) float64; 0 for what is not in the objective.
        """
        losses = joined(validation_losses, target_losses)
        # (3): v = sum_j z_j / c_j(now) * grad L_val_j
        return _weights(self._next_log_weights(losses), losses) / _normalizers(losses).nan_to_num(nan=1.0)

    def update(
        self,
        *,
        task_tokens: Tensor,  # (num_tasks,) float64, supervised tokens spent on each task; not used
        validation_losses: Tensor,  # (num_tasks,) float64, the same as given to ``objective_weights``
        gradient_dots: Tensor,  # (num_tasks,) float64, <v, g_i>; NaN: the probe had no token of the task
        target_losses: Tensor | None = None,  # (num_targets,) float64, the same as given to ``objective_weights``
        **signals: Tensor,
    ) -> dict[str, Tensor]:
        """One step, (2) and (5). A task without a gradient product keeps its q; the others share the rest.

        Returns:
            To log: ``weights``, z, and ``relative_improvements``, r, NaN if not measured, (num_tasks,) each;
            ``target_weights`` and ``target_relative_improvements`` of the targets, if there are any; ``values``, u,
            (num_tasks,).
        """
        assert not gradient_dots.isinf().any(), "an infinite gradient: the model has diverged"
        losses = joined(validation_losses, target_losses)
        assert not losses.isinf().any(), "an infinite validation loss: the model has diverged"
        improvements = self._improvements(losses)
        self.log_weights = self._next_log_weights(losses)
        self.last_losses = torch.where(losses.isnan(), self.last_losses, losses)

        # (4): u_i = eta <v, g_i>, within -1 and 1
        values = (self.lookahead_lr * gradient_dots).clamp(-1, 1)
        measured = ~values.isnan()
        before = self.log_shares[measured]
        # (5): q_i <- q_i exp(rho u_i) / Z
        scores = before + self.step_size * values[measured]
        self.log_shares[measured] = torch.log_softmax(scores, dim=0) + before.logsumexp(0)

        weights, num_tasks = _weights(self.log_weights, losses), len(self.log_shares)
        logged = {"weights": weights, "relative_improvements": improvements}
        of_targets = {f"target_{name}": value[num_tasks:] for name, value in logged.items()}
        logged = {name: value[:num_tasks] for name, value in logged.items()} | {"values": values}
        return logged if target_losses is None else logged | of_targets

    def _improvements(self, losses: Tensor) -> Tensor:
        """r of (1): (num_tasks + num_targets,) float64; NaN where nothing was or is measured."""
        # (1): r_j = (L_j(before) - L_j(now)) / c_j(before)
        return (self.last_losses - losses) / _normalizers(self.last_losses)

    def _next_log_weights(self, losses: Tensor) -> Tensor:
        """log z of (2), up to a constant; it stays where nothing was or is measured."""
        # (2): z_j <- z_j exp(-rho r_j) / Z
        return self.log_weights - self.step_size * self._improvements(losses).nan_to_num()

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that an exact resume needs."""
        return copied_state(self, _STATE)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continues from a ``state_dict``; a ValueError if it is of another mixture or number of tasks."""
        load_state(self, _STATE, state)

    def start_from(self, state: Mapping[str, Tensor], positions: Tensor) -> None:
        """Starts with the shares of another run; see ``interface.Mixture``."""
        self.log_shares = carried_scores(state["log_shares"], self.log_shares, positions)


def _weights(log_weights: Tensor, losses: Tensor) -> Tensor:
    """z, which is 0 for what has no loss or is not in the objective, and sums to 1: (num_tasks + num_targets,)."""
    kept = ~losses.isnan() & ~log_weights.isinf()
    weights = torch.zeros_like(losses)
    weights[kept] = torch.softmax(log_weights[kept], dim=0)
    return weights


def _normalizers(losses: Tensor) -> Tensor:
    """c_j: the losses, at least ``MIN_NORMALIZER``; (num_tasks + num_targets,) float64."""
    return losses.clamp_min(MIN_NORMALIZER)
