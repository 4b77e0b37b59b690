"""A task before it is tokenized (``RawTask``) and after (``Task``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = -100

# As a chat template takes it: role and content; tool_calls, tool_call_id, name and reasoning_content where the row has
# them.
Message = dict[str, Any]


class BadRow(NamedTuple):
    """A row of a source that is no example.

    Attributes:
        source: of the row, up to its number: ``data/chat.jsonl, line``.
        number: of the row in its source.
        reason: what is wrong with it.
    """

    source: str
    number: int
    reason: str

    def __str__(self) -> str:
        return f"{self.source} {self.number}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Conversation:
    """One example as text.

    Attributes:
        messages: an optional system message, then user, assistant, user, ..., assistant. Turns of the role ``tool`` may
            follow an answer with ``tool_calls``.
        supervised: indices of the assistant's messages that count in the loss; the others are context.
        tools: functions that the model may call, as JSON schemas; None: there are none.
        origin: source and number of the row, as in ``BadRow``; None: it has none, because a program made it.
    """

    messages: list[Message]
    supervised: tuple[int, ...]
    tools: list[dict[str, Any]] | None = None
    origin: tuple[str, int] | None = None


@dataclass(frozen=True)
class RawTask:
    """One task as text.

    Attributes:
        name: of the task, in the mixture and in every log.
        conversations: one per example: a ``Conversation``, or a list of messages whose answers all count.
        validation: the validation split if the source has its own; None: it is split off by the hash of the prompt.
        test: the test split if the source has its own.
        entropy: the lowest loss that any model can reach, in nats per supervised token, if it is known.
        memorized: training rows may be validation rows as well, because the task is to memorize them.
        bad_rows: rows of the source that are no examples.
        unused_keys: for each key of the rows that is not used, the number of rows that have it.
    """

    name: str
    conversations: Sequence[Conversation | list[Message]]
    validation: Sequence[Conversation | list[Message]] | None = None
    test: Sequence[Conversation | list[Message]] | None = None
    entropy: float | None = None
    memorized: bool = False
    bad_rows: Sequence[BadRow] = ()
    unused_keys: Mapping[str, int] = field(default_factory=dict)


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
        start, end = self.offsets[index : index + 2].tolist()
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
class LeftOut:
    """What of a task's rows is not trained on, and why.

    Attributes:
        too_long: examples with more than ``max_seq_len`` tokens.
        bad_rows: rows that are no examples (``on_bad_rows: skip``).
        unlabeled: examples whose answers all have the weight 0.
        leaked_answers: answers of training examples that are context only, because a task validates or tests on the
            same last user message with the same answer.
        leaked_examples: training examples in which that left no answer to train on.
        unused_keys: for each key of the rows that is not used, the number of rows that have it.
    """

    too_long: int = 0
    bad_rows: int = 0
    unlabeled: int = 0
    leaked_answers: int = 0
    leaked_examples: int = 0
    unused_keys: Mapping[str, int] = field(default_factory=dict)

    @property
    def examples(self) -> int:
        """Rows of the source that are in no split."""
        return self.too_long + self.bad_rows + self.unlabeled + self.leaked_examples


@dataclass(frozen=True)
class Task:
    """One task, tokenized and split.

    Attributes:
        name: of the task, in the mixture and in every log.
        train: the training split.
        validation: the split for the objective and the results; None: the task is in neither.
        test: the split that is measured once, after the run; None: there is none.
        entropy: see ``RawTask``.
        left_out: what is not trained on.
    """

    name: str
    train: Examples
    validation: Examples | None
    test: Examples | None = None
    entropy: float | None = None
    left_out: LeftOut = LeftOut()

    @property
    def splits(self) -> dict[str, Examples]:
        """The splits that the task has, by name: train, validation, test."""
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: split for name, split in splits.items() if split is not None}
