"""Tasks whose examples are in files that are read only when the store does not have them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

from adapt_recipes.data.examples import BadRow, Conversation, Message, RawTask


class FileRows(NamedTuple):
    """What is in a file.

    Attributes:
        conversations: its examples; each has an ``origin``.
        bad_rows: rows that are no examples.
        num_empty: rows that are left out because they have no answer, which the source allows.
        unused_keys: for each key of the rows that is not used, the number of rows that have it.
    """

    conversations: Sequence[Conversation | list[Message]]
    bad_rows: Sequence[BadRow] = ()
    num_empty: int = 0
    unused_keys: Mapping[str, int] = {}


@dataclass(frozen=True)
class SourceFile:
    """A file of data, and how it is read.

    Attributes:
        path: of the file.
        reader: called with the path; returns ``FileRows``. A partial of a function of a module, whose keywords are all
            that decides the result besides the content of the file.
        unit: what a row is called in an error: ``instance``.
    """

    path: Path
    reader: partial[FileRows]
    unit: str

    @property
    def settings(self) -> str:
        """Differs between readers that may return other rows."""
        function = self.reader.func
        return f"{function.__module__}.{function.__qualname__} {sorted(self.reader.keywords.items())}"

    @property
    def source(self) -> str:
        """As in ``BadRow``."""
        return f"{self.path}, {self.unit}"

    def read(self) -> FileRows:
        return self.reader(self.path)


@dataclass(frozen=True)
class FileTask:
    """A task in files, as a ``RawTask`` is one in memory. Its ``conversations`` are read when they are asked for.

    Attributes:
        name: of the task.
        files: of its examples, in their order.
    """

    name: str
    files: Sequence[SourceFile]
    validation: None = field(default=None, init=False)
    test: None = field(default=None, init=False)
    entropy: None = field(default=None, init=False)
    memorized: bool = field(default=False, init=False)

    @cached_property
    def _rows(self) -> list[FileRows]:
        return [file.read() for file in self.files]

    @property
    def conversations(self) -> list[Conversation | list[Message]]:
        return [row for rows in self._rows for row in rows.conversations]

    @property
    def bad_rows(self) -> list[BadRow]:
        return [row for rows in self._rows for row in rows.bad_rows]

    @property
    def unused_keys(self) -> dict[str, int]:
        return total(rows.unused_keys for rows in self._rows)

    def raw_task(self) -> RawTask:
        """The task in memory."""
        return RawTask(self.name, self.conversations, bad_rows=self.bad_rows, unused_keys=self.unused_keys)


def total(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The sum of counts by key."""
    result: Counter[str] = Counter()
    for each in counts:
        result.update(each)
    return dict(sorted(result.items()))
