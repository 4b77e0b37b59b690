"""Files of a folder become tasks, one per file or one per value of a column."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from adapt_recipes.data import ByteTokenizer, RawTask, Task, jsonl_tasks, prepare_tasks
from adapt_recipes.data.source_files import ColumnTasks, FileTask


def pair(question: object, answer: str = "a", **other: Any) -> dict[str, Any]:
    return {"prompt": str(question), "response": answer, **other}


def write(file: Path, *rows: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return file


def prepare(tmp_path: Path, tasks: Any, **options: Any) -> list[Task]:
    options = {"max_seq_len": 64, "validation_examples": 1, "cache_dir": tmp_path / "cache"} | options
    return prepare_tasks(tasks, ByteTokenizer(), **options)


def by_column(path: Path, column: str) -> list[RawTask]:
    (tasks,) = jsonl_tasks(path, task_per="column", column=column)
    assert isinstance(tasks, ColumnTasks)
    return tasks.raw_tasks()


def questions(task: RawTask | FileTask, split: str = "conversations") -> list[str] | None:
    rows = getattr(task, split)
    return None if rows is None else [row.messages[0]["content"] for row in rows]


def test_a_task_per_file(tmp_path: Path) -> None:
    file = write(
        tmp_path / "data" / "b.jsonl", pair(1, id=3), {"messages": [{"role": "user", "content": "2"}]}, pair(3)
    )
    write(tmp_path / "data" / "b.validation.jsonl", pair(4, id=5))
    write(tmp_path / "data" / "b.test.json", [pair(5), pair(6)])
    write(tmp_path / "data" / "a" / "c.json", pair(7))
    c, b = jsonl_tasks(tmp_path / "data")
    assert (c.name, b.name) == ("a/c", "b") and c.validation is None and c.test is None
    splits = [questions(b, split) for split in ("conversations", "validation", "test")]
    assert splits == [["1", "3"], ["4"], ["5", "6"]]
    assert b.unused_keys == {"id": 2} and c.unused_keys == {}
    assert list(map(str, b.bad_rows)) == [f"{file}, line 2: the last message must be the assistant's, not the user's"]
    assert [row.origin for row in b.conversations] == [(f"{file}, line", 1), (f"{file}, line", 3)]
    (alone,) = jsonl_tasks(file)
    assert alone.name == "b" and questions(alone, "test") == ["5", "6"]


def test_a_task_per_value_of_a_column(tmp_path: Path) -> None:
    sources: list[Any] = ["y", "x", None, "x ", 3, ["x"], True, " ", "a\nb", 1.5]
    rows = [pair(i, source=source) for i, source in enumerate(sources)]
    file = write(tmp_path / "data" / "a.jsonl", *rows, pair(10), pair(11, "", source="x"), "no object")
    write(tmp_path / "data" / "a.test.jsonl", pair(20, source="y"))
    write(tmp_path / "data" / "b.jsonl", pair(30, source="x", id=1))
    tasks = {task.name: task for task in by_column(tmp_path / "data", "source")}
    assert {name: questions(task) for name, task in tasks.items()} == {"3": ["4"], "x": ["1", "3", "30"], "y": ["0"]}
    assert questions(tasks["y"], "test") == ["20"] and tasks["x"].test is None
    assert tasks["x"].unused_keys == {"id": 1}, "the column is used"
    assert [row.number for row in tasks["x"].bad_rows] == [12], "a row without a value is the first task's"
    bad = {row.number: row.reason for task in tasks.values() for row in task.bad_rows}
    none = "no 'source', whose values are the tasks"
    assert bad == {
        3: none,
        6: "'source' must be a name, not ['x']",
        7: "'source' must be a name, not True",
        8: "'source' must be a name, not ' '",
        9: r"'source' must be a name, not 'a\nb'",
        10: "'source' must be a name, not 1.5",
        11: none,
        12: "message 1: the assistant's answer is empty",
        13: "must be an object with the key 'source'",
    }
    with pytest.raises(
        ValueError, match=f"^{file}: 14 bad rows: line 1: no 'sources', .*; it has 'source'; line 2: no"
    ):
        write(tmp_path / "data" / "a.jsonl", *rows, *rows[:4])
        by_column(tmp_path / "data", "sources")


def test_parquet_is_read_as_json_is(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "look", "arguments": {"x": 1}}}
    other = {"type": "function", "function": {"name": "look", "arguments": {"y": [2]}}}
    rows = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]}]},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}], "id": 1},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [other]}]},
    ]
    (tmp_path / "p").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p" / "t.parquet")
    write(tmp_path / "j" / "t.jsonl", *rows)
    (parquet,), (lines,) = jsonl_tasks(tmp_path / "p"), jsonl_tasks(tmp_path / "j")
    read = [[(row.messages, row.supervised) for row in task.conversations] for task in (parquet, lines)]
    assert read[0] == read[1] and len(read[0]) == 3
    assert [row.origin for row in parquet.conversations][0] == (f"{tmp_path}/p/t.parquet, row", 0)


def test_bad_rows_are_refused_or_skipped(tmp_path: Path) -> None:
    good = [pair(i) for i in range(3)]
    file = write(tmp_path / "data" / "a.jsonl", *good, *[pair(i, "") for i in range(1_000)])
    write(tmp_path / "data" / "b.jsonl", *good, 3)
    tasks = jsonl_tasks(tmp_path / "data")
    reason = "message 1: the assistant's answer is empty"
    lines = "; ".join(f"line {line}: {reason}" for line in range(4, 9))
    with pytest.raises(ValueError) as error:
        prepare(tmp_path, tasks)
    advice = "tasks.on_bad_rows: skip leaves them out"
    assert str(error.value) == f"{file}: 1,000 bad rows: {lines}; and 995 more; and 1 elsewhere; {advice}"
    with pytest.raises(ValueError, match=r"/b.jsonl, line 4: must be an object, not int$"):
        prepare(tmp_path, tasks[1:])
    assert [task.left_out.bad_rows for task in prepare(tmp_path, tasks, on_bad_rows="skip")] == [1_000, 1]

    file = write(tmp_path / "c.jsonl", *[{"text": "a"}] * 3)
    with pytest.raises(
        ValueError, match="c.jsonl: 3 bad rows: line 1: fits no format; .*; line 2: the same; line 3: the"
    ):
        prepare(tmp_path, jsonl_tasks(file))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task_per": "files"}, r"^tasks.task_per: 'files' is not allowed; did you mean 'file'\?$"),
        ({"task_per": "split"}, "^tasks.task_per: 'split' is not allowed; allowed: file, column$"),
        ({"task_per": "column"}, "^tasks.column: name the column whose values are the tasks"),
        ({"column": "source"}, "^tasks.column is for task_per: column, not for task_per: file$"),
        ({"format": "alpacca"}, r"^tasks.format: 'alpacca' is not a format; did you mean 'alpaca'\?$"),
        ({"messages": "a", "prompt": "b"}, "^tasks.messages: is one column"),
    ],
)
def test_wrong_arguments(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    """They are refused before anything is read."""
    with pytest.raises(ValueError, match=message):
        jsonl_tasks(tmp_path / "nowhere", **arguments)


@pytest.mark.parametrize("raw", ["", "\n \n", "[]", "\ufeff"])
def test_nothing_there(tmp_path: Path, raw: str) -> None:
    with pytest.raises(ValueError, match=r"^tasks.path: no folder .*nowhere$"):
        jsonl_tasks(tmp_path / "nowhere")
    (tmp_path / "a.json").write_text(raw)
    with pytest.raises(ValueError, match=r"/a.json is empty$"):
        prepare(tmp_path, jsonl_tasks(tmp_path))


def seconds(folder: Path, num_tasks: int, number: int, *, in_files: bool) -> float:
    """Reads the rows of so many tasks, each in a file of its own or all in one, which the store does not have."""
    rows = [pair(i, source=str(i % num_tasks)) for i in range(number)]
    for task in range(num_tasks) if in_files else [0]:
        write(folder / "data" / f"{task}.jsonl", *(rows[task::num_tasks] if in_files else rows))
    start = time.monotonic()
    if in_files:
        sizes = [len(task.conversations) for task in jsonl_tasks(folder / "data") if isinstance(task, FileTask)]
    else:
        tasks = prepare(folder, jsonl_tasks(folder / "data", task_per="column", column="source"))
        sizes = [len(split.lengths) for task in tasks for split in task.splits.values()]
        assert len(tasks) == num_tasks
    assert sum(sizes) == number
    return time.monotonic() - start


@pytest.mark.parametrize(("in_files", "number"), [(True, 2_000), (False, 10_000)])
def test_ten_thousand_tasks(tmp_path: Path, in_files: bool, number: int) -> None:
    # Ten seconds of grace for slow machines: anything quadratic takes minutes.
    few = seconds(tmp_path / "few", 10, 2 * number, in_files=in_files)
    assert seconds(tmp_path / "many", number, 2 * number, in_files=in_files) < 10 + 10 * few
