"""SIGTERM and Ctrl-C end a run at the next step boundary, saved, with the status that shells expect."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from running import RECIPES, ROOT, Runs, assert_same_run, before, events, summary

STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130}


@pytest.fixture(autouse=True)
def listening() -> Iterator[None]:
    """A process that a shell starts in the background is deaf to Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def checkpoints(folder: Path) -> list[str]:
    path = folder / "checkpoints"
    return sorted(entry.name for entry in path.iterdir()) if path.exists() else []


@pytest.mark.slow
@pytest.mark.parametrize(("number", "strategy"), [(signal.SIGTERM, "adapt_planned"), (signal.SIGINT, "uniform")])
def test_a_process_that_is_told_to_stop(runs: Runs, tmp_path: Path, number: signal.Signals, strategy: str) -> None:
    long: dict[str, Any] = {"budget.tokens": 3000, "checkpoint_every": 0}
    folder, recipe = tmp_path / "run", ROOT / "recipes" / f"{RECIPES[strategy]}.py"
    process = subprocess.Popen(
        [sys.executable, recipe, *runs.argv(strategy, folder, **long)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    expected = runs.whole(strategy, **long)
    while process.poll() is None and not any(event["event"] == "step" for event in events(folder)):
        time.sleep(0.001)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == STATUS[number], err
    last = events(folder)[-1]
    step = last["step"]
    assert 1 <= step < summary(expected)["steps"]
    assert {key: last[key] for key in ("event", "reason")} == {"event": "end", "reason": "interrupted"}
    assert checkpoints(folder) == [f"step_{step}"]
    assert f"stopped at step {step} by {number.name}; resume=true goes on from here" in out
    assert "Traceback" not in err
    assert not (folder / "model").exists() and not (folder / "summary.json").exists()
    assert runs.run(strategy, folder, **long) == 0
    assert [event["step"] for event in events(folder) if event["event"] == "resume"] == [step]
    assert [event["reason"] for event in events(folder) if event["event"] == "end"] == ["finished"]
    assert_same_run(folder, expected)


def interrupt(strategy: str, method: str, *, after: int, number: int) -> Any:
    """Sends this process a signal at the start of a method, as ``before`` says it, once."""
    sent = False

    def send() -> None:
        nonlocal sent
        if not sent:
            sent = True
            signal.raise_signal(number)

    return before(strategy, method, send, after=after)


@pytest.mark.parametrize(
    ("number", "strategy", "method", "at_step", "saved_at"),
    [
        (signal.SIGTERM, "adapt_planned", "validate", 0, None),  # before the first step: there is nothing to save
        (signal.SIGINT, "adapt_planned", "step", 0, 1),
        (signal.SIGTERM, "adapt_planned", "step", 4, 5),
        (signal.SIGINT, "adapt_planned", "update_mixture", 3, 3),
        (signal.SIGTERM, "adapt_planned", "validate", 4, 4),
        (signal.SIGINT, "adapt_planned", "save", 6, 6),
        (signal.SIGTERM, "adapt_planned", "log_step", 7, 7),
        (signal.SIGINT, "mos_diff", "measure_base_model", 0, None),
        (signal.SIGTERM, "mos_diff", "update_mixture", 3, 3),
    ],
)
def test_whatever_it_is_doing(
    runs: Runs,
    tmp_path: Path,
    number: signal.Signals,
    strategy: str,
    method: str,
    at_step: int,
    saved_at: int | None,
) -> None:
    folder = tmp_path / "run"
    handlers = [signal.getsignal(each) for each in STATUS]
    with interrupt(strategy, method, after=at_step, number=number):
        assert runs.run(strategy, folder) == STATUS[number]
    assert [signal.getsignal(each) for each in STATUS] == handlers
    log = events(folder)
    assert log[-1] | {"seconds": 0} == {"event": "end", "reason": "interrupted", "step": saved_at or 0, "seconds": 0}
    assert checkpoints(folder) == ([f"step_{saved_at}"] if saved_at else [])
    if saved_at:
        assert [event["event"] for event in log].count("checkpoint") == (saved_at + 1) // 2, "each boundary saved once"
    assert runs.run(strategy, folder) == 0
    assert_same_run(folder, runs.whole(strategy))


@pytest.mark.parametrize("method", ["step", "finish"])
def test_a_run_that_is_as_good_as_over_ends_well(runs: Runs, tmp_path: Path, method: str) -> None:
    last_step = summary(runs.whole("uniform"))["steps"] - 1
    with interrupt("uniform", method, after=last_step, number=signal.SIGTERM):
        assert runs.run("uniform", tmp_path / "run") == 0
    assert_same_run(tmp_path / "run", runs.whole("uniform"))


def test_a_second_ctrl_c_does_not_wait(runs: Runs, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with contextlib.ExitStack() as patched:
        for method in ("log_step", "validate"):  # both between two boundaries
            patched.enter_context(interrupt("uniform", method, after=4, number=signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            runs.run("uniform", folder)
    assert (events(folder)[-1]["event"], events(folder)[-1]["step"]) == ("step", 4)
    assert checkpoints(folder) == ["step_2"]
    assert runs.run("uniform", folder) == 0
    assert_same_run(folder, runs.whole("uniform"))
