"""What a scorer learns from: one reward a task, measured on a few examples of each.

MoS (Mixture-of-Skills, arXiv 2406.08811) and the methods that it is compared with. With a batch B_i of task i:

    (7)  z_i = mean over (x, y) in B_i of the mean over all tokens of x and y of the top layer's hidden states (here:
         of all that the model reads in training, which is all but the last, as a rule the one that ends the answer)
    (8)  R(i) = (1/N) sum_n cos(z_i, z_n)                          how much i has in common with the others, transfer
    (9)  r(x, y) = PPL(y; x, theta) / PPL(y; x, theta_0)           theta_0: the base model; response tokens only
    (10) R(i) = mean over (x, y) in B_i of r(x, y)                 how hard i still is, difficulty
    (a)  R(i) = (1/N) sum_j cos(grad L_dev_j, grad L_train_i)      MultiDDS-S, arXiv 2004.06748
    (b)  R(i) = mean over (x, y) in B_i of u(y; x, theta)          MultiUAT, arXiv 2109.02284: u is an uncertainty
    (c)  R(i) = || grad L_train_i ||                               the global reward of HBO, arXiv 2505.12300

A reward is built with ``task_names`` and ``model``, and called with the batches that it ``reads``, by name, a name as
often as it is read: ``train`` (training examples, others at every update), ``validation`` (always the same) or ``pool``
(training examples, always the same, and with it ``base_losses``, what they had before the first step). It returns
(num_tasks,) float64 on the CPU; NaN for a task without an example in what it reads. One of your own is such a class.
For ``tune plan`` it says how many ``gradients`` of all weights it has at a time; 0: it computes forwards alone. What a
reader of the run should know stands in ``note``, where there is one: it is said at the start, and in the log.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapt_recipes.errors import nearest
from adapt_recipes.signals import passes


class CosineSimilarity:
    """MoS's transferability, (7) and (8): what a task has in common with all tasks, itself included.

    Args:
        task_names: the tasks, in order.
        model: see ``adapt_recipes.signals.passes``.
        specialist: MoSpec: the task that alone is to be done well; (8) is then the similarity with it only.

    Raises:
        ValueError: ``specialist`` is no task.
    """

    reads: tuple[str, ...] = ("train",)
    gradients = 0

    def __init__(self, *, task_names: Sequence[str], model: nn.Module, specialist: str | None = None) -> None:
        self.specialist = _task(specialist, task_names)
        self.num_tasks, self.model = len(task_names), model

    def __call__(self, *, train: Sequence[passes.ExampleBatch]) -> Tensor:
        """(num_tasks,), at most 1. A negative mean is given as 0 (ours), for (6) of the scorer needs rewards >= 0."""
        z = F.normalize(passes.task_embeddings(self.model, train, self.num_tasks), dim=1)  # (7)
        others = z if self.specialist is None else z[self.specialist : self.specialist + 1]
        return (z @ others.T).nanmean(1).clamp(0, 1)  # (8)


class PerplexityRatio:
    """MoS's difficulty, (9) and (10): how little of a task has been learned since the base model.

    What cannot be learned keeps the highest reward for ever.

    Args:
        task_names: the tasks, in order.
        model: see ``adapt_recipes.signals.passes``.
        specialist: MoSpec: the task that alone is to be done well; its reward counts twice.

    Raises:
        ValueError: ``specialist`` is no task.
    """

    reads: tuple[str, ...] = ("pool",)
    gradients = 0

    def __init__(self, *, task_names: Sequence[str], model: nn.Module, specialist: str | None = None) -> None:
        self.specialist = _task(specialist, task_names)
        self.num_tasks, self.model = len(task_names), model

    def __call__(self, *, pool: Sequence[passes.ExampleBatch], base_losses: Tensor) -> Tensor:
        """(num_tasks,), above 0; ``base_losses``: (num_examples,), log PPL(y; x, theta_0) of the pool."""
        ratios = (passes.example_losses(self.model, pool) - base_losses).exp()  # (9)
        rewards = passes.task_means(ratios, pool, self.num_tasks)  # (10)
        if self.specialist is not None:
            rewards[self.specialist] *= 2
        return rewards


class GradientAlignment:
    """MultiDDS-S, (a): how much a step on a task's training loss does for all tasks' validation losses.

    A backward a task on either split: the dearest of the rewards. Two gradients are kept at a time, however many tasks.

    Args:
        task_names: the tasks, in order.
        model: see ``adapt_recipes.signals.passes``.
    """

    reads: tuple[str, ...] = ("validation", "train")
    gradients = 2

    def __init__(self, *, task_names: Sequence[str], model: nn.Module) -> None:
        self.num_tasks, self.model = len(task_names), model

    def __call__(self, *, validation: Sequence[passes.ExampleBatch], train: Sequence[passes.ExampleBatch]) -> Tensor:
        """(num_tasks,), at most 1; N counts the tasks with a validation split. Negative: 0, as in CosineSimilarity."""
        mean: list[Tensor] = []  # of grad L_dev_j / || grad L_dev_j ||, which makes (a) one product a task
        tasks = _tasks_of(validation, self.num_tasks)
        for task in tasks:
            gradient = _task_gradient(self.model, validation, task, self.num_tasks)
            scale = 1 / (passes.norm(gradient) or 1.0) / len(tasks)
            mean = mean or [torch.zeros_like(part) for part in gradient]
            torch._foreach_add_(mean, gradient, alpha=scale)
            del gradient  # before the next one is made
        rewards = torch.full((self.num_tasks,), math.nan, dtype=torch.float64)
        for task in _tasks_of(train, self.num_tasks):
            gradient = _task_gradient(self.model, train, task, self.num_tasks)
            size = passes.norm(gradient)
            rewards[task] = passes.inner(gradient, mean) / size if size else 0.0
            del gradient
        return rewards.clamp(0, 1)


# MultiUAT's measures of how unsure a model is of an answer. p: the probability of the likeliest token at each of the
# answer's positions, entropy: of all tokens there. The higher, the less sure. The variance of an answer of one token is
# 0: where all answers are, VarTP and ComEV teach a scorer nothing.
MEASURES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "PreTP": lambda p, entropy: 1 - p.prod(),
    "ExpTP": lambda p, entropy: 1 - p.mean(),
    "VarTP": lambda p, entropy: p.var(correction=0),
    "ComEV": lambda p, entropy: p.var(correction=0) / p.mean(),
    "EntSent": lambda p, entropy: entropy.mean(),
    "EntEOS": lambda p, entropy: entropy[-1],
}


class Uncertainty:
    """MultiUAT, (b): how unsure the model is of the validation answers, over several forward passes with dropout.

    Args:
        task_names: the tasks, in order.
        model: see ``adapt_recipes.signals.passes``.
        measure: one of ``MEASURES``: 1 minus the product or the mean of the p, their variance alone or over their mean,
            the mean entropy, or that of the last token. The default is ours; the paper compares all. PreTP is near 1
            for any long answer.
        mc_samples: forward passes, each with other dropout masks; null: the paper's 30 where the model has dropout,
            else one without.

    Raises:
        ValueError: an unknown measure; ``mc_samples`` above 1 for a model without dropout, where all would be equal.
    """

    gradients = 0

    def __init__(
        self, *, task_names: Sequence[str], model: nn.Module, measure: str = "EntSent", mc_samples: int | None = None
    ) -> None:
        if measure not in MEASURES:
            raise ValueError(f"reward.measure: {measure!r}{nearest(str(measure), MEASURES)}")
        if mc_samples is not None and mc_samples < 1:
            raise ValueError(f"reward.mc_samples: has to be at least 1, not {mc_samples}")
        self.has_dropout = _has_dropout(model)
        if mc_samples is not None and mc_samples > 1 and not self.has_dropout:
            raise ValueError(
                f"reward.mc_samples: {mc_samples} samples need dropout, and the model has none; leave the key out"
            )
        self.measure = MEASURES[measure]
        self.mc_samples = mc_samples or (30 if self.has_dropout else 1)
        self.reads = ("validation",) * self.mc_samples
        self.num_tasks, self.model = len(task_names), model
        self.note = "the model has no dropout: uncertainty is that of one forward pass"
        if self.has_dropout:
            self.note = f"uncertainty is the mean over {self.mc_samples} forward passes with dropout"

    def __call__(self, *, validation: Sequence[passes.ExampleBatch]) -> Tensor:
        """(num_tasks,), at least 0 (PreTP and ExpTP at most 1); NaN for a task without a validation split."""
        values = passes.example_uncertainties(
            self.model, validation, self.measure, mc_samples=self.mc_samples, dropout=self.has_dropout
        )
        return passes.task_means(values, validation, self.num_tasks)


class GradientNorm:
    """HBO's global reward, (c): how much a task still pulls at the weights.

    Args:
        task_names: the tasks, in order.
        model: see ``adapt_recipes.signals.passes``.
    """

    reads: tuple[str, ...] = ("train",)
    gradients = 1

    def __init__(self, *, task_names: Sequence[str], model: nn.Module) -> None:
        self.num_tasks, self.model = len(task_names), model

    def __call__(self, *, train: Sequence[passes.ExampleBatch]) -> Tensor:
        """(num_tasks,), at least 0."""
        rewards = torch.full((self.num_tasks,), math.nan, dtype=torch.float64)
        for task in _tasks_of(train, self.num_tasks):
            rewards[task] = passes.norm(_task_gradient(self.model, train, task, self.num_tasks))
        return rewards


def _task(name: str | None, task_names: Sequence[str]) -> int | None:
    """The index of the specialist's task, if there is one."""
    if name is not None and name not in task_names:
        raise ValueError(f"reward.specialist: {name!r} is no task of this run{nearest(str(name), task_names)}")
    return None if name is None else list(task_names).index(name)


def _tasks_of(batches: Sequence[passes.Batch], num_tasks: int) -> list[int]:
    """The tasks that there are examples of."""
    return passes.num_supervised(batches, num_tasks).nonzero().flatten().tolist()


def _task_gradient(model: nn.Module, batches: Sequence[passes.Batch], task: int, num_tasks: int) -> list[Tensor]:
    weights = torch.zeros(num_tasks, dtype=torch.float64)
    weights[task] = 1
    return passes.loss_gradient(model, batches, weights)


def _has_dropout(model: nn.Module) -> bool:
    """Whether training mode drops anything: a dropout module, or torchtune's attention, which keeps the rate itself."""
    rates = [
        module.p if isinstance(module, nn.Dropout) else getattr(module, "attn_dropout", 0.0)
        for module in model.modules()
    ]
    return any(rate > 0 for rate in rates)
