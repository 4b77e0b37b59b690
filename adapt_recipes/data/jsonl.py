"""Tasks from JSON Lines, JSON and Parquet files in a folder and its subfolders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Literal

from adapt_recipes.data.file_rows import check_task_per, file_rows
from adapt_recipes.data.formats import RowReader
from adapt_recipes.data.rows import data_files, read_rows
from adapt_recipes.data.source_files import ColumnTasks, FileRow, FileTask, SourceFile


def jsonl_tasks(
    path: str | Path,
    *,
    task_per: Literal["file", "column"] = "file",
    column: str | None = None,
    format: str | None = None,
    messages: str | None = None,
    prompt: str | None = None,
    response: str | None = None,
) -> list[FileTask] | list[ColumnTasks]:
    """One task for every file NAME.jsonl, .json or .parquet, called NAME; or one for every value of a column.

    JSON files hold an object per line or an array of objects, and may be compressed (.jsonl.gz). NAME.validation.jsonl
    and NAME.test.jsonl are the task's other splits; see ``rows.data_files``. Rows are in any of ``formats.FORMATS``.

    Args:
        path: a folder, or a single file.
        task_per: whether a task is a file, or a value of ``column`` in all files.
        column: the column whose values are the tasks, in alphabetical order.
        format: of all rows; None: each file's is recognized by the keys of its rows.
        messages: the column of the conversations, in place of the format's.
        prompt: the column of the user's message, in place of the format's.
        response: the column of the answer, in place of the format's.

    Returns:
        The tasks, whose files are read when their rows are asked for.

    Raises:
        ValueError: there is no folder or no file, or an argument is not allowed; when the files are read: one cannot be
            read or is empty, or no row has a value in the column.
    """
    check_task_per(task_per, ("file", "column"), column)
    columns = {"format": format, "messages": messages, "prompt": prompt, "response": response}
    # What is wrong with them, before anything is read.
    RowReader(**columns)
    reader = partial(_rows, column=column, columns=columns)
    tasks = []
    for name, splits in data_files(path).items():
        files = [
            SourceFile(file, reader, f"{file}, {'row' if file.suffix.lower() == '.parquet' else 'line'}", split)
            for split, some in splits.items()
            for file in some
        ]
        tasks.append(FileTask(name, files))
    return tasks if column is None else [ColumnTasks([file for task in tasks for file in task.files])]


def _rows(file: Path, *, column: str | None, columns: Mapping[str, str | None]) -> Iterator[FileRow]:
    """What is in a file."""
    is_empty = True
    for row in file_rows(read_rows(file), RowReader(**columns), column):
        is_empty = False
        yield row
    if is_empty:
        raise ValueError(f"{file} is empty")
