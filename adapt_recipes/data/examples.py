"""A task before it is tokenized (``RawTask``) and after (``Task``)."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import torch
from torch import Tensor

from adapt_recipes.data.store import Columns

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
        references: all answers to the last question that are right; empty: the last answer alone.
    """

    messages: list[Message]
    supervised: tuple[int, ...]
    tools: list[dict[str, Any]] | None = None
    origin: tuple[str, int] | None = None
    references: tuple[str, ...] = ()


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
    """Tokenized examples: an index over the columns of the store, which are memory maps that processes share.

    Attributes:
        sources: the columns of every source file.
        rows: (num_examples,) int64, the examples, numbered over all sources.
        hidden: (num_hidden,) int64, ascending, the answers that are context, numbered over all sources.
    """

    sources: Sequence[Columns]
    rows: Tensor
    hidden: Tensor

    @classmethod
    def in_memory(
        cls,
        tokens: Tensor,  # (num_tokens,) integers, the examples, concatenated
        supervised: Tensor,  # (num_tokens,) bool, tokens that count; never the first of an example
        offsets: Tensor,  # (num_examples + 1,) int64, the start of each example, and the end of the last
        prompt_hashes: Tensor,  # (num_examples,) int64
    ) -> Examples:
        """Examples that a program made, without texts."""
        ids, starts, mask = tokens.numpy().astype(np.int32), offsets.numpy().astype(np.int64), supervised.numpy() > 0
        # An answer begins and ends where the mask changes.
        changes = np.diff(np.concatenate([[0], mask, [0]]).astype(np.int8))
        firsts, ends = (changes > 0).nonzero()[0], (changes < 0).nonzero()[0]
        example_of = np.searchsorted(starts, firsts, side="right") - 1
        number, zeros = len(starts) - 1, np.zeros(len(firsts), dtype=np.int64)
        columns = Columns(
            tokens=ids,
            offsets=starts,
            max_tokens=np.array([ids[i:k].max() for i, k in pairwise(starts)], dtype=np.int32),
            rows=np.arange(number),
            prompt_hashes=prompt_hashes.numpy().astype(np.int64),
            content_hashes=prompt_hashes.numpy().astype(np.int64),
            answer_offsets=np.concatenate([[0], np.bincount(example_of, minlength=number).cumsum()]),
            firsts=(firsts - starts[example_of]).astype(np.int32),
            ends=(ends - starts[example_of]).astype(np.int32),
            pair_hashes=zeros,
            whole_hashes=zeros,
            num_bytes=zeros.astype(np.int32),
            prompts=pyarrow.nulls(number, pyarrow.large_string()),
            references=pyarrow.nulls(number, pyarrow.large_list(pyarrow.large_string())),
        )
        return cls((columns,), torch.arange(number), torch.zeros(0, dtype=torch.int64))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> Tensor:
        """(num_examples,) int64: rendered tokens of each example."""
        return self._column([np.diff(each.offsets) for each in self.sources])

    @property
    def num_supervised(self) -> Tensor:
        """(num_examples,) int64: supervised tokens of each example."""
        counts = []
        for columns, hidden in zip(self.sources, self._hidden_by_source, strict=True):
            sizes = np.concatenate([[0], columns.ends - columns.firsts])
            sizes[hidden + 1] = 0
            counts.append(np.diff(sizes.cumsum()[columns.answer_offsets]))
        return self._column(counts)

    @property
    def prompt_hashes(self) -> Tensor:
        """(num_examples,) int64, of everything before the last answer."""
        return self._column([each.prompt_hashes for each in self.sources])

    @property
    def max_token(self) -> int:
        """The highest token id."""
        return int(self._column([each.max_tokens for each in self.sources]).max())

    @property
    def offsets(self) -> Tensor:
        """(num_examples + 1,) int64: the start of each example in ``tokens`` and ``supervised``, and the end."""
        offsets = torch.zeros(len(self) + 1, dtype=torch.int64)
        offsets[1:] = self.lengths.cumsum(0)
        return offsets

    @property
    def tokens(self) -> Tensor:
        """(num_tokens,) int32, a copy: the rendered examples, concatenated."""
        return torch.from_numpy(np.concatenate([np.zeros(0, np.int32), *self.token_blocks()]))

    @property
    def supervised(self) -> Tensor:
        """(num_tokens,) bool, a copy: True for a token that is predicted and counts in the loss.

        Never the first token of an example, because nothing precedes it.
        """
        return torch.from_numpy(np.concatenate([np.zeros(0, bool), *self.supervised_blocks()]))

    def token_blocks(self) -> Iterator[np.ndarray]:
        """``tokens`` in parts that are not copied."""
        for source, first, end in self._runs():
            columns = self.sources[source]
            yield columns.tokens[columns.offsets[first] : columns.offsets[end]]

    def supervised_blocks(self) -> Iterator[np.ndarray]:
        """``supervised`` in parts."""
        hidden_by_source = self._hidden_by_source
        for source, first, end in self._runs():
            columns, hidden = self.sources[source], hidden_by_source[source]
            offsets = columns.offsets[first : end + 1]
            answers = np.arange(columns.answer_offsets[first], columns.answer_offsets[end])
            answers = answers[~np.isin(answers, hidden)] if len(hidden) else answers
            starts = columns.offsets[np.searchsorted(columns.answer_offsets, answers, side="right") - 1] - offsets[0]
            # +1 where an answer begins, -1 behind its end. No two begin or end at the same place.
            changes = np.zeros(offsets[-1] - offsets[0] + 1, dtype=np.int8)
            changes[starts + columns.firsts[answers]] += 1
            changes[starts + columns.ends[answers]] -= 1
            yield changes[:-1].cumsum(dtype=np.int8) > 0

    def example(self, index: int) -> Example:
        """Example ``index``, shifted for a causal model."""
        columns, row, hidden = self._located(index)
        start, end = columns.offsets[row : row + 2].tolist()
        # numpy, because operations on small tensors are several times slower.
        tokens = columns.tokens[start:end].astype(np.int64)
        labels = np.full(len(tokens) - 1, IGNORE_INDEX)
        first_answer, last_answer = columns.answer_offsets[row : row + 2].tolist()
        for answer in range(first_answer, last_answer):
            if not _is_in(answer, hidden):
                first, end = int(columns.firsts[answer]), int(columns.ends[answer])
                labels[first - 1 : end - 1] = tokens[first:end]
        return Example(torch.from_numpy(tokens[:-1]), torch.from_numpy(labels))

    def prompt(self, index: int) -> tuple[list[Message], list[dict[str, Any]] | None]:
        """The messages before the last answer of example ``index``, and its tools."""
        columns, row, _ = self._located(index)
        messages, tools = json.loads(columns.prompts[row].as_py())
        return messages, tools

    def references(self, index: int) -> list[str]:
        """The answers to the prompt of example ``index`` that its source gives."""
        columns, row, _ = self._located(index)
        references: list[str] = columns.references[row].as_py()
        return references

    def answer_bytes(self, index: int) -> list[int]:
        """The UTF-8 lengths of the supervised answers of example ``index``."""
        columns, row, hidden = self._located(index)
        first, end = columns.answer_offsets[row : row + 2].tolist()
        return [int(columns.num_bytes[answer]) for answer in range(first, end) if not _is_in(answer, hidden)]

    def select(self, indices: Sequence[int] | Tensor) -> Examples:
        """The examples at ``indices``, in that order."""
        return replace(self, rows=self.rows[torch.as_tensor(indices, dtype=torch.int64)])

    def _column(self, values: Sequence[np.ndarray]) -> Tensor:
        """The values of the examples, as int64, from those of all rows of every source."""
        return torch.from_numpy(np.concatenate([*values, np.zeros(0, np.int64)])[self.rows.numpy()])

    @cached_property
    def _row_starts(self) -> list[int]:
        """The number of the first row of each source, and the number of all rows."""
        return [0, *accumulate(len(each.rows) for each in self.sources)]

    @cached_property
    def _hidden_by_source(self) -> list[np.ndarray]:
        """The hidden answers of each source, numbered within it."""
        starts = np.array([0, *accumulate(len(each.firsts) for each in self.sources)])
        hidden = self.hidden.numpy()
        cuts = np.searchsorted(hidden, starts)
        return [hidden[cuts[i] : cuts[i + 1]] - start for i, start in enumerate(starts[:-1])]

    def _located(self, index: int) -> tuple[Columns, int, np.ndarray]:
        """The source of an example, its row there, and the hidden answers of the source."""
        row = int(self.rows[index])
        source = bisect_right(self._row_starts, row) - 1
        return self.sources[source], row - self._row_starts[source], self._hidden_by_source[source]

    def _runs(self) -> Iterator[tuple[int, int, int]]:
        """Source, first row and last + 1 of examples that follow each other in the same source."""
        rows = self.rows.numpy()
        if not len(rows):
            return
        starts = np.array(self._row_starts)
        sources = np.searchsorted(starts, rows, side="right") - 1
        breaks = ((np.diff(rows) != 1) | (np.diff(sources) != 0)).nonzero()[0] + 1
        for first, end in pairwise([0, *breaks.tolist(), len(rows)]):
            source = int(sources[first])
            yield source, int(rows[first] - starts[source]), int(rows[end - 1] - starts[source]) + 1


def _is_in(number: int, ascending: np.ndarray) -> bool:
    """Whether a number is among others that are sorted."""
    if not len(ascending):
        return False
    position = int(np.searchsorted(ascending, number))
    return position < len(ascending) and int(ascending[position]) == number


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
