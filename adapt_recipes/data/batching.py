"""Micro-batches of examples that begin alike, distributed to the processes."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from adapt_recipes.data.examples import IGNORE_INDEX, Example
from adapt_recipes.data.packing import shared_with_previous, supervised_lengths
from adapt_recipes.training.process_group import rank, world_size


class MicroBatch(NamedTuple):
    """Examples computed in one forward pass, padded on the right; ``packing.py`` says what the model computes of them.

    Attributes:
        tokens: (batch, length) int64, padded with 0.
        labels: (batch, length) int64, padded with ``IGNORE_INDEX``.
        tasks: (batch,) int64, each row's task.
        rows: (batch,) int64, the index of each row in the list that was batched. -1 is a dummy row: one token without a
            label, for a process that has no example while others have some.
        lengths: (batch,) int64, positions of each row that are not padding.
        num_tokens: positions that are not padding, in this forward pass on all processes together.
        num_supervised_tokens: labels that count in the loss, on all processes together.
        computed_tokens: positions that the model computes, on all processes together: without padding, and beginnings
            that rows share once.
    """

    tokens: Tensor
    labels: Tensor
    tasks: Tensor
    rows: Tensor
    lengths: Tensor
    num_tokens: int
    num_supervised_tokens: int
    computed_tokens: int

    @property
    def supervised_tasks(self) -> Tensor:
        """(num_supervised,) int64: the task of each supervised position on this process, row by row."""
        return self.tasks.unsqueeze(1).expand_as(self.labels)[self.labels != IGNORE_INDEX]

    def to(self, device: torch.device) -> MicroBatch:
        """The same micro-batch on a device."""
        return self._replace(
            tokens=self.tokens.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            tasks=self.tasks.to(device, non_blocking=True),
        )


def micro_batches(
    examples: Sequence[Example], tasks: Sequence[int], *, max_tokens: int, rank: int = 0, world_size: int = 1
) -> list[MicroBatch]:
    """Splits examples into as few micro-batches as possible, as equal as possible, and distributes them to processes.

    The examples are sorted by their tokens, so that those that begin alike are neighbors, and the list is cut. Each
    process has the same number of micro-batches: in a round every process computes one and waits for the slowest. All
    processes compute the same cuts without communication.

    Args:
        examples: the same list on every process.
        tasks: the task of each example.
        max_tokens: bound on the tokens computed in one forward pass, where a shared token counts as an eighth, which is
            about the memory of its keys and values; a longer example is computed alone.
        rank: of this process.
        world_size: number of processes.

    Returns:
        This process's micro-batches, the largest first, so that one that does not fit in memory fails at once.
    """
    if not examples:
        return []
    order = sorted(range(len(examples)), key=lambda i: (examples[i].tokens.tolist(), i))
    all_tokens, all_labels = _padded([examples[i] for i in order])
    lengths = supervised_lengths(all_labels).numpy()
    shared = shared_with_previous(all_tokens.numpy(), lengths)

    parts = _parts(lengths, lengths - shared + shared // 8, max_tokens, world_size)
    # The first row of a part shares nothing.
    sizes = [int(lengths[part].sum() - shared[part[1:]].sum()) for part in map(list, parts)]
    by_size = sorted(range(len(parts)), key=lambda i: -sizes[i])
    computed = [0] * world_size  # tokens, by process
    batches = []
    for first in range(0, len(parts), world_size):
        in_round = by_size[first : first + world_size]
        # The process that has computed least gets the largest part.
        by_need = sorted(range(world_size), key=lambda process: computed[process])
        for i, process in zip(in_round, by_need, strict=True):
            computed[process] += max(1, sizes[i])
        everything = [examples[order[place]] for i in in_round for place in parts[i]]
        num_tokens = sum(len(example.tokens) for example in everything)
        num_supervised = int((torch.cat([each.labels for each in everything]) != IGNORE_INDEX).sum())
        totals = num_tokens, num_supervised, sum(max(1, sizes[i]) for i in in_round)
        if mine := [order[place] for place in parts[in_round[by_need.index(rank)]]]:
            tokens, labels = _padded([examples[i] for i in mine])
            lengths_here = torch.tensor([len(examples[i].tokens) for i in mine])
            of_rows = torch.tensor([tasks[i] for i in mine]), torch.tensor(mine), lengths_here
            batches.append(MicroBatch(tokens, labels, *of_rows, *totals))
        else:
            batches.append(_dummy(tasks[order[parts[in_round[0]][0]]], totals))
    return batches


def build_batches(
    examples: Sequence[tuple[int, Example]],  # each with the index of its task
    *,
    max_tokens: int,
    device: torch.device,
) -> list[MicroBatch]:
    """``micro_batches`` of this process, on its device."""
    tasks, rows = [task for task, _ in examples], [example for _, example in examples]
    batches = micro_batches(rows, tasks, max_tokens=max_tokens, rank=rank(), world_size=world_size())
    return [batch.to(device) for batch in batches]


# Indices into the sorted list.
Part = range


def _parts(lengths: np.ndarray, added: np.ndarray, max_tokens: int, world_size: int) -> list[Part]:
    """The cuts with the fewest rounds; among these, with the smallest largest part. Some parts may be empty."""
    # Filling parts one after the other gives the fewest for a bound. (A part never computes more than a longer one.)
    num_parts = -(-len(_filled(lengths, added, max_tokens)) // world_size) * world_size
    bounds = range(1, max(max_tokens, int(lengths.max())) + 1)
    bound = bounds[bisect_left(bounds, True, key=lambda bound: len(_filled(lengths, added, bound)) <= num_parts)]
    parts = _filled(lengths, added, bound)
    return parts + [range(0)] * (num_parts - len(parts))


def _filled(lengths: np.ndarray, added: np.ndarray, bound: int) -> list[Part]:
    """Consecutive parts that each take as many rows as stay within the bound, and at least one.

    Args:
        lengths: of the rows: what each costs as the first of a part.
        added: what each costs behind another one, at most its length.
        bound: on the costs of a part.
    """
    parts, start, size = [], 0, 0
    for place, (length, more) in enumerate(zip(lengths.tolist(), added.tolist(), strict=True)):
        if place > start and size + more > bound:
            parts.append(range(start, place))
            start, size = place, 0
        size += more if place > start else length
    return [*parts, range(start, len(lengths))]


def _padded(examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Tokens and labels, (batch, length) each."""
    tokens = pad_sequence([example.tokens for example in examples], batch_first=True)
    labels = pad_sequence([example.labels for example in examples], batch_first=True, padding_value=IGNORE_INDEX)
    return tokens, labels


def _dummy(task: int, totals: tuple[int, int, int]) -> MicroBatch:
    """A row of a task that another process computes: a probe that does not need the task can skip the row as well."""
    tokens, labels = torch.zeros(1, 1, dtype=torch.int64), torch.full((1, 1), IGNORE_INDEX)
    return MicroBatch(tokens, labels, torch.tensor([task]), torch.tensor([-1]), torch.tensor([1]), *totals)
