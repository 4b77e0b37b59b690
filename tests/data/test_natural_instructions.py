from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from adapt_recipes.data import ByteTokenizer, Conversation, natural_instructions, prepare_tasks
from adapt_recipes.data.examples import bad_rows_error
from adapt_recipes.data.source_files import FileTask


def content(category: str | list[str] = "Question Answering", **changes: Any) -> dict[str, Any]:
    """A file of the collection, in its true form."""
    return {
        "Contributors": ["A", "B"],
        "Categories": [category] if isinstance(category, str) else category,
        "Definition": [" Answer the question. "],
        "Positive Examples": [
            {"input": "1 + 1?", "output": "2", "explanation": "a sum"},
            {"input": "1 + 2?", "output": "3", "explanation": "a sum"},
        ],
        "Negative Examples": [],
        "Instances": [
            {"id": "task1-a", "input": "2 + 2? ", "output": [" 4", "four"]},
            {"id": "task1-b", "input": "2 + 3?", "output": ["5", "5"]},
        ],
    } | changes


def folder_with(tmp_path: Path, **files: dict[str, Any] | str | bytes) -> Path:
    (tmp_path / "tasks").mkdir()
    for name, what in files.items():
        raw = what if isinstance(what, bytes) else (what if isinstance(what, str) else json.dumps(what)).encode()
        (tmp_path / "tasks" / f"{name}.json").write_bytes(raw)
    return tmp_path


def turns(prompt: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def read(task: FileTask) -> list[list[dict[str, str]]]:
    assert all(isinstance(each, Conversation) and each.supervised == (1,) for each in task.conversations)
    return [each.messages for each in task.conversations if isinstance(each, Conversation)]


def answers(task: FileTask) -> list[str]:
    return [messages[-1]["content"] for messages in read(task)]


def test_definition_input_and_first_output(tmp_path: Path) -> None:
    (task,) = natural_instructions(folder_with(tmp_path, task1=content()))
    assert task.name == "Question Answering" and task.validation is None and task.entropy is None
    assert read(task) == [
        turns("Answer the question.\n\n2 + 2?", "4"),
        turns("Answer the question.\n\n2 + 3?", "5"),
    ]


def test_all_outputs_gives_one_example_a_different_output(tmp_path: Path) -> None:
    (task,) = natural_instructions(folder_with(tmp_path, task1=content()), all_outputs=True)
    assert answers(task) == ["4", "four", "5"]


@pytest.mark.parametrize(("all_outputs", "expected"), [(False, ["4", "6"]), (True, ["4", "6", "six"])])
def test_empty_outputs_are_left_out_and_counted(
    tmp_path: Path, all_outputs: bool, expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    outputs: list[Any] = [["", "4"], [" "], ["6", "six", ""], [""], []]
    instances = [{"input": f"question {i}", "output": output} for i, output in enumerate(outputs)]
    path = folder_with(tmp_path, task1=content(Instances=instances), task2=content())
    (task,) = natural_instructions(path, all_outputs=all_outputs)
    assert answers(task)[: len(expected)] == expected and not task.bad_rows
    warning = "warning: tasks.path: instances with only empty outputs, which are left out: 3 (task1.json: 3)\n"
    for _ in ("cold", "warm"):
        prepare_tasks([task], ByteTokenizer(), max_seq_len=64, validation_examples=1, cache_dir=tmp_path / "cache")
        assert capsys.readouterr().err == warning


@pytest.mark.parametrize("number", [1, 2, 5])
def test_positive_examples(tmp_path: Path, number: int) -> None:
    (task,) = natural_instructions(folder_with(tmp_path, task1=content()), num_positive_examples=number)
    shown = [
        "Positive Example 1 -\nInput: 1 + 1?\nOutput: 2\n\n",
        "Positive Example 2 -\nInput: 1 + 2?\nOutput: 3\n\n",
    ]
    assert read(task)[0][0]["content"] == (
        "Answer the question.\n\n"
        + "".join(shown[:number])
        + "Now complete the following example -\nInput: 2 + 2?\nOutput:"
    )


def test_types_select_and_order_and_gather_files(tmp_path: Path) -> None:
    other = content(Instances=[{"input": "a", "output": "b"}], Definition="Other.")
    path = folder_with(tmp_path, task2=content(["B", "C"]), task1=other | {"Categories": ["B"]}, task3=content("A"))
    everything = natural_instructions(path)
    assert [(task.name, len(task.conversations)) for task in everything] == [("A", 2), ("B", 3), ("C", 2)]
    assert read(everything[1])[0] == turns("Other.\n\na", "b"), "in the order of the files' names"
    assert [task.name for task in natural_instructions(path, types=["C", "A"])] == ["C", "A"]
    by_file = natural_instructions(path, task_per="file")
    assert [task.name for task in by_file] == ["task3", "task1", "task2"], "of types A, B, C, each once"
    assert [task.name for task in natural_instructions(path, task_per="file", types=["C"])] == ["task2"]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (b"", r"task1.json: the file is empty$"),
        ('{"Categories": ["A"],\n"Definition": oops}', r"task1.json: line 2: not valid JSON \(Expecting value\)$"),
        (b'{"Categories":\n\n["\xff"]}', r"task1.json: line 3: not valid UTF-8$"),
        ("[1]", r"task1.json: must be an object with the key 'Categories', not list$"),
        ({"Category": ["A"]}, r"task1.json: no key 'Categories'; it has 'Category'$"),
        (content(Categories=[]), r"task1.json: 'Categories' is an empty list$"),
        (content(Categories=["A", " "]), r"task1.json: a category is blank$"),
        (content(Categories=[3]), r"task1.json: 'Categories' must be a string, not int$"),
        (content(Definition=None), r"task1.json: 'Definition' must be a string, not NoneType$"),
        (content(Instances=[]), r"task1.json: 'Instances' is an empty list$"),
        ('{"Categories": ["A"], "Definition": "\\ud800"}', r"task1.json: 'Definition' is not valid Unicode"),
        ('{"Categories":' + "[" * 100_000, r"task1.json: not valid JSON \(nested too deeply\)$"),
        ('{"Categories": ' + "1" * 5_000 + "}", r"task1.json: not valid JSON \(a number is too long\)$"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, broken: Any, message: str) -> None:
    path = folder_with(tmp_path, task1=broken, task0=content())
    with pytest.raises(ValueError, match=message) as error:
        assert [task.conversations for task in natural_instructions(path)]
    assert str(tmp_path / "tasks" / "task1.json") in str(error.value) and "\n" not in str(error.value)


def test_bad_instances_are_gathered(tmp_path: Path) -> None:
    instances = [
        {"id": "x", "input": "a"},
        {"input": "a", "outputs": "b"},
        {"input": 1, "output": "a"},
        "a",
        {"input": "a", "output": ["b", 3]},
        {"input": "a", "output": "b"},
    ]
    path = folder_with(tmp_path, task1=content(["A", "B"], Instances=instances))
    tasks = natural_instructions(path)
    assert [read(task) for task in tasks] == [[turns("Answer the question.\n\na", "b")]] * 2
    source = f"{path}/tasks/task1.json, instance"
    assert [str(row) for row in tasks[0].bad_rows] == [
        f"{source} 0: no key 'output'",
        f"{source} 1: no key 'output'; it has 'outputs'",
        f"{source} 2: 'input' must be a string, not int",
        f"{source} 3: must be an object with the key 'input', not str",
        f"{source} 4: 'output' must be a string, not int",
    ]
    assert tasks[0].conversations[0].origin == (source, 5)
    both = [row for task in tasks for row in task.bad_rows]
    assert bad_rows_error(both).startswith(f"{path}/tasks/task1.json: 5 bad rows: instance 0: "), "each once"


def test_hidden_files_and_links(tmp_path: Path) -> None:
    path = folder_with(tmp_path, task1=content(), **{"._task1": b"\0"})
    (path / "tasks" / "README.md").write_text("about")
    assert len(natural_instructions(path)) == 1
    (path / "tasks" / "task2.json").symlink_to("nowhere")
    with pytest.raises(ValueError, match="task2.json is a broken link; remove it$"):
        natural_instructions(path)


def test_broken_positive_examples(tmp_path: Path) -> None:
    path = folder_with(tmp_path, task1=content(**{"Positive Examples": [{"input": "a"}]}))
    assert len(natural_instructions(path)) == 1
    with pytest.raises(ValueError, match=r"task1.json: positive example 0: no key 'output'"):
        assert natural_instructions(path, num_positive_examples=1)[0].conversations


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"types": ["Question Answer"]}, r"^tasks.types: .* 'Question Answer'; did you mean 'Question Answering'\?$"),
        ({"types": []}, "^tasks.types: name at least one type, and each only once$"),
        ({"types": ["Question Answering"] * 2}, "^tasks.types: name at least one type, and each only once$"),
        ({"task_per": "files"}, r"^tasks.task_per: 'files' is not allowed; did you mean 'file'\?$"),
        ({"num_positive_examples": -1}, "^tasks.num_positive_examples: -1 is not allowed; at least 0$"),
    ],
)
def test_wrong_arguments(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        natural_instructions(folder_with(tmp_path, task1=content()), **arguments)


def test_missing_folder_and_no_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^tasks.path: no folder .*nowhere$"):
        natural_instructions(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"^tasks.path: no files .*/tasks/\*\.json$"):
        natural_instructions(tmp_path)


@pytest.mark.skipif(
    "NATURAL_INSTRUCTIONS" not in os.environ, reason="NATURAL_INSTRUCTIONS names no copy of the collection"
)
def test_real_files() -> None:
    for task in natural_instructions(os.environ["NATURAL_INSTRUCTIONS"], num_positive_examples=2):
        assert task.conversations
        for user, answer in read(task):
            assert user["content"].count("Positive Example 2 -") == 1 and answer["content"].strip()
