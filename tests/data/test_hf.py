from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest

from adapt_recipes.data import hf_tasks

TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
PAIRS = datasets.Dataset.from_dict({"prompt": ["a", "c"], "response": ["b", "d"], "extra": [1, 2]})


def names(tasks: list[Any]) -> list[str]:
    return [task.name for task in tasks]


def test_one_task_a_split(tmp_path: Path) -> None:
    chat = datasets.Dataset.from_list([{"messages": TURNS}] * 3)
    datasets.DatasetDict({"chat": chat, "pairs": PAIRS}).save_to_disk(tmp_path / "set")
    first, second = hf_tasks(tmp_path / "set")
    assert names([first, second]) == ["chat", "pairs"]
    assert first.conversations == [TURNS] * 3
    assert second.conversations[0] == TURNS and len(second.conversations) == 2
    assert names(hf_tasks(str(tmp_path / "set"), names=["pairs"])) == ["pairs"]


def test_a_single_split_and_named_columns(tmp_path: Path) -> None:
    PAIRS.rename_columns({"prompt": "question", "response": "answer"}).save_to_disk(tmp_path)
    (task,) = hf_tasks(tmp_path, prompt="question", response="answer")
    assert task.name == "train" and task.conversations[0] == TURNS
    with pytest.raises(ValueError, match=r"split 'train': neither .* no 'answers'; did you mean 'answer'\?$"):
        hf_tasks(tmp_path, prompt="question", response="answers")


def test_one_task_a_configuration(tmp_path: Path) -> None:
    for name in ("two", "one"):
        datasets.DatasetDict({"train": PAIRS, "test": PAIRS.select([0])}).save_to_disk(tmp_path / name)
    first, second = hf_tasks(tmp_path, task_per="configuration")
    assert names([first, second]) == ["one", "two"] and first.validation is None
    (task,) = hf_tasks(tmp_path, task_per="configuration", names=["two"], validation_split="test")
    assert len(task.conversations) == 2 and task.validation == [TURNS]
    assert names(hf_tasks(tmp_path, configuration="one")) == ["train", "test"]
    with pytest.raises(ValueError, match=r", configuration 'one': no split 'tests'; did you mean 'test'\?$"):
        hf_tasks(tmp_path, task_per="configuration", validation_split="tests")


def test_a_name_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[tuple[str, str | None]] = []

    def load_dataset(path: str, configuration: str | None) -> datasets.DatasetDict:
        loads.append((path, configuration))
        return datasets.DatasetDict({"train": PAIRS})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda path: ["de", "en"])
    assert names(hf_tasks("someone/something")) == ["train"]
    assert names(hf_tasks("someone/something", task_per="configuration")) == ["de", "en"]
    assert loads == [("someone/something", None), ("someone/something", "de"), ("someone/something", "en")]

    monkeypatch.setattr(datasets, "load_dataset", lambda *_: datasets.DatasetDict({"train": PAIRS.select([])}))
    with pytest.raises(ValueError, match="^someone/something, split 'train': the split is empty$"):
        hf_tasks("someone/something")

    def refuse(path: str, configuration: str | None) -> None:
        raise ConnectionError("Couldn't reach the Hub\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    expected = "^tasks.path: cannot load the dataset someone/something, configuration 'de': Couldn't reach the Hub$"
    with pytest.raises(ValueError, match=expected):
        hf_tasks("someone/something", configuration="de")


def test_broken_rows_are_named(tmp_path: Path) -> None:
    datasets.Dataset.from_list([{"messages": TURNS}, {"messages": TURNS[:1]}]).save_to_disk(tmp_path / "a")
    with pytest.raises(ValueError, match=r"/a, split 'train': row 1: the last message must be the assistant's"):
        hf_tasks(tmp_path / "a")
    datasets.Dataset.from_dict({"prompt": ["a"], "response": [None]}).save_to_disk(tmp_path / "b")
    with pytest.raises(ValueError, match=r"/b, split 'train': row 0: 'response' must be a string, not NoneType$"):
        hf_tasks(tmp_path / "b")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"names": ["trian"]}, r"no split 'trian'; did you mean 'train'\?$"),
        ({"task_per": "splits"}, r"^tasks.task_per: 'splits' is not allowed; did you mean 'split'\?$"),
        ({"validation_split": "test"}, "^tasks.validation_split is for task_per: configuration"),
        ({"task_per": "configuration", "configuration": "a"}, "^tasks.configuration is for task_per: split"),
    ],
)
def test_wrong_arguments(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    PAIRS.save_to_disk(tmp_path)
    with pytest.raises(ValueError, match=message):
        hf_tasks(tmp_path, **arguments)


def test_no_folder_is_not_looked_up_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^tasks.path: no folder .*nowhere$"):
        hf_tasks(tmp_path / "nowhere")
