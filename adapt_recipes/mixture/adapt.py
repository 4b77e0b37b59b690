"""ADAPT: a task mixture learned by meta-gradients under a token budget (arXiv 2512.04555), in its one-step form.

The paper's abstract gives the idea: a distribution over tasks, updated by meta-gradients of a smooth worst-case
validation objective with entropy regularization. Neither code nor hyperparameters are public, so this is *our reading*
of it, and every default below is *ours*. With one logit a_i per task:

    (1)  s = softmax(a + log prior),   p = (1 - floor) s + floor * prior               the mixture
    (2)  theta'(p) = theta - eta * sum_i p_i g_i,   g_i = grad L_train_i(theta)        one look-ahead step
    (3)  F(p) = (1/beta) log( sum_j o_j exp(beta l_j) ) - lambda H(p)                  smooth worst case, entropy
         l_j = (L_val_j(theta') - r_j) / c_j,   H(p) = -sum_i p_i log(p_i / q_i),   q = prior / max prior
    (4)  v = sum_j w_j / c_j * grad L_val_j(theta'),   w ~ o exp(beta l)               one aggregated gradient
    (5)  dF/dp_i = -u_i + lambda (log(p_i / q_i) + 1),   u_i = eta <v, g_i>            u_i: decrease of (3) per unit p_i
    (6)  a <- a - rho (1 - floor) s * (dF/dp - sum_k s_k dF/dp_k)                      gradient descent on F through (1)

j runs over the tasks that are validated on, o_j = 1 / their number. With targets, which are validated on and never
trained, j runs over both, and o is given; by default it is even over the targets, and 0 for the tasks (ours).

The prior is ours too. If it is uniform, q = 1 and H is the entropy, as in the paper; else that term draws the mixture
to the prior. The reference r_j is 0, or the loss that the task is expected to reach (``reference.py``), so that a task
that cannot be learned is not the worst case. (2) is linear in p, so (5) needs first derivatives only. It is exact if
the losses in (3) and (4) are measured at theta'. By default the recipe measures them at theta, which is the same to
first order in eta and cheaper (``probe.exact_lookahead``). It computes (2), v and the dot products with the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from adapt_recipes.errors import nearest
from adapt_recipes.mixture.common import (
    averaged,
    carried_scores,
    centered_and_scaled,
    copied_state,
    filled,
    floored,
    joined,
    load_state,
    number,
    worst_case,
)
from adapt_recipes.mixture.prior import Prior
from adapt_recipes.mixture.reference import Reference

# The smallest divisor c_j, in nats per supervised token (ours). Without it, a task that the base model has already
# mastered would become the worst case of (3), because its loss would be divided by almost 0.
MIN_NORMALIZER = 0.1

_STATE = ("logits", "values", "first_losses")


class Adapt:
    """Learns the mixture by the meta-gradient of a smooth worst-case validation loss after one look-ahead step.

    Args:
        task_names: the tasks, in order.
        num_supervised_tokens: (num_tasks,) supervised tokens available per task; only the prior uses it.
        budget_tokens: supervised tokens to spend; only ``reference: asymptote`` uses it.
        meta_lr: rho of (6), >= 0 (ours); with 0 the mixture stays the prior, and a uniform one to the last bit.
        entropy_weight: lambda of (3), >= 0 (ours).
        sharpness: beta of (3), > 0 (ours): near 0 the mean of the losses, if large their maximum.
        floor: the part of the mixture that is always the prior, 0 <= floor < 1 (ours).
        prior, temperature: see ``adapt_recipes.mixture.prior`` (ours; the paper starts uniform).
        normalize: ``initial``: c_j is the validation loss at the first mixture update, at least ``MIN_NORMALIZER``;
            ``none``: c_j = 1 (ours).
        reference: r_j of (3) (ours): null: 0; a mapping of each task's name to a loss, or the path of a JSON file with
            one; ``initial`` or ``asymptote``.
        center_and_scale: replace u by z = (u - mean u) / rms(u - mean u), and rho by rho * N, in (5) and (6) (ours).
            The part common to all u_i can be many times larger than their differences, and their size depends on model
            and data. If all u_i are equal (to 1e-9 of their size), the logits do not change. False: the exact gradient
            step.
        ema_decay: weight of the old in the exponential average of u over updates, 0 <= ema_decay < 1 (ours); 0: the
            newest u.
        lookahead_lr: eta of (2), > 0 (ours), which is not the optimizer's learning rate. With ``center_and_scale`` it
            has an effect on the mixture only through theta', with ``probe.exact_lookahead``.
        target_names: the targets, in order, from the recipe.
        target_weights: (num_tasks + num_targets,) o of (3), normalized here, from the recipe.

    Raises:
        ValueError: an argument is out of range; one line that names it.
    """

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
        normalize: str = "initial",
        reference: str | Mapping[str, float] | None = None,
        center_and_scale: bool = True,
        ema_decay: float = 0.7,
        lookahead_lr: float = 0.1,
        target_names: Sequence[str] = (),
        target_weights: Tensor | None = None,
    ) -> None:
        # Arguments.
        if normalize not in ("initial", "none"):
            raise ValueError(f"mixture.normalize: {normalize!r}{nearest(str(normalize), ['initial', 'none'])}")
        if not isinstance(center_and_scale, bool):
            raise ValueError(f"mixture.center_and_scale must be true or false, not {center_and_scale!r}")
        self.meta_lr = number("meta_lr", meta_lr, at_least=0)
        self.entropy_weight = number("entropy_weight", entropy_weight, at_least=0)
        self.sharpness = number("sharpness", sharpness, above=0)
        self.floor = number("floor", floor, at_least=0, below=1)
        self.ema_decay = number("ema_decay", ema_decay, at_least=0, below=1)
        self.lookahead_lr = number("lookahead_lr", lookahead_lr, above=0)
        self.normalize = normalize
        self.center_and_scale = center_and_scale
        validated = [*task_names, *target_names]
        self.reference = Reference(reference, task_names=validated, budget_tokens=budget_tokens)
        self.prior = Prior(prior, temperature, task_names=task_names, num_supervised_tokens=num_supervised_tokens)

        self.observes: tuple[str, ...] = ("validation_losses", "gradient_dots")
        if target_names:
            self.observes += ("target_losses",)
        # o of (3), up to a factor
        ones = torch.ones(len(validated), dtype=torch.float64)
        self.target_weights = ones if target_weights is None else target_weights

        # State, float64: a and the average of u, (num_tasks,); the first losses of all. NaN until measured.
        self.logits = torch.zeros(len(task_names), dtype=torch.float64)
        self.values = torch.full_like(self.logits, math.nan)
        self.first_losses = torch.full_like(ones, math.nan)

    def probabilities(self) -> Tensor:
        """The mixture (1): (num_tasks,) float64 on the CPU, sums to 1."""
        # (1): s = softmax(a + log prior), p = (1 - floor) s + floor * prior
        return floored(self._shares(), self.floor, self.prior.shares)

    def objective_weights(
        self,
        validation_losses: Tensor,  # (num_tasks,) float64, nats per supervised token; NaN: no validation split
        target_losses: Tensor | None = None,  # (num_targets,) float64, nats per supervised token
    ) -> Tensor:
        """The weights w_j / c_j of the validation gradients in (4).

        Returns:
            (num_tasks + num_targets,) float64; 0 for what is not in the objective. At the first call, before any
            update, c_j is computed from these losses.
        """
        losses = joined(validation_losses, target_losses)
        _, weights = self._worst_case(losses)
        # (4): v = sum_j w_j / c_j * grad L_val_j
        return weights / torch.nan_to_num(self._normalizers(losses), nan=1.0)

    def update(
        self,
        *,
        task_tokens: Tensor,  # (num_tasks,) float64, supervised tokens spent on each task
        validation_losses: Tensor,  # (num_tasks,) float64, the same as given to ``objective_weights``
        gradient_dots: Tensor,  # (num_tasks,) float64, <v, g_i>; NaN: the probe had no token of the task
        target_losses: Tensor | None = None,  # (num_targets,) float64, the same as given to ``objective_weights``
        **signals: Tensor,
    ) -> dict[str, Tensor]:
        """One step (6) on the logits.

        Returns:
            To log: ``objective``, F at the mixture in use, a scalar; ``weights``, w; ``values``, the average of u;
            ``reference_losses``, the r_j of the next update; ``target_weights`` and ``target_reference_losses`` of the
            targets, if there are any.
        """
        assert not gradient_dots.isinf().any(), "an infinite gradient: the model has diverged"

        # Losses and weights with the reference and c_j of ``objective_weights``; only then may the reference change.
        measured_losses = joined(validation_losses, target_losses)
        worst, weights = self._worst_case(measured_losses)
        self.first_losses = torch.where(self.first_losses.isnan(), measured_losses, self.first_losses)
        # A target's curve is over the tokens of all tasks, in units of a fair share.
        others = task_tokens.double().mean().expand(len(measured_losses) - len(task_tokens))
        self.reference.observe(measured_losses, torch.cat([task_tokens, others]))

        # (3): F(p) = (1/beta) log( sum_j o_j exp(beta l_j) ) - lambda H(p), where p_i log p_i -> 0 as p_i -> 0
        s, p = self._shares(), self.probabilities()
        log_p = p.clamp_min(torch.finfo(p.dtype).tiny).log() - self.prior.logits
        objective = worst + self.entropy_weight * (p * log_p).sum()

        # (5): dF/dp_i = -u_i + lambda (log(p_i / q_i) + 1), u averaged over updates, optionally centered and scaled
        self.values = averaged(self.values, self.lookahead_lr * gradient_dots, self.ema_decay)
        u = filled(self.values, s)
        rate = self.meta_lr
        if self.center_and_scale:
            u, differ = centered_and_scaled(u)
            rate = self.meta_lr * len(u) if differ else 0.0
        gradient = -u + self.entropy_weight * (log_p + 1)

        # (6): a <- a - rho (1 - floor) s * (dF/dp - sum_k s_k dF/dp_k)
        self.logits = self.logits - rate * (1 - self.floor) * s * (gradient - (s * gradient).sum())
        logged = {"objective": objective, "values": torch.nan_to_num(self.values)}
        num_tasks, references = len(self.logits), self.reference.losses.clone()
        logged |= {"weights": weights[:num_tasks], "reference_losses": references[:num_tasks]}
        if target_losses is not None:
            logged |= {"target_weights": weights[num_tasks:], "target_reference_losses": references[num_tasks:]}
        return logged

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that an exact resume needs."""
        return {**copied_state(self, _STATE), **self.reference.state_dict()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continues from a ``state_dict``; a ValueError if it is of another mixture or number of tasks."""
        own = {name: value for name, value in state.items() if not name.startswith("reference_")}
        load_state(self, _STATE, own)
        self.reference.load_state_dict({name: value for name, value in state.items() if name not in own})

    def start_from(self, state: Mapping[str, Tensor], positions: Tensor) -> None:
        """Starts with the logits of another run; see ``interface.Mixture``."""
        self.logits = carried_scores(state["logits"], self.logits, positions, self.prior.logits)

    def _shares(self) -> Tensor:
        """s of (1): (num_tasks,) float64."""
        return torch.softmax(self.logits + self.prior.logits, dim=0)

    def _normalizers(self, losses: Tensor) -> Tensor:
        """c_j of (3): (num_tasks + num_targets,) float64."""
        if self.normalize == "none":
            return torch.ones_like(losses)
        return torch.where(self.first_losses.isnan(), losses, self.first_losses).clamp_min(MIN_NORMALIZER)

    def _worst_case(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        """The first term of (3), a scalar, and w of (4), which is 0 for tasks that are not in the objective."""
        assert not losses.isinf().any(), "an infinite validation loss: the model has diverged"
        # (3): l_j = (L_val_j(theta') - r_j) / c_j
        excess = self.reference.excess(losses) / self._normalizers(losses)
        # (4): w ~ o exp(beta l)
        return worst_case(excess, self.target_weights, self.sharpness)
