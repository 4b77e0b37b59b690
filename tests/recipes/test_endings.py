"""How runs end: output that nobody reads, trackers that fail, signals at any moment, no memory, a killed launcher."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from running import RECIPES, ROOT, Runs, assert_same_run, before, events, exit_status, summary
from torch import Tensor

from adapt_recipes.models import TokenLosses

LONG: dict[str, Any] = {"budget.tokens": 3000}
# It ends by a signal alone, on any machine.
ENDLESS: dict[str, Any] = {"budget.tokens": 100_000, "tasks.max_epochs_per_task": 10_000}


def launch(*arguments: Any, **options: Any) -> subprocess.Popen[str]:
    """`tune run`, as a user starts it."""
    return subprocess.Popen(
        [sys.executable, "-m", "tune_cli_ext", "run", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        text=True,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options,
    )


def wait_for_steps(process: subprocess.Popen[str], folder: Path, number: int = 2) -> None:
    while process.poll() is None and sum(event["event"] == "step" for event in events(folder)) < number:
        time.sleep(0.01)


@contextlib.contextmanager
def no_handler(number: signal.Signals) -> Iterator[None]:
    """Processes that a background shell starts ignore Ctrl-C."""
    before = signal.signal(number, signal.SIG_DFL)
    yield
    signal.signal(number, before)


# ---- output

LARGEST_FILE = 1 << 30


def limit_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))


@pytest.mark.slow
def test_ctrl_c_where_the_reader_of_the_output_ends_first(runs: Runs, tmp_path: Path) -> None:
    """As in `tune run ... 2>&1 | tee log`: the terminal sends Ctrl-C to both."""
    folder = tmp_path / "run"
    reader, writer = os.pipe()
    process = launch(RECIPES["uniform"], *runs.argv("uniform", folder, **LONG), stdout=writer, stderr=writer)
    os.close(writer)
    wait_for_steps(process, folder)
    os.close(reader)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert {key: events(folder)[-1][key] for key in ("event", "reason")} == {"event": "end", "reason": "interrupted"}
    assert runs.run("uniform", folder, **LONG) == 0
    assert_same_run(folder, runs.whole("uniform", **LONG))


@pytest.mark.slow
@pytest.mark.parametrize("target", ["a pipe without a reader", "a file that cannot grow"])
def test_a_run_goes_on_without_its_output(runs: Runs, tmp_path: Path, target: str) -> None:
    """As in `tune run ... | head -1`, or `> file` on a disk that is full."""
    folder, options = tmp_path / "run", {}
    if target == "a file that cannot grow":
        writer = os.open(tmp_path / "full", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.truncate(writer, LARGEST_FILE)
        options["preexec_fn"] = limit_files
    else:
        reader, writer = os.pipe()
        os.close(reader)
    process = launch(RECIPES["uniform"], *runs.argv("uniform", folder), stdout=writer, **options)
    os.close(writer)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    (line,) = err.splitlines()
    assert re.fullmatch(r"warning: stdout cannot be written \(.*\); the run goes on without it", line)
    (note,) = (event["text"] for event in events(folder) if event["event"] == "note")
    assert f"warning: {note}" == line
    assert summary(folder)["worst_validation_loss"] == summary(runs.whole("uniform"))["worst_validation_loss"]


# ---- signals


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_a_closed_terminal_and_a_warning_of_slurm(
    runs: Runs, tmp_path: Path, number: signal.Signals, processes: int
) -> None:
    folder = tmp_path / "run"
    options = ["--nproc_per_node", 2] if processes == 2 else []
    process = launch(*options, RECIPES["uniform"], *runs.argv("uniform", folder, **ENDLESS))
    wait_for_steps(process, folder)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in err, err
    step = events(folder)[-1]["step"]
    assert events(folder)[-1]["reason"] == "interrupted"
    assert f"stopped at step {step} by {number.name}; resume=true goes on from here" in out


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_nohup(runs: Runs, tmp_path: Path, processes: int) -> None:
    folder = tmp_path / "run"
    options = ["--nproc_per_node", 2] if processes == 2 else []
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    process = launch(*options, RECIPES["uniform"], *runs.argv("uniform", folder))
    signal.signal(signal.SIGHUP, before)
    wait_for_steps(process, folder)
    process.send_signal(signal.SIGHUP)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert summary(folder)["supervised_tokens"] == summary(runs.whole("uniform"))["supervised_tokens"]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("seconds", [0.5, 2, 4, 6])
def test_before_the_first_step(
    runs: Runs, tmp_path: Path, number: signal.Signals, seconds: float, processes: int
) -> None:
    """While torch is imported, the processes meet, or data is read: one line, and no traceback."""
    folder = tmp_path / "run"
    options = ["--nproc_per_node", 2] if processes == 2 else []
    with no_handler(number):
        process = launch(*options, RECIPES["uniform"], *runs.argv("uniform", folder, **ENDLESS), start_new_session=True)
    # After torch is imported, the launcher starts its processes, whose Python takes a moment to set its handlers.
    while processes == 2 and seconds > 2 and process.poll() is None and not _children(process.pid):
        time.sleep(0.01)
    time.sleep(seconds if processes == 1 or seconds <= 2 else seconds - 3)
    if number == signal.SIGINT:
        # A terminal sends it to all.
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert "Traceback" not in err
    if "stopped at step" not in out:
        assert err.splitlines() == [f"stopped by {number.name}; nothing new is saved"]


# ---- a launcher that is killed


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent is gone")
def test_processes_end_with_their_launcher(runs: Runs, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    launcher = launch("--nproc_per_node", 2, RECIPES["uniform"], *runs.argv("uniform", folder, **LONG))
    wait_for_steps(launcher, folder)
    workers = _children(launcher.pid)
    assert len(workers) == 2
    launcher.kill()
    launcher.wait()
    limit = time.monotonic() + 10
    while any(_is_running(pid) for pid in workers) and time.monotonic() < limit:
        time.sleep(0.01)
    assert not any(_is_running(pid) for pid in workers)
    assert runs.finish_group("uniform", folder, **LONG) == [0, 0]


def _children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def _is_running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# ---- out of memory


def test_out_of_memory_in_a_step(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system really refuses what a forward pass asks for."""
    original, folder = TokenLosses.forward, tmp_path / "run"

    def forward(self: Any, tokens: Tensor, labels: Tensor, output: str = "losses") -> Tensor:
        losses = original(self, tokens, labels, output)  # type: ignore[arg-type]
        if torch.is_grad_enabled() and any(event["event"] == "checkpoint" for event in events(folder)):
            torch.empty(1 << 62, dtype=torch.uint8)
        return losses

    monkeypatch.setattr(TokenLosses, "forward", forward)
    assert exit_status(RECIPES["uniform"], runs.argv("uniform", folder)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        r"error: step 3: out of memory in a micro-batch of \d+ x \d+ tokens, beside weights 0.00 GB, gradients .*"
        r"micro_batch_tokens.*; checkpoints are from before this step",
        line,
    )
    assert events(folder)[-1] | {"seconds": 0} == {
        "event": "end",
        "reason": "error",
        "step": 2,
        "message": line.removeprefix("error: "),
        "seconds": 0,
    }
    monkeypatch.undo()
    assert runs.run("uniform", folder) == 0
    assert_same_run(folder, runs.whole("uniform"))


# ---- trackers

TRACKER = """
class Tracker:
    def __init__(self, fails):
        self.fails = fails

    def log_dict(self, payload, step):
        if step >= 3 and self.fails:
            raise ConnectionError("the server is gone")

    def close(self):
        if self.fails:
            raise ConnectionError("the server is gone")
"""


def test_a_tracker_that_fails(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_tracker.py").write_text(TRACKER)
    monkeypatch.chdir(tmp_path)
    tracker = "{_component_: my_tracker.Tracker, fails: true}"
    assert runs.run("uniform", tmp_path / "run", metric_logger=tracker, log_every=1) == 0
    line = "warning: metric_logger: ConnectionError: the server is gone; the run goes on without it"
    assert set(capsys.readouterr().err.splitlines()) == {line}
    assert_same_run(tmp_path / "run", runs.whole("uniform"))


def test_a_tracker_whose_package_is_missing_is_found_before_data_is_read(runs: Runs, tmp_path: Path) -> None:
    tracker = "{_component_: torchtune.training.metric_logging.CometLogger, project: x}"
    with (
        before("uniform", "setup", lambda: pytest.fail("data is read")),
        pytest.raises(ValueError, match="^metric_logger: .*comet"),
    ):
        runs.run("uniform", tmp_path / "run", metric_logger=tracker)
    assert not (tmp_path / "run").exists()
