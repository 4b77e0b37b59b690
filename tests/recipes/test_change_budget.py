"""``change_budget``: a run goes on with another budget, a finished one from its last checkpoint."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from running import Runs, assert_same_run, events, files, summary
from tiers import slow_but

import adapt_recipes.run
from adapt_recipes.export import export

# Of small steps.
FIRST: dict[str, Any] = {"budget.tokens": 100, "batch_size": 2}
MORE: dict[str, Any] = {"budget.tokens": 160, "batch_size": 2, "change_budget": "true"}
ONE_OF_EACH_RECIPE = ["adapt_planned", "mos_diff", "uniform"]


def steps(folder: Path) -> list[dict[str, Any]]:
    return [event for event in events(folder) if event["event"] == "step"]


@pytest.fixture
def finished(runs: Runs, tmp_path: Path) -> Path:
    """A copy of a finished run with the first budget."""
    return Path(shutil.copytree(runs.whole("uniform", **FIRST), tmp_path / "run"))


# ---- a finished run goes on


@pytest.mark.parametrize("strategy", slow_but(["adapt_planned"], ONE_OF_EACH_RECIPE))
def test_a_finished_run_goes_on(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str], strategy: str) -> None:
    """It spends the new budget exactly, and schedule and mixture are those of the new one."""
    folder = Path(shutil.copytree(runs.whole(strategy, **FIRST), tmp_path / "run"))
    first, log, model = summary(folder), steps(folder), files(folder / "model")
    last = first["steps"]
    assert first["supervised_tokens"] == 100
    built: list[Any] = []
    start = adapt_recipes.run.Run.start

    def keep(run: Any, tasks: Any, ledger: Any, mixture: Any, *rest: Any, **named: Any) -> None:
        built.append(mixture)
        start(run, tasks, ledger, mixture, *rest, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapt_recipes.run.Run, "start", keep)
        assert runs.run(strategy, folder, **MORE) == 0

    # What is spent, step by step.
    done, line = summary(folder), steps(folder)
    assert done["supervised_tokens"] == done["budget_tokens"] == sum(done["task_tokens"].values()) == 160
    assert not done["unspent_tokens"] and done["steps"] > last
    assert line[:last] == log

    # The learning rate, by the share of the new budget in the middle of each step; of the old one before.
    config = runs.config(strategy, folder)
    schedule, base = config.lr_schedule.build(), config.optimizer.arguments["lr"]
    spent = 0
    for event in line:
        middle, budget = (spent + event["supervised_tokens"]) / 2, 100 if event["step"] <= last else 160
        assert event["lr"] == base * schedule(middle / budget)
        spent = event["supervised_tokens"]
    assert line[last]["lr"] > line[last - 1]["lr"]
    if strategy == "adapt_planned":
        assert (built[0].budget_tokens, built[0].fair_tokens) == (160, 40)
        assert first["mixture_updates"] < done["mixture_updates"]

    # Nothing of the first budget is lost, and the log says what happened.
    kept = json.loads((folder / f"summary.step_{last}.json").read_text())
    assert kept == json.loads((runs.whole(strategy, **FIRST) / "summary.json").read_text())
    assert files(folder / f"model_step_{last}") == model != files(folder / "model")
    text = "the budget was tokens 100 and is tokens 160 from here on: 160 supervised tokens, of which 100 are spent"
    assert [event["text"] for event in events(folder) if event["event"] == "note"] == [text]
    assert f"change_budget: {text}" in capsys.readouterr().out

    # With the key or without: finished.
    state = files(folder)
    assert runs.run(strategy, folder, **MORE) == 0
    assert runs.run(strategy, folder, **FIRST | {"budget.tokens": 160}) == 0
    assert files(folder) == state and capsys.readouterr().out.count("is finished already") == 2


@pytest.mark.parametrize("strategy", slow_but(["uniform"], ONE_OF_EACH_RECIPE))
@pytest.mark.parametrize("after", slow_but([2], [0, 2, 4]))
def test_a_resume_of_the_extended_run_is_exact(runs: Runs, tmp_path: Path, strategy: str, after: int) -> None:
    """Killed before a checkpoint with the new budget, and after one; also without the key, once there is one."""
    first = runs.whole(strategy, **FIRST)
    expected, folder = (Path(shutil.copytree(first, tmp_path / name)) for name in ("expected", "run"))
    assert runs.run(strategy, expected, **MORE) == 0
    last = summary(first)["steps"]
    runs.stop(strategy, folder, after=last + after, **MORE)
    changes = FIRST | {"budget.tokens": 160} if after == 4 else MORE
    assert runs.run(strategy, folder, **changes) == 0
    assert_same_run(folder, expected)
    assert [path.name for path in sorted(folder.iterdir())] == [path.name for path in sorted(expected.iterdir())]


@pytest.mark.slow
def test_of_several_budgets(runs: Runs, finished: Path) -> None:
    """One after the other, each by another key; the results of each are kept."""
    for changes in ({"budget.tokens": 130}, {"budget.tokens": "null", "budget.epochs": 0.7}):
        assert runs.run("uniform", finished, **MORE | changes) == 0
    kept = sorted(finished.glob("summary.step_*.json"), key=lambda path: json.loads(path.read_text())["steps"])
    spent = [json.loads(path.read_text())["supervised_tokens"] for path in (*kept, finished / "summary.json")]
    assert spent[:2] == [100, 130] and spent[2] > 130
    assert len(list(finished.glob("model_step_*"))) == 2


def test_the_model_that_is_kept_is_what_export_writes(runs: Runs, finished: Path, tmp_path: Path) -> None:
    """The same bytes, under another name: an export is in no one's way."""
    (exported,) = export(finished, out=tmp_path / "exported")
    last = summary(finished)["steps"]
    assert runs.run("uniform", finished, **MORE) == 0
    assert files(finished / f"model_step_{last}") == files(exported)


@pytest.mark.slow
def test_all_results_are_kept(runs: Runs, tmp_path: Path) -> None:
    """The best weights, and what mixture_eval has measured, which was on the model of the first budget."""
    folder, best = tmp_path / "run", {"keep_best": "worst", "validate_every": 2}
    assert runs.run("uniform", folder, **FIRST, **best) == 0
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "a.jsonl").write_text("answers")
    (folder / "evaluation.json").write_text("{}")
    last, model_best = summary(folder)["steps"], files(folder / "model_best")
    assert runs.run("uniform", folder, **MORE, **best) == 0
    assert files(folder / f"model_best_step_{last}") == model_best
    assert (folder / f"evaluation_step_{last}" / "a.jsonl").read_text() == "answers"
    assert (folder / f"evaluation.step_{last}.json").read_text() == "{}"
    assert not (folder / "evaluation.json").exists() and not (folder / "evaluation").exists()


@pytest.mark.slow
def test_a_kill_while_results_are_renamed(
    runs: Runs, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The summary is last: a run that has it is finished, whatever else is renamed, and goes on all the same."""
    expected = Path(shutil.copytree(finished, tmp_path / "expected"))
    assert runs.run("uniform", expected, **MORE) == 0
    last, rename = summary(finished)["steps"], adapt_recipes.run_directory.os.rename

    def once(old: Path, new: Path) -> None:
        if old.name == "summary.json":
            raise KeyboardInterrupt
        rename(old, new)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(adapt_recipes.run_directory.os, "rename", once)
        runs.run("uniform", finished, **MORE)
    assert (finished / "summary.json").exists() and (finished / f"model_step_{last}").exists()
    assert runs.run("uniform", finished, **MORE) == 0
    assert_same_run(finished, expected)
    assert files(finished).keys() == files(expected).keys()


# ---- a run that was stopped


@pytest.mark.parametrize("budget", slow_but([60], [60, 500]))
def test_a_stopped_run_ends_earlier_or_later(runs: Runs, tmp_path: Path, budget: int) -> None:
    """Steps are the same up to there; with less, too, as long as it is not spent."""
    folder = tmp_path / "run"
    runs.stop("uniform", folder, after=5, **FIRST)
    (checkpoint,) = (folder / "checkpoints").glob("step_*")
    log = steps(folder)[:4]
    assert checkpoint.name == "step_4" and log[-1]["supervised_tokens"] < 60
    changes = MORE | {"budget.tokens": budget}
    assert runs.run("uniform", folder, **changes) == 0
    assert summary(folder)["supervised_tokens"] == budget
    assert steps(folder)[:4] == log and not list(folder.glob("*step_*"))


@pytest.mark.slow
def test_two_processes(runs: Runs, finished: Path, tmp_path: Path) -> None:
    """They agree that the run goes on, and the first of them keeps its results."""
    last = summary(finished)["steps"]
    assert runs.finish_group("uniform", finished, **MORE) == [0, 0]
    assert summary(finished)["supervised_tokens"] == 160
    assert (finished / f"summary.step_{last}.json").exists() and (finished / f"model_step_{last}").exists()
    assert runs.finish_group("uniform", finished, **MORE | {"budget.tokens": 150}) == [2, 2]


# ---- what is refused


def refused(runs: Runs, folder: Path, **changes: Any) -> str:
    """The error, in one line; the folder is as it was."""
    state = files(folder)
    with pytest.raises(ValueError) as caught:
        runs.run("uniform", folder, **changes)
    assert files(folder) == state and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "tokens"),
    [
        ({"budget.tokens": 100}, None),
        ({"budget.tokens": 60}, 60),
        ({"budget.tokens": "null", "budget.fraction": 0.01}, 3),
    ],
)
def test_no_budget_that_is_spent(runs: Runs, finished: Path, changes: dict[str, Any], tokens: int | None) -> None:
    """The same one is that of a finished run."""
    last = summary(finished)["steps"]
    if tokens is None:
        assert runs.run("uniform", finished, **MORE | changes) == 0
        assert summary(finished)["steps"] == last and not list(finished.glob("summary.step_*"))
        return
    assert refused(runs, finished, **MORE | changes) == (
        f"budget: {tokens} supervised tokens are not more than the 100 that the run has spent by step {last}; raise it"
    )


def test_without_the_key(runs: Runs, finished: Path, tmp_path: Path) -> None:
    """A finished run, and one that was stopped."""
    line = (
        "resume: budget.tokens changed since the run began; change it back, or use another output_dir; "
        "change_budget=true allows another budget"
    )
    assert refused(runs, finished, **FIRST | {"budget.tokens": 160}) == line
    runs.stop("uniform", tmp_path / "stopped", after=3, **FIRST)
    assert refused(runs, tmp_path / "stopped", **FIRST | {"budget.tokens": 160}) == line
    other = refused(runs, finished, **FIRST | {"seed": 1})
    assert other == "resume: seed changed since the run began; change it back, or use another output_dir"


def test_nothing_else_may_change(runs: Runs, finished: Path) -> None:
    assert refused(runs, finished, **MORE, seed=1).startswith("resume: seed changed since the run began;")


def test_it_needs_resume(runs: Runs, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^change_budget: needs resume, as [^\n]*\Z"):
        runs.run("uniform", tmp_path / "run", **MORE, resume="false")


def test_a_name_that_is_taken(runs: Runs, finished: Path) -> None:
    """Nothing is renamed, then."""
    last = summary(finished)["steps"]
    (finished / f"model_step_{last}").mkdir()
    text = refused(runs, finished, **MORE)
    assert text == (
        f"change_budget: {finished / 'model'} would be kept as model_step_{last}, which is there already; move it"
    )
    assert (finished / "summary.json").exists()


def test_without_a_checkpoint(runs: Runs, finished: Path) -> None:
    shutil.rmtree(finished / "checkpoints")
    assert re.match("change_budget: .* has no checkpoint to go on from; ", refused(runs, finished, **MORE))


def test_a_run_that_stop_after_has_ended(runs: Runs, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ended = {"keep_best": "worst", "validate_every": 1, "stop_after": 1, "optimizer.lr": 10}
    assert runs.run("uniform", folder, **FIRST, **ended) == 0
    assert summary(folder)["stopped_early"]
    text = refused(runs, folder, **MORE, **ended)
    assert text.startswith("change_budget: stop_after has ended the run at step ")
