"""Gathers the rows of files and splits as tasks: one per source, or one per value of a column."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from reprlib import repr as short
from typing import Any

from adapt_recipes.data.examples import BadRow, Conversation, RawTask
from adapt_recipes.data.formats import RowReader
from adapt_recipes.data.rows import UNPRINTABLE, Row, Split
from adapt_recipes.errors import closest, nearest


class TaskRows:
    """The rows of one task while they are read."""

    def __init__(self) -> None:
        self.splits: dict[Split, list[Conversation]] = {}
        self.bad_rows: list[BadRow] = []
        self.unused_keys: Counter[str] = Counter()

    def raw_task(self, name: str) -> RawTask:
        return RawTask(
            name,
            self.splits.get("train", []),
            self.splits.get("validation"),
            self.splits.get("test"),
            bad_rows=self.bad_rows,
            unused_keys=dict(sorted(self.unused_keys.items())),
        )


class TasksReader:
    """Gathers tasks from the rows of several sources.

    Args:
        column: the column whose values are the tasks; None: each source names its task.
        columns: the arguments of ``RowReader``.
    """

    def __init__(self, *, column: str | None, **columns: str | None) -> None:
        self._column = column
        self._columns = columns
        self._tasks: dict[str, TaskRows] = {}
        # Of rows without a value in the column.
        self._of_no_task: list[BadRow] = []
        # What is wrong with the arguments, before anything is read.
        RowReader(**columns)

    def read(self, rows: Iterable[Row], *, source: str, split: Split, task: str) -> None:
        """Adds the rows of a file, or of a split, which have one format.

        Args:
            rows: of the source.
            source: what precedes the number of a row in an error: ``data/chat.jsonl, line``.
            split: of the rows.
            task: their task, unless a column has it.

        Raises:
            ValueError: there is no row.
        """
        reader = RowReader(**self._columns)
        used = () if self._column is None else (self._column,)
        if self._column is None:
            self._tasks.setdefault(task, TaskRows()).splits.setdefault(split, [])
        is_empty = True
        for row in rows:
            is_empty = False
            bad_rows = self._of_no_task if self._column is not None else self._tasks[task].bad_rows
            try:
                if row.error:
                    raise ValueError(row.error)
                name = task if self._column is None else _value(row.value, self._column)
                gathered = self._tasks.setdefault(name, TaskRows())
                bad_rows = gathered.bad_rows
                conversation = reader.conversation(
                    row.value, origin=(source, row.number), unused_keys=gathered.unused_keys, used=used
                )
                gathered.splits.setdefault(split, []).append(conversation)
            except ValueError as error:
                bad_rows.append(BadRow(source, row.number, str(error)))
        if is_empty:
            where, _, _ = source.rpartition(", ")
            raise ValueError(f"{where} is empty")

    def raw_tasks(self) -> list[RawTask]:
        """The tasks, in the order of their sources, or of the column's values by alphabet.

        Raises:
            ValueError: no row has a value in the column.
        """
        names = list(self._tasks) if self._column is None else sorted(self._tasks)
        if not names:
            raise ValueError(bad_rows_error(self._of_no_task))
        self._tasks[names[0]].bad_rows.extend(self._of_no_task)
        return [self._tasks[name].raw_task(name) for name in names]


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


def check_task_per(task_per: str, allowed: Sequence[str], column: str | None) -> None:
    """Refuses a ``task_per`` that a source does not have, and a column where none makes the tasks, or none is named."""
    if task_per not in allowed:
        raise ValueError(f"tasks.task_per: {task_per!r} is not allowed{nearest(str(task_per), allowed)}")
    if task_per == "column" and column is None:
        raise ValueError("tasks.column: name the column whose values are the tasks, or set another tasks.task_per")
    if task_per != "column" and column is not None:
        raise ValueError(f"tasks.column is for task_per: column, not for task_per: {task_per}")


def _value(row: Any, column: str) -> str:
    """The value of a row in the column that makes the tasks."""
    if not isinstance(row, Mapping):
        raise ValueError(f"must be an object with the key {column!r}")
    if row.get(column) is None:
        raise ValueError(_no_value(column, tuple(row)))
    value = row[column]
    name = str(value).strip()
    if isinstance(value, bool) or not isinstance(value, str | int) or not name or UNPRINTABLE.search(name):
        raise ValueError(f"{column!r} must be a name, not {short(value)}")
    return name


@lru_cache
def _no_value(column: str, keys: tuple[str, ...]) -> str:
    close = closest(column, [key for key in keys if key != column])
    return f"no {column!r}, whose values are the tasks" + (f"; it has {close!r}" if close else "")
