"""Processes stop together, at the same step and with the same status, whichever of them was signaled."""

from __future__ import annotations

import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import group
import pytest
import torch

from adapt_recipes.training import interrupt
from adapt_recipes.training.interrupt import StopSignals
from adapt_recipes.training.process_group import all_reduce_sum, process_group, rank

pytestmark = pytest.mark.slow

Sent = dict[int, dict[int, list[signal.Signals]]]  # process -> step -> signals

CASES: dict[str, Sent] = {
    "the first": {0: {3: [signal.SIGTERM]}},
    "the second": {1: {3: [signal.SIGINT]}},
    "both": {0: {3: [signal.SIGTERM]}, 1: {3: [signal.SIGTERM]}},
    "one by one": {0: {3: [signal.SIGINT]}, 1: {4: [signal.SIGINT]}},
    "each its own": {0: {3: [signal.SIGINT]}, 1: {3: [signal.SIGTERM]}},
    "twice": {0: {3: [signal.SIGTERM, signal.SIGTERM]}, 1: {3: [signal.SIGTERM, signal.SIGTERM]}},
    "one after the other": {0: {3: [signal.SIGINT, signal.SIGTERM]}},
    "nobody": {},
}


def loop(sent: Sent) -> tuple[int, int, list[int]]:
    """(the step it ended at, the exit status, the steps it was saved at), in the way of the recipes."""
    step, saved_at = 0, []
    with StopSignals() as stop:
        while step < 9 and not stop.agreed():
            step += 1
            all_reduce_sum(torch.zeros(1))
            for number in sent.get(rank(), {}).get(step, []):
                signal.raise_signal(number)
            if stop.agreed():
                saved_at.append(step)
        if stop.received and saved_at[-1:] != [step]:
            saved_at.append(step)
        return step, stop.exit_status, saved_at


def stopped(folder: Path) -> dict[str, Any]:
    with process_group("cpu", batch_size=2):
        return {name: loop(sent) for name, sent in CASES.items()}


def one_does_not_answer(folder: Path) -> None:
    interrupt.STOP_TIMEOUT = timedelta(seconds=1)
    with process_group("cpu", batch_size=2), StopSignals() as stop:
        if rank() == 0:
            signal.raise_signal(signal.SIGTERM)
        else:
            time.sleep(3)
        stop.agreed()
        (folder / f"saved by {rank()}").touch()


def one_is_gone(folder: Path) -> None:
    with process_group("cpu", batch_size=2), StopSignals() as stop:
        if rank() == 1:
            signal.raise_signal(signal.SIGKILL)
        signal.raise_signal(signal.SIGINT)
        stop.agreed()
        (folder / "saved").touch()


def ends_in_an_error(folder: Path) -> None:
    """The launcher tells it to stop while it is about to say what is wrong."""
    with process_group("cpu", batch_size=2):
        try:
            with StopSignals():
                raise ValueError("wrong")
        except ValueError as error:
            signal.raise_signal(signal.SIGTERM)
            raise ValueError(f"{error}, and said") from error


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[group.Ended]]:
    folder = tmp_path_factory.mktemp("group")
    ended = group.run((stopped, one_does_not_answer, one_is_gone, ends_in_an_error), folder)
    assert not list(folder.rglob("saved*")), "nothing is saved that not all have agreed on"
    return ended


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("the first", (3, 143, [3])),
        ("the second", (3, 130, [3])),
        ("both", (3, 143, [3])),
        ("one by one", (3, 130, [3])),
        ("each its own", (3, 143, [3])),
        ("twice", (3, 143, [3])),
        ("one after the other", (3, 130, [3])),
        ("nobody", (9, 0, [])),
    ],
)
def test_all_stop_at_the_same_step(
    ended: dict[str, list[group.Ended]], case: str, expected: tuple[int, int, list[int]]
) -> None:
    assert [each.result[case] for each in ended["stopped"]] == [expected, expected]


@pytest.mark.parametrize(
    ("case", "status", "name"), [("one_does_not_answer", 143, "SIGTERM"), ("one_is_gone", 130, "SIGINT")]
)
def test_who_was_told_to_stop_does_not_wait_for_ever(
    ended: dict[str, list[group.Ended]], case: str, status: int, name: str
) -> None:
    first, second = ended[case]
    assert first.status == status and second.status != 0
    said = f"error: stopped by {name}, but not all processes answer; nothing is saved, the newest checkpoint stands"
    assert said in first.err.splitlines() and "Traceback" not in first.err
    assert first.seconds < 60


def test_an_error_is_said_though_the_launcher_would_end_it(ended: dict[str, list[group.Ended]]) -> None:
    for each in ended["ends_in_an_error"]:
        assert each.status == 2 and "error: wrong, and said" in each.err.splitlines()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_one_process_is_told_by_the_first_signal_and_ended_by_the_second(number: signal.Signals) -> None:
    acted: list[int] = []
    before = signal.signal(number, lambda number, frame: acted.append(number))
    try:
        with StopSignals() as stop:
            assert not stop.agreed() and stop.exit_status == 0
            signal.raise_signal(number)
            assert stop.received is None, "until it is asked"
            assert stop.agreed() and stop.received is number and stop.exit_status == 128 + number
            assert acted == []
            signal.raise_signal(number)
            assert acted == [number], "as it always does"
            assert stop.agreed() and stop.received is number
        with StopSignals() as stop:
            pass
        signal.raise_signal(number)
        assert acted == [number, number] and not stop.agreed()
    finally:
        signal.signal(number, before)
