"""log.jsonl, summary.json, resolved.yaml."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from adapt_recipes.runlog import NullLog, RunLog, has_run, is_finished, write_resolved, write_summary


def test_lines_are_json_and_there_at_once(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.write("step", loss=0.1, tensor=torch.tensor([1.0, float("nan")]), nested={"a": float("inf")}, name="é")
    line = (tmp_path / "log.jsonl").read_text(encoding="utf-8")
    assert json.loads(line) == {"event": "step", "loss": 0.1, "tensor": [1.0, None], "nested": {"a": None}, "name": "é"}
    assert line.endswith("\n") and log.num_bytes == len(line.encode())
    log.close()


def test_a_resume_cuts_the_log_where_the_checkpoint_was(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.write("step", step=1)
    length = log.num_bytes
    log.write("step", step=2)
    log.close()
    log = RunLog(tmp_path, keep_bytes=length)
    log.write("resume", step=1)
    log.close()
    events = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert events == [{"event": "step", "step": 1}, {"event": "resume", "step": 1}]


def test_a_new_run_replaces_a_stale_log(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text("stale\n")
    RunLog(tmp_path).close()
    assert (tmp_path / "log.jsonl").read_text() == ""


def test_a_log_that_was_cut_since_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text("short\n")
    with pytest.raises(ValueError, match=r"log\.jsonl is shorter"):
        RunLog(tmp_path, keep_bytes=100)
    assert (tmp_path / "log.jsonl").read_text() == "short\n"


def test_what_a_folder_holds(tmp_path: Path) -> None:
    assert not has_run(tmp_path) and not is_finished(tmp_path)
    write_resolved(tmp_path, {"seed": 1, "mixture": {"_component_": "x"}})
    assert has_run(tmp_path) and not is_finished(tmp_path)
    resolved = yaml.safe_load((tmp_path / "resolved.yaml").read_text())
    assert resolved["seed"] == 1 and resolved["versions"]["torch"] == torch.__version__
    write_summary(tmp_path, {"losses": torch.tensor([1.5])})
    assert is_finished(tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text()) == {"losses": [1.5]}
    assert not list(tmp_path.glob("*.partial"))


def test_a_silent_stand_in_takes_every_call() -> None:
    """All that a recipe asks of the log."""
    silent = NullLog()
    silent.write("step", loss=1.0)
    silent.close()
    public = {name for name in vars(RunLog) if not name.startswith("_")}
    assert public <= {*vars(NullLog)} and silent.num_bytes == 0
