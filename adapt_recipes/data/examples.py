"""A task before it is tokenized (``RawTask``) and after (``Task``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = -100

# {"role": ..., "content": ...}, as in chat templates.
Message = dict[str, str]
Conversation = list[Message]


@dataclass(frozen=True)
class RawTask:
    """One task as text.

    Attributes:
        name: of the task, in the mixture and in every log.
        conversations: one per example; the last message is the assistant's.
        validation: the validation split if the source has its own; None: it is split off by the hash of the prompt.
        entropy: the lowest loss that any model can reach, in nats per supervised token, if it is known.
        test: the test split if the source has its own; None: ``tasks.test_examples`` are split off likewise.
    """

    name: str
    conversations: list[Conversation]
    validation: list[Conversation] | None = None
    entropy: float | None = None
    test: list[Conversation] | None = None


class Example(NamedTuple):
    """One example after the causal shift: ``labels[t]`` is the token that follows ``tokens[t]``.

    Attributes:
        tokens: (length,) int64, all rendered tokens but the last.
        labels: (length,) int64, ``IGNORE_INDEX`` at positions that do not count in the loss.
    """

    tokens: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Examples:
    """Tokenized examples in flat tensors, which may be memory maps of any size.

    Attributes:
        tokens: (num_tokens,) int32, the rendered examples, concatenated.
        supervised: (num_tokens,) bool, True for a token that is predicted and counts in the loss. Never the first token
            of an example, because nothing precedes it.
        offsets: (num_examples + 1,) int64, the start of each example, and the end of the last.
        prompt_hashes: (num_examples,) int64, of everything before the last answer.
    """

    tokens: Tensor
    supervised: Tensor
    offsets: Tensor
    prompt_hashes: Tensor

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Tensor:
        """(num_examples,) int64: rendered tokens of each example."""
        return self.offsets.diff()

    @property
    def num_supervised(self) -> Tensor:
        """(num_examples,) int64: supervised tokens of each example."""
        total = torch.zeros(len(self.supervised) + 1, dtype=torch.int64)
        total[1:] = self.supervised.cumsum(0)
        return total[self.offsets].diff()

    def example(self, index: int) -> Example:
        """Example ``index``, shifted for a causal model."""
        start, end = int(self.offsets[index]), int(self.offsets[index + 1])
        tokens = self.tokens[start:end].to(torch.int64)
        labels = tokens[1:].masked_fill(~self.supervised[start + 1 : end], IGNORE_INDEX)
        return Example(tokens[:-1], labels)

    def select(self, indices: Sequence[int] | Tensor) -> Examples:
        """The examples at ``indices``, in that order, in new flat tensors."""
        indices = torch.as_tensor(indices, dtype=torch.int64)
        lengths = self.lengths[indices]
        offsets = torch.zeros(len(indices) + 1, dtype=torch.int64)
        offsets[1:] = lengths.cumsum(0)
        # The index of each selected token in the old tensors: the start of its example plus its position in it.
        source = torch.arange(int(offsets[-1])) + (self.offsets[indices] - offsets[:-1]).repeat_interleave(lengths)
        return Examples(self.tokens[source], self.supervised[source], offsets, self.prompt_hashes[indices])


@dataclass(frozen=True)
class Task:
    """One task, tokenized and split.

    Attributes:
        name: of the task, in the mixture and in every log.
        train: the training split.
        validation: the split for the objective and the results; None: the task is in neither.
        entropy: see ``RawTask``.
        num_dropped: examples dropped because they are longer than ``max_seq_len``.
        test: the split that a run measures once, after it has ended; None: there is none.
    """

    name: str
    train: Examples
    validation: Examples | None
    entropy: float | None = None
    num_dropped: int = 0
    test: Examples | None = None

    @property
    def splits(self) -> list[Examples]:
        """The splits that the task has: training, validation, test."""
        return [split for split in (self.train, self.validation, self.test) if split is not None]
