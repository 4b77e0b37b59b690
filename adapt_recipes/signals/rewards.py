"""Rewards from which a scorer learns: one number per task, measured on a few examples of each.

MoS (Mixture-of-Skills, arXiv 2406.08811) and the methods that it is compared with. With a batch B_i of task i:

    (7)  z_i = mean over (x, y) in B_i of the mean over all tokens of x and y of the top layer's hidden states (here:
         all tokens that the model reads in training, that is, all but the last, which usually ends the answer)
    (8)  R(i) = (1/N) sum_n cos(z_i, z_n)                          task similarity, for transferability
    (9)  r(x, y) = PPL(y; x, theta) / PPL(y; x, theta_0)           theta_0: the base model; response tokens only (in the
         authors' code PPL(x, y) of the whole text, ``tokens: all``, of other training examples at every update,
         ``examples: fresh``)
    (10) R(i) = mean over (x, y) in B_i of r(x, y)                 remaining difficulty
    (a)  R(i) = (1/N) sum_j cos(grad L_dev_j, grad L_train_i)      MultiDDS-S, arXiv 2004.06748
    (b)  R(i) = mean over (x, y) in B_i of u(y; x, theta)          MultiUAT, arXiv 2109.02284: u is an uncertainty
    (c)  R(i) = mean over (x, y) in B_i of || grad L(x, y) ||      the global reward of HBO, arXiv 2505.12300 (our
         reading: that of its authors' code)

The interface is ``reward_interface.Reward``. For ``tune plan`` a reward also has ``gradients``, the number of gradients
of all weights that it keeps at a time; 0: it computes forward passes only. If it has a ``note`` for the reader of a
run, this is printed at the start and written to the log.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapt_recipes.errors import nearest
from adapt_recipes.signals import passes
from adapt_recipes.signals.reward_interface import TOKENS


class CosineSimilarity:
    """MoS's transferability, (7) and (8): the similarity of a task to all tasks, including itself.

    Args:
        task_names: the tasks, in order.
        model: see ``adapt_recipes.signals.passes``.
        specialist: MoSpec: the target task; (8) is then the similarity to it only.

    Raises:
        ValueError: ``specialist`` is not a task.
    """

    reads: tuple[str, ...] = ("train",)
    gradients = 0

    def __init__(self, *, task_names: Sequence[str], model: nn.Module, specialist: str | None = None) -> None:
        self.specialist = _task(specialist, task_names)
        self.num_tasks, self.model = len(task_names), model

    def __call__(self, *, train: Sequence[passes.ExampleBatch]) -> Tensor:
        """(num_tasks,) float64, in [-1, 1]. Not clamped, as in the authors' code: ``form: paper`` refuses R < 0."""
        # (7): z_i = mean over (x, y) in B_i of the mean over all tokens of the top layer's hidden states
        z = F.normalize(passes.task_embeddings(self.model, train, self.num_tasks), dim=1)
        # (8): R(i) = (1/N) sum_n cos(z_i, z_n)
        others = z if self.specialist is None else z[self.specialist : self.specialist + 1]
        return (z @ others.T).nanmean(1)


# What ``PerplexityRatio`` reads.
EXAMPLES: dict[str, tuple[str, ...]] = {"fixed": ("pool",), "fresh": ("train", "base_losses")}


class PerplexityRatio:
    """MoS's difficulty, (9) and (10): the perplexity of a task relative to that of the base model.

    A task that cannot be learned keeps the highest reward forever.

    Args:
        task_names: the tasks, in order.
        model: see ``adapt_recipes.signals.passes``.
        specialist: MoSpec: the target task; its reward counts twice.
        tokens: of which a perplexity is: ``answer`` (the paper) or ``all``, prompt included (the authors' code).
        examples: ``fixed``: the same at every update, so that the base model is measured once. ``fresh``: others at
            every update (the authors' code); the base model is measured each time, with a copy of its trainable weights
            that is kept in host memory.

    Raises:
        ValueError: ``specialist`` is not a task, or ``tokens`` or ``examples`` is unknown.
    """

    gradients = 0

    def __init__(
        self,
        *,
        task_names: Sequence[str],
        model: nn.Module,
        specialist: str | None = None,
        tokens: str = "answer",
        examples: str = "fixed",
    ) -> None:
        if examples not in EXAMPLES:
            raise ValueError(f"reward.examples: {examples!r}{nearest(str(examples), EXAMPLES)}")
        self.reads = EXAMPLES[examples]
        self.tokens = _tokens(tokens)
        self.specialist = _task(specialist, task_names)
        self.num_tasks, self.model = len(task_names), model

    def __call__(
        self,
        *,
        base_losses: Tensor,  # (num_examples,) float64, log PPL(y; x, theta_0)
        pool: Sequence[passes.ExampleBatch] = (),
        train: Sequence[passes.ExampleBatch] = (),
    ) -> Tensor:
        """(num_tasks,) float64, above 0. Of the pool, or of training examples; the other is empty."""
        examples = [*pool, *train]
        # (9): r(x, y) = PPL(y; x, theta) / PPL(y; x, theta_0)
        ratios = (passes.example_losses(self.model, examples, tokens=self.tokens) - base_losses).exp()
        # (10): R(i) = mean over (x, y) in B_i of r(x, y)
        rewards = passes.task_means(ratios, examples, self.num_tasks)
        if self.specialist is not None:
            rewards[self.specialist] *= 2
        return rewards


class GradientAlignment:
    """MultiDDS-S, (a): the effect of a step on a task's training loss on the validation losses of all tasks.

    It needs one backward pass per task on each split, and is the most expensive of the rewards. It keeps two gradients
    at a time, for any number of tasks.

    Args:
        task_names: the tasks, in order.
        model: see ``adapt_recipes.signals.passes``.
    """

    reads: tuple[str, ...] = ("validation", "train")
    gradients = 2

    def __init__(self, *, task_names: Sequence[str], model: nn.Module) -> None:
        self.num_tasks, self.model = len(task_names), model

    def __call__(self, *, validation: Sequence[passes.ExampleBatch], train: Sequence[passes.ExampleBatch]) -> Tensor:
        """(num_tasks,) float64, in [0, 1]; N counts the tasks with a validation split. A negative mean becomes 0."""
        # The mean of grad L_dev_j / || grad L_dev_j ||, with which (a) is one inner product per task. A gradient is
        # deleted before the next one is computed.
        mean: list[Tensor] = []
        tasks = _tasks_of(validation, self.num_tasks)
        for task in tasks:
            gradient = _task_gradient(self.model, validation, task, self.num_tasks)
            scale = 1 / (passes.norm(gradient) or 1.0) / len(tasks)
            mean = mean or [torch.zeros_like(part) for part in gradient]
            torch._foreach_add_(mean, gradient, alpha=scale)
            del gradient

        # (a): R(i) = (1/N) sum_j cos(grad L_dev_j, grad L_train_i)
        rewards = torch.full((self.num_tasks,), math.nan, dtype=torch.float64)
        for task in _tasks_of(train, self.num_tasks):
            gradient = _task_gradient(self.model, train, task, self.num_tasks)
            size = passes.norm(gradient)
            rewards[task] = passes.inner(gradient, mean) / size if size else 0.0
            del gradient
        return rewards.clamp(0, 1)


# MultiUAT's measures of the uncertainty of a model about an answer. p: the probability of the most likely token at each
# position of the answer; entropy: that of the distribution over tokens there. A higher value is less certain. The
# variance for an answer of one token is 0, so VarTP and ComEV are useless if all answers have one token.
MEASURES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "PreTP": lambda p, entropy: 1 - p.prod(),
    "ExpTP": lambda p, entropy: 1 - p.mean(),
    "VarTP": lambda p, entropy: p.var(correction=0),
    "ComEV": lambda p, entropy: p.var(correction=0) / p.mean(),
    "EntSent": lambda p, entropy: entropy.mean(),
    "EntEOS": lambda p, entropy: entropy[-1],
}


class Uncertainty:
    """MultiUAT, (b): the uncertainty of the model about the validation answers, over forward passes with dropout.

    Args:
        task_names: the tasks, in order.
        model: see ``adapt_recipes.signals.passes``.
        measure: one of ``MEASURES``: 1 minus the product or the mean of p, the variance of p, the variance divided by
            the mean, the mean entropy, or the entropy of the last token. The default is ours; the paper compares all.
            PreTP is near 1 for any long answer.
        mc_samples: forward passes, each with other dropout masks; null: the paper's 30 if the model has dropout, else
            one without.

    Raises:
        ValueError: the measure is unknown, or ``mc_samples`` is above 1 for a model without dropout.
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
        """(num_tasks,) float64, at least 0 (PreTP and ExpTP at most 1); NaN for a task without a validation split."""
        # (b): R(i) = mean over (x, y) in B_i of u(y; x, theta)
        values = passes.example_uncertainties(
            self.model, validation, self.measure, mc_samples=self.mc_samples, dropout=self.has_dropout
        )
        return passes.task_means(values, validation, self.num_tasks)


class GradientNorm:
    """HBO's global reward, (c): the mean norm of the gradient of a single example, as in the authors' code.

    It needs one backward pass per example, which micro-batches cannot share, and several processes take turns.

    Args:
        task_names: the tasks, in order.
        model: see ``adapt_recipes.signals.passes``.
        tokens: of which the loss is the mean: ``answer``, or ``all``, prompt included (the authors' code).

    Raises:
        ValueError: ``tokens`` is unknown.
    """

    reads: tuple[str, ...] = ("train",)
    gradients = 1

    def __init__(self, *, task_names: Sequence[str], model: nn.Module, tokens: str = "answer") -> None:
        self.tokens = _tokens(tokens)
        self.num_tasks, self.model = len(task_names), model

    def __call__(self, *, train: Sequence[passes.ExampleBatch]) -> Tensor:
        """(num_tasks,) float64, at least 0."""
        # (c): R(i) = mean over (x, y) in B_i of || grad L(x, y) ||
        norms = passes.example_gradient_norms(self.model, train, tokens=self.tokens)
        return passes.task_means(norms, train, self.num_tasks)


def _task(name: str | None, task_names: Sequence[str]) -> int | None:
    """The index of the target task; None: there is none."""
    if name is not None and name not in task_names:
        raise ValueError(f"reward.specialist: {name!r} is no task of this run{nearest(str(name), task_names)}")
    return None if name is None else list(task_names).index(name)


def _tokens(tokens: str) -> passes.Tokens:
    if tokens not in TOKENS:
        raise ValueError(f"reward.tokens: {tokens!r}{nearest(str(tokens), TOKENS)}")
    return cast(passes.Tokens, tokens)


def _tasks_of(batches: Sequence[passes.Batch], num_tasks: int) -> list[int]:
    """The tasks with examples in the batches."""
    return passes.num_supervised(batches, num_tasks).nonzero().flatten().tolist()


def _task_gradient(model: nn.Module, batches: Sequence[passes.Batch], task: int, num_tasks: int) -> list[Tensor]:
    """The gradient of the mean loss of one task."""
    weights = torch.zeros(num_tasks, dtype=torch.float64)
    weights[task] = 1
    return passes.loss_gradient(model, batches, weights)


def _has_dropout(model: nn.Module) -> bool:
    """Whether the model has dropout: in a dropout module, or in torchtune's attention, which has the rate itself."""
    rates = [
        module.p if isinstance(module, nn.Dropout) else getattr(module, "attn_dropout", 0.0)
        for module in model.modules()
    ]
    return any(rate > 0 for rate in rates)
