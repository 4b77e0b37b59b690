"""Group DRO: more of the tasks whose loss is high (Sagawa et al., arXiv 1911.08731).

The paper minimizes the worst group's loss, min_theta max_q sum_g q_g L_g(theta), and weights the losses by q. Here q is
the mixture, the share of supervised tokens, which gives the same gradient in expectation. At every update, where L are
the losses of the tasks or their excess over a reference (``adapt_recipes.mixture.reference``; the numbers are ours):

    (1)  q_i ~ prior_i exp(beta L_i)                 ``softmax``: maximizes sum_i q_i L_i - KL(q, prior) / beta
    (2)  q_i <- q_i exp(eta L_i) / Z                 ``exponentiated_gradient``: the paper's; it starts at the prior
    (3)  p = (1 - floor) q + floor * prior           the mixture

(1) depends on the current losses only. (2) sums them over the run and forgets nothing: while one loss is the highest,
its share keeps growing. In the paper (2) is applied at every step, to the one group that was drawn; here it is applied
to all measured tasks at every mixture update. The paper's adjustment by group size is not implemented.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from adapt_recipes.errors import nearest
from adapt_recipes.mixture.common import carried_scores, copied_state, floored, load_state, number
from adapt_recipes.mixture.prior import Prior
from adapt_recipes.mixture.reference import Reference

FORMS = ("softmax", "exponentiated_gradient")
# The signal that each value of ``losses`` observes.
SIGNALS = {"validation": "validation_losses", "train": "train_losses"}

_STATE = ("log_shares",)


class GroupDRO:
    """Gives more tokens to tasks with high losses.

    **A trap.** The loss of a task that cannot be learned stays high forever, so it gets the tokens, unless its losses
    have a reference.

    Args:
        task_names: the tasks, in order.
        num_supervised_tokens: (num_tasks,) supervised tokens available per task; only the prior uses it.
        budget_tokens: supervised tokens to spend; only ``reference: asymptote`` uses it.
        form: ``softmax``, (1) (ours), or ``exponentiated_gradient``, (2) (the paper's).
        sharpness: beta of (1), 1/nat, >= 0, for ``form: softmax`` only; null: 1 (ours). 0 is the prior.
        step_size: eta of (2), 1/nat, >= 0, for ``form: exponentiated_gradient`` only; null: 1 (ours; the paper's is
            0.01 per training step). 0 stays at the prior.
        losses: ``validation`` (ours) or ``train`` (the paper's): the losses from which L is computed.
        reference: the loss over which L is the excess: null: 0, as in the paper; a mapping of each task's name to a
            loss, or the path of a JSON file with one; ``initial`` or ``asymptote``.
        floor: the part of the mixture that is always the prior, 0 <= floor < 1 (ours; the paper has none).
        prior, temperature: see ``adapt_recipes.mixture.prior`` (ours; the paper starts uniform).

    Raises:
        ValueError: an argument is out of range, or a reference has no loss for a task; one line that names it.
    """

    def __init__(
        self,
        *,
        task_names: Sequence[str],
        num_supervised_tokens: Tensor | Sequence[int],
        budget_tokens: int,
        form: str = "softmax",
        sharpness: float | None = None,
        step_size: float | None = None,
        losses: str = "validation",
        reference: str | Mapping[str, float] | None = None,
        floor: float = 0.05,
        prior: str | Mapping[str, float] = "uniform",
        temperature: float | None = None,
    ) -> None:
        # Arguments.
        for key, value, allowed in (("form", form, FORMS), ("losses", losses, SIGNALS)):
            if value not in list(allowed):
                raise ValueError(f"mixture.{key}: {value!r}{nearest(str(value), allowed)}")
        if form == "softmax" and step_size is not None:
            other = "exponentiated_gradient; softmax takes mixture.sharpness"
            raise ValueError(f"mixture.step_size is for mixture.form: {other}")
        if form == "exponentiated_gradient" and sharpness is not None:
            other = "softmax; exponentiated_gradient takes mixture.step_size"
            raise ValueError(f"mixture.sharpness is for mixture.form: {other}")
        self.sharpness = number("sharpness", 1.0 if sharpness is None else sharpness, at_least=0)
        self.step_size = number("step_size", 1.0 if step_size is None else step_size, at_least=0)
        self.floor = number("floor", floor, at_least=0, below=1)
        self.form = form
        self.observes: tuple[str, ...] = (SIGNALS[losses],)
        self.reference = Reference(reference, task_names=task_names, budget_tokens=budget_tokens)

        self.prior = Prior(prior, temperature, task_names=task_names, num_supervised_tokens=num_supervised_tokens)

        # State: log q, (num_tasks,) float64.
        self.log_shares = torch.log_softmax(self.prior.logits, dim=0)

    def probabilities(self) -> Tensor:
        """The mixture (3): (num_tasks,) float64 on the CPU, sums to 1."""
        # (3): p = (1 - floor) q + floor * prior
        return floored(torch.softmax(self.log_shares, dim=0), self.floor, self.prior.shares)

    def update(
        self,
        *,
        task_tokens: Tensor,  # (num_tasks,) float64, supervised tokens spent on each task
        **signals: Tensor,  # ``validation_losses`` or ``train_losses``: (num_tasks,) float64, nats per supervised token
    ) -> dict[str, Tensor]:
        """One step, (1) or (2). A task that was not measured (NaN) keeps its q; the others share the rest.

        Returns:
            To log, each (num_tasks,): ``excess_losses``, L, NaN if not measured; ``reference_losses``.
        """
        losses = signals[self.observes[0]]
        assert not losses.isinf().any(), "an infinite loss: the model has diverged"
        self.reference.observe(losses, task_tokens)
        excess = self.reference.excess(losses)
        measured = ~excess.isnan()
        before = self.log_shares[measured]
        if self.form == "softmax":
            # (1): q_i ~ prior_i exp(beta L_i)
            scores = self.sharpness * excess[measured] + self.prior.logits[measured]
        else:
            # (2): q_i <- q_i exp(eta L_i) / Z
            scores = before + self.step_size * excess[measured]
        self.log_shares[measured] = torch.log_softmax(scores, dim=0) + before.logsumexp(0)
        return {"excess_losses": excess, "reference_losses": self.reference.losses.clone()}

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that an exact resume needs."""
        return {**copied_state(self, _STATE), **self.reference.state_dict()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continues from a ``state_dict``; a ValueError if it is of another mixture or number of tasks."""
        own = {name: value for name, value in state.items() if not name.startswith("reference_")}
        load_state(self, _STATE, own)
        self.reference.load_state_dict({name: value for name, value in state.items() if name not in own})

    def start_from(self, state: Mapping[str, Tensor], positions: Tensor) -> None:
        """Starts with the shares of another run; see ``interface.Mixture``."""
        self.log_shares = carried_scores(state["log_shares"], self.log_shares, positions)
