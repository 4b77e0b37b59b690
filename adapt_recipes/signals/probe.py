"""``Probe``: every measurement of the model outside training, counted in the ledger and checked to be finite."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from adapt_recipes.budget import Ledger
from adapt_recipes.data import MicroBatch, Task
from adapt_recipes.models import TokenLosses
from adapt_recipes.signals import passes
from adapt_recipes.signals.base_losses import BaseWeights
from adapt_recipes.signals.ksteps import kstep_differences, kstep_gradients, last_layers
from adapt_recipes.signals.nonfinite import check_dots, check_finite, check_rewards
from adapt_recipes.signals.passes import Scores
from adapt_recipes.training import precision

Batches = Sequence[MicroBatch]


class Probe:
    """Measures the model with its current weights, and leaves the model and every generator unchanged.

    The tokens it reads are counted in the ledger, once for each time they are read: those for the mixture as
    ``probe_tokens``, those of validations and the test as ``validation_tokens``. A value that is not finite ends the
    run with an error that names the step, the task and, if one can be found, the example.

    Args:
        model: of the run.
        ledger: of the run.
        tasks: of the run, in the order of the mixture.
        targets: tasks that are validated on and never trained; in batches they are numbered after the others.
    """

    def __init__(self, model: TokenLosses, ledger: Ledger, tasks: Sequence[Task], targets: Sequence[Task] = ()) -> None:
        self.model, self.ledger = model, ledger
        self.tasks, self.targets = [*tasks], [*targets]
        self.task_names = [task.name for task in tasks]

    def scores(self, batches: Batches, *, split: Literal["validation", "test"] = "validation") -> Scores:
        """Mean loss and exact match per task, of a whole split: a validation, or the test.

        Returns:
            (num_tasks + num_targets,) float64 each; NaN for a task without that split.
        """
        self.ledger.validate(batches)
        # One context around all batches casts the weights once.
        with self.model.autocast():
            scores = passes.task_scores(self.model, batches, len(self.tasks + self.targets))
        self._check_losses(scores.losses, batches, split)
        return scores

    def losses(self, batches: Batches) -> Tensor:
        """Mean loss per task, of validation examples, for the mixture.

        Returns:
            (num_tasks + num_targets,) float64, nats per supervised token; NaN for a task without a validation split.
        """
        self.ledger.probe(batches)
        with self.model.autocast():
            losses = passes.task_losses(self.model, batches, len(self.tasks + self.targets))
        self._check_losses(losses, batches, "validation")
        return losses

    def _check_losses(self, losses: Tensor, batches: Batches, split: Literal["validation", "test"]) -> None:
        """Those of the tasks that have the split are finite."""
        tasks = self.tasks + self.targets
        measured = losses[[getattr(task, split) is not None for task in tasks]]
        check_finite(self.model, batches, [measured], tasks=tasks, step=self.ledger.steps, of=split)

    def gradient(
        self,
        batches: Batches,
        weights: Tensor,  # (num_tasks,) float64, or (num_tasks + num_targets,)
        *,
        of: Literal["training", "validation"],
    ) -> list[Tensor]:
        """The gradient of ``sum_j weights_j * (mean loss of task j)``, one tensor per trainable parameter.

        Without weights of their own targets have the weight 0.

        ``of`` names the examples in an error.
        """
        self.ledger.probe(batches)
        tasks = self.tasks + self.targets
        weights = F.pad(weights, (0, len(tasks) - len(weights)))
        with self.model.autocast():
            gradient = passes.loss_gradient(self.model, batches, weights)
        check_finite(self.model, batches, gradient, tasks=tasks, step=self.ledger.steps, of=of)
        return gradient

    def gradient_dots(
        self,
        batches: Batches,
        direction: Sequence[Tensor],  # one tensor per trainable parameter
        *,
        estimator: Literal["finite_difference", "backward"],
        dtype: precision.DType,
    ) -> Tensor:
        """``<direction, gradient of task i's mean loss>`` on training examples: (num_tasks,) float64."""
        self.ledger.probe(batches)
        num_tasks = len(self.tasks + self.targets)
        if estimator == "finite_difference":
            # On both sides of the weights.
            self.ledger.probe(batches)
            step = precision.finite_difference_step(dtype)
            dots = passes.gradient_dots(self.model, batches, direction, num_tasks, **step)
        else:
            dots = passes.gradient_dots_by_backward(self.model, batches, direction, num_tasks)
        names = [task.name for task in self.tasks + self.targets]
        check_dots(dots, batches, task_names=names, step=self.ledger.steps)
        return dots[: len(self.tasks)]

    def kstep_differences(
        self,
        train: Sequence[Batches],  # of each of the K steps
        validation: Batches,
        probabilities: Tensor,  # (num_tasks,) float64, the mixture
        weights: Tensor,  # (num_tasks,) float64, or (num_tasks + num_targets,), of the objective
        *,
        estimator: Literal["finite_difference", "backward"],
        learning_rate: float,
        validation_weight: float,
        num_last_layers: int | None = None,  # that move; None: all weights that train
    ) -> Tensor:
        """What K look-ahead steps say about each task, (3) or (4) of ``ksteps.py``: (num_tasks,) float64."""
        names = [task.name for task in self.tasks + self.targets]
        p, w = (F.pad(each, (0, len(names) - len(each))) for each in (probabilities, weights))
        settings: dict[str, float] = {"learning_rate": learning_rate}
        reads = (1, 1)
        if estimator == "finite_difference":
            # Each step's examples for a gradient and a measurement on both paths; the objective's in each step of one.
            reads = (4, len(train))
            settings["validation_weight"] = validation_weight
        for batches in [*train] * reads[0] + [validation] * reads[1]:
            self.ledger.probe(batches)
        measure = kstep_differences if estimator == "finite_difference" else kstep_gradients
        with passes.only_trained(self.model, last_layers(self.model, num_last_layers)):
            u = measure(self.model, train, validation, p, w, **settings)
        check_dots(
            u,
            [*chain(*train)],
            task_names=names,
            step=self.ledger.steps,
            what="after the look-ahead steps the loss",
            advice="lower mixture.lookahead_lr or probe.steps",
        )
        return u[: len(self.tasks)]

    def gradient_moments(self, halves: Sequence[Batches]) -> dict[str, Tensor]:
        """The size and the noise of gradients, as ``passes.gradient_moments`` measures them, by signal."""
        for half in halves:
            self.ledger.probe(half)
        in_both = torch.stack([passes.num_supervised(half, len(self.tasks)) for half in halves]).amin(0) > 0
        if not in_both.any():
            raise ValueError("probe.examples: the variance of gradients needs at least 2 examples per task")
        squared_norms, variances = passes.gradient_moments(self.model, halves, len(self.tasks))
        for values in (squared_norms, variances):
            known = torch.where(in_both, values, 0.0)
            check_dots(known, halves[0], task_names=self.task_names, step=self.ledger.steps)
        return {"squared_gradient_norms": squared_norms, "gradient_variances": variances}

    def step_gains(self, batches: Sequence[Batches], *, learning_rate: float) -> Tensor:
        """What one step on each task alone decreases its loss, relative to it: (num_tasks,) float64.

        Args:
            batches: the training examples of each task.
            learning_rate: of the step.
        """
        # For the loss before the step, its gradient, and the loss after it.
        for own in [*batches] * 3:
            self.ledger.probe(own)
        gains = passes.step_gains(self.model, batches, learning_rate=learning_rate)
        check_dots(
            gains,
            [*chain(*batches)],
            task_names=self.task_names,
            step=self.ledger.steps,
            what="before or after a step on the task alone the loss",
            advice="lower mixture.lookahead_lr",
        )
        return gains

    def base_losses(self, weights: BaseWeights, batches: Batches, *, tokens: passes.Tokens) -> Tensor:
        """The base model's mean loss of each training example: (num_examples,) float64, nats per token."""
        with weights.loaded_into(self.model):
            return self.example_losses(batches, tokens=tokens)

    def example_losses(self, batches: Batches, *, tokens: passes.Tokens) -> Tensor:
        """The mean loss of each training example: (num_examples,) float64, nats per token."""
        self.ledger.probe(batches)
        losses = passes.example_losses(self.model, batches, tokens=tokens)
        check_finite(self.model, batches, [losses], tasks=self.tasks, step=self.ledger.steps, of="training")
        return losses

    def rewards(
        self,
        reward: Callable[..., Tensor],
        batches: Mapping[str, Batches],  # by the names in reward.reads
        base_losses: Tensor,  # (num_examples,) float64, where the reward reads them or the pool; counted already
    ) -> Tensor:
        """One reward per task, (num_tasks,) float64. A name that the reward reads several times counts each time."""
        names: tuple[str, ...] = reward.reads  # type: ignore[attr-defined]
        reads = [name for name in names if name != "base_losses"]
        for name in reads:
            self.ledger.probe(batches[name])
        read = {name: batches[name] for name in reads}
        rewards = reward(**read, **({"base_losses": base_losses} if {"pool", "base_losses"} & {*names} else {}))
        component = type(reward).__name__
        check_rewards(rewards, read.values(), task_names=self.task_names, step=self.ledger.steps, reward=component)
        return rewards
