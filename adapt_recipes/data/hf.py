"""Tasks from a Hugging Face dataset, on disk or on the hub, through ``datasets``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import datasets

from adapt_recipes.data.conversations import conversation_of, error_prefix, folder_of
from adapt_recipes.data.examples import Conversation, RawTask
from adapt_recipes.errors import nearest


def hf_tasks(
    path: str | Path,
    *,
    task_per: Literal["split", "configuration"] = "split",
    names: list[str] | None = None,
    configuration: str | None = None,
    split: str = "train",
    validation_split: str | None = None,
    messages: str = "messages",
    prompt: str = "prompt",
    response: str = "response",
) -> list[RawTask]:
    """One task per split, or one per configuration, of a dataset.

    Args:
        path: a folder written by ``save_to_disk``, or a folder of such folders, its configurations (both are read
            without network); or an argument of ``datasets.load_dataset``: a name on the hub, a folder of data files.
        task_per: whether a task is a split or a configuration.
        names: which splits or configurations, in which order; None: all, in the order of the dataset.
        configuration: with ``task_per="split"``: the configuration whose splits are the tasks.
        split: with ``task_per="configuration"``: the split of each to train on.
        validation_split: with ``task_per="configuration"``: the split of each to validate on; None: split off.
        messages: the column of the conversations, lists of ``{role, content}``.
        prompt: the column of the user's message, if there is no column ``messages``.
        response: the column of the assistant's message, if there is no column ``messages``.

    Raises:
        ValueError: the dataset cannot be loaded; a split, configuration or column is unknown; a row is no conversation
            (it names split and row).
    """
    if task_per not in ("split", "configuration"):
        allowed = nearest(str(task_per), ("split", "configuration"))
        raise ValueError(f"tasks.task_per: {task_per!r} is not allowed{allowed}")
    if task_per == "split" and validation_split is not None:
        raise ValueError(
            "tasks.validation_split is for task_per: configuration; with task_per: split every split is a task"
        )
    if task_per == "configuration" and configuration is not None:
        raise ValueError("tasks.configuration is for task_per: split; tasks.names chooses among configurations")

    # This cannot be a name on the hub, where a missing one takes long to report.
    if str(path).startswith((".", "/", "~")):
        folder_of(path)

    def conversations(splits: dict[str, Any], name: str, where: str) -> list[Conversation]:
        if name not in splits:
            raise ValueError(f"{where}: no split {name!r}{nearest(name, splits)}")
        with error_prefix(f"{where}, split {name!r}"):
            return _conversations(splits[name], messages, prompt, response)

    # A task per split, or per configuration.
    if task_per == "split":
        splits = _splits(path, configuration)
        return [RawTask(name, conversations(splits, name, str(path))) for name in names or splits]
    tasks = []
    for name in names or _configurations(path):
        splits, where = _splits(path, name), f"{path}, configuration {name!r}"
        validation = conversations(splits, validation_split, where) if validation_split else None
        tasks.append(RawTask(name, conversations(splits, split, where), validation))
    return tasks


def _is_saved(folder: Path) -> bool:
    """Whether ``save_to_disk`` wrote ``folder``: with several splits, or a single one."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _configurations(path: str | Path) -> list[str]:
    folder = Path(path).expanduser()
    saved = sorted(each.name for each in folder.iterdir() if _is_saved(each)) if folder.is_dir() else []
    if saved:
        return saved
    with _loading(path):
        return list(datasets.get_dataset_config_names(str(path)))


def _splits(path: str | Path, configuration: str | None) -> dict[str, datasets.Dataset]:
    """The splits of a dataset by name. A dataset saved with a single split without a name has it under ``train``."""
    folder = Path(path).expanduser() / (configuration or "")
    with _loading(path, configuration):
        if _is_saved(folder):
            loaded = datasets.load_from_disk(str(folder))
        else:
            loaded = datasets.load_dataset(str(path), configuration)
        return dict(loaded) if isinstance(loaded, dict) else {"train": loaded}


@contextmanager
def _loading(path: str | Path, configuration: str | None = None) -> Iterator[None]:
    """Turns any exception of ``datasets`` into one line."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        named = f"{path}, configuration {configuration!r}" if configuration else f"{path}"
        raise ValueError(f"tasks.path: cannot load the dataset {named}: {reason}") from error


def _conversations(dataset: datasets.Dataset, messages: str, prompt: str, response: str) -> list[Conversation]:
    if not len(dataset):
        raise ValueError("the split is empty")
    columns = [messages] if messages in dataset.column_names else [prompt, response]
    for column in columns:
        if column not in dataset.column_names:
            hint = nearest(column, dataset.column_names)
            raise ValueError(f"neither a column {messages!r} nor both {prompt!r} and {response!r}: no {column!r}{hint}")
    conversations = []
    for index, row in enumerate(dataset.select_columns(columns)):
        with error_prefix(f"row {index}"):
            conversations.append(conversation_of(row, messages=messages, prompt=prompt, response=response))
    return conversations
