"""Micro-batches of examples of like length, so that little of what is computed is padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from adapt_recipes.data.examples import IGNORE_INDEX, Example

# What one more forward and backward cost besides their tokens, in tokens computed: chiefly one more gradient of every
# weight to write and add up. 145 measured (135M weights, bf16, CPU); the total is flat around its minimum.
FORWARD_OVERHEAD_TOKENS = 128


class MicroBatch(NamedTuple):
    """Examples computed in one forward, padded on the right.

    Right padding needs no attention mask: under causal attention no real token sees what comes after it.

    Attributes:
        tokens: (batch, length) int64, padded with 0.
        labels: (batch, length) int64, padded with ``IGNORE_INDEX``.
        tasks: (batch,) int64, each row's task.
        rows: (batch,) int64, where each row stood in the list that was batched.
        lengths: (batch,) int64, each row's positions that are not padding.
        num_tokens: positions that are not padding.
        num_supervised_tokens: labels that count.
    """

    tokens: Tensor
    labels: Tensor
    tasks: Tensor
    rows: Tensor
    lengths: Tensor
    num_tokens: int
    num_supervised_tokens: int

    @property
    def supervised_tasks(self) -> Tensor:
        """(num_supervised_tokens,) int64: the task of each label that counts, row by row."""
        return self.tasks.unsqueeze(1).expand_as(self.labels)[self.labels != IGNORE_INDEX]

    def to(self, device: torch.device) -> MicroBatch:
        """The same micro-batch on a device."""
        return self._replace(
            tokens=self.tokens.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            tasks=self.tasks.to(device, non_blocking=True),
        )


def micro_batches(examples: Sequence[Example], tasks: Sequence[int], *, max_tokens: int) -> list[MicroBatch]:
    """Cut examples into micro-batches that compute the fewest tokens.

    Examples are sorted by length, and the list is cut where the sum of tokens computed (rows times longest row) and of
    the overhead of each forward is smallest: a shortest path over the cuts. The longest come first, so that what does
    not fit in memory fails at once.

    Args:
        examples: what to compute.
        tasks: the task of each.
        max_tokens: bound on the tokens computed in one forward; an example longer than that is computed alone.
    """
    order = sorted(range(len(examples)), key=lambda i: (-len(examples[i].tokens), i))
    lengths = [len(examples[i].tokens) for i in order]
    widths = np.array(lengths)
    best = np.zeros(len(order) + 1, dtype=np.int64)  # best[end]: least cost of computing order[:end]
    start_of = np.zeros(len(order) + 1, dtype=np.int64)
    for end in range(1, len(order) + 1):
        computed = widths[:end] * np.arange(end, 0, -1)
        fits = computed <= max_tokens
        fits[end - 1] = True  # an example alone always does
        costs = np.where(fits, best[:end] + computed + FORWARD_OVERHEAD_TOKENS, np.iinfo(np.int64).max)
        start_of[end] = np.argmin(costs)
        best[end] = costs[start_of[end]]
    batches = []
    end = len(order)
    while end > 0:
        start = int(start_of[end])
        batches.append(_collate(examples, tasks, order[start:end]))
        end = start
    return batches[::-1]


def _collate(examples: Sequence[Example], tasks: Sequence[int], rows: list[int]) -> MicroBatch:
    labels = pad_sequence([examples[i].labels for i in rows], batch_first=True, padding_value=IGNORE_INDEX)
    return MicroBatch(
        tokens=pad_sequence([examples[i].tokens for i in rows], batch_first=True),
        labels=labels,
        tasks=torch.tensor([tasks[i] for i in rows]),
        rows=torch.tensor(rows),
        lengths=torch.tensor([len(examples[i].tokens) for i in rows]),
        num_tokens=sum(len(examples[i].tokens) for i in rows),
        num_supervised_tokens=int((labels != IGNORE_INDEX).sum()),
    )
