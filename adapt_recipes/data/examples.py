"""A task before it is tokenized (``RawTask``) and after (``Task``)."""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import torch
from torch import Tensor

from adapt_recipes.data.store import TASK, Columns

IGNORE_INDEX = -100
# Examples whose mask is computed at once.
_CHUNK = 4096

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


def bad_rows_error(bad_rows: Sequence[BadRow]) -> str:
    """One line about the bad rows of the first source that has some: their number, and the first five."""
    # A row may be of several tasks.
    bad_rows = list(dict.fromkeys(bad_rows))
    source = bad_rows[0].source
    same = [row for row in bad_rows if row.source == source]
    if len(bad_rows) == 1:
        return str(bad_rows[0])
    where, _, unit = source.rpartition(", ")
    shown: list[str] = []
    for row in same[:5]:
        # A long reason, such as the list of all formats, stands there once.
        is_repeated = len(row.reason) > 60 and any(each.endswith(row.reason) for each in shown)
        shown.append(f"{unit} {row.number}: {'the same' if is_repeated else row.reason}")
    more = f"; and {len(same) - 5:,} more" if len(same) > 5 else ""
    others = f"; and {len(bad_rows) - len(same):,} elsewhere" if len(bad_rows) > len(same) else ""
    rows = "1 bad row" if len(same) == 1 else f"{len(same):,} bad rows"
    return f"{where}: {rows}: {'; '.join(shown)}{more}{others}"


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
            tasks=pyarrow.nulls(number, TASK),
        )
        return cls((columns,), torch.arange(number), torch.zeros(0, dtype=torch.int64))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> Tensor:
        """(num_examples,) int64: rendered tokens of each example."""
        return self._gathered(self._lengths_of)

    @cached_property
    def num_supervised(self) -> Tensor:
        """(num_examples,) int64: supervised tokens of each example. Kept, because a run asks for it again and again."""
        return self._answer_sums(lambda columns, answers: columns.ends[answers] - columns.firsts[answers])

    @cached_property
    def num_answer_bytes(self) -> Tensor:
        """(num_examples,) int64: UTF-8 bytes of the supervised answers of each example; 0 where they are not known."""
        return self._answer_sums(lambda columns, answers: columns.num_bytes[answers])

    @property
    def tokens_per_byte(self) -> float:
        """Supervised tokens, end tokens included, over UTF-8 bytes of supervised answers; NaN if no bytes are known."""
        num_bytes = int(self.num_answer_bytes.sum())
        return int(self.num_supervised.sum()) / num_bytes if num_bytes else math.nan

    @property
    def prompt_hashes(self) -> Tensor:
        """(num_examples,) int64, of everything before the last answer."""
        return self._gathered(lambda source, rows: self.sources[source].prompt_hashes[rows])

    @property
    def max_token(self) -> int:
        """The highest token id."""
        return int(self._gathered(lambda source, rows: self.sources[source].max_tokens[rows]).max())

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
        for source, rows in self._chunks():
            columns = self.sources[source]
            # The tokens of these rows, as if they followed each other.
            offsets = np.concatenate([[0], self._lengths_of(source, rows).cumsum()])
            answers, counts = self._answers_of(source, rows)
            starts = offsets[:-1].repeat(counts)
            is_learned = ~np.isin(answers, self._hidden_of(source))
            starts, answers = starts[is_learned], answers[is_learned]
            mask = np.zeros(offsets[-1], dtype=bool)
            mask[ranges(starts + columns.firsts[answers], starts + columns.ends[answers])] = True
            yield mask

    def example(self, index: int) -> Example:
        """Example ``index``, shifted for a causal model."""
        columns, row, answers = self._located(index)
        start, end = columns.offsets[row : row + 2].tolist()
        # numpy, because operations on small tensors are several times slower.
        tokens = columns.tokens[start:end].astype(np.int64)
        labels = np.full(len(tokens) - 1, IGNORE_INDEX)
        for answer in answers:
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
        columns, _, answers = self._located(index)
        return [int(columns.num_bytes[answer]) for answer in answers]

    def select(self, indices: Sequence[int] | Tensor) -> Examples:
        """The examples at ``indices``, in that order."""
        return replace(self, rows=self.rows[torch.as_tensor(indices, dtype=torch.int64)])

    def _gathered(self, of_source: Callable[[int, np.ndarray], np.ndarray]) -> Tensor:
        """The values of the examples, as int64, from those of rows of every source."""
        rows, starts = self.rows.numpy(), np.array(self._row_starts)
        source_of = np.searchsorted(starts, rows, side="right") - 1
        # The examples in the order of their sources.
        order = source_of.argsort(kind="stable")
        cuts = np.searchsorted(source_of[order], np.arange(len(starts)))
        values = np.empty(len(rows), dtype=np.int64)
        for source in np.diff(cuts).nonzero()[0].tolist():
            examples = order[cuts[source] : cuts[source + 1]]
            values[examples] = of_source(source, rows[examples] - starts[source])
        return torch.from_numpy(values)

    def _lengths_of(self, source: int, rows: np.ndarray) -> np.ndarray:
        offsets = self.sources[source].offsets
        return offsets[rows + 1] - offsets[rows]

    def _answer_sums(self, sizes_of: Callable[[Columns, np.ndarray], np.ndarray]) -> Tensor:
        """(num_examples,) int64: sums over the supervised answers of each example, of sizes of answers of a source."""

        def of_source(source: int, rows: np.ndarray) -> np.ndarray:
            answers, counts = self._answers_of(source, rows)
            sizes = sizes_of(self.sources[source], answers)
            sizes[np.isin(answers, self._hidden_of(source))] = 0
            sums, cuts = (np.concatenate([[0], each.cumsum()]) for each in (sizes, counts))
            return np.diff(sums[cuts])

        return self._gathered(of_source)

    def _answers_of(self, source: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The answers of rows of a source, and their number for each row."""
        offsets = self.sources[source].answer_offsets
        return ranges(offsets[rows], offsets[rows + 1]), offsets[rows + 1] - offsets[rows]

    @cached_property
    def _row_starts(self) -> list[int]:
        """The number of the first row of each source, and the number of all rows."""
        return [0, *accumulate(len(each.rows) for each in self.sources)]

    @cached_property
    def _answer_starts(self) -> list[int]:
        """The number of the first answer of each source, and the number of all answers."""
        return [0, *accumulate(len(each.firsts) for each in self.sources)]

    def _hidden_of(self, source: int) -> np.ndarray:
        """The hidden answers of a source, numbered within it."""
        first, end = self._answer_starts[source : source + 2]
        hidden = self.hidden.numpy()
        return hidden[slice(*np.searchsorted(hidden, [first, end]))] - first

    def _located(self, index: int) -> tuple[Columns, int, list[int]]:
        """The source of an example, its row there, and its supervised answers there."""
        row = int(self.rows[index])
        source = bisect_right(self._row_starts, row) - 1
        columns, row, start = self.sources[source], row - self._row_starts[source], self._answer_starts[source]
        first, end = columns.answer_offsets[row : row + 2].tolist()
        hidden = self.hidden.numpy()
        return columns, row, [answer for answer in range(first, end) if not _is_in(start + answer, hidden)]

    def _chunks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Source and rows of at most ``_CHUNK`` examples that follow each other and have the same source."""
        rows, starts = self.rows.numpy(), np.array(self._row_starts)
        for first in range(0, len(rows), _CHUNK):
            some = rows[first : first + _CHUNK]
            sources = np.searchsorted(starts, some, side="right") - 1
            breaks = np.diff(sources).nonzero()[0] + 1
            for begin, end in pairwise([0, *breaks.tolist(), len(some)]):
                source = int(sources[begin])
                yield source, some[begin:end] - starts[source]

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


def ranges(firsts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """``[*range(firsts[0], ends[0]), *range(firsts[1], ends[1]), ...]``."""
    counts = ends - firsts
    return np.arange(counts.sum()) + (firsts - counts.cumsum() + counts).repeat(counts)


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
        untrained: examples of a target on which it neither validates nor tests.
        unused_keys: for each key of the rows that is not used, the number of rows that have it.
    """

    too_long: int = 0
    bad_rows: int = 0
    unlabeled: int = 0
    leaked_answers: int = 0
    leaked_examples: int = 0
    untrained: int = 0
    unused_keys: Mapping[str, int] = field(default_factory=dict)

    @property
    def examples(self) -> int:
        """Rows of the source that are in no split."""
        return self.too_long + self.bad_rows + self.unlabeled + self.leaked_examples + self.untrained


@dataclass(frozen=True)
class Task:
    """One task, tokenized and split.

    Attributes:
        name: of the task, in the mixture and in every log.
        train: the training split; empty for a target, which is validated on and never trained.
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
        return {name: split for name, split in splits.items() if split is not None and len(split)}

    @property
    def is_target(self) -> bool:
        """Whether it is validated on and never trained."""
        return not len(self.train)
