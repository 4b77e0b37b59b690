"""Tasks whose rows are in files that are read only when the store does not have them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

from adapt_recipes.data.conversations import error_prefix
from adapt_recipes.data.examples import BadRow, Conversation, Message, RawTask, bad_rows_error
from adapt_recipes.data.rows import Split


class FileRow(NamedTuple):
    """A row of a file.

    Attributes:
        number: of the row in the file.
        conversation: the example; None: it is none.
        error: why it is no example; None: it is one, or ``is_empty``.
        is_empty: it is left out because it has no answer, which the source allows.
        task: the value of the column that makes the tasks; None: it has none, or no column makes them.
        unused_keys: keys of the row that are not used.
    """

    number: int
    conversation: Conversation | list[Message] | None = None
    error: str | None = None
    is_empty: bool = False
    task: str | None = None
    unused_keys: Collection[str] = ()


@dataclass(frozen=True)
class SourceFile:
    """A file of data, and how it is read.

    Attributes:
        path: of the file.
        reader: called with the path; returns the rows. A partial of a function of a module, whose keywords are all that
            decides the result besides the content and the ending of the file.
        source: what precedes the number of a row in an error: ``data/chat.jsonl, line``.
        split: of the rows.
        first_row: what is added to the numbers of rows in errors, where they are counted over several files.
        node: of the config that has the source's arguments, for errors: ``tasks.math``.
    """

    path: Path
    reader: partial[Iterator[FileRow]]
    source: str
    split: Split = "train"
    first_row: int = 0
    node: str = "tasks"

    @property
    def settings(self) -> str:
        """Differs between files that may have other rows though their contents are the same."""
        function = self.reader.func
        keywords = sorted(self.reader.keywords.items())
        return f"{function.__module__}.{function.__qualname__} {self.path.suffix.lower()} {keywords}"

    def read(self) -> Iterator[FileRow]:
        with error_prefix(self.node):
            yield from self.reader(self.path)

    def bad_row(self, number: int, reason: str) -> BadRow:
        """Row ``number`` of the file, which is no example."""
        return BadRow(self.source, self.first_row + number, reason.replace(" tasks.", f" {self.node}."))


@dataclass(frozen=True)
class FileTask:
    """A task in files, which has the attributes of a ``RawTask``. Its rows are read when they are asked for.

    Attributes:
        name: of the task.
        files: of its splits, in the order of its examples. Where a column makes tasks, the examples of each value
            follow each other, in alphabetical order.
    """

    name: str
    files: Sequence[SourceFile]
    entropy: None = field(default=None, init=False)
    memorized: bool = field(default=False, init=False)

    @cached_property
    def raw_task(self) -> RawTask:
        """The task in memory."""
        rows = [(file, row) for file in self.files for row in file.read()]
        rows.sort(key=lambda each: each[1].task or "")
        return _raw_task(self.name, rows, splits={file.split for file in self.files})

    @property
    def conversations(self) -> Sequence[Conversation | list[Message]]:
        return self.raw_task.conversations

    @property
    def validation(self) -> Sequence[Conversation | list[Message]] | None:
        return self.raw_task.validation

    @property
    def test(self) -> Sequence[Conversation | list[Message]] | None:
        return self.raw_task.test

    @property
    def bad_rows(self) -> Sequence[BadRow]:
        return self.raw_task.bad_rows

    @property
    def unused_keys(self) -> dict[str, int]:
        return dict(self.raw_task.unused_keys)


@dataclass(frozen=True)
class ColumnTasks:
    """A task for every value that a column has in files, in alphabetical order. Reading the files tells which.

    Attributes:
        files: of all splits, in the order of the examples. A row without a value is a bad row of the first task.
    """

    files: Sequence[SourceFile]

    def raw_tasks(self) -> list[RawTask]:
        """The tasks in memory.

        Raises:
            ValueError: no row has a value in the column.
        """
        rows: dict[str, list[tuple[SourceFile, FileRow]]] = {}
        of_no_task: list[tuple[SourceFile, FileRow]] = []
        for file in self.files:
            for row in file.read():
                (of_no_task if row.task is None else rows.setdefault(row.task, [])).append((file, row))
        if not rows:
            raise ValueError(bad_rows_error([file.bad_row(row.number, str(row.error)) for file, row in of_no_task]))
        rows[min(rows)] += of_no_task
        return [_raw_task(name, rows[name]) for name in sorted(rows)]


def _raw_task(name: str, rows: Iterable[tuple[SourceFile, FileRow]], splits: Collection[Split] = ()) -> RawTask:
    """A task of these rows, with the splits that they have, and ``splits``."""
    conversations: dict[Split, list[Conversation | list[Message]]] = {split: [] for split in splits}
    bad_rows: list[BadRow] = []
    unused_keys: Counter[str] = Counter()
    for file, row in rows:
        unused_keys.update(row.unused_keys)
        if row.error is not None:
            bad_rows.append(file.bad_row(row.number, row.error))
        elif isinstance(row.conversation, Conversation):
            origin = file.source, file.first_row + row.number
            conversations.setdefault(file.split, []).append(replace(row.conversation, origin=origin))
    return RawTask(
        name,
        conversations.get("train", []),
        conversations.get("validation"),
        conversations.get("test"),
        bad_rows=bad_rows,
        unused_keys=dict(sorted(unused_keys.items())),
    )
