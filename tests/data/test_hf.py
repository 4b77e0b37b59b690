"""Splits, configurations and columns of Hugging Face datasets become tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from adapt_recipes.data import Conversation, RawTask, hf_tasks, jsonl_tasks
from adapt_recipes.data.source_files import ColumnTasks, FileTask

TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
PAIRS = datasets.Dataset.from_dict({"prompt": ["a", "c"], "response": ["b", "d"], "extra": [1, 2]})
CHAT = datasets.Dataset.from_list([{"messages": TURNS}] * 3)


def save(folder: Path, **splits: datasets.Dataset) -> Path:
    datasets.DatasetDict(splits).save_to_disk(folder)
    return folder


def read(task: Any) -> list[list[dict[str, Any]]]:
    return [each.messages for each in task.conversations if isinstance(each, Conversation)]


def sizes(tasks: list[FileTask] | list[ColumnTasks] | list[RawTask]) -> dict[str, tuple[int, int | None, int | None]]:
    """Of the training, validation and test split."""
    tasks = [each for task in tasks for each in (task.raw_tasks() if isinstance(task, ColumnTasks) else [task])]
    return {
        task.name: (
            len(task.conversations),
            None if task.validation is None else len(task.validation),
            None if task.test is None else len(task.test),
        )
        for task in tasks
    }


def test_one_task_per_split(tmp_path: Path) -> None:
    path = save(tmp_path / "set", pairs=PAIRS, chat=CHAT)
    pairs, chat = hf_tasks(path)
    assert (pairs.name, chat.name) == ("pairs", "chat") and read(chat) == [TURNS] * 3
    assert read(pairs)[0] == TURNS and len(pairs.conversations) == 2 and pairs.unused_keys == {"extra": 2}
    assert pairs.conversations[1].origin == (f"{path}, split 'pairs', row", 1)
    assert sizes(hf_tasks(str(path), names=["chat", "pairs"])).keys() == {"chat", "pairs"}


ALL = {"train": PAIRS, "validation": CHAT, "test": PAIRS.select([0])}


@pytest.mark.parametrize(
    ("splits", "arguments", "expected", "unread"),
    [
        # Called so, or named.
        (ALL, {}, {"train": (2, 3, 1)}, ""),
        (ALL, {"names": ["train"], "validation_split": "test"}, {"train": (2, 1, None)}, ""),
        (ALL, {"names": ["train"], "test_split": "validation"}, {"train": (2, None, 3)}, ""),
        (ALL, {"names": ["test"]}, {"test": (1, 3, None)}, ""),
        (ALL, {"names": ["train", "validation"]}, {"train": (2, None, None), "validation": (3, None, None)}, ""),
        ({"train": PAIRS, "dev": CHAT}, {}, {"train": (2, 3, None)}, ""),
        ({"train": PAIRS, "other": CHAT}, {"validation_split": "other"}, {"train": (2, 3, None)}, ""),
        # What is called a test is not trained on.
        (ALL | {"more": PAIRS}, {}, {"train": (2, None, None), "more": (2, None, None)}, "'validation', 'test'"),
        ({"train": PAIRS, "test_sft": CHAT, "Val.1": CHAT}, {}, {"train": (2, None, None)}, "'test_sft', 'Val.1'"),
        ({"train": PAIRS, "latest": PAIRS}, {}, {"train": (2, None, None), "latest": (2, None, None)}, ""),
    ],
)
def test_validation_and_test_splits(
    tmp_path: Path, capfd: Any, splits: Any, arguments: dict[str, Any], expected: dict[str, Any], unread: str
) -> None:
    path = save(tmp_path / "set", **splits)
    capfd.readouterr()
    assert sizes(hf_tasks(path, **arguments)) == expected
    warnings = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning")]
    assert warnings == ([f"warning: tasks.path: {path}: not read: split {unread}"] if unread else [])


def test_a_single_split_and_named_columns(tmp_path: Path) -> None:
    PAIRS.rename_columns({"prompt": "question", "response": "text"}).save_to_disk(tmp_path)
    (task,) = hf_tasks(tmp_path, prompt="question", response="text")
    assert task.name == "train" and read(task)[0] == TURNS
    message = rf"^tasks.response: {tmp_path}, split 'train' has no column 'texts'; did you mean 'text'\?$"
    with pytest.raises(ValueError, match=message):
        hf_tasks(tmp_path, prompt="question", response="texts")


def test_one_task_per_configuration(tmp_path: Path, capfd: Any) -> None:
    save(tmp_path / "two", train=PAIRS, validation=CHAT, more=PAIRS)
    save(tmp_path / "one", train=PAIRS, test=PAIRS.select([0]))
    PAIRS.save_to_disk(tmp_path / "zero")
    per = {"task_per": "configuration"}
    expected = {"one": (2, None, 1), "two": (2, 3, None), "zero": (2, None, None)}
    assert sizes(hf_tasks(tmp_path, **per)) == expected
    assert f"warning: tasks.path: {tmp_path}, configuration 'two': not read: split 'more'" in capfd.readouterr().err
    assert list(sizes(hf_tasks(tmp_path, names=["zero", "one"], **per))) == ["zero", "one"]
    assert sizes(hf_tasks(tmp_path, names=["one"], validation_split="test", **per)) == {"one": (2, 1, None)}
    assert sizes(hf_tasks(tmp_path, names=["one"], split="test", **per)) == {"one": (1, None, None)}
    assert sizes(hf_tasks(tmp_path, configuration="two", names=["train"])) == {"train": (2, 3, None)}
    for arguments, message in (
        ({"split": "validation", **per}, ", configuration 'one': no split 'validation'; allowed: train, test$"),
        ({"validation_split": "tests", **per}, r", configuration 'one': no split 'tests'; did you mean 'test'\?$"),
        ({"names": ["tow"], **per}, r"^tasks.names: .* has no configuration 'tow'; did you mean 'two'\?$"),
        ({"configuration": "tow"}, r"^tasks.configuration: .* has no configuration 'tow'; did you mean 'two'\?$"),
        ({}, "has the configurations one, two, zero; name one in tasks.configuration, or set task_per: configuration$"),
    ):
        with pytest.raises(ValueError, match=message):
            hf_tasks(tmp_path, **arguments)


def test_one_task_per_value_of_a_column(tmp_path: Path, capfd: Any) -> None:
    split = PAIRS.add_column("source", ["y", "x"])
    more = datasets.Dataset.from_list([{"prompt": "a", "response": "b", "source": each} for each in ("x", "x", None)])
    path = save(tmp_path / "set", train=split, validation=more, other=split)
    (tasks,) = hf_tasks(path, task_per="column", column="source")
    assert isinstance(tasks, ColumnTasks)
    x, y = tasks.raw_tasks()
    assert sizes([x, y]) == {"x": (1, 2, None), "y": (1, None, None)}
    assert x.unused_keys == y.unused_keys == {"extra": 1}, "the column is used"
    assert [str(row) for row in x.bad_rows] == [
        f"{path}, split 'validation', row 2: no 'source', whose values are the tasks"
    ]
    assert f"warning: tasks.path: {path}: not read: split 'other'" in capfd.readouterr().err
    assert sizes(hf_tasks(path, task_per="column", column="source", split="validation")) == {"x": (2, None, None)}
    with pytest.raises(ValueError, match=r"^tasks.column: .* has no column 'sorce'; did you mean 'source'\?$"):
        hf_tasks(path, task_per="column", column="sorce")


def test_a_name_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[tuple[Any, ...]] = []

    def load_dataset(path: str, configuration: str | None, **chosen: Any) -> datasets.DatasetDict:
        loads.append((path, configuration, chosen))
        return datasets.DatasetDict({"train": PAIRS})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda path: ["de", "en"])
    assert list(sizes(hf_tasks("someone/something"))) == ["train"]
    assert list(sizes(hf_tasks("someone/something", task_per="configuration"))) == ["de", "en"]
    hf_tasks("json", data_files=["a.jsonl"])
    hub = "someone/something"
    assert loads == [(hub, None, {}), (hub, "de", {}), (hub, "en", {}), ("json", None, {"data_files": ["a.jsonl"]})]

    monkeypatch.setattr(datasets, "load_dataset", lambda *_: datasets.DatasetDict({"train": PAIRS.select([])}))
    with pytest.raises(ValueError, match="^someone/something, split 'train' is empty$"):
        hf_tasks("someone/something")

    def refuse(path: str, configuration: str | None) -> None:
        raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['de', 'en']")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    expected = "cannot load the dataset someone/something: Config name is missing. Please pick one .*: .'de', 'en'.$"
    with pytest.raises(ValueError, match=f"^tasks.path: {expected}"):
        hf_tasks("someone/something")
    with pytest.raises(ValueError, match="cannot load the dataset someone/something, configuration 'fr': "):
        hf_tasks("someone/something", configuration="fr")


def test_an_empty_split(tmp_path: Path) -> None:
    path = save(tmp_path / "set", train=PAIRS, test=PAIRS.select([]))
    with pytest.raises(ValueError, match=f"^{path}, split 'test' is empty$"):
        hf_tasks(path)
    with pytest.raises(ValueError, match=f"^{path}, split 'test' is empty$"):
        hf_tasks(path, names=["test"], prompt="prompt", response="response")


def test_rows_are_as_they_were_before_arrow(tmp_path: Path) -> None:
    """A struct of Arrow has the keys of all rows; and nothing is decoded."""
    calls = [{"type": "function", "function": {"name": "f", "arguments": each}} for each in ({"x": 1}, {"y": [2]})]
    rows = [[TURNS[0], {"role": "assistant", "content": "", "tool_calls": [call]}] for call in calls]
    rows.append([{"role": "user", "content": "a", "weight": 0}, TURNS[1]])
    dataset = datasets.Dataset.from_list([{"messages": each, "tools": json.dumps([calls[0]])} for each in rows])
    dataset.save_to_disk(tmp_path / "calls")
    (task,) = hf_tasks(tmp_path / "calls")
    assert read(task) == [*rows[:2], TURNS] and not task.bad_rows
    assert [each.tools for each in task.conversations if isinstance(each, Conversation)] == [[calls[0]]] * 3
    dataset.select([2, 1]).save_to_disk(tmp_path / "selected")
    assert read(hf_tasks(tmp_path / "selected")[0]) == [TURNS, rows[1]]

    images = PAIRS.select([0]).add_column("image", [{"bytes": b"no image", "path": None}])
    images.cast_column("image", datasets.Image(decode=True)).save_to_disk(tmp_path / "images")
    (row,) = hf_tasks(tmp_path / "images")[0].bad_rows
    assert row.reason.startswith("the key 'image' cannot be used here")


def test_columns_of_json(tmp_path: Path) -> None:
    """Values of several types in one column are JSON to Arrow, in a data set as in a Parquet file."""
    contents: list[Any] = ["a", [{"type": "text", "text": "a"}], [{"type": "image", "image": "b"}]]
    rows = [{"messages": [TURNS[0] | {"content": each}, TURNS[1]]} for each in contents]
    dataset = datasets.Dataset.from_list(rows, on_mixed_types="use_json")
    dataset.save_to_disk(tmp_path / "set")
    dataset.to_parquet(tmp_path / "t.parquet")
    for task in (hf_tasks(tmp_path / "set")[0], jsonl_tasks(tmp_path / "t.parquet")[0]):
        assert read(task) == [TURNS, TURNS]
        (row,) = task.bad_rows
        assert row.number == 2
        assert row.reason == "message 0: a part of its content is 'image'; only 'text' can be used"
    # A null in JSON is the row's own.
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": None}}}
    rows = [{"messages": [TURNS[0], TURNS[1] | {"tool_calls": [each]}]} for each in (call, {"function": "f"})]
    datasets.Dataset.from_list(rows, on_mixed_types="use_json").save_to_disk(tmp_path / "calls")
    assert read(hf_tasks(tmp_path / "calls")[0]) == [[TURNS[0], TURNS[1] | {"tool_calls": [call]}]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"names": ["trian"]}, r"no split 'trian'; did you mean 'train'\?$"),
        ({"names": []}, "^tasks.names: name at least one, and each only once$"),
        ({"names": ["train", "train"]}, "^tasks.names: name at least one, and each only once$"),
        ({"names": ["train"], "validation_split": "train"}, "^tasks.validation_split: .* 'train' has another use$"),
        ({"names": ["train"], "validation_split": "more", "test_split": "more"}, "^tasks.test_split: .* another use$"),
        ({"names": ["train", "more"], "test_split": "train"}, "^tasks.test_split: .* 'train' has another use$"),
        ({"names": ["train", "more"], "test_split": "tests"}, "^tasks.validation_split and tasks.test_split are"),
        ({"names": ["train"], "test_split": "mroe"}, r"no split 'mroe'; did you mean 'more'\?$"),
        ({"split": "more"}, "^tasks.split is not for task_per: split; tasks.names chooses among them$"),
        ({"configuration": "a"}, "^tasks.configuration: .* was written by save_to_disk, without"),
        ({"data_files": "a"}, "^tasks.data_files: .* was written by save_to_disk, and has no data files to choose$"),
        ({"task_per": "splits"}, r"^tasks.task_per: 'splits' is not allowed; did you mean 'split'\?$"),
        ({"task_per": "column"}, "^tasks.column: name the column whose values are the tasks"),
        ({"task_per": "column", "column": "a", "names": ["b"]}, "^tasks.names is not for task_per: column; "),
        ({"column": "extra"}, "^tasks.column is for task_per: column, not for task_per: split$"),
        ({"task_per": "configuration", "configuration": "a"}, "^tasks.configuration is not for task_per: "),
        ({"format": "openai"}, "^tasks.format: 'openai' is not a format; allowed: messages, "),
        ({"prompt": "promt"}, r"^tasks.prompt: .* has no column 'promt'; did you mean 'prompt'\?$"),
    ],
)  # fmt: skip
def test_wrong_arguments(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    path = save(tmp_path / "set", train=PAIRS, more=PAIRS)
    with pytest.raises(ValueError, match=message):
        hf_tasks(path, **arguments)


def test_only_splits_to_hold_out(tmp_path: Path) -> None:
    path = save(tmp_path / "set", test=PAIRS, validation=PAIRS)
    with pytest.raises(ValueError, match="no split to train on; name one in tasks.names: test, validation$"):
        hf_tasks(path)


def test_no_folder_is_not_looked_up_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^tasks.path: no folder .*nowhere$"):
        hf_tasks(tmp_path / "nowhere")
