"""What a run reads as a whole: its highest token, and a hash by which a resume on other data is refused."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from adapt_recipes.data import Examples, Task, build_tasks, fingerprint, load, max_token


def examples(*tokens: int) -> Examples:
    """One example, of which all but the first token are supervised."""
    supervised = torch.arange(len(tokens)) > 0
    offsets = torch.tensor([0, len(tokens)])
    return Examples.in_memory(
        torch.tensor(tokens, dtype=torch.int32), supervised, offsets, torch.zeros(1, dtype=torch.int64)
    )


TASKS = [Task("a", examples(1, 2, 3), examples(4, 5)), Task("b", examples(6, 7), None)]


def with_test(test: Examples | None) -> list[Task]:
    return [replace(TASKS[0], test=test), TASKS[1]]


def test_a_hash_without_a_test_split_is_for_ever() -> None:
    """Another one would refuse the resume of every earlier run."""
    assert fingerprint(TASKS) == "1422f3c19783ce23a08758ae33dc8290"


def test_a_hash_is_of_every_split_and_its_place() -> None:
    tests = [None, examples(4, 5), examples(4, 6), examples(4, 5, 6)]
    moved = [Task("a", examples(1, 2, 3), None, test=examples(4, 5)), TASKS[1]]
    other = [TASKS[0], replace(TASKS[1], test=examples(4, 5))]
    assert len({fingerprint(tasks) for tasks in (*map(with_test, tests), moved, other)}) == 6


def test_a_hash_tells_a_target_from_a_task_without_validation() -> None:
    none = examples(1, 2).select([])
    assert fingerprint([Task("a", none, examples(1, 2, 3))]) != fingerprint([Task("a", examples(1, 2, 3), None)])


def test_the_highest_token_is_of_every_split() -> None:
    assert max_token(TASKS) == 7 and max_token(with_test(examples(1, 9))) == 9
    assert max_token([]) == 0


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_one_process_says_what_it_waits_for(
    rank: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not the first of a host, which prepares the data, and none of the others."""

    @contextlib.contextmanager
    def in_turn(**_: bool) -> Iterator[None]:
        time.sleep(0.2)
        yield

    monkeypatch.setattr(load, "raise_on_all_ranks", in_turn)
    monkeypatch.setattr(load, "load_tasks", lambda *_, **__: TASKS)
    monkeypatch.setattr(load, "_SILENT_SECONDS", 0.01)
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    component: Any = type("Component", (), {"build": lambda self: None})()
    assert build_tasks(component, component, max_seq_len=8) == (None, TASKS)
    waits = "waiting for the first process of this host, which prepares the data\n"
    assert capsys.readouterr().err == (waits if rank == 1 else "")
