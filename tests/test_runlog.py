"""log.jsonl, summary.json, resolved.yaml."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from torchtune.training.metric_logging import StdoutLogger

from adapt_recipes import events
from adapt_recipes.events import (
    CheckpointEvent,
    EndEvent,
    MixtureEvent,
    NoteEvent,
    ResumeEvent,
    SavedValidationEvent,
    StepEvent,
    Summary,
    ValidationEvent,
)
from adapt_recipes.run_directory import has_run, is_finished
from adapt_recipes.runlog import NullLog, RunLog, close_metric_logger, log_config, write_resolved, write_summary

SUMMARY = Summary(
    strategy="uniform",
    seed=0,
    budget_tokens=30,
    supervised_tokens=30,
    total_tokens=114,
    tokens=60,
    computed_tokens=90,
    unique_supervised_tokens=30,
    stopped_early=False,
    unspent_tokens=0,
    probe_tokens=8,
    probe_total_tokens=24,
    validation_tokens=10,
    validation_total_tokens=30,
    task_tokens={"one": 10, "two": 20},
    probabilities={"one": 0.25, "two": 0.75},
    validation_losses={"one": 1.5, "two": math.nan},
    initial_validation_losses={"one": 2.5, "two": math.nan},
    worst_validation_loss=1.5,
    mean_validation_loss=1.5,
    saved_validation_losses={"one": 1.75, "two": math.nan},
    validation_exact_match={"one": 0.5, "two": math.nan},
    mean_validation_exact_match=0.5,
    validation_bits_per_byte={"one": math.nan, "two": math.nan},
    mean_validation_bits_per_byte=math.nan,
    seconds=3.5,
    mixture_seconds=0.0,
    validation_seconds=0.5,
    steps=6,
    mixture_updates=0,
    left_out={},
    data_fingerprint="0",
)


def step(number: int, *, spent: int = 0) -> StepEvent:
    return StepEvent(
        step=number,
        loss=2.0,
        lr=0.1,
        grad_norm=1.0,
        supervised_tokens=spent,
        total_tokens=4 * spent,
        tokens=2 * spent,
        computed_tokens=3 * spent,
        task_tokens={"one": spent},
        task_losses={"one": 2.0},
        seconds=0.5,
    )


def test_lines_are_json_and_there_at_once(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    signals = {"z": torch.tensor([1.0, math.nan]), "objective": torch.tensor(0.5)}
    log.write(
        MixtureEvent(
            step=3,
            supervised_tokens=8,
            total_tokens=40,
            probe_tokens=4,
            seconds=1.5,
            mixture_seconds=0.5,
            probabilities={"é": math.inf},
            signals=signals,
        )
    )
    line = (tmp_path / "log.jsonl").read_text(encoding="utf-8")
    expected = {"event": "mixture", "step": 3, "supervised_tokens": 8, "total_tokens": 40, "probe_tokens": 4}
    expected |= {"seconds": 1.5, "mixture_seconds": 0.5}
    assert json.loads(line) == expected | {"probabilities": {"é": None}, "z": [1.0, None], "objective": 0.5}
    assert "é" in line and line.endswith("\n") and log.num_bytes == len(line.encode())
    log.close()


def test_a_resume_cuts_the_log_where_the_checkpoint_was(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.write(CheckpointEvent(step=1))
    length = log.num_bytes
    log.write(CheckpointEvent(step=2))
    log.close()
    log = RunLog(tmp_path, keep_bytes=length)
    log.write(ResumeEvent(step=1, supervised_tokens=8))
    log.close()
    events = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert events == [{"event": "checkpoint", "step": 1}, {"event": "resume", "step": 1, "supervised_tokens": 8}]


def test_a_new_run_replaces_a_stale_log(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text("stale\n")
    RunLog(tmp_path).close()
    assert (tmp_path / "log.jsonl").read_text() == ""


def test_of_a_log_that_was_cut_whole_lines_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "log.jsonl").write_text("short\ncut")
    RunLog(tmp_path, keep_bytes=100).close()
    assert (tmp_path / "log.jsonl").read_text() == "short\n"
    assert "log.jsonl is shorter than at the checkpoint" in capsys.readouterr().err


def test_what_a_folder_holds(tmp_path: Path) -> None:
    assert not has_run(tmp_path) and not is_finished(tmp_path)
    write_resolved(tmp_path, {"seed": 1, "mixture": {"_component_": "x"}})
    assert has_run(tmp_path) and not is_finished(tmp_path)
    resolved = yaml.safe_load((tmp_path / "resolved.yaml").read_text())
    assert resolved["seed"] == 1 and resolved["versions"]["torch"] == torch.__version__
    write_summary(tmp_path, SUMMARY)
    assert is_finished(tmp_path)
    written = json.loads((tmp_path / "summary.json").read_text())
    assert list(written) == list(asdict(SUMMARY)), "in this order"
    unmeasured = {
        "validation_losses": {"one": 1.5, "two": None},
        "initial_validation_losses": {"one": 2.5, "two": None},
        "saved_validation_losses": {"one": 1.75, "two": None},
        "validation_exact_match": {"one": 0.5, "two": None},
        "validation_bits_per_byte": {"one": None, "two": None},
        "mean_validation_bits_per_byte": None,
    }
    assert written == asdict(SUMMARY) | unmeasured
    assert all(value is None for key, value in written.items() if "test" in key), "no test split"
    assert not list(tmp_path.glob("*.partial"))


class Logger:
    """A metric logger that keeps what it is given."""

    def __init__(self) -> None:
        self.lines: list[tuple[int, dict[str, Any]]] = []
        self.closed = False

    def log_dict(self, metrics: dict[str, Any], step: int) -> None:
        self.lines.append((step, metrics))

    def close(self) -> None:
        self.closed = True


def test_a_metric_logger_gets_the_first_the_last_and_some_steps(tmp_path: Path) -> None:
    logger = Logger()
    log = RunLog(tmp_path, metric_logger=logger, log_every=3, budget_tokens=80)
    for number in range(1, 9):
        log.write(step(number, spent=10 * number))
    assert [number for number, _ in logger.lines] == [1, 3, 6, 8]
    numbers = {"loss": 2.0, "lr": 0.1, "grad_norm": 1.0, "supervised_tokens": 60, "total_tokens": 240, "tokens": 120}
    assert logger.lines[2][1] == numbers | {"computed_tokens": 180, "seconds": 0.5}
    log.close()


def test_a_metric_logger_that_fails_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Broken(Logger):
        def log_dict(self, metrics: dict[str, Any], step: int) -> None:
            super().log_dict(metrics, step)
            raise RuntimeError("no\nnetwork")

        def close(self) -> None:
            raise RuntimeError("no network")

    logger = Broken()
    log = RunLog(tmp_path, metric_logger=logger, log_every=1, budget_tokens=80)
    for number in (1, 2):
        log.write(step(number, spent=10 * number))
    log.close()
    close_metric_logger(logger)
    assert len(logger.lines) == 1 and len((tmp_path / "log.jsonl").read_text().splitlines()) == 2
    line = "warning: metric_logger: RuntimeError: no network; the run goes on without it\n"
    assert capsys.readouterr().err == 2 * line


def test_a_metric_logger_gets_what_is_in_resolved_yaml(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of torchtune's loggers one writes it to a file. A logger need not take a config, and may refuse it."""
    config = {"output_dir": str(tmp_path), "lr": 1e-3, "mixture": {"_component_": "x", "names": ["a", "b"]}}
    write_resolved(tmp_path, config)
    resolved = yaml.safe_load((tmp_path / "resolved.yaml").read_text())

    class Taking(Logger):
        def log_config(self, config: Any) -> None:
            self.config = OmegaConf.to_container(config, resolve=True)

    class Refusing(Logger):
        def log_config(self, config: Any) -> None:
            raise RuntimeError("resume\nhas changed")

    taking = Taking()
    log_config(taking, config)
    assert taking.config == resolved
    log_config(StdoutLogger(), config)
    assert yaml.safe_load((tmp_path / "torchtune_config.yaml").read_text()) == resolved
    log_config(Logger(), config)
    assert capsys.readouterr().err == ""
    log_config(Refusing(), config)
    line = "warning: metric_logger: RuntimeError: resume has changed; the run goes on without its config\n"
    assert capsys.readouterr().err == line


def test_what_a_metric_logger_gets_of_other_events(tmp_path: Path) -> None:
    logger = Logger()
    log = RunLog(tmp_path, metric_logger=logger)
    shares = {"step": 3, "supervised_tokens": 8, "probe_tokens": 4, "mixture_seconds": 0.5}
    spent = {"supervised_tokens": 9, "total_tokens": 40, "validation_tokens": 6, "seconds": 1.5}
    log.write(
        MixtureEvent(
            **shares, total_tokens=40, seconds=1.5, probabilities={"one": 0.25, "two": 0.75}, signals={"z": 1.0}
        )
    )
    unmeasured = {"unmeasured": math.nan}
    measured: dict[str, Any] = {"losses": {"one": 1.0, "two": 2.0} | unmeasured}
    measured["exact_match"] = {"one": 0.0, "two": 0.5} | unmeasured
    unknown = dict.fromkeys(("one", "two", "unmeasured"), math.nan)
    log.write(ValidationEvent(step=4, **spent, **measured, bits_per_byte={"one": 3.0, "two": math.nan} | unmeasured))
    log.write(SavedValidationEvent(step=4, **spent, **measured, bits_per_byte=unknown))
    log.write(events.TestEvent(step=5, **spent, **measured, bits_per_byte=unknown))
    for event in (
        CheckpointEvent(step=5),
        ResumeEvent(step=5, supervised_tokens=9),
        NoteEvent(step=5, text="so"),
        EndEvent(reason="error", step=5, message="no"),
    ):
        log.write(event)
    totals = {name: value for name, value in shares.items() if name != "step"}
    losses = {"validation_loss/one": 1.0, "validation_loss/two": 2.0}
    losses |= {"worst_validation_loss": 2.0, "mean_validation_loss": 1.5}
    losses |= {"validation_exact_match/one": 0.0, "validation_exact_match/two": 0.5}
    losses |= {"mean_validation_exact_match": 0.25}
    of_saved, of_test = (
        {name.replace("validation", split): value for name, value in losses.items()}
        for split in ("saved_validation", "test")
    )
    for each in (losses, of_saved, of_test):
        each["validation_tokens"] = 6
    losses |= {"validation_bits_per_byte/one": 3.0, "mean_validation_bits_per_byte": 3.0}
    probabilities = {"p/one": 0.25, "p/two": 0.75}
    assert logger.lines == [(3, probabilities | totals), (4, losses), (4, of_saved), (5, of_test)]


def test_a_silent_stand_in_takes_every_call() -> None:
    """All that a recipe asks of the log."""
    silent = NullLog()
    silent.write(step(1))
    silent.close()
    public = {name for name in vars(RunLog) if not name.startswith("_")}
    assert public <= {*vars(NullLog)} and silent.num_bytes == 0
