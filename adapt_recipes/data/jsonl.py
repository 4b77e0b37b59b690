"""Tasks from JSON Lines, JSON and Parquet files in a folder and its subfolders."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from adapt_recipes.data.examples import RawTask
from adapt_recipes.data.raw_tasks import TasksReader, check_task_per
from adapt_recipes.data.rows import data_files, read_rows


def jsonl_tasks(
    path: str | Path,
    *,
    task_per: Literal["file", "column"] = "file",
    column: str | None = None,
    format: str | None = None,
    messages: str | None = None,
    prompt: str | None = None,
    response: str | None = None,
) -> list[RawTask]:
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

    Raises:
        ValueError: there is no folder or no file, a file cannot be read or is empty, or an argument is not allowed.
    """
    check_task_per(task_per, ("file", "column"), column)
    reader = TasksReader(column=column, format=format, messages=messages, prompt=prompt, response=response)
    for name, splits in data_files(path).items():
        for split, files in splits.items():
            for file in files:
                unit = "row" if file.name.lower().endswith(".parquet") else "line"
                reader.read(read_rows(file), source=f"{file}, {unit}", split=split, task=name)
    return reader.raw_tasks()
