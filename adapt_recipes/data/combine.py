"""Tasks from several sources: one per source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from adapt_recipes.data.examples import RawTask
from adapt_recipes.data.source_files import ColumnTasks, FileTask


def task_per_source(**sources: Sequence[RawTask | FileTask | ColumnTasks]) -> list[RawTask | FileTask]:
    """One task for every source, called by its key, of all the rows that the source has.

    A source with several tasks (splits, files, configurations) becomes one. Its validation split consists of those of
    its tasks; if none has one, it is split off.

    Args:
        sources: each a component that returns tasks.
    """
    if not sources:
        raise ValueError("there is no source; add a key for each, with a _component_ that returns tasks")
    for name, tasks in sources.items():
        if not isinstance(tasks, Sequence) or not all(
            isinstance(task, RawTask | FileTask | ColumnTasks) for task in tasks
        ):
            raise ValueError(f"{name}: must be a node with a _component_ that returns tasks")
    return [_joined(name, tasks) for name, tasks in sources.items()]


def _joined(name: str, given: Sequence[RawTask | FileTask | ColumnTasks]) -> RawTask | FileTask:
    in_files = [file for task in given if not isinstance(task, RawTask) for file in task.files]
    if in_files and not any(isinstance(task, RawTask) for task in given):
        return FileTask(name, [replace(file, node=file.node.replace("tasks", f"tasks.{name}", 1)) for file in in_files])
    tasks: list[RawTask | FileTask] = []
    for task in given:
        tasks += task.raw_tasks() if isinstance(task, ColumnTasks) else [task]
    own = {
        split: [rows for task in tasks if (rows := getattr(task, split)) is not None]
        for split in ("validation", "test")
    }
    unused_keys: Counter[str] = Counter()
    for task in tasks:
        unused_keys.update(task.unused_keys)
    return RawTask(
        name,
        [row for task in tasks for row in task.conversations],
        [row for rows in own["validation"] for row in rows] if own["validation"] else None,
        [row for rows in own["test"] for row in rows] if own["test"] else None,
        entropy=tasks[0].entropy if len(tasks) == 1 else None,
        memorized=all(task.memorized for task in tasks),
        # What a reason advises is an argument of the source.
        bad_rows=[
            row._replace(reason=row.reason.replace(" tasks.", f" tasks.{name}."))
            for task in tasks
            for row in task.bad_rows
        ],
        unused_keys=unused_keys,
    )
