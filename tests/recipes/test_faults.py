"""Two processes train one model, and something goes wrong with one of them or with both: each says why it ends, and a
resume is the run that nothing went wrong with, bit for bit."""

from __future__ import annotations

import functools
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from running import (
    RECIPES,
    ROOT,
    Runs,
    assert_same_run,
    before,
    end,
    events,
    files,
    load_checkpoint,
    recipe_class,
    said,
    summary,
)
from torch import Tensor

import adapt_recipes.run
from adapt_recipes import data
from adapt_recipes.data import load
from adapt_recipes.models import TokenLosses
from adapt_recipes.training import interrupt, process_group

pytestmark = pytest.mark.slow

WITHOUT_WORD = r"another process has ended or does not answer, without an error message \([^\n]+\)"


@pytest.fixture(scope="module")
def whole(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``whole(strategy)``: the run directory of two processes that nothing happened to; run once."""

    @functools.cache
    def run(strategy: str) -> Path:
        folder = tmp_path_factory.mktemp("whole") / "run"
        assert runs.finish_group(strategy, folder) == [0, 0]
        return folder

    return run


def checkpoints(folder: Path) -> list[str]:
    path = folder / "checkpoints"
    return sorted(entry.name for entry in path.iterdir()) if path.exists() else []


def errors(folder: Path, rank: int) -> list[str]:
    """What a process of the group that ran last has said on its standard error; torch's own log has no part in it."""
    lines = said(folder, f".{rank}.err").splitlines()
    log = r"(\[rank\d\]:)?\[[EWI]\d{4} |frame #|Exception raised from |<omitting|$"
    return [line for line in lines if not re.match(log, line)]


# ---- what happens to a process, before its run begins: `prepare` of a group


def kill_before(rank: int, *, victim: int, strategy: str, method: str, step: int) -> None:
    """kill -9 of the victim when it is about to call a method of its run after so many steps."""
    if rank == victim:
        before(strategy, method, lambda: os.kill(os.getpid(), signal.SIGKILL), after=step).start()


def kill_all_while_one_saves(rank: int, *, folder: Path, victim: int, operation: int) -> None:
    """kill -9 of all before the victim's n-th operation on a file, from the making of a checkpoint's folder on."""
    (folder / f"{rank}.pid").write_text(str(os.getpid()))
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            path = str(arguments[0])
            begins = event == "os.mkdir" and path.endswith(".partial")
            counted = begins or (count > 0 and ("/checkpoints" in path or "/" not in path))  # rmtree names no folder
            count += counted
            if counted and count == operation:
                for each in (1 - victim, victim):
                    os.kill(int((folder / f"{each}.pid").read_text()), signal.SIGKILL)

    if rank == victim:
        sys.addaudithook(hook)


def limit_files(rank: int, *, victim: int, max_bytes: int) -> None:
    """For the victim the disk is full as soon as a file is so large."""
    if rank == victim:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, max_bytes))


def change_the_data(rank: int, *, victim: int, file: Path) -> None:
    """The file changes after the first process has read it, and before the victim does."""
    load_tasks = load.load_tasks

    def loading(*arguments: Any, **named: Any) -> Any:
        file.write_text(file.read_text().replace('"125"', '"126"'))
        return load_tasks(*arguments, **named)

    if rank == victim:
        load.load_tasks = loading


def losses_that_are_not_finite(rank: int, *, text: str, victim: int | None = None) -> None:
    """The loss of examples with this text is NaN; with a victim that of all examples is, on this process alone."""
    forward, ids = TokenLosses.forward, torch.tensor(list(text.encode()))

    def failing(self: TokenLosses, tokens: Tensor, labels: Tensor) -> Tensor:
        found = (tokens.unfold(1, len(ids), 1) == ids).all(dim=-1).any(dim=1)
        if not self.training:
            found = torch.zeros_like(found)
        elif rank == victim:
            found = torch.ones_like(found)
        losses = forward(self, tokens, labels)
        return losses.masked_fill(found[(labels != data.IGNORE_INDEX).nonzero()[:, 0]], torch.nan)

    if victim in (None, rank):
        TokenLosses.forward = failing  # type: ignore[method-assign]


def fail_alone(rank: int, *, victim: int, kind: type[Exception]) -> None:
    """The victim fails in its third step, and the group cannot be taken down, as where a kernel of nccl's waits."""
    recipe = recipe_class("uniform")
    original = recipe.step

    def step(self: Any) -> None:
        if rank == victim and self.ledger.steps == 2:
            raise kind("all is lost")
        original(self)

    destroy = torch.distributed.destroy_process_group
    torch.distributed.destroy_process_group = lambda group=None: destroy(group) if group else time.sleep(600)
    recipe.step = step


def see_no_summary(rank: int, *, victim: int) -> None:
    """As on another host, which does not know yet of what the first one has written."""
    if rank == victim:
        adapt_recipes.run.is_finished = lambda folder: False


def work_elsewhere(rank: int, *, folder: Path) -> None:
    """As on a host of its own, where the same path is another folder."""
    process_group.NFS_VISIBILITY_SECONDS = 1
    (folder / str(rank)).mkdir()
    os.chdir(folder / str(rank))


def meet_for_a_second(rank: int) -> None:
    process_group.RENDEZVOUS_TIMEOUT = timedelta(seconds=1)


def slow_disk(rank: int, *, wait: str | None) -> None:
    """A checkpoint of the tiny model takes 40 seconds; torchrun waits 30, or as long as the environment says."""
    interrupt.DISK_SPEED = 28_000
    os.environ["TORCHELASTIC_RUN_ID"] = "none"
    if wait is not None:
        os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = wait


# ---- kill -9


@pytest.mark.parametrize(
    ("strategy", "victim", "method", "step", "changes"),
    [
        ("uniform", 0, "step", 3, {}),
        ("mos_diff", 1, "update_mixture", 6, {}),
        ("adapt_planned", 0, "save", 4, {}),
        ("uniform", 1, "step", 4, {"async_checkpointing": "true"}),  # step 4 is about to be written, or is written
        ("uniform", 1, "finish", 10, {}),
    ],
    ids=str,
)
def test_one_is_killed(
    runs: Runs, whole: Any, tmp_path: Path, strategy: str, victim: int, method: str, step: int, changes: dict[str, Any]
) -> None:
    folder = tmp_path / "run"
    kill = functools.partial(kill_before, victim=victim, strategy=strategy, method=method, step=step)
    statuses = end(runs.start_group(strategy, folder, prepare=kill, **changes), within=60)
    assert statuses == ([-9, 2] if victim == 0 else [2, -9]), [errors(folder, 0), errors(folder, 1)]
    (line,) = errors(folder, 1 - victim)
    assert re.fullmatch(rf"error: {WITHOUT_WORD}", line), line
    assert runs.finish_group(strategy, folder) == [0, 0]
    assert_same_run(folder, whole(strategy))


@pytest.mark.parametrize("kind", [ValueError, KeyError])
def test_one_fails_and_leaves_whatever_the_other_does(runs: Runs, tmp_path: Path, kind: type[Exception]) -> None:
    folder = tmp_path / "run"
    fail = functools.partial(fail_alone, victim=1, kind=kind)
    assert end(runs.start_group("uniform", folder, prepare=fail), within=30) == [2, 2 if kind is ValueError else 1]
    (line,), own = errors(folder, 0), errors(folder, 1)
    if kind is ValueError:
        assert line == "error: process 1 has ended: all is lost" and own == ["error: all is lost"]
    else:
        assert line == "error: process 1 has ended: KeyError: 'all is lost'"
        assert own[0].startswith("Traceback") and own[-1] == "KeyError: 'all is lost'"


@pytest.mark.parametrize("in_background", ["false", "true"])
def test_all_are_killed_during_a_checkpoint(runs: Runs, whole: Any, tmp_path: Path, in_background: str) -> None:
    folder, newest = tmp_path / "run", []
    # Victim, operation: what it is about to do; the newest checkpoint, and what else there is.
    moments = {
        (1, 2): ("write weights", 0, "partial"),
        (0, 15): ("flush: the checkpoint has just got its name", 2, ""),
        (0, 10): ("write checksums", 2, "partial"),
        (0, 17): ("flush: the one before has just lost its name", 4, "removed"),
        (1, 3): ("read what it has written", 4, "partial"),
        (0, 21): ("remove the third file of the one before", 6, "removed"),
    }
    for (victim, operation), (_, _, left) in moments.items():
        kill = functools.partial(kill_all_while_one_saves, folder=tmp_path, victim=victim, operation=operation)
        group = runs.start_group("uniform", folder, prepare=kill, async_checkpointing=in_background)
        assert end(group) == [-9, -9], errors(folder, 0) + errors(folder, 1)
        newest.append(max((int(name[5:]) for name in checkpoints(folder) if "." not in name), default=0))
        assert {name.partition(".")[2] for name in checkpoints(folder)} - {""} == {left} - {""}
    assert newest == [step for _, step, _ in moments.values()]
    assert runs.finish_group("uniform", folder, async_checkpointing=in_background) == [0, 0]
    resumed = [event["step"] for event in events(folder) if event["event"] == "resume"]
    assert resumed == sorted(resumed) and resumed[-1] == newest[-1]
    assert_same_run(folder, whole("uniform"))
    assert checkpoints(folder) == [f"step_{summary(folder)['steps']}"]


@pytest.mark.parametrize("strategy", ["uniform", "adapt_planned", "mos_diff"])
def test_whether_it_is_finished_is_as_the_first_one_sees_it(runs: Runs, tmp_path: Path, strategy: str) -> None:
    shutil.copytree(runs.whole(strategy), tmp_path / "run")
    blind = functools.partial(see_no_summary, victim=1)
    assert end(runs.start_group(strategy, tmp_path / "run", prepare=blind), within=30) == [0, 0]
    assert "is finished already" in said(tmp_path / "run", ".0.out") and said(tmp_path / "run", ".1.out") == ""


# ---- torchrun


def launch(*arguments: str) -> subprocess.Popen[str]:
    """`tune run`, as a user starts it."""
    return subprocess.Popen(
        [sys.executable, "-m", "tune_cli_ext", "run", *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("target", "number"),
    [("launcher", signal.SIGTERM), ("worker", signal.SIGTERM), ("worker", signal.SIGKILL)],
)
def test_under_torchrun(runs: Runs, whole: Any, tmp_path: Path, target: str, number: signal.Signals) -> None:
    """A signal to `tune run`, or to one of the processes that it has started."""
    folder, strategy = tmp_path / "run", "adapt_planned"
    changes: dict[str, Any] = {"budget.tokens": 330 if number == signal.SIGKILL else 3000}
    launcher = launch("--nproc_per_node", "2", RECIPES[strategy], *runs.argv(strategy, folder, **changes))
    while launcher.poll() is None and not any(event["event"] == "step" for event in events(folder)[3:]):
        time.sleep(0.01)
    if target == "launcher":
        launcher.send_signal(number)
    else:
        workers = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        os.kill(int(workers[-1]), number)
    out, err = launcher.communicate(timeout=60)
    said_by_us = [line for line in err.splitlines() if line.startswith("error: ")]
    if number == signal.SIGKILL:
        assert launcher.returncode == 1
        (line,) = said_by_us
        assert re.fullmatch(f"error: ({WITHOUT_WORD}|stopped by SIGTERM, but not all processes answer; .*)", line)
        assert runs.finish_group(strategy, folder) == [0, 0]
        assert_same_run(folder, whole(strategy))
        return
    assert launcher.returncode == 128 + number and said_by_us == [], err
    assert "Traceback" not in err and "FAILED" not in err, err
    last = events(folder)[-1]
    assert (last["event"], last["reason"]) == ("end", "interrupted")
    assert f"stopped at step {last['step']} by {number.name}; resume=true goes on from here" in out
    assert checkpoints(folder) == [f"step_{last['step']}"]


def test_torchrun_starts_anew_after_a_kill(runs: Runs, whole: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    launcher = launch("--nproc_per_node", "2", "--max_restarts", "1", RECIPES["uniform"], *runs.argv("uniform", folder))
    while launcher.poll() is None and not any(event["event"] == "checkpoint" for event in events(folder)):
        time.sleep(0.01)
    workers = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    _, err = launcher.communicate(timeout=120)
    assert launcher.returncode == 0, err
    assert any(event["event"] == "resume" for event in events(folder))
    assert_same_run(folder, whole("uniform"))


def test_a_misspelt_key_is_said_once(runs: Runs, tmp_path: Path) -> None:
    arguments = runs.argv("uniform", tmp_path / "run", sed=1)
    _, err = launch("--nproc_per_node", "2", RECIPES["uniform"], *arguments).communicate(timeout=60)
    said_by_us = [line for line in err.splitlines() if line.startswith("error: ")]
    assert said_by_us == ["error: unknown key 'sed'; did you mean 'seed'?"]


def test_a_rendezvous_that_never_comes(tmp_path: Path) -> None:
    where = "127.0.0.1:29400"
    launcher = launch(
        *("--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d", "--rdzv_endpoint", where),
        *("--rdzv_conf", "join_timeout=1", RECIPES["uniform"], "--config", str(ROOT / "yaml" / "tiny_uniform.yaml")),
    )
    out, err = launcher.communicate(timeout=60)
    assert launcher.returncode == 2
    assert err.splitlines()[-1].startswith(f"tune run: error: the 2 hosts did not connect at {where}"), err


def test_processes_that_never_come(runs: Runs, tmp_path: Path) -> None:
    """Without torchrun; with it, where one of them dies before it gets there."""
    assert end(runs.start_group("uniform", tmp_path / "run", ranks=[0], prepare=meet_for_a_second)) == [2]
    (line,) = errors(tmp_path / "run", 0)
    assert re.match(r"error: 2 processes did not meet at 127\.0\.0\.1:\d+ within 1 s: ", line)


@pytest.mark.parametrize("wait", [None, "60"])
def test_a_checkpoint_that_may_take_longer_than_torchrun_waits(runs: Runs, tmp_path: Path, wait: str | None) -> None:
    folder = tmp_path / "run"
    assert runs.finish_group("uniform", folder, prepare=functools.partial(slow_disk, wait=wait)) == [0, 0]
    lines = [line for line in said(folder, ".0.out").splitlines() if "torchrun" in line]
    expected = "warning: a checkpoint of 0.0 GB may take 38 s to write, and torchrun kills a run 30 s after SIGTERM or "
    expected += "Ctrl-C; set TORCH_ELASTIC_SHUTDOWN_TIMEOUT=77 before `tune run`, or count on the checkpoint before"
    assert lines == ([expected] if wait is None else []) and said(folder, ".1.out") == ""


@pytest.mark.parametrize("strategy", ["uniform", "adapt_planned", "mos_diff"])
def test_an_output_dir_of_each_ones_own(runs: Runs, tmp_path: Path, strategy: str) -> None:
    elsewhere = functools.partial(work_elsewhere, folder=tmp_path)
    group = runs.start_group(strategy, tmp_path / "run", prepare=elsewhere, output_dir="run")
    assert end(group, within=60) == [2, 2]
    assert errors(tmp_path / "run", 0) == ["error: output_dir: run is not the same folder on process 1 as on 0"]
    assert errors(tmp_path / "run", 1) == [] and files(tmp_path / "0" / "run") == {}


@pytest.fixture(scope="module")
def killed(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed in step 6; its checkpoints are from steps 2 and 4."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    kill = functools.partial(kill_before, victim=0, strategy="uniform", method="step", step=5)
    assert 0 not in end(runs.start_group("uniform", folder, prepare=kill, keep_checkpoints=2))
    assert checkpoints(folder) == ["step_2", "step_4"]
    return folder


@pytest.fixture
def folder(killed: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(killed, tmp_path / "run"))


# ---- a disk that fills up


@pytest.mark.parametrize(
    ("victim", "full_at", "in_background"),
    [(0, "checkpoint", "false"), (1, "checkpoint", "true"), (0, "log", "true")],
)
def test_a_disk_that_fills_up(
    runs: Runs, whole: Any, killed: Path, tmp_path: Path, victim: int, full_at: str, in_background: str
) -> None:
    """Stood in for by the system's limit on the size of a file."""
    folder = Path(shutil.copytree(killed, tmp_path / "run"))
    log = folder / "log.jsonl"
    max_bytes = (
        100_000 if full_at == "checkpoint" else load_checkpoint(folder / "checkpoints" / "step_4")["log_bytes"] + 400
    )
    limit = functools.partial(limit_files, victim=victim, max_bytes=max_bytes)
    changes: dict[str, Any] = {"async_checkpointing": in_background, "keep_checkpoints": 2}
    assert runs.finish_group("uniform", folder, prepare=limit, **changes) == [2, 2]
    assert checkpoints(folder) == ["step_2", "step_4"]
    if full_at == "checkpoint":
        (line,) = errors(folder, 0)
        assert line.startswith(f"error: no space left while writing checkpoint step_6 in {folder / 'checkpoints'}; ")
        assert line.endswith("; the newest whole checkpoint is step_4") and errors(folder, 1) == []
        assert (events(folder)[-1]["event"], events(folder)[-1]["reason"]) == ("end", "error")
    else:
        assert errors(folder, 0) == [f"error: output_dir: {log}: file too large"]
        (line,) = errors(folder, 1)
        assert re.fullmatch(rf"error: (process 0 has ended: .*'{log}'|{WITHOUT_WORD})", line)
    assert runs.finish_group("uniform", folder) == [0, 0]
    assert_same_run(folder, whole("uniform"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.root
@pytest.mark.parametrize("in_background", ["false", "true"])
def test_a_real_disk_that_fills_up(runs: Runs, whole: Any, small_disk: Path, in_background: str) -> None:
    """It has room for one checkpoint, but not for a second one beside it."""
    folder = small_disk / "run"
    assert runs.finish_group("uniform", folder, async_checkpointing=in_background) == [2, 2]
    (line,) = errors(folder, 0)
    assert line.startswith("error: no space left while writing checkpoint step_4 ") and errors(folder, 1) == []
    assert checkpoints(folder) == ["step_2"]
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    assert runs.finish_group("uniform", folder) == [0, 0]
    assert [event["step"] for event in events(folder) if event["event"] == "resume"] == [2]
    assert_same_run(folder, whole("uniform"))


# ---- damage, changes, NaN


@pytest.mark.parametrize("file", ["__1_0.distcp", "shared.pt"])
def test_the_checkpoint_before_a_corrupted_one_is_used(runs: Runs, whole: Any, folder: Path, file: str) -> None:
    path = folder / "checkpoints" / "step_4" / file
    content = bytearray(path.read_bytes())
    # Of weights one bit; of what every process reads all, so that each stumbles in its own way.
    content[:] = b"x" * len(content) if file == "shared.pt" else content
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert runs.finish_group("uniform", folder) == [0, 0]
    (line,) = errors(folder, 0)
    assert line.startswith(f"warning: damaged checkpoints in {folder / 'checkpoints'}: step_4 ({file} is not what was")
    assert line.endswith("; going on from step_2") and errors(folder, 1) == []
    assert [event["step"] for event in events(folder) if event["event"] == "resume"] == [2]
    assert_same_run(folder, whole("uniform"))


@pytest.mark.parametrize("when", ["between run and resume", "between two processes"])
def test_a_data_file_that_changed(runs: Runs, whole: Any, folder: Path, when: str) -> None:
    file, before = runs.tasks / "c.jsonl", files(folder)
    original, prepare = file.read_text(), None
    try:
        if when == "between two processes":
            prepare = functools.partial(change_the_data, victim=1, file=file)
        else:
            file.write_text(original.replace('"125"', '"126"'))
        assert runs.finish_group("uniform", folder, prepare=prepare) == [2, 2]
    finally:
        file.write_text(original)
    (line,) = errors(folder, 0)
    assert errors(folder, 1) == [] and files(folder) == before
    if when == "between two processes":
        assert (
            line
            == "error: tasks: not the same on process 1 as on process 0; the data files have to be the same for all"
        )
    else:
        assert line.startswith("error: resume: tasks: the data changed since the run began; ")
    assert runs.finish_group("uniform", folder) == [0, 0]
    assert_same_run(folder, whole("uniform"))


def test_an_example_whose_loss_is_not_finite(
    runs: Runs, whole: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes say of it what one does."""
    prepare = functools.partial(losses_that_are_not_finite, text="b1")
    alone = shutil.copytree(folder, tmp_path / "alone")
    with monkeypatch.context() as patched:
        patched.setattr(TokenLosses, "forward", TokenLosses.forward)  # so that it is put back
        prepare(0)
        with pytest.raises(ValueError, match="^step 5: the loss of training example .* of task 'b' is not") as one:
            runs.run("uniform", alone)
    assert runs.finish_group("uniform", folder, prepare=prepare) == [2, 2]
    assert errors(folder, 0) == [f"error: {one.value}"] and errors(folder, 1) == []
    assert events(folder)[-1]["message"] == str(one.value) and checkpoints(folder)[-1] == "step_4"
    assert runs.finish_group("uniform", folder) == [0, 0]
    assert_same_run(folder, whole("uniform"))


def test_a_process_whose_losses_are_not_finite(runs: Runs, whole: Any, folder: Path) -> None:
    """Whatever it computes, as with a broken device."""
    prepare = functools.partial(losses_that_are_not_finite, text="none", victim=1)
    assert runs.finish_group("uniform", folder, prepare=prepare) == [2, 2]
    (line,) = errors(folder, 0)
    assert line.startswith("error: step 5: the loss of training example ") and errors(folder, 1) == []
    assert events(folder)[-1]["reason"] == "error" and checkpoints(folder)[-1] == "step_4"
    assert runs.finish_group("uniform", folder) == [0, 0]
    assert_same_run(folder, whole("uniform"))
