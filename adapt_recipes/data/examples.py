"""What a task is: before it is tokenised (``RawTask``) and after (``Task``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = -100

Message = dict[str, str]  # {"role": ..., "content": ...}, as chat templates take it
Conversation = list[Message]


@dataclass(frozen=True)
class RawTask:
    """One task as text.

    Attributes:
        name: the task, as the mixture and every log name it.
        conversations: one an example; the last message is the assistant's.
        validation: the validation split where the source brings its own; None: it is split off by hash of the prompt.
        entropy: the lowest loss any model can reach, in nats a supervised token, where it is known.
    """

    name: str
    conversations: list[Conversation]
    validation: list[Conversation] | None = None
    entropy: float | None = None


class Example(NamedTuple):
    """One example after the causal shift: ``labels[t]`` is what follows ``tokens[t]``.

    Attributes:
        tokens: (length,) int64, all rendered tokens but the last.
        labels: (length,) int64, ``IGNORE_INDEX`` where the position does not count in the loss.
    """

    tokens: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Examples:
    """Tokenised examples, flat, so that a memory map of any size serves as well as a tensor.

    Attributes:
        tokens: (num_tokens,) int32, the rendered examples one after the other.
        supervised: (num_tokens,) bool, True for a token that is predicted and counts in the loss; never an example's
            first token, which nothing precedes.
        offsets: (num_examples + 1,) int64, where each example begins, and the end.
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
        """Example ``index`` as a model reads it."""
        start, end = int(self.offsets[index]), int(self.offsets[index + 1])
        tokens = self.tokens[start:end].to(torch.int64)
        labels = tokens[1:].masked_fill(~self.supervised[start + 1 : end], IGNORE_INDEX)
        return Example(tokens[:-1], labels)

    def select(self, indices: Sequence[int] | Tensor) -> Examples:
        """The examples ``indices``, in that order, as a new flat block."""
        indices = torch.as_tensor(indices, dtype=torch.int64)
        lengths = self.lengths[indices]
        offsets = torch.zeros(len(indices) + 1, dtype=torch.int64)
        offsets[1:] = lengths.cumsum(0)
        # Where each selected token stands in the old block: its example's start there plus how far it is into that.
        source = torch.arange(int(offsets[-1])) + (self.offsets[indices] - offsets[:-1]).repeat_interleave(lengths)
        return Examples(self.tokens[source], self.supervised[source], offsets, self.prompt_hashes[indices])


@dataclass(frozen=True)
class Task:
    """One task, tokenised and split.

    Attributes:
        name: as in the mixture and in every log.
        train: what training draws from.
        validation: what the objective and the results are measured on; None: the task is left out of both.
        entropy: see ``RawTask``.
        num_dropped: examples left out because they are longer than ``max_seq_len``.
    """

    name: str
    train: Examples
    validation: Examples | None
    entropy: float | None = None
    num_dropped: int = 0
