"""Tasks from a Hugging Face dataset, on disk or on the hub, through ``datasets``."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal

import datasets

from adapt_recipes.data.examples import RawTask
from adapt_recipes.data.file_rows import check_task_per, file_rows
from adapt_recipes.data.formats import RowReader
from adapt_recipes.data.rows import SPLITS, Row, Split, arrow_rows, folder_of
from adapt_recipes.data.source_files import ColumnTasks, FileRow, FileTask, SourceFile
from adapt_recipes.errors import nearest, warn

Splits = Mapping[str, datasets.Dataset]


def hf_tasks(
    path: str | Path,
    *,
    task_per: Literal["split", "configuration", "column"] = "split",
    column: str | None = None,
    names: list[str] | None = None,
    configuration: str | None = None,
    split: str = "train",
    validation_split: str | None = None,
    test_split: str | None = None,
    data_files: str | list[str] | None = None,
    format: str | None = None,
    messages: str | None = None,
    prompt: str | None = None,
    response: str | None = None,
) -> list[FileTask] | list[ColumnTasks] | list[RawTask]:
    """One task per split, per configuration, or per value of a column of a dataset.

    A split named validation (or valid, val, dev) is the validation split, and one named test the test split, unless the
    arguments say otherwise. One with such a word in its name (test_sft) is not trained on unless ``names`` has it. A
    warning names the splits that are not read. Rows are in any of ``formats.FORMATS``.

    Args:
        path: a folder written by ``save_to_disk``, or a folder of such folders, its configurations (both are read
            without network); or an argument of ``datasets.load_dataset``: a name on the hub, a folder of data files.
        task_per: whether a task is a split, a configuration, or a value of ``column``.
        column: the column whose values are the tasks, in alphabetical order.
        names: which splits or configurations, in which order; None: all, in the order of the dataset.
        configuration: which one, unless it is the task.
        split: the one to train on, unless it is the task.
        validation_split: the one to validate on; None: the one named so; without one it is split off.
        test_split: the one to test on; None: the one named so.
        data_files: of the dataset, in place of all of them.
        format: of all rows; None: each split's is recognized by the keys of its rows.
        messages: the column of the conversations, in place of the format's.
        prompt: the column of the user's message, in place of the format's.
        response: the column of the answer, in place of the format's.

    Returns:
        The tasks. The Arrow files that ``datasets`` keeps are read when their rows are asked for; a dataset that it has
        in memory is read at once.

    Raises:
        ValueError: the dataset cannot be loaded, a split is empty, or an argument is not allowed or names a split,
            configuration or column that is not there; when rows are read: none has a value in the column.
    """
    check_task_per(task_per, ("split", "configuration", "column"), column)
    if names is not None and (not names or len(set(names)) < len(names)):
        raise ValueError("tasks.names: name at least one, and each only once")
    if task_per == "split" and split != "train":
        raise ValueError("tasks.split is not for task_per: split; tasks.names chooses among them")
    if task_per == "configuration" and configuration is not None:
        raise ValueError("tasks.configuration is not for task_per: configuration; tasks.names chooses among them")
    if task_per == "column" and names is not None:
        raise ValueError("tasks.names is not for task_per: column; every value of the column is a task")
    # This cannot be a name on the hub, where a missing one takes long to report.
    if str(path).startswith((".", "/", "~")):
        folder_of(path)
    named = {"column": column, "messages": messages, "prompt": prompt, "response": response}
    columns = {"format": format, "messages": messages, "prompt": prompt, "response": response}
    # What is wrong with them, before anything is read.
    RowReader(**columns)
    files: dict[str, list[SourceFile]] = {}
    is_in_memory = False

    def add(splits: Splits, where: str, *, task: str, name: str, split: Split) -> None:
        nonlocal is_in_memory
        if name not in splits:
            raise ValueError(f"{where}: no split {name!r}{nearest(name, splits)}")
        rows = splits[name]
        if not len(rows):
            raise ValueError(f"{where}, split {name!r} is empty")
        for key, wanted in named.items():
            if wanted is not None and wanted not in rows.column_names:
                advice = nearest(wanted, rows.column_names)
                raise ValueError(f"tasks.{key}: {where}, split {name!r} has no column {wanted!r}{advice}")
        source = f"{where}, split {name!r}, row"
        some = files.setdefault(task, [])
        if rows.cache_files:
            some += _source_files(rows, column, columns, source=source, split=split)
        else:
            is_in_memory = True
            some.append(
                SourceFile(Path(path), partial(_in_memory, rows, column=column, columns=columns), source, split)
            )

    # The datasets, and which splits are trained on.
    if task_per == "configuration":
        loaded = {
            f"{path}, configuration {name!r}": (_splits(path, name, data_files), {name: split})
            for name in _chosen(names, path)
        }
    else:
        splits = _splits(path, configuration, data_files)
        others = [name for name in splits if name in (validation_split, test_split) or _is_to_hold_out(name)]
        trained = [split] if task_per == "column" else names or [name for name in splits if name not in others]
        if not trained:
            raise ValueError(f"{path}: no split to train on; name one in tasks.names: {', '.join(splits)}")
        loaded = {str(path): (splits, {name: name for name in trained})}

    for where, (splits, tasks) in loaded.items():
        held_out = _held_out(where, splits, tasks.values(), validation_split, test_split)
        if len(tasks) > 1:
            if validation_split is not None or test_split is not None:
                raise ValueError(
                    "tasks.validation_split and tasks.test_split are for one task, or one per configuration"
                )
            held_out = {}
        unread = [name for name in splits if name not in (*tasks.values(), *held_out.values())]
        if unread and (names is None or task_per == "configuration"):
            warn(f"tasks.path: {where}: not read: split {', '.join(map(repr, unread))}")
        for task, name in tasks.items():
            add(splits, where, task=task, name=name, split="train")
            for other, name in held_out.items():
                add(splits, where, task=task, name=name, split=other)
    if column is not None:
        of_column = ColumnTasks([file for some in files.values() for file in some])
        return of_column.raw_tasks() if is_in_memory else [of_column]
    by_name = [FileTask(name, some) for name, some in files.items()]
    return [task.raw_task for task in by_name] if is_in_memory else by_name


def _source_files(
    rows: datasets.Dataset, column: str | None, columns: Mapping[str, str | None], *, source: str, split: Split
) -> Iterator[SourceFile]:
    """The Arrow files of a split."""
    paths = [Path(each["filename"]) for each in rows.cache_files]
    first_row, before = 0, None
    for path in paths:
        reader = partial(_rows, column=column, columns={**columns, "before": before})
        yield SourceFile(path, reader, source, split, first_row)
        # Rows have the number and the format that they have in the split.
        if path != paths[-1]:
            before = before or _format(path, column, columns)
            first_row += len(datasets.Dataset.from_file(str(path)))


def _rows(file: Path, *, column: str | None, columns: Mapping[str, str | None]) -> Iterator[FileRow]:
    """What is in an Arrow file."""
    return _in_memory(datasets.Dataset.from_file(str(file)), file, column=column, columns=columns)


def _in_memory(
    rows: datasets.Dataset, _: Path, *, column: str | None, columns: Mapping[str, str | None]
) -> Iterator[FileRow]:
    """What is in a dataset."""
    return file_rows(_values(rows), RowReader(**columns), column)


def _format(file: Path, column: str | None, columns: Mapping[str, str | None]) -> str | None:
    """The format of the rows of an Arrow file, of which no more is read than shows it."""
    reader = RowReader(**columns)
    for _ in file_rows(_values(datasets.Dataset.from_file(str(file))), reader, column):
        if reader.format is not None:
            break
    return reader.format


def _values(rows: datasets.Dataset) -> Iterator[Row]:
    """The rows with Arrow's own values: nothing is decoded, such as an image."""
    return arrow_rows(rows.with_format("arrow").iter(batch_size=1000))


def _is_to_hold_out(split: str) -> bool:
    """Whether a word of the name says that a split is not to train on."""
    return not SPLITS.keys().isdisjoint(re.split(r"[\W_]", split.lower()))


def _held_out(
    where: str, splits: Splits, trained: Collection[str], validation_split: str | None, test_split: str | None
) -> dict[Split, str]:
    """The validation and the test split: the one named, or else the one called so."""
    held_out: dict[Split, str] = {}
    named: dict[Split, str | None] = {"validation": validation_split, "test": test_split}
    for split, name in named.items():
        if name is None:
            taken = {*trained, *held_out.values(), test_split}
            called_so = (each for each in SPLITS if SPLITS[each] == split and each in splits and each not in taken)
            name = next(called_so, None)
        elif name in (*trained, *held_out.values()):
            raise ValueError(f"tasks.{split}_split: {where}: the split {name!r} has another use")
        if name is not None:
            held_out[split] = name
    return held_out


def _is_saved(folder: Path) -> bool:
    """Whether ``save_to_disk`` wrote ``folder``: with several splits, or a single one."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _saved_configurations(folder: Path) -> list[str]:
    """The folders in ``folder`` that ``save_to_disk`` wrote, if it did not write ``folder`` itself."""
    if _is_saved(folder) or not folder.is_dir():
        return []
    return sorted(each.name for each in folder.iterdir() if _is_saved(each))


def _chosen(names: list[str] | None, path: str | Path) -> list[str]:
    """The configurations to read: ``names``, or all."""
    saved = _saved_configurations(Path(path).expanduser())
    for name in names or ():
        if saved and name not in saved:
            raise ValueError(f"tasks.names: {path} has no configuration {name!r}{nearest(name, saved)}")
    if names is not None or saved:
        return names or saved
    with _loading(path):
        return list(datasets.get_dataset_config_names(str(path)))


def _splits(
    path: str | Path, configuration: str | None, data_files: str | list[str] | None
) -> dict[str, datasets.Dataset]:
    """The splits of a dataset by name. A dataset saved with a single split without a name has it under ``train``."""
    folder = Path(path).expanduser()
    if saved := _saved_configurations(folder):
        if configuration is None:
            advice = "name one in tasks.configuration, or set task_per: configuration"
            raise ValueError(f"tasks.path: {path} has the configurations {', '.join(saved)}; {advice}")
        if configuration not in saved:
            raise ValueError(
                f"tasks.configuration: {path} has no configuration {configuration!r}{nearest(configuration, saved)}"
            )
        folder = folder / configuration
    elif configuration is not None and _is_saved(folder):
        raise ValueError(f"tasks.configuration: {path} was written by save_to_disk, without configurations; remove it")
    if _is_saved(folder) and data_files is not None:
        raise ValueError(f"tasks.data_files: {folder} was written by save_to_disk, and has no data files to choose")
    with _loading(path, configuration):
        if (folder / "dataset_dict.json").is_file():
            names = json.loads((folder / "dataset_dict.json").read_text())["splits"]
            return {name: _saved_split(folder / name) for name in names}
        if _is_saved(folder):
            return {"train": _saved_split(folder)}
        chosen = {} if data_files is None else {"data_files": data_files}
        loaded = datasets.load_dataset(str(folder), configuration, **chosen)
        return dict(loaded) if isinstance(loaded, dict) else {"train": loaded}


def _saved_split(folder: Path) -> datasets.Dataset:
    """A split on disk; ``datasets`` writes one without rows that it cannot read."""
    if not json.loads((folder / "state.json").read_text())["_data_files"]:
        return datasets.Dataset.from_dict({})
    return datasets.Dataset.load_from_disk(str(folder))


@contextmanager
def _loading(path: str | Path, configuration: str | None = None) -> Iterator[None]:
    """Turns any exception of ``datasets`` into one line."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())
        named = f"{path}, configuration {configuration!r}" if configuration else f"{path}"
        raise ValueError(f"tasks.path: cannot load the dataset {named}: {reason}") from error
