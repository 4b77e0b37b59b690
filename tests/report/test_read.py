"""A run directory is read as it was written: all of it, or up to where it was cut off."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_runs import events, write_run

from adapt_recipes.report import read
from adapt_recipes.report.read import Run, read_run


def check_against_log(run: Run, folder: Path) -> None:
    """Every number that was read stands on a line of the log, in its order."""
    tasks = list(events(folder, "mixture")[0]["probabilities"])
    assert run.tasks == tuple(tasks)

    def column(event: str, key: str) -> list[float]:
        return [line[key] for line in events(folder, event)]

    def rows(event: str, key: str) -> np.ndarray:
        """As floats, in which null is NaN."""
        values = [[line[key][task] for task in tasks] for line in events(folder, event)]
        return np.array(values, dtype=float).reshape(-1, len(tasks))

    for key in ("step", "supervised_tokens", "tokens", "computed_tokens", "seconds", "lr"):
        assert getattr(run.steps, key).tolist() == column("step", key), key
    for key in ("step", "supervised_tokens", "probe_tokens", "mixture_seconds"):
        assert getattr(run.mixtures, key).tolist() == column("mixture", key), key
    assert run.validations.supervised_tokens.tolist() == column("validation", "supervised_tokens")
    np.testing.assert_array_equal(run.steps.task_tokens, rows("step", "task_tokens"))
    np.testing.assert_array_equal(run.mixtures.probabilities, rows("mixture", "probabilities"))
    np.testing.assert_array_equal(run.validations.losses, rows("validation", "losses"))
    assert run.num_updates == len(events(folder, "mixture")) - 1


def test_everything_is_read(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", seed=3, tasks=["b", "a", "é"])
    run = read_run(folder)
    check_against_log(run, folder)
    assert (run.strategy, run.seed, run.name, run.ended, run.notes) == ("adapt", 3, "run", "", ())
    assert run.summary == json.loads((folder / "summary.json").read_text())
    assert run.spent == run.summary["supervised_tokens"] == 20 * 64


def test_a_real_run(real_run: Path) -> None:
    run = read_run(real_run)
    check_against_log(run, real_run)
    summary = run.summary
    assert run.ended == "" and run.spent == summary["budget_tokens"] == 1280
    assert run.num_updates == summary["mixture_updates"] > 0
    assert dict(zip(run.tasks, run.steps.task_tokens[-1], strict=True)) == summary["task_tokens"]
    assert dict(zip(run.tasks, run.validations.losses[-1], strict=True)) == summary["validation_losses"]
    assert run.worst[-1] == summary["worst_validation_loss"]
    assert run.mean[-1] == pytest.approx(summary["mean_validation_loss"], rel=1e-12)


def test_worst_and_mean_leave_out_what_is_not_measured(tmp_path: Path) -> None:
    losses = {0: 2.0, 1: np.nan, 2: 5.0}
    folder = write_run(tmp_path / "run", loss=lambda task, share: losses[task] - share)
    assert '"two": null' in (folder / "log.jsonl").read_text()
    run = read_run(folder)
    assert run.worst.tolist() == [5.0, 4.5, 4.0] and run.mean.tolist() == [3.5, 3.0, 2.5]
    assert run.only(["two"]).worst.tolist() == pytest.approx([np.nan] * 3, nan_ok=True)
    assert run.only(["two"]).mean.tolist() == pytest.approx([np.nan] * 3, nan_ok=True)
    some = run.only(["three", "one"])
    assert some.tasks == ("three", "one") and some.validations.losses[0].tolist() == [5.0, 2.0]
    assert some.steps.task_tokens[-1].tolist() == run.steps.task_tokens[-1, [2, 0]].tolist()
    assert some.mixtures.probabilities[-1].tolist() == run.mixtures.probabilities[-1, [2, 0]].tolist()


@pytest.mark.parametrize("steps", [1, 7, 8, 9, 15, 16, 17, 100, 1000])
def test_most_lines_of_a_long_log_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """The first and the last step are read, and evenly spread ones between; every validation; updates are counted."""
    monkeypatch.setattr(read, "KEPT_LINES", 4)
    folder = write_run(tmp_path / "run", steps=steps, update_every=1, validate_every=3)
    run = read_run(folder)
    for some, event in ((run.steps, "step"), (run.mixtures, "mixture")):
        every = [line["step"] for line in events(folder, event)]
        assert len(some.step) <= 9 and len(some.step) >= min(len(every), 4)
        assert some.step[0] == every[0] and some.step[-1] == every[-1]
        gaps = np.diff(some.step)[:-1]
        assert (gaps == gaps[:1]).all(), "evenly spread, but for the last"
        lines = {line["step"]: line for line in events(folder, event)}
        assert some.supervised_tokens.tolist() == [lines[step]["supervised_tokens"] for step in some.step]
    assert run.validations.losses.tolist() == [[*line["losses"].values()] for line in events(folder, "validation")]
    assert run.num_updates == len(events(folder, "mixture")) - 1


@pytest.fixture(scope="module")
def log_lines(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    folder = write_run(tmp_path_factory.mktemp("cut") / "run", steps=6, finished=False)
    return (folder / "log.jsonl").read_bytes().splitlines(keepends=True)


@given(data=st.data())
def test_a_log_cut_off_in_a_line_is_read_up_to_there_and_says_so(
    log_lines: list[bytes], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Wherever the cut is, what is read is what stands on the whole lines before it."""
    whole = data.draw(st.integers(1, len(log_lines) - 1))
    cut = data.draw(st.integers(0, len(log_lines[whole]) - 2))
    folder = tmp_path_factory.mktemp("run")
    (folder / "resolved.yaml").write_text("strategy: adapt\nseed: 0\n")
    (folder / "log.jsonl").write_bytes(b"".join(log_lines[:whole]) + log_lines[whole][:cut])
    run = read_run(folder)
    (folder / "log.jsonl").write_bytes(b"".join(log_lines[:whole]))
    check_against_log(run, folder)
    assert run.notes == ((f"log.jsonl ends in the middle of line {whole + 1}, and is read up to there",) if cut else ())
    assert run.ended == "was killed or is still running"


def test_a_last_line_without_its_newline_is_whole(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    log = folder / "log.jsonl"
    log.write_bytes(log.read_bytes().removesuffix(b"\n"))
    assert read_run(folder).notes == ()


@pytest.mark.parametrize(
    ("after", "said"),
    [
        ([], "was killed or is still running"),
        ([{"event": "end", "reason": "interrupted", "step": 20}], "was interrupted"),
        (
            [{"event": "end", "reason": "error", "step": 20, "message": "out of memory"}],
            "ended in an error: out of memory",
        ),
        ([{"event": "end", "reason": "finished", "step": 20}], "spent its budget, but has no summary.json"),
        (
            [{"event": "end", "reason": "interrupted", "step": 20}, {"event": "resume", "step": 20}],
            "was killed or is still running",
        ),
        (
            [{"event": "resume", "step": 10}, {"event": "end", "reason": "interrupted", "step": 20}],
            "was interrupted",
        ),
    ],
)
def test_how_an_unfinished_run_ended(tmp_path: Path, after: list[dict], said: str) -> None:
    folder = write_run(tmp_path / "run", finished=False)
    with open(folder / "log.jsonl", "a") as log:
        log.writelines(json.dumps(line) + "\n" for line in after)
    run = read_run(folder)
    assert run.ended == said
    assert run.summary == {} and run.spent == 20 * 64


def test_a_run_that_was_killed_before_its_first_step(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", finished=False)
    log = folder / "log.jsonl"
    log.write_bytes(log.read_bytes().splitlines(keepends=True)[0])
    run = read_run(folder)
    assert run.spent == 0 and run.num_updates == 0
    assert run.steps.task_tokens.shape == run.validations.losses.shape == (0, 3)


def test_a_run_without_a_config_is_called_by_its_folder(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "resolved.yaml").unlink()
    run = read_run(folder)
    assert (run.strategy, run.seed) == ("run", None)
    assert run.notes == ("there is no resolved.yaml: its strategy and seed are not known",)


# ---- what cannot be read


def second_line(key: str, value: object) -> Callable[[Path], None]:
    """Changes a value on the second line, a validation."""

    def change(folder: Path) -> None:
        lines = (folder / "log.jsonl").read_text().splitlines(keepends=True)
        values = json.loads(lines[1]) | {key: value}
        lines[1] = json.dumps({k: v for k, v in values.items() if v != "gone"}) + "\n"
        (folder / "log.jsonl").write_text("".join(lines))

    return change


def text(name: str, content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(content)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: (folder / "log.jsonl").unlink(), "{folder}: the run has no log.jsonl"),
        (text("log.jsonl", ""), "{folder}/log.jsonl: the run has not begun"),
        (text("log.jsonl", "{}\n"), "{folder}/log.jsonl, line 1: has no 'event'"),
        (text("log.jsonl", '{"event": "mixture"}\nnonsense\n'), "{folder}/log.jsonl, line 2: is not a JSON object"),
        (text("log.jsonl", '[1]\n{"event": "mixture"}\n'), "{folder}/log.jsonl, line 1: is not a JSON object"),
        (text("log.jsonl", '{"event": "mixture"}\n'), "{folder}/log.jsonl, line 1: has no 'probabilities'"),
        (
            text("log.jsonl", '{"event": "mixture", "probabilities": [1]}\n'),
            "line 1: 'probabilities' has to be a mapping",
        ),
        (second_line("losses", "gone"), "{folder}/log.jsonl, line 2: has no 'losses'"),
        (second_line("losses", {"one": 1.0}), "line 2: 'losses' has to have the tasks of the log's first line"),
        (second_line("losses", {"one": 1, "two": "x", "three": 1}), "line 2: 'losses' has to be a mapping of tasks to"),
        (second_line("supervised_tokens", "many"), "line 2: 'supervised_tokens' has to be a number"),
        (text("resolved.yaml", "a: ["), "{folder}/resolved.yaml: while parsing"),
        (text("resolved.yaml", "- a\n"), "{folder}/resolved.yaml: has to be a mapping of keys to values"),
        (text("summary.json", '{"a": '), "{folder}/summary.json: Expecting value"),
    ],
)
def test_what_cannot_be_read_is_named_in_one_line(tmp_path: Path, spoil: Callable[[Path], object], said: str) -> None:
    folder = write_run(tmp_path / "run")
    spoil(folder)
    with pytest.raises(ValueError) as error:
        read_run(folder)
    assert said.format(folder=folder) in str(error.value) and "\n" not in str(error.value)


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "notes").mkdir()
    for name in ("a", "b"):
        write_run(tmp_path / "runs" / name)
    for name, said in {
        "gone": "there is no such folder",
        "file": "is not a folder",
        "empty": "contains no run",
        "runs": f"contains no run itself, but 2 of its folders do: give {tmp_path / 'runs'}/*/",
    }.items():
        with pytest.raises(ValueError) as error:
            read_run(tmp_path / name)
        assert str(error.value) == f"{tmp_path / name}: {said}"


# ---- speed


@pytest.mark.slow
def test_a_hundred_tasks_and_a_hundred_thousand_lines_take_less_than_ten_seconds(tmp_path: Path) -> None:
    """Half a gigabyte, from the log to the page; by the processor's clock, for what else runs is not its fault."""
    from adapt_recipes.report.page import write_report

    tasks = [f"task{i:04d}_type" for i in range(100)]
    folder = write_run(tmp_path / "run", tasks=tasks, steps=1)
    step, update, losses = (events(folder, event)[-1] for event in ("step", "mixture", "validation"))
    step["task_losses"] = dict.fromkeys(tasks[:64], 1.2345678901234567)
    update |= {f"signal_{i}": dict.fromkeys(tasks, 0.1234567890123456) for i in range(5)}
    lines = {
        event["event"]: json.dumps(event | {"step": "STEP", "supervised_tokens": "STEP"})
        for event in (step, update, losses)
    }
    with open(folder / "log.jsonl", "w") as log:
        log.write(lines["mixture"].replace('"STEP"', "0") + "\n")
        for number in range(1, 95_001):
            log.write(lines["step"].replace('"STEP"', str(number)) + "\n")
            if number % 20 == 0:
                log.write(lines["mixture"].replace('"STEP"', str(number)) + "\n")
            if number % 200 == 0:
                log.write(lines["validation"].replace('"STEP"', str(number)) + "\n")
    assert (folder / "log.jsonl").stat().st_size > 4e8
    started = time.process_time()
    run = read_run(folder)
    write_report([folder], tmp_path / "page.html")
    assert time.process_time() - started < 10
    assert run.num_updates == 4750 and run.logged == 95_000 and len(run.validations.losses) == 475
