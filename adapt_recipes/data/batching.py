"""Micro-batches of examples of similar length, so that there is little padding, distributed to the processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from adapt_recipes.data.examples import IGNORE_INDEX, Example
from adapt_recipes.training.process_group import rank, world_size

# The fixed cost of one more forward and backward pass, in computed tokens: mainly writing and accumulating one more
# gradient of every weight. Measured: 145 (135M weights, bf16, CPU). The total cost is flat around its minimum.
FORWARD_OVERHEAD_TOKENS = 128
# The same where weights are gathered from other processes and gradients are sent to them. Measured: 340 in fp32, 680 in
# bf16 (20M weights, gloo, two processes).
SHARDED_OVERHEAD_TOKENS = 512


class MicroBatch(NamedTuple):
    """Examples computed in one forward pass, padded on the right.

    Right padding needs no attention mask: under causal attention no real token sees what comes after it.

    Attributes:
        tokens: (batch, length) int64, padded with 0.
        labels: (batch, length) int64, padded with ``IGNORE_INDEX``.
        tasks: (batch,) int64, each row's task.
        rows: (batch,) int64, the index of each row in the list that was batched. -1 is a dummy row: one token without a
            label, for a process that has no example while others have some.
        lengths: (batch,) int64, positions of each row that are not padding.
        num_tokens: positions that are not padding, in this forward pass on all processes together.
        num_supervised_tokens: labels that count in the loss, on all processes together.
        computed_tokens: all positions, padding included, on all processes together.
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
    """Splits examples into micro-batches that compute the fewest tokens, and distributes them to the processes.

    The examples are sorted by length (length bucketing), and the list is cut into rounds. In a round every process
    computes one micro-batch and waits for the slowest. The cost of a round is the number of tokens computed (rows times
    longest row, on the process with the most) plus the overhead of a forward pass. A shortest path finds the cuts with
    the smallest total cost. (With greedy cuts, forward and backward passes on Natural Instructions took as long for
    one process, and 17 % longer for two.) The longest examples come first, so that a batch that does not fit in memory
    fails at once.

    All processes compute the same cuts without communication. The numbers of tokens that two processes compute differ
    by at most the longest example.

    Args:
        examples: the same list on every process.
        tasks: the task of each example.
        max_tokens: bound on the tokens computed in one forward pass; a longer example is computed alone.
        rank: of this process.
        world_size: number of processes.

    Returns:
        This process's micro-batches; every process has the same number of them.
    """
    order = sorted(range(len(examples)), key=lambda i: (-len(examples[i].tokens), i))
    lengths = np.array([len(examples[i].tokens) for i in order], dtype=np.int64)
    computed = np.zeros(world_size, dtype=np.int64)  # tokens, by process
    batches = []
    for parts in _rounds(lengths, max_tokens, world_size):
        sizes = np.array([_size(lengths, part) or 1 for part in parts])
        # The process that has computed least gets the largest part.
        by_size, by_need = np.argsort(-sizes, kind="stable"), np.argsort(computed, kind="stable")
        computed[by_need] += sizes[by_size]
        mine = parts[by_size[by_need.tolist().index(rank)]]
        everything = [examples[order[place]] for part in parts for place in part]
        totals = {
            "num_tokens": sum(len(example.tokens) for example in everything),
            "num_supervised_tokens": int((torch.cat([each.labels for each in everything]) != IGNORE_INDEX).sum()),
            "computed_tokens": int(sizes.sum()),
        }
        if mine:
            batches.append(_collate(examples, tasks, [order[place] for place in mine], totals))
        else:
            batches.append(_dummy(tasks[order[parts[0][0]]], totals))
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
Part = Sequence[int]


def _rounds(lengths: np.ndarray, max_tokens: int, num_parts: int) -> Iterator[list[Part]]:
    """The micro-batches of each round: ``num_parts`` of them with nearly equal numbers of tokens; some may be empty."""
    num, never = len(lengths), np.iinfo(np.int64).max
    overhead = FORWARD_OVERHEAD_TOKENS if num_parts == 1 else SHARDED_OVERHEAD_TOKENS
    # rest[start]: the number of tokens from there on.
    rest = np.append(np.cumsum(lengths[::-1])[::-1], 0)
    # One micro-batch is best where it fits and its padding costs no more than a second forward pass.
    if num_parts == 1 and num and num * lengths[0] <= min(max_tokens, rest[0] + overhead):
        yield [range(num)]
        return
    # best[end]: the smallest cost of computing all examples before it.
    best = np.full(num + 1, never)
    best[0] = 0
    # Start and bound of the round that ends at each index.
    start_of, bound_of = np.zeros((2, num + 1), dtype=np.int64)

    # Shortest path over the cuts: from each start, try every bound on a part's tokens.
    for start in range(num):
        if best[start] == never:
            continue
        bounds = lengths[start] * np.arange(min(max(1, max_tokens // lengths[start]), num - start) + 1)
        bounds = np.append(bounds, -1)
        edges = _edges(lengths, rest, start, bounds, max_tokens, num_parts)
        rows = np.diff(edges, axis=0)
        sizes = rows * lengths[np.minimum(edges[:-1], num - 1)]
        fits = ((sizes <= max_tokens) | (rows == 1)).all(0) & (np.ptp(sizes, axis=0) <= lengths[start])
        costs, ends = best[start] + sizes.max(0) + overhead, edges[-1]
        # Several rounds may reach the same end. In this order the cheapest one is written last.
        better = (fits & (costs < best[ends])).nonzero()[0]
        better = better[np.argsort(-costs[better], kind="stable")]
        best[ends[better]], start_of[ends[better]], bound_of[ends[better]] = costs[better], start, bounds[better]

    # Walk back along the best path.
    cuts = [num]
    while cuts[-1] > 0:
        cuts.append(int(start_of[cuts[-1]]))
    for end, start in reversed(list(zip(cuts, cuts[1:], strict=False))):
        edges = _edges(lengths, rest, start, bound_of[end : end + 1], max_tokens, num_parts)[:, 0]
        yield [range(*pair) for pair in pairwise(edges.tolist())]


def _edges(
    lengths: np.ndarray, rest: np.ndarray, start: int, bounds: np.ndarray, max_tokens: int, num_parts: int
) -> np.ndarray:
    """(num_parts + 1, num_bounds): the boundaries between the parts of a round, for each bound on a part's tokens.

    A part takes as many rows as stay within the bound, and at least one. Bound -1: as many as an equal share of the
    remaining tokens needs; bound 0: one row more where that share is a whole number of rows.
    """
    edges = np.full((num_parts + 1, len(bounds)), start)
    for part in range(num_parts):
        place = edges[part]
        width = lengths[np.minimum(place, len(lengths) - 1)]
        limits = np.where(
            bounds > 0, np.minimum(bounds, max_tokens), rest[place] // (num_parts - part) + width + bounds
        )
        edges[part + 1] = np.minimum(place + np.maximum(limits // width, 1), len(lengths))
    return edges


def _size(lengths: np.ndarray, part: Part) -> int:
    """The tokens computed for a part; its first row is the longest."""
    return len(part) * int(lengths[part[0]]) if part else 0


def _collate(examples: Sequence[Example], tasks: Sequence[int], rows: list[int], totals: dict[str, int]) -> MicroBatch:
    return MicroBatch(
        tokens=pad_sequence([examples[i].tokens for i in rows], batch_first=True),
        labels=pad_sequence([examples[i].labels for i in rows], batch_first=True, padding_value=IGNORE_INDEX),
        tasks=torch.tensor([tasks[i] for i in rows]),
        rows=torch.tensor(rows),
        lengths=torch.tensor([len(examples[i].tokens) for i in rows]),
        **totals,
    )


def _dummy(task: int, totals: dict[str, int]) -> MicroBatch:
    """A row of a task that another process computes: a probe that does not need the task can skip the row as well."""
    return MicroBatch(
        tokens=torch.zeros(1, 1, dtype=torch.int64),
        labels=torch.full((1, 1), IGNORE_INDEX),
        tasks=torch.tensor([task]),
        rows=torch.tensor([-1]),
        lengths=torch.tensor([1]),
        **totals,
    )
