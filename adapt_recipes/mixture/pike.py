"""Balanced-PiKE: more of the tasks whose gradient is large beside its noise, and whose loss is high (arXiv 2502.06244).

At every mixture update, with L the training losses since the last one, and w = prior at the start:

    (1)  y_k = tau exp(tau L_k) / sum_j exp(tau L_j)                                the tilt; with tau = 0, y = 1
    (2)  w_k <- w_k exp(z1 y_k^2 |g_k|^2 - z2 y_k^2 s_k^2) / Z                      Z: w sums to 1
    (3)  p = (1 - floor) w + floor * prior                                          the mixture

|g_k|^2 is the squared norm of task k's gradient, and s_k^2 the variance of the gradient of one example. Both are
estimated from two half batches (``signals.passes.gradient_moments``). A task rises while a step on it decreases its
loss more than noise increases it; the noise of a task that cannot be learned keeps it down.

(1) and (2) are the paper's, where z2 is zeta_2 / (2 b) with b the batch size: one constant here. y = 1 with tau = 0 is
PiKE without balance. *Ours* are (3) and the prior, a turn of ``mixture_update_every`` steps, gradients of mean losses
per supervised token, and all numbers but tau = 3. Losses are not weighted; only shares move.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from adapt_recipes.mixture.common import carried_scores, copied_state, floored, load_state, number
from adapt_recipes.mixture.prior import Prior

_STATE = ("log_shares",)


class Pike:
    """Learns the mixture from the size and the noise of each task's gradient.

    **A trap.** The exponents of (2) have the size of squared gradient norms, which depends on model and data. Where z1
    is much too large a single update decides, and where it is much too small nothing moves: see the logged
    ``exponents``. A task that has been learned has no gradient, and so keeps its w.

    Args:
        task_names: the tasks, in order.
        num_supervised_tokens: (num_tasks,) supervised tokens available per task; only the prior uses it.
        budget_tokens: supervised tokens to spend; not used.
        norm_weight: z1 of (2), >= 0 (ours).
        variance_weight: z2 of (2), >= 0 (ours).
        tilt: tau of (1), 1/nat, >= 0; 3 is the paper's best. 0: no balance.
        floor: the part of the mixture that is always the prior, 0 <= floor < 1 (ours).
        prior, temperature: see ``adapt_recipes.mixture.prior`` (ours; the paper starts uniform).

    Raises:
        ValueError: an argument is out of range; one line that names it.
    """

    observes: tuple[str, ...] = ("train_losses", "squared_gradient_norms", "gradient_variances")

    def __init__(
        self,
        *,
        task_names: Sequence[str],
        num_supervised_tokens: Tensor | Sequence[int],
        budget_tokens: int,
        norm_weight: float = 0.05,
        variance_weight: float = 1e-4,
        tilt: float = 3.0,
        floor: float = 0.05,
        prior: str | Mapping[str, float] = "uniform",
        temperature: float | None = None,
    ) -> None:
        self.norm_weight = number("norm_weight", norm_weight, at_least=0)
        self.variance_weight = number("variance_weight", variance_weight, at_least=0)
        self.tilt = number("tilt", tilt, at_least=0)
        self.floor = number("floor", floor, at_least=0, below=1)
        self.prior = Prior(prior, temperature, task_names=task_names, num_supervised_tokens=num_supervised_tokens)
        # State: log w, (num_tasks,) float64.
        self.log_shares = torch.log_softmax(self.prior.logits, dim=0)

    def probabilities(self) -> Tensor:
        """The mixture (3): (num_tasks,) float64 on the CPU, sums to 1."""
        # (3): p = (1 - floor) w + floor * prior
        return floored(torch.softmax(self.log_shares, dim=0), self.floor, self.prior.shares)

    def update(
        self,
        *,
        task_tokens: Tensor,  # (num_tasks,) float64, supervised tokens spent on each task; not used
        train_losses: Tensor,  # (num_tasks,) float64, nats per supervised token since the last update; NaN: not drawn
        squared_gradient_norms: Tensor,  # (num_tasks,) float64; an estimate, which may be negative
        gradient_variances: Tensor,  # (num_tasks,) float64, >= 0, of one example's gradient
        **signals: Tensor,
    ) -> dict[str, Tensor]:
        """One step (2). A task that was not drawn or not measured keeps its w; the others share the rest.

        Returns:
            To log: ``exponents``, those of (2), (num_tasks,), NaN if not measured.
        """
        assert not train_losses.isinf().any(), "an infinite training loss: the model has diverged"
        measured = ~(train_losses + squared_gradient_norms + gradient_variances).isnan()
        # (1): y_k = tau exp(tau L_k) / sum_j exp(tau L_j)
        y = self.tilt * torch.softmax(self.tilt * train_losses[measured], dim=0) if self.tilt else torch.ones(())
        # (2): w_k <- w_k exp(z1 y_k^2 |g_k|^2 - z2 y_k^2 s_k^2) / Z
        gain = self.norm_weight * squared_gradient_norms - self.variance_weight * gradient_variances
        exponents = torch.full_like(train_losses, torch.nan)
        exponents[measured] = y**2 * gain[measured]
        before = self.log_shares[measured]
        self.log_shares[measured] = torch.log_softmax(before + exponents[measured], dim=0) + before.logsumexp(0)
        return {"exponents": exponents}

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that an exact resume needs."""
        return copied_state(self, _STATE)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continues from a ``state_dict``; a ValueError if it is of another mixture or number of tasks."""
        load_state(self, _STATE, state)

    def start_from(self, state: Mapping[str, Tensor], positions: Tensor) -> None:
        """Starts with the shares of another run; see ``interface.Mixture``."""
        self.log_shares = carried_scores(state["log_shares"], self.log_shares, positions)
