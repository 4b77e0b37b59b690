"""FAMO as a mixture: all tasks shall improve at the same relative rate (Liu et al., arXiv 2306.03792).

The paper weights losses. It steps along the gradient of c sum_k z_k log D_k, where D_k = L_k - min_k and c makes the
weights c z_k / D_k of the losses' gradients sum to 1. Here only shares of supervised tokens move: they are these
weights, which gives the same gradient in expectation (*ours*). With w = 0 at the start, at every mixture update:

    (1)  z = softmax(w + log prior)
    (2)  delta_k = log D_k(before) - log D_k(now)       the relative progress of task k since the last update
    (3)  g = J^T delta + gamma w                        J the Jacobian of (1): (J^T delta)_k = z_k (delta_k - z . delta)
    (4)  w <- w - Adam(g)                               step size beta; a task that improved more than others gets less
    (5)  q_k ~ z_k / D_k                                with the new z
    (6)  p = (1 - floor) q + floor * prior              the mixture

(3) and (4) with Adam, beta = .025 and gamma = .01 are those of the authors' code (``famo.py``; one of its experiments
has gamma = .001). There an update is a training step, and delta is of one batch before and after it; here it is an
interval of ``mixture_update_every`` steps, and the losses are of the validation split or the means of training losses
since the last update (*ours*). min_k is 0 unless ``reference`` says otherwise, as in the code. *Ours* as well: the
prior, the floor, and that D is at least SMALLEST_EXCESS, where the code adds 1e-8 to it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from adapt_recipes.errors import nearest
from adapt_recipes.mixture.common import carried_scores, copied_state, floored, load_state, number
from adapt_recipes.mixture.prior import Prior
from adapt_recipes.mixture.reference import Reference

# The signal that each value of ``losses`` observes.
SIGNALS = {"validation": "validation_losses", "train": "train_losses"}
# Nats: below it a loss is as good as its minimum.
SMALLEST_EXCESS = 1e-3
# Adam's decay of the first and second moments, and the number that keeps its quotient finite: torch's defaults.
BETAS, EPSILON = (0.9, 0.999), 1e-8

_STATE = ("logits", "first_moments", "second_moments", "num_steps", "last_losses")


class Famo:
    """Equalizes the relative progress of the tasks, d log(L - min) per update.

    **A trap.** The shares (5) are inverse to the losses: a task whose loss approaches min gets most of the tokens until
    w has moved against it, which takes many updates. The method suits losses of a similar size. ``weight_decay`` has to
    be small beside delta / num_tasks: where log losses fall by .001 per update, 0.01 keeps w at 0, and the task that is
    ahead runs away with the tokens; with 0 all rates become equal.

    Args:
        task_names: the tasks, in order.
        num_supervised_tokens: (num_tasks,) supervised tokens available per task; only the prior uses it.
        budget_tokens: supervised tokens to spend; only ``reference: asymptote`` uses it.
        learning_rate: beta of (4), > 0; 0.025 is the authors'.
        weight_decay: gamma of (3), >= 0; 0.01 is the authors'.
        losses: ``train`` (the paper's) or ``validation`` (ours).
        reference: min_k: null: 0, as in the authors' code; a mapping of each task's name to a loss, or the path of a
            JSON file with one; ``asymptote``. See ``adapt_recipes.mixture.reference``; ``initial`` is refused.
        floor: the part of the mixture that is always the prior, 0 <= floor < 1 (ours).
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
        learning_rate: float = 0.025,
        weight_decay: float = 0.01,
        losses: str = "train",
        reference: str | Mapping[str, float] | None = None,
        floor: float = 0.05,
        prior: str | Mapping[str, float] = "uniform",
        temperature: float | None = None,
    ) -> None:
        if losses not in list(SIGNALS):
            raise ValueError(f"mixture.losses: {losses!r}{nearest(str(losses), SIGNALS)}")
        if reference == "initial":
            advice = "null, a loss for each task, or asymptote"
            raise ValueError(f"mixture.reference: 'initial' is above the loss of a task that learns; allowed: {advice}")
        self.learning_rate = number("learning_rate", learning_rate, above=0)
        self.weight_decay = number("weight_decay", weight_decay, at_least=0)
        self.floor = number("floor", floor, at_least=0, below=1)
        self.observes: tuple[str, ...] = (SIGNALS[losses],)
        self.reference = Reference(reference, task_names=task_names, budget_tokens=budget_tokens)
        self.prior = Prior(prior, temperature, task_names=task_names, num_supervised_tokens=num_supervised_tokens)

        # State, (num_tasks,) float64 each: w, Adam's moments and steps, and the last losses; NaN: never measured.
        self.logits = torch.zeros(len(task_names), dtype=torch.float64)
        self.first_moments, self.second_moments, self.num_steps = (torch.zeros_like(self.logits) for _ in range(3))
        self.last_losses = torch.full_like(self.logits, math.nan)

    def weights(self) -> Tensor:
        """z of (1): (num_tasks,) float64, sums to 1."""
        # (1): z = softmax(w + log prior)
        return torch.softmax(self.logits + self.prior.logits, dim=0)

    def probabilities(self) -> Tensor:
        """The mixture (6): (num_tasks,) float64 on the CPU, sums to 1. A task never measured keeps its prior share."""
        known = ~self.last_losses.isnan()
        q = self.prior.shares.clone()
        if known.any():
            # (5): q_k ~ z_k / D_k
            log_z = torch.log_softmax(self.logits + self.prior.logits, dim=0)
            scores = (log_z - self._log_excess(self.last_losses))[known]
            q[known] = torch.softmax(scores, dim=0) * q[known].sum()
        # (6): p = (1 - floor) q + floor * prior
        return floored(q, self.floor, self.prior.shares)

    def update(
        self,
        *,
        task_tokens: Tensor,  # (num_tasks,) float64, supervised tokens spent on each task
        **signals: Tensor,  # ``train_losses`` or ``validation_losses``: (num_tasks,) float64, nats per supervised token
    ) -> dict[str, Tensor]:
        """One step, (2) to (4). A task that was not measured (NaN) keeps its w and its last loss.

        Returns:
            To log, each (num_tasks,): ``relative_progress``, delta, NaN if not measured; ``task_weights``, z;
            ``reference_losses``, min.
        """
        losses = signals[self.observes[0]]
        assert not losses.isinf().any(), "an infinite loss: the model has diverged"
        self.reference.observe(losses, task_tokens)
        # (2): delta_k = log D_k(before) - log D_k(now), both over the reference as it is now
        progress = self._log_excess(self.last_losses) - self._log_excess(losses)
        measured = ~progress.isnan()
        if measured.any():
            z = self.weights()[measured]
            z = z / z.sum()
            delta = progress[measured]
            # (3): g = J^T delta + gamma w
            gradient = z * (delta - (z * delta).sum()) + self.weight_decay * self.logits[measured]
            # (4): w <- w - Adam(g)
            self.num_steps[measured] += 1
            for moments, beta, value in zip(
                (self.first_moments, self.second_moments), BETAS, (gradient, gradient.square()), strict=True
            ):
                moments[measured] = beta * moments[measured] + (1 - beta) * value
            first, second = (
                moments[measured] / (1 - beta ** self.num_steps[measured])
                for moments, beta in zip((self.first_moments, self.second_moments), BETAS, strict=True)
            )
            self.logits[measured] -= self.learning_rate * first / (second.sqrt() + EPSILON)
        self.last_losses = torch.where(losses.isnan(), self.last_losses, losses)
        references = self.reference.losses.clone()
        return {"relative_progress": progress, "task_weights": self.weights(), "reference_losses": references}

    def _log_excess(self, losses: Tensor) -> Tensor:
        """log D, (num_tasks,); NaN where ``losses`` is."""
        return (losses - self.reference.losses).clamp_min(SMALLEST_EXCESS).log()

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
