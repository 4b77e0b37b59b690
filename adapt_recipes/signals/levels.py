"""Difficulty levels inside each task, and their shares: the local actors of HBO (arXiv 2505.12300).

This is our reading of its authors' code. theta_0 is the base model, and (x, y) are training examples of a task:

    (a) the levels: all (x, y), sorted by PPL(y; x, theta_0) and cut into levels of equal numbers, the easiest first
    (b) r(k) = mean over random (x, y) of level k of PPL(y; x, theta) / PPL(y; x, theta_0)
    (c) R(k) = r(k) / mean_k r(k)                                the reward of level k
    (d) p(k), the share of level k in its task                   an actor per task: ``Scorer`` with ``form: authors``

Ours are the numbers of levels and of examples, that p(k) is a share of the task's supervised tokens with ``sampling:
tokens``, and that within a level every example comes once before any comes twice.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor

from adapt_recipes import data
from adapt_recipes.data.sampler import Sampling
from adapt_recipes.mixture.scorer import Scorer
from adapt_recipes.signals.base_losses import BaseLosses
from adapt_recipes.signals.nonfinite import check_finite
from adapt_recipes.signals.passes import Tokens
from adapt_recipes.signals.probe import Probe
from adapt_recipes.strict import STRICT

BatchesOf = Callable[[Sequence[tuple[int, data.Example]]], list[data.MicroBatch]]


@dataclass(kw_only=True, config=STRICT)
class LevelsConfig:
    """The ``levels`` node of a config. The defaults are ours."""

    number: Annotated[int, Field(ge=2)] = 3
    """difficulty levels per task; a task with fewer examples has one per example"""
    examples: PositiveInt = 16
    """random training examples per level and update"""


class Levels:
    """The difficulty levels of all tasks and their shares, measured on the base model and then learned.

    Args:
        tasks: of the run, in the order of the mixture.
        config: of the levels.
        seed: of the run.
        sampling: of the run; within a task it is for levels what it is for tasks.
    """

    def __init__(self, tasks: Sequence[data.Task], config: LevelsConfig, *, seed: int, sampling: Sampling) -> None:
        self.config = config
        self._tasks = tasks
        self._seed = seed
        self._sampling: Sampling = sampling
        # In the order of the tasks; empty until measured.
        self._actors: list[_Actor] = []

    def measure(self, probe: Probe, batches_of: BatchesOf, *, cache_dir: Path, tokens: Tokens) -> None:
        """Measures the base model on all training examples, task by task, and cuts them into levels.

        The tokens count as read even if the losses come from the cache.

        Args:
            probe: of the run, before the first step.
            batches_of: makes this process's micro-batches of examples.
            cache_dir: see ``BaseLosses``.
            tokens: see ``passes.example_losses``.
        """
        for i, task in enumerate(self._tasks):
            batches = batches_of([(i, task.train.example(index)) for index in range(len(task.train))])
            probe.ledger.probe(batches)
            base = BaseLosses()
            base.measure(probe.model, batches, cache_dir=cache_dir, tokens=tokens)
            check_finite(probe.model, batches, [base.values], tasks=self._tasks, step=0, of="training")
            self._actors.append(self._actor(task, base.values.float()))

    def draw(self, task: int) -> tuple[int, bool]:
        """The next example of a task: its index in the training split, and whether it comes for the first time."""
        actor = self._actors[task]
        (draw,) = actor.sampler.draw(actor.shares, max_examples=1, max_tokens=sys.maxsize)
        return int(actor.indices[draw.task][draw.example_index]), draw.first_time

    def update(self, probe: Probe, batches_of: BatchesOf, update: int, *, tokens: Tokens) -> dict[str, Tensor]:
        """Measures random examples of every level with the current weights, and updates the actors.

        Args:
            probe, batches_of, tokens: as for ``measure``.
            update: number of the mixture update, each with other examples.

        Returns:
            To log, (num_tasks,) float64 each: ``level_k_rewards`` and ``level_k_probabilities``, k from 1; NaN for a
            task that has no such level.
        """
        examples, base_losses = [], []
        for task, actor in enumerate(self._actors):
            for level, indices in zip(actor.levels, actor.indices, strict=True):
                chosen = data.random_indices(level, self.config.examples, seed=self._seed, update=update)
                examples += [(task, level.train.example(i)) for i in chosen.tolist()]
                base_losses.append(actor.base_losses[indices[chosen]].double())
        losses = probe.example_losses(batches_of(examples), tokens=tokens)
        # (b): r(k) = mean over random (x, y) of level k of PPL(y; x, theta) / PPL(y; x, theta_0)
        ratios = (losses - torch.cat(base_losses)).exp().split([len(each) for each in base_losses])
        means = torch.stack([ratio.mean() for ratio in ratios]).split([len(actor.levels) for actor in self._actors])

        logged = {}
        for name in ("rewards", "probabilities"):
            for k in range(self.config.number):
                logged[f"level_{k + 1}_{name}"] = torch.full((len(self._tasks),), torch.nan, dtype=torch.float64)
        for task, (actor, r) in enumerate(zip(self._actors, means, strict=True)):
            # (c): R(k) = r(k) / mean_k r(k)
            rewards = r / r.mean()
            actor.learn(rewards)
            for k in range(len(rewards)):
                logged[f"level_{k + 1}_rewards"][task] = rewards[k]
                logged[f"level_{k + 1}_probabilities"][task] = actor.shares[k]
        return logged

    def state_dict(self) -> list[dict[str, Any]]:
        """Of each task. The levels follow from the base losses, so a resume needs no base model."""
        return [
            {
                "base_losses": actor.base_losses.clone(),
                "scorer": actor.scorer.state_dict(),
                "sampler": actor.sampler.state_dict(),
            }
            for actor in self._actors
        ]

    def load_state_dict(self, state: Sequence[Mapping[str, Any]]) -> None:
        self._actors = [self._actor(task, each["base_losses"]) for task, each in zip(self._tasks, state, strict=True)]
        for actor, each in zip(self._actors, state, strict=True):
            actor.sampler.load_state_dict(each["sampler"])
            actor.load_scorer(each["scorer"])

    def _actor(self, task: data.Task, base_losses: Tensor) -> _Actor:
        return _Actor(task, base_losses, number=self.config.number, seed=self._seed, sampling=self._sampling)


class _Actor:
    """The levels of one task and their shares.

    Attributes:
        base_losses: (num_examples,) float32, nats per token.
        indices: of each level's examples in the training split.
        levels: each as a task, for the sampler.
        shares: (num_levels,) float64, p(k).
    """

    def __init__(self, task: data.Task, base_losses: Tensor, *, number: int, seed: int, sampling: Sampling) -> None:
        self.base_losses = base_losses
        # (a): the examples sorted by PPL(y; x, theta_0), those with the same one in their order
        self.indices = base_losses.argsort(stable=True).split(level_sizes(len(base_losses), number))
        self.levels = [
            data.Task(f"{task.name}, level {k}", task.train.select(indices), None)
            for k, indices in enumerate(self.indices, start=1)
        ]
        # Not the run's seed, with which the random choice of a level would depend on that of the task.
        self.sampler = data.TokenSampler(self.levels, seed=f"{seed}, levels of {task.name}", sampling=sampling)
        # (d)
        self.scorer = Scorer(
            task_names=[level.name for level in self.levels],
            num_supervised_tokens=[int(level.train.num_supervised.sum()) for level in self.levels],
            budget_tokens=0,
            prior="proportional",
            form="authors",
        )
        self.shares = self.scorer.probabilities()

    def learn(self, rewards: Tensor) -> None:
        """One update of the shares from (num_levels,) float64 rewards."""
        self.scorer.update(task_tokens=torch.zeros_like(rewards), rewards=rewards)
        self.shares = self.scorer.probabilities()

    def load_scorer(self, state: Mapping[str, Any]) -> None:
        self.scorer.load_state_dict(state)
        self.shares = self.scorer.probabilities()


def level_sizes(num_examples: int, number: int) -> list[int]:
    """The numbers of examples of a task's levels, which differ by one at most."""
    return [len(part) for part in torch.arange(num_examples).tensor_split(min(number, num_examples))]
