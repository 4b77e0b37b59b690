"""``mixture.start_from`` in runs: a run on other data begins where a finished one has ended."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from running import RECIPES, Runs, assert_same_run, events, exit_status, summary
from tiers import slow_but

ONE_OF_EACH_RECIPE = ["adapt", "mos_diff"]
# So that something is learned in a short run.
FAST: dict[str, Any] = {"mixture_update_every": 2, "batch_size": 4}


@pytest.fixture(scope="module")
def other_tasks(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two of the tasks with other rows, and a new one."""
    folder = tmp_path_factory.mktemp("other")
    for task in ("b", "c", "new"):
        rows = [{"prompt": f"{task} {i}", "response": f"no{i % 5}"} for i in range(24)]
        (folder / f"{task}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def second(first: Path, other_tasks: Path, **changes: Any) -> dict[str, Any]:
    data = {"tasks.path": other_tasks, "tasks.no_validation": "[]"}
    return FAST | data | {"mixture.start_from": first} | changes


def shares(folder: Path) -> list[dict[str, float]]:
    return [event["probabilities"] for event in events(folder) if event["event"] == "mixture"]


@pytest.mark.parametrize("strategy", slow_but("adapt", ONE_OF_EACH_RECIPE))
def test_it_begins_where_the_other_has_ended(
    runs: Runs, other_tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], strategy: str
) -> None:
    first, folder = runs.whole(strategy, **FAST), tmp_path / "run"
    changes = second(first, other_tasks)
    assert runs.run(strategy, folder, **changes) == 0
    end, begin = summary(first)["probabilities"], shares(folder)[0]
    assert list(begin) == ["b", "c", "new"] and begin["new"] == pytest.approx(1 / 3, rel=1e-12)
    floor = 0.0 if strategy == "mos_diff" else 0.05
    learned = {name: (end[name] - floor / 4) for name in ("b", "c")}
    ratio = (begin["b"] - floor / 3) / (begin["c"] - floor / 3)
    assert ratio == pytest.approx(learned["b"] / learned["c"], rel=1e-9) and abs(ratio - 1) > 1e-4
    text = (
        f"2 of 3 tasks start from {first}; at their prior share, because new: new; of its tasks not in this run: a, d"
    )
    assert text in [event["text"] for event in events(folder) if event["event"] == "note"]
    assert f"mixture.start_from: {text}" in capsys.readouterr().out

    # Interrupted, it needs the other run no more.
    gone, again = tmp_path / "gone", tmp_path / "again"
    shutil.copytree(first, gone)
    runs.stop(strategy, again, after=5, **changes | {"mixture.start_from": gone})
    shutil.rmtree(gone)
    assert runs.run(strategy, again, **changes | {"mixture.start_from": gone}) == 0
    notes = [event for event in events(again) if event["event"] == "note"]
    assert len(notes) == len([event for event in events(folder) if event["event"] == "note"])
    assert shares(again) == shares(folder) and summary(again) == summary(folder)


@pytest.mark.slow
def test_two_processes(runs: Runs, other_tasks: Path, tmp_path: Path) -> None:
    first = runs.whole("adapt", **FAST)
    changes = second(first, other_tasks)
    assert runs.finish_group("adapt", tmp_path / "two", **changes) == [0, 0]
    runs.run("adapt", tmp_path / "one", **changes)
    assert shares(tmp_path / "two")[0] == shares(tmp_path / "one")[0]


def test_the_same_run_twice_is_the_same(runs: Runs, other_tasks: Path, tmp_path: Path) -> None:
    changes = second(runs.whole("adapt", **FAST), other_tasks)
    for name in ("one", "two"):
        assert runs.run("adapt", tmp_path / name, **changes) == 0
    assert_same_run(tmp_path / "one", tmp_path / "two")


# ---- bad input


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("nothing", "mixture.start_from: FOLDER is no run directory"),
        ("unfinished", "mixture.start_from: the run in FOLDER is not finished; resume=true finishes it"),
        ("no checkpoint", "mixture.start_from: there is no checkpoint in FOLDER/checkpoints"),
        (
            "another kind",
            "mixture.start_from: the mixture of FOLDER is adapt_recipes.mixture.AdaptPlanned, and that of this run is "
            "adapt_recipes.mixture.Adapt",
        ),
        ("other tasks", "mixture.start_from: no task of this run, x, was one of FOLDER, a, b, c, d"),
        (
            "static",
            "mixture.start_from: adapt_recipes.mixture.uniform has no `start_from`: it keeps nothing for another run",
        ),
        ("damaged", "mixture.start_from: damaged checkpoint FOLDER/checkpoints/step_"),
    ],
)
def test_bad_input(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str, message: str) -> None:
    folder, strategy, changes = tmp_path / "first", "adapt", FAST
    if case == "unfinished":
        runs.stop("adapt", folder, after=5, **FAST)
    elif case == "another kind":
        folder = runs.whole("adapt_planned")
    elif case == "static":
        folder, strategy, changes = runs.whole("uniform"), "uniform", {}
    elif case != "nothing":
        shutil.copytree(runs.whole("adapt", **FAST), folder)
    if case == "no checkpoint":
        shutil.rmtree(folder / "checkpoints")
    if case == "damaged":
        (file,) = (folder / "checkpoints").glob("step_*/shared.pt")
        file.write_bytes(file.read_bytes()[:-1])
    if case == "other tasks":
        rows = [{"prompt": f"p{i}", "response": "r"} for i in range(20)]
        (tmp_path / "tasks").mkdir()
        (tmp_path / "tasks" / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
        changes = FAST | {"tasks.path": tmp_path / "tasks", "tasks.no_validation": "[]"}
    argv = runs.argv(strategy, tmp_path / "run", **changes, **{"mixture.start_from": folder})
    assert exit_status(RECIPES[strategy], argv) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert message.replace("FOLDER", str(folder)) in line and not (tmp_path / "run" / "log.jsonl").exists()
