"""Draws examples so that every task gets the share of supervised tokens that the mixture gives it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from adapt_recipes.data.examples import IGNORE_INDEX, Example, Examples, Task


class Draw(NamedTuple):
    """One example drawn for training.

    Attributes:
        task: index of the task.
        example_index: of the example in the task's training split.
        num_supervised_tokens: those that count; fewer than the example has only if the budget ends within it.
        first_time: whether this is the task's first epoch.
    """

    task: int
    example_index: int
    num_supervised_tokens: int
    first_time: bool


Sampling = Literal["tokens", "example", "dataset"]


class TokenSampler:
    """The deficit sampler: ``p`` is a task's share of *supervised tokens*, however long its examples are.

    The task with the largest deficit comes next. For an example of ``l`` supervised tokens drawn from task ``k``,
    ``d += p * l; d[k] -= l``. The next example comes from ``argmax d`` over tasks with ``p > 0``, ties to the first.
    The share spent always stays within O(1) examples of ``p``, also while ``p`` changes. Within a task every example
    comes once before any comes twice, in an order that depends on the seed, the task's name and the epoch alone.

    Args:
        tasks: the tasks, in the order of the mixture.
        seed: of the run, or any text in its place.
        max_epochs: no task is drawn more often than this; whole examples only. None: any number of epochs.
        sampling: ``tokens``: as above. ``example``: the task of every example is drawn at random with the chances p, as
            in the authors' code of MoS (arXiv 2406.08811). ``dataset``: that of a whole step is, as in their paper.
        next_example: given a task, the index of its next example and whether that comes for the first time; None: as
            above.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        *,
        seed: int | str,
        max_epochs: float | None = None,
        sampling: Sampling = "tokens",
        next_example: Callable[[int], tuple[int, bool]] | None = None,
    ) -> None:
        assert max_epochs is None or next_example is None, "caps are of examples in the order of the sampler"
        self._tasks = tasks
        self._seed = seed
        self.sampling = sampling
        self._next_example = next_example or self._next_in_order
        self._max_epochs = max_epochs
        # numpy, because draw loops over examples and operations on small tensors are several times slower.
        self._lengths = [task.train.num_supervised.numpy() for task in tasks]
        self._deficits = np.zeros(len(tasks))
        self._num_drawn = np.zeros(len(tasks), dtype=np.int64)
        # task -> (epoch, order). Computed from the seed, so it is not part of the state.
        self._orders: dict[int, tuple[int, np.ndarray]] = {}
        self._max_drawn = np.full(len(tasks), np.iinfo(np.int64).max)
        if max_epochs is not None:
            self._max_drawn, _ = self._within(max_epochs)

    def draw(
        self,
        probabilities: Tensor,  # (num_tasks,) float64
        *,
        max_tokens: int,
        max_examples: int | None = None,
        target_tokens: int | None = None,
    ) -> list[Draw]:
        """The examples of one step: so many examples, or as many as hold so many supervised tokens.

        Args:
            probabilities: of the mixture.
            max_tokens: supervised tokens left in the budget; an example beyond them counts only up to there.
            max_examples: stop after this many examples; None: ``target_tokens`` says when to stop.
            target_tokens: stop after the example with which the step holds this many supervised tokens, or more; the
                first example is taken in any case. None: ``max_examples`` says when to stop.

        Returns:
            At least one example. The step is smaller if the budget ends within it, or if all tasks with a share have
            reached ``max_epochs``.
        """
        if max_examples is None and target_tokens is None:
            raise ValueError("batch_tokens: the recipe has to give it to TokenSampler.draw, see Ledger.step_target")
        most = math.inf if max_examples is None else max_examples
        target = max_tokens if target_tokens is None else min(target_tokens, max_tokens)
        assert most >= 1 and max_tokens >= 1
        if self.sampling != "tokens":
            # The same number of examples drawn before gives the same tasks, so a resume has nothing more to restore.
            generator = _generator("task", self._seed, self._num_drawn.sum())
        if self.sampling == "dataset":
            only = torch.multinomial(probabilities, 1, generator=generator)
            probabilities = torch.zeros_like(probabilities).scatter(0, only, 1.0)
        shares = probabilities.numpy()
        closed = np.where((shares > 0) & (self._num_drawn < self._max_drawn), 0.0, np.inf)
        assert not closed.all(), "all tasks with a share have reached their cap"
        draws: list[Draw] = []
        held = 0
        while not draws or (len(draws) < most and held < target):
            if self.sampling == "example":
                chances = probabilities.masked_fill(torch.from_numpy(closed) > 0, 0.0)
                task = int(torch.multinomial(chances, 1, generator=generator))
            else:
                task = int(np.argmax(self._deficits - closed))
            index, first_time = self._next_example(task)
            length = int(self._lengths[task][index])
            self._num_drawn[task] += 1
            self._deficits += shares * length
            self._deficits[task] -= length
            draws.append(Draw(task, index, min(length, max_tokens - held), first_time))
            held += length
            if self._num_drawn[task] == self._max_drawn[task]:
                closed[task] = np.inf
                if closed.all():
                    break
        return draws

    def caps(self, budget_tokens: int) -> Tensor | None:
        """(num_tasks,) int64, supervised tokens of the examples within ``max_epochs``; None: any number.

        Raises:
            ValueError: all together they are less than the budget.
        """
        if self._max_epochs is None:
            return None
        _, tokens = self._within(self._max_epochs)
        if budget_tokens > tokens.sum():
            available = sum(int(lengths.sum()) for lengths in self._lengths)
            # In steps of 0.01; whole examples may need a little more than budget / available.
            steps = itertools.count(-(-100 * budget_tokens // available))
            enough = next(n / 100 for n in steps if self._within(n / 100)[1].sum() >= budget_tokens)
            raise ValueError(
                f"tasks.max_epochs_per_task: {self._max_epochs:.10g} epochs of all tasks are {tokens.sum()} supervised "
                f"tokens, fewer than the budget of {budget_tokens}; set {enough:.10g} or more, or lower the budget"
            )
        return torch.from_numpy(tokens)

    def example(self, draw: Draw) -> Example:
        """A drawn example, with labels beyond the budget masked."""
        example = self._tasks[draw.task].train.example(draw.example_index)
        if draw.num_supervised_tokens == self._lengths[draw.task][draw.example_index]:
            return example
        tokens, labels = example
        counted = (labels != IGNORE_INDEX).cumsum(0) <= draw.num_supervised_tokens
        return Example(tokens, labels.masked_fill(~counted, IGNORE_INDEX))

    @property
    def num_drawn(self) -> Tensor:
        """(num_tasks,) int64, examples drawn from each task since the run began."""
        return torch.from_numpy(self._num_drawn.copy())

    def _within(self, max_epochs: float) -> tuple[np.ndarray, np.ndarray]:
        """The whole examples of each task within so many epochs, and their tokens: (num_tasks,) int64 each."""
        examples, tokens = np.zeros((2, len(self._tasks)), dtype=np.int64)
        epochs = int(max_epochs)
        for task, lengths in enumerate(self._lengths):
            # Of the last, incomplete epoch: as many as fit.
            in_order = lengths[self._order(task, epochs)].cumsum()
            total = int(in_order[-1])
            number = int(np.searchsorted(in_order, max_epochs * total - epochs * total, side="right"))
            examples[task] = epochs * len(lengths) + number
            tokens[task] = epochs * total + (in_order[number - 1] if number else 0)
        return examples, tokens

    def _next_in_order(self, task: int) -> tuple[int, bool]:
        """The index of the task's next example, and whether it comes for the first time."""
        epoch, position = divmod(int(self._num_drawn[task]), len(self._lengths[task]))
        return int(self._order(task, epoch)[position]), epoch == 0

    def _order(self, task: int, epoch: int) -> np.ndarray:
        """The order of the task's examples in one epoch, (num_examples,) int64."""
        if task not in self._orders or self._orders[task][0] != epoch:
            generator = _generator("order", self._seed, self._tasks[task].name, epoch)
            self._orders[task] = (epoch, torch.randperm(len(self._lengths[task]), generator=generator).numpy())
        return self._orders[task][1]

    def state_dict(self) -> dict[str, Any]:
        return {"deficits": torch.from_numpy(self._deficits.copy()), "num_drawn": self.num_drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._deficits[:] = state["deficits"].numpy()
        self._num_drawn[:] = state["num_drawn"].numpy()


def count_tokens(draws: Sequence[Draw], num_tasks: int) -> Tensor:
    """(num_tasks,) int64, supervised tokens of the draws by task."""
    counts = [0] * num_tasks
    for draw in draws:
        counts[draw.task] += draw.num_supervised_tokens
    return torch.tensor(counts)


def count_unique(draws: Sequence[Draw]) -> int:
    """Supervised tokens of examples that are drawn for the first time."""
    return sum(draw.num_supervised_tokens for draw in draws if draw.first_time)


def draw_names(draws: Sequence[Draw], tasks: Sequence[Task]) -> list[str]:
    """The name of each draw in an error."""
    return [f"training example {draw.example_index} of task '{tasks[draw.task].name}'" for draw in draws]


def validation_examples(tasks: Sequence[Task], count: int | None = None) -> list[tuple[int, Example]]:
    """The validation split, each example with the index of its task.

    Args:
        tasks: in the order of the mixture; those without a validation split are skipped.
        count: the first ``count`` examples of each task, always the same ones; None: all.
    """
    return _examples([task.validation for task in tasks], count)


def test_examples(tasks: Sequence[Task]) -> list[tuple[int, Example]]:
    """The test split, each example with the index of its task; empty if no task has one.

    Nothing reads it with the model before the run has ended.
    """
    return _examples([task.test for task in tasks])


def _examples(splits: Sequence[Examples | None], count: int | None = None) -> list[tuple[int, Example]]:
    """The first ``count`` examples of each task's split."""
    present = [(i, split) for i, split in enumerate(splits) if split is not None]
    return [(i, split.example(k)) for i, split in present for k in range(len(split))[:count]]


def random_examples(tasks: Sequence[Task], count: int, *, seed: int, update: int | None) -> list[tuple[int, Example]]:
    """Random training examples for a probe, each with the index of its task; independent of what the sampler draws.

    Args:
        tasks: in the order of the mixture.
        count: examples of each task; all of them if it has fewer.
        seed: of the run.
        update: number of the mixture update, each with other examples; None: the pool, the same at every update.
    """
    return [
        (i, task.train.example(index))
        for i, task in enumerate(tasks)
        for index in random_indices(task, count, seed=seed, update=update).tolist()
    ]


def random_indices(task: Task, count: int, *, seed: int, update: int | None) -> Tensor:
    """(count,) int64, or fewer: the training examples of one task that ``random_examples`` gives."""
    return torch.randperm(len(task.train), generator=_generator("probe", seed, task.name, update))[:count]


def _generator(*key: object) -> torch.Generator:
    """A generator seeded by ``key``, the same on every machine."""
    digest = blake2b("\0".join(map(str, key)).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))
