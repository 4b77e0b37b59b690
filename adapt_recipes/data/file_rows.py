"""Makes examples of the rows of files and splits, each with the value of the column that makes the tasks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from reprlib import repr as short
from typing import Any

from adapt_recipes.data.formats import RowReader
from adapt_recipes.data.rows import UNPRINTABLE, Row
from adapt_recipes.data.source_files import FileRow
from adapt_recipes.errors import closest, nearest


def file_rows(rows: Iterable[Row], reader: RowReader, column: str | None) -> Iterator[FileRow]:
    """What the rows of a file or split are.

    Args:
        rows: of the source, which have one format.
        reader: of the format.
        column: the column whose values are the tasks; None: no column makes them.
    """
    used = () if column is None else (column,)
    for row in rows:
        task, conversation, error = None, None, row.error
        unused_keys: Counter[str] = Counter()
        try:
            if error is None:
                task = None if column is None else _value(row.value, column)
                conversation = reader.conversation(row.value, origin=None, unused_keys=unused_keys, used=used)
        except ValueError as reason:
            error = str(reason)
        yield FileRow(row.number, conversation, error, task=task, unused_keys=tuple(unused_keys))


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
