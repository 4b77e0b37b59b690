"""A checkpoint is whole or absent, whatever happens while it is written."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adapt_recipes.training import checkpoint
from adapt_recipes.training.checkpoint import (
    NoSpaceLeft,
    clean,
    config_differences,
    load_checkpoint,
    newest_checkpoint,
    rng_state,
    save_checkpoint,
    set_rng_state,
    written_whole,
)


def state(step: int, size: int = 10) -> dict[str, Any]:
    return {
        "step": step,
        "weights": torch.full((size,), float(step)),
        "names": ["a", None],
        "share": 0.5,
        "pair": (1, 2),
    }


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    saved = state(3) | {"optimizer": {"state": {0: {"exp_avg": torch.randn(4, dtype=torch.bfloat16)}}}}
    path = save_checkpoint(tmp_path / "run" / "checkpoints", 3, saved, keep=1)
    assert path == tmp_path / "run" / "checkpoints" / "step_3"
    loaded = load_checkpoint(path)
    assert torch.equal(loaded.pop("weights"), saved.pop("weights"))
    exp_avg = loaded["optimizer"]["state"][0].pop("exp_avg")
    assert exp_avg.dtype == torch.bfloat16
    assert torch.equal(exp_avg, saved["optimizer"]["state"][0].pop("exp_avg"))
    assert loaded == saved


def test_the_newest_is_by_number_and_the_oldest_beyond_keep_go(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None and newest_checkpoint(tmp_path / "nowhere") is None
    for step in (2, 8, 9, 10, 100):
        save_checkpoint(tmp_path, step, state(step), keep=3)
    assert names(tmp_path) == ["step_10", "step_100", "step_9"]
    assert newest_checkpoint(tmp_path) == tmp_path / "step_100"
    save_checkpoint(tmp_path, 101, state(101), keep=1)
    assert names(tmp_path) == ["step_101"]


def test_a_step_saved_again_is_replaced(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 5, state(5), keep=1)
    path = save_checkpoint(tmp_path, 5, state(5) | {"again": True}, keep=1)
    assert load_checkpoint(path)["again"] is True
    assert names(tmp_path) == ["step_5"]


def test_what_interruptions_leave_is_ignored_and_cleared_away(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, state(1), keep=2)
    for leftover in ("step_2.partial", "step_0.removed"):
        shutil.copytree(tmp_path / "step_1", tmp_path / leftover)
    (tmp_path / "notes").mkdir()
    (tmp_path / "step_9").write_text("not a folder")
    assert newest_checkpoint(tmp_path) == tmp_path / "step_1"
    clean(tmp_path)
    assert names(tmp_path) == ["notes", "step_1", "step_9"]
    clean(tmp_path / "nowhere")
    shutil.copytree(tmp_path / "step_1", tmp_path / "step_2.partial")
    save_checkpoint(tmp_path, 3, state(3), keep=2)
    assert names(tmp_path) == ["notes", "step_1", "step_3", "step_9"]


def test_a_failure_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, state(1), keep=1)
    with pytest.raises((AttributeError, TypeError)):
        save_checkpoint(tmp_path, 2, {"weights": torch.ones(5), "function": lambda: None}, keep=1)
    assert names(tmp_path) == ["step_1"]
    with pytest.raises(KeyboardInterrupt), written_whole(tmp_path / "model") as partial:
        (partial / "half").write_text("")
        raise KeyboardInterrupt
    assert names(tmp_path) == ["step_1"]


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = save_checkpoint(tmp_path, 1, state(1, size=1000), keep=1)
    file = path / "state.pt"
    file.write_bytes(file.read_bytes()[:2000] if content is None else content)
    with pytest.raises(ValueError, match=rf"^checkpoint {file} cannot be read \([^\n]*\); remove {path} to [^\n]*\Z"):
        load_checkpoint(path)
    file.unlink()
    with pytest.raises(ValueError, match=rf"^checkpoint {file} cannot be read \([^\n]*No such file"):
        load_checkpoint(path)


# ---- no space: a disk that is really full where one can be mounted, a limit of the system on file sizes everywhere

SAVE_UNTIL_FULL = """
import resource, signal, sys
from pathlib import Path
import torch
from adapt_recipes.training.checkpoint import NoSpaceLeft, save_checkpoint
folder, limit = Path(sys.argv[1]), int(sys.argv[2])
save_checkpoint(folder, 1, {"weights": torch.ones(1000)}, keep=2)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    save_checkpoint(folder, 2, {"weights": torch.ones(1 << 20)}, keep=2)
except NoSpaceLeft as error:
    print(error)
"""


def save_until_full(folder: Path, limit: int) -> None:
    command = [sys.executable, "-c", SAVE_UNTIL_FULL, str(folder), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    expected = f"no space left while writing checkpoint step_2 in {folder}; the newest whole checkpoint is step_1\n"
    assert done.stdout == expected, done.stderr
    assert names(folder) == ["step_1"]
    assert torch.equal(load_checkpoint(folder / "step_1")["weights"], torch.ones(1000))


@pytest.mark.parametrize("limit", [1 << 15, 1 << 20])
def test_a_write_that_the_system_refuses(tmp_path: Path, limit: int) -> None:
    save_until_full(tmp_path, limit)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.strip()}")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.root
def test_a_full_disk(small_disk: Path) -> None:
    save_until_full(small_disk, 0)


def test_no_space_for_the_first_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", full)
    with pytest.raises(
        NoSpaceLeft, match=r"^no space left while writing checkpoint step_4 in .*; there is no whole one$"
    ):
        save_checkpoint(tmp_path, 4, state(4), keep=1)
    assert names(tmp_path) == []


def test_other_trouble_is_not_called_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoint.torch, "save", broken)
    with pytest.raises(OSError, match="Input/output error") as caught:
        save_checkpoint(tmp_path, 4, state(4), keep=1)
    assert not isinstance(caught.value, NoSpaceLeft)


# ---- kill -9

SAVE_FOREVER = """
import sys
from pathlib import Path
import torch
from adapt_recipes.training.checkpoint import newest_checkpoint, save_checkpoint
folder = Path(sys.argv[1])
newest = newest_checkpoint(folder)
step = int(newest.name.removeprefix("step_")) if newest else 0
print("ready", flush=True)
while True:
    step += 1
    for _ in range(2):  # the second time over the first
        save_checkpoint(folder, step, {"step": step, "weights": torch.full((200_000,), float(step))}, keep=1)
"""


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    generator = random.Random(0)
    seen = set()
    reached = 0
    for _ in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVE_FOREVER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(generator.uniform(0.02, 0.3))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        seen |= {Path(name).suffix for name in names(tmp_path)}
        newest = newest_checkpoint(tmp_path)
        if newest is None:
            assert reached == 0, "the checkpoint that there was is gone"
            continue
        loaded = load_checkpoint(newest)
        assert loaded["step"] >= reached and torch.equal(
            loaded["weights"], torch.full((200_000,), float(loaded["step"]))
        )
        reached = loaded["step"]
    assert reached > 1
    assert seen - {""}, "none of the kills fell into a write"
    clean(tmp_path)
    assert all(Path(name).suffix == "" for name in names(tmp_path))


def test_an_end_before_any_single_operation_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a kill cannot be timed to hit: nothing more happens from the n-th operation on the disk on."""

    class Killed(BaseException):
        pass

    def killed_at(moment: int, folder: Path) -> bool:
        """Saves step 1 again and then step 2, over the checkpoint of step 1."""
        calls = 0
        remove = shutil.rmtree

        def dying(operation: Any) -> Any:
            def counted(*args: Any, **kwargs: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls > moment:
                    if calls == moment + 1 and operation is remove:  # in the middle of it
                        (args[0] / "state.pt").unlink(missing_ok=True)
                    raise Killed
                return operation(*args, **kwargs)

            return counted

        with monkeypatch.context() as patched:
            for owner, name in ((checkpoint, "_sync"), (os, "rename"), (os, "replace"), (shutil, "rmtree")):
                patched.setattr(owner, name, dying(getattr(owner, name)))
            patched.setattr(Path, "rmdir", dying(Path.rmdir))
            patched.setattr(torch, "save", dying(torch.save))
            try:
                save_checkpoint(folder, 1, state(1), keep=1)
                save_checkpoint(folder, 2, state(2), keep=1)
            except Killed:
                return True
        return False

    for moment in itertools.count():
        folder = tmp_path / str(moment)
        save_checkpoint(folder, 1, state(1), keep=1)
        killed = killed_at(moment, folder)
        assert newest_checkpoint(folder) is not None
        for path in folder.iterdir():
            if not path.suffix:
                assert load_checkpoint(path)["step"] == int(path.name.removeprefix("step_"))
        save_checkpoint(folder, 3, state(3), keep=1)
        assert names(folder) == ["step_3"]
        if not killed:
            break
    assert moment > 12, "the operations were counted"


# ---- generators and configs


def draw() -> list[Any]:
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3).tolist()]


def test_generators_go_on_where_they_were(tmp_path: Path) -> None:
    draw()  # an odd number of Gaussians: a second one waits inside Python's and numpy's generator
    path = save_checkpoint(tmp_path, 1, {"rng": rng_state()}, keep=1)
    expected = [draw(), draw()]
    assert expected[0] != expected[1]
    set_rng_state(load_checkpoint(path)["rng"])
    assert [draw(), draw()] == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_cuda_generator_goes_on_where_it_was() -> None:
    torch.rand(1, device="cuda")
    saved = rng_state()
    expected = torch.rand(3, device="cuda")
    set_rng_state(saved)
    assert torch.equal(torch.rand(3, device="cuda"), expected)


def test_config_differences_are_named() -> None:
    saved = {
        "seed": 1,
        "resume": False,
        "model": {"path": "a", "size": {"x": 1}},
        "tasks": ["a", "b"],
        "gone": {},
        "lr": 1,
    }
    now = {
        "seed": 2,
        "resume": True,
        "model": {"path": "b", "size": {"x": 2}},
        "tasks": ["b", "a"],
        "new": None,
        "lr": 1.0,
    }
    assert config_differences(saved, saved, free=()) == []
    assert config_differences(saved, now, free=()) == [
        "seed",
        "resume",
        "model.path",
        "model.size.x",
        "tasks",
        "gone",
        "new",
    ]
    assert config_differences(saved, now, free={"resume", "model.size", "gone", "new"}) == [
        "seed",
        "model.path",
        "tasks",
    ]
    assert config_differences({"model_path": 1}, {"model_path": 2}, free=["model"]) == ["model_path"]
    assert config_differences({"model": {"path": "a"}}, {"model": None}, free=[]) == ["model.path", "model"]
