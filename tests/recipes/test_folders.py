"""Nothing that a user has is deleted or replaced, and a folder is of one run at a time."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from running import Runs, assert_same_run, end, events, files, summary

# ---- folders that are not of a run


@pytest.mark.parametrize("name", ["model", "adapter", "checkpoints"])
@pytest.mark.parametrize("resume", ["true", "false"])
def test_a_folder_of_someone_else_is_refused(runs: Runs, tmp_path: Path, name: str, resume: str) -> None:
    theirs = tmp_path / "run" / name
    theirs.mkdir(parents=True)
    (theirs / "step_3").mkdir()
    (theirs / "step_3" / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match=rf"^output_dir: {theirs} is there already, and not of a run; move it"):
        runs.run("uniform", tmp_path / "run", resume=resume)
    assert files(tmp_path / "run") == {f"{name}/step_3/mine.txt": b"precious"}


@pytest.mark.parametrize("name", ["log.jsonl", "summary.json", "resolved.yaml"])
def test_so_is_a_file(runs: Runs, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine: 1\n")
    with pytest.raises(ValueError, match=f"^output_dir: {tmp_path / name} is there already"):
        runs.run("uniform", tmp_path)
    assert (tmp_path / name).read_text() == "mine: 1\n"


def test_the_current_folder_of_a_project(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "net.py").write_text("code")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="^output_dir: model is there already"):
        runs.run("uniform", Path("."))
    assert (tmp_path / "model" / "net.py").read_text() == "code"


@pytest.mark.parametrize(
    ("key", "inside"),
    [
        ("checkpointer.checkpoint_dir", "model"),
        ("checkpointer.checkpoint_dir", "model/nested"),
        ("tasks.path", "checkpoints"),
        ("tasks.path", "."),
    ],
)
def test_a_path_of_the_config_in_what_a_run_writes(runs: Runs, tmp_path: Path, key: str, inside: str) -> None:
    exp = tmp_path / "exp"
    (tmp_path / "elsewhere").symlink_to(exp)
    path = tmp_path / "elsewhere" / inside
    with pytest.raises(ValueError, match=rf"^output_dir: the run would write to {path}, which is {re.escape(key)}; "):
        runs.run("uniform", exp, **{key: path})
    assert not exp.exists()


def test_a_model_on_another_disk(runs: Runs, tmp_path: Path) -> None:
    """``model`` is a link, to a folder that is empty or not there yet; so are ``checkpoints`` and output_dir."""
    disk = tmp_path / "disk"
    for name in ("model", "checkpoints"):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / name).symlink_to(disk / name)
    (tmp_path / "link").symlink_to(tmp_path / "run")
    (disk / "model").mkdir(parents=True)
    runs.stop("uniform", tmp_path / "link", after=3)
    assert runs.run("uniform", tmp_path / "link") == 0
    assert (tmp_path / "run" / "model").is_symlink() and (disk / "model" / "config.json").is_file()
    assert_same_run(tmp_path / "run", runs.whole("uniform"))
    (tmp_path / "dangling").symlink_to(tmp_path / "other" / "place")
    assert runs.run("uniform", tmp_path / "dangling") == 0
    assert_same_run(tmp_path / "other" / "place", runs.whole("uniform"))


# ---- finished already


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer.lr": 0.5}, "optimizer.lr changed"),
        ({"seed": 5, "budget.tokens": 200}, "seed, budget.tokens changed"),
        ({"model.num_layers": 1}, "model.num_layers changed"),
    ],
    ids=str,
)
def test_another_run_is_not_finished(runs: Runs, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    shutil.copytree(runs.whole("uniform"), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    before = files(tmp_path / "run")
    with pytest.raises(ValueError, match=f"^resume: {message} since the run began"):
        runs.run("uniform", tmp_path / "run", **changes)
    assert files(tmp_path / "run") == before


def test_nor_is_one_of_another_recipe_or_of_other_data(runs: Runs, tmp_path: Path) -> None:
    shutil.copytree(runs.whole("uniform"), tmp_path / "run")
    with pytest.raises(ValueError, match="^resume: .*mixture.*changed since the run began"):
        runs.run("adapt_planned", tmp_path / "run")
    shutil.copytree(runs.tasks, tmp_path / "tasks")
    with open(tmp_path / "tasks" / "a.jsonl", "a") as file:
        file.write("\n" + json.dumps({"prompt": "new", "response": "x"}))
    # The same path, with other content.
    saved = (tmp_path / "run" / "resolved.yaml").read_text().replace(str(runs.tasks), str(tmp_path / "tasks"))
    (tmp_path / "run" / "resolved.yaml").write_text(saved)
    with pytest.raises(ValueError, match="^resume: tasks: the data changed since the run began"):
        runs.run("uniform", tmp_path / "run", **{"tasks.path": tmp_path / "tasks"})


def test_what_may_change_at_a_resume_may_change_in_a_finished_run(runs: Runs, tmp_path: Path) -> None:
    shutil.copytree(runs.whole("uniform"), tmp_path / "run")
    assert runs.run("uniform", tmp_path / "run", log_every=3, keep_checkpoints=2) == 0


def test_a_model_that_is_gone_is_written_again(runs: Runs, tmp_path: Path) -> None:
    shutil.copytree(runs.whole("adapt_planned"), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    assert runs.run("adapt_planned", tmp_path / "run") == 0
    assert_same_run(tmp_path / "run", runs.whole("adapt_planned"))
    for name in ("model", "checkpoints"):
        shutil.rmtree(tmp_path / "run" / name)
    with pytest.raises(ValueError, match="^output_dir: .* is finished, but has neither model/ nor a checkpoint"):
        runs.run("adapt_planned", tmp_path / "run")


# ---- one run at a time


def test_two_runs_started_in_one_folder(runs: Runs, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = runs.start("uniform", folder, **{"budget.tokens": 3000})
    while not events(folder) and first.is_alive():
        time.sleep(0.01)
    holder = f"process {first.pid} on {socket.gethostname()}"
    assert runs.finish("uniform", tmp_path / "run", seed=1) == 2
    assert (tmp_path / "run.err").read_text() == f"error: output_dir: {folder} is in use by {holder}\n"
    assert end([first]) == [0]
    assert_same_run(folder, runs.whole("uniform", **{"budget.tokens": 3000}))
    assert not (folder / ".lock").exists()


def test_a_lock_that_a_kill_leaves_is_none(runs: Runs, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    killed = runs.start("uniform", folder, **{"budget.tokens": 3000})
    while not events(folder) and killed.is_alive():
        time.sleep(0.01)
    killed.kill()
    killed.join()
    assert (folder / ".lock").exists()
    assert runs.finish("uniform", folder, **{"budget.tokens": 3000}) == 0
    assert summary(folder)["supervised_tokens"] == 3000


def test_a_run_that_is_refused_leaves_no_folder(runs: Runs, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="^tasks"):
        runs.run("uniform", tmp_path / "a" / "b" / "run", **{"tasks.path": tmp_path / "nowhere"})
    assert not (tmp_path / "a").exists()


# ---- paths


def test_home_and_an_empty_path(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    os.symlink(runs.tasks, tmp_path / "tasks")
    changes: dict[str, Any] = {"tasks.path": "~/tasks", "budget.tokens": 20}
    assert runs.run("uniform", Path("~/run"), **changes) == 0
    assert summary(tmp_path / "run")["supervised_tokens"] == 20 and not Path("~").exists()
    with pytest.raises(ValueError, match="^output_dir: "):
        runs.config("uniform", "''", **changes)  # type: ignore[arg-type]
