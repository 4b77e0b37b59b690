"""Group DRO: more of the tasks whose loss is high (Sagawa et al., arXiv 1911.08731).

The paper minimizes the worst group's loss, min_theta max_q sum_g q_g L_g(theta), and weighs the losses by q. Here q is
the mixture, the share of supervised tokens: the same gradient in expectation. At every update, with L the tasks' losses
or their excess over a reference (``adapt_recipes.mixture.reference``; the numbers are ours):

    (1)  q_i ~ exp(beta L_i)                         ``softmax``: the q of the highest sum_i q_i L_i + H(q) / beta
    (2)  q_i <- q_i exp(eta L_i) / Z                 ``exponentiated_gradient``: the paper's
    (3)  p = (1 - floor) q + floor / N               the mixture

(2) sums over the run what (1) takes of the moment: it forgets nothing, and while one loss leads its share keeps
growing. The paper takes (2) at every step, for the one group that was drawn; here it is taken for all measured tasks at
every mixture update. The paper's adjustment by group size is not here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from adapt_recipes.errors import nearest
from adapt_recipes.mixture.common import copied_state, floored, load_state, number
from adapt_recipes.mixture.reference import Reference

FORMS = ("softmax", "exponentiated_gradient")
OBSERVES = {"validation": "validation_losses", "train": "train_losses"}

_STATE = ("log_shares",)


class GroupDRO:
    """Answers high losses with more tokens.

    **A trap.** A task that cannot be learned has a high loss for ever and gets the tokens, unless its losses are
    counted from a reference.

    Args:
        task_names: the tasks, in order.
        num_supervised_tokens: (num_tasks,) supervised tokens available per task; not used.
        budget_tokens: supervised tokens to spend; only ``reference: asymptote`` uses it.
        form: ``softmax``, (1) (ours), or ``exponentiated_gradient``, (2) (the paper's).
        sharpness: beta of (1), 1/nat, >= 0, for ``form: softmax`` only; null: 1 (ours). 0 is uniform.
        step_size: eta of (2), 1/nat, >= 0, for ``form: exponentiated_gradient`` only; null: 1 (ours; the paper's is
            0.01 per training step). 0 stays uniform.
        losses: ``validation`` (ours) or ``train`` (the paper's): which losses L is made of.
        reference: what L is counted from: null, as in the paper, takes the losses as they are; a mapping of each task's
            name to a loss, or the path of a JSON file with one; ``initial`` or ``asymptote``.
        floor: the part of the mixture spread evenly, 0 <= floor < 1 (ours; the paper has none).

    Raises:
        ValueError: if an argument is out of range, or a reference has no loss for a task; one line that names it.
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
    ) -> None:
        for key, value, allowed in (("form", form, FORMS), ("losses", losses, OBSERVES)):
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
        self.observes: tuple[str, ...] = (OBSERVES[losses],)
        self.reference = Reference(reference, task_names=task_names, budget_tokens=budget_tokens)
        num_tasks = len(task_names)
        self.log_shares = torch.full((num_tasks,), -math.log(num_tasks), dtype=torch.float64)  # log q

    def probabilities(self) -> Tensor:
        """The mixture (3): (num_tasks,) float64 on the CPU, sums to 1."""
        return floored(torch.softmax(self.log_shares, dim=0), self.floor)

    def update(self, *, task_tokens: Tensor, **signals: Tensor) -> dict[str, Tensor]:
        """One step, (1) or (2).

        Args:
            task_tokens: (num_tasks,) supervised tokens each task has had.
            signals: the one that is observed, ``validation_losses`` or ``train_losses``: (num_tasks,) float64, nats a
                supervised token. NaN for a task that was not measured: it keeps its share q, and the others share out
                what they had together.

        Returns:
            To log, each (num_tasks,): ``excess_losses``, L, NaN where not measured; ``reference_losses``.
        """
        losses = signals[self.observes[0]]
        assert not losses.isinf().any(), "an infinite loss: the model has diverged"
        self.reference.observe(losses, task_tokens)
        excess = self.reference.excess(losses)
        measured = ~excess.isnan()
        before = self.log_shares[measured]
        if self.form == "softmax":
            scores = self.sharpness * excess[measured]
        else:
            scores = before + self.step_size * excess[measured]
        self.log_shares[measured] = torch.log_softmax(scores, dim=0) + before.logsumexp(0)
        return {"excess_losses": excess, "reference_losses": self.reference.losses.clone()}

    def state_dict(self) -> dict[str, Tensor]:
        """All that ``load_state_dict`` needs to continue as if never stopped."""
        return {**copied_state(self, _STATE), **self.reference.state_dict()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continues from a ``state_dict``; a ValueError if it is of another mixture or number of tasks."""
        own = {name: value for name, value in state.items() if not name.startswith("reference_")}
        load_state(self, _STATE, own)
        self.reference.load_state_dict({name: value for name, value in state.items() if name not in own})
