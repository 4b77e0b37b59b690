"""evaluation.json is complete after every task, and refuses what would mix two measurements."""

from __future__ import annotations

import json
import math
import multiprocessing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adapt_recipes.evaluation import records
from adapt_recipes.evaluation.records import Sample, Score, read_evaluation, read_samples
from adapt_recipes.run_directory import EVALUATION

SCORE = Score(
    family="reasoning",
    metric="acc",
    higher_is_better={"acc": True, "bits_per_byte": False},
    values={"acc": 0.5, "bits_per_byte": 1.25},
    stderrs={"acc": 0.1},
    num_examples=2,
    data="hub",
    seconds=1.5,
    versions={"lm-eval": "0.4.13"},
)
SAMPLES = [
    Sample(id=name, prompt='a "prompt"\n\u2028of é', references=["x"], answer="<x>", values={"acc": value})
    for name, value in (("1", 0.0), ("2", 1.0))
]
SETTINGS = {"seed": 0, "limit": None}


def add(folder: Path, task: str, suite: str = "s", weights: str = "w", **settings: Any) -> None:
    records.add(folder, suite, task, SCORE, SAMPLES, "model", weights, SETTINGS | settings)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert read_evaluation(tmp_path) is None and records.scores_of(tmp_path, "s") == {}
    for suite, task in (("s", "a"), ("s", "type/b"), ("other", "a")):
        add(tmp_path, task, suite)
    found = read_evaluation(tmp_path)
    assert found is not None and (found.model, found.weights) == ("model", "w")
    assert {name: [*suite.scores] for name, suite in found.suites.items()} == {"s": ["a", "type/b"], "other": ["a"]}
    assert found.suites["s"].scores["a"] == SCORE and found.suites["s"].settings == SETTINGS
    assert read_samples(tmp_path, "s", "type/b") == SAMPLES and read_samples(tmp_path, "s", "c") == []


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    records.add(tmp_path, "s", "a", replace(SCORE, values={"acc": math.nan}), SAMPLES, "model", "w", SETTINGS)
    assert json.loads((tmp_path / EVALUATION).read_text())["suites"]["s"]["scores"]["a"]["values"] == {"acc": None}
    assert math.isnan(records.scores_of(tmp_path, "s")["a"].values["acc"])


def test_a_score_without_its_metric_is_refused(tmp_path: Path) -> None:
    records.add(tmp_path, "s", "a", replace(SCORE, metric="f1"), SAMPLES, "model", "w", SETTINGS)
    with pytest.raises(ValueError, match=f"{EVALUATION}: is not what mixture_eval writes .*f1"):
        read_evaluation(tmp_path)


def _add_many(folder: Path, number: int) -> None:
    for i in range(10):
        add(folder, f"{number}-{i}")


def test_processes_that_write_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_add_many, args=(tmp_path, number)) for number in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert len(records.scores_of(tmp_path, "s")) == 30


def test_a_suite_is_not_continued_with_other_settings(tmp_path: Path) -> None:
    add(tmp_path, "a")
    records.check(tmp_path, "s", "w", SETTINGS)
    records.check(tmp_path, "other", "w", {"limit": 3})
    for settings, named in (
        ({"seed": 1, "limit": None}, "seed: s was measured with 0"),
        ({"seed": 0, "limit": 5}, "limit: s"),
    ):
        with pytest.raises(ValueError, match=f"^{named}.*suite=NAME"):
            records.check(tmp_path, "s", "w", settings)
    with pytest.raises(ValueError, match="is of other weights than model has now"):
        records.check(tmp_path, "s", "v", SETTINGS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "has the format None, and this version reads 1"),
        ('{"format": 2}', "has the format 2, and this version reads 1"),
        ('{"format": 1, "model": "m", "weights": "w"}', "is not what mixture_eval writes"),
        (
            '{"format": 1, "model": "m", "weights": "w", "suites": {"s": {"settings": {}, "scores": {"a": {}}}}}',
            "is not",
        ),
    ],
)
def test_a_file_of_another_version_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / EVALUATION).write_text(content)
    with pytest.raises(ValueError, match=f"{EVALUATION}: {message}"):
        read_evaluation(tmp_path)


def test_a_malformed_sample_is_named_by_its_line(tmp_path: Path) -> None:
    add(tmp_path, "a")
    with open(records.samples_file(tmp_path, "s", "a"), "a") as file:
        file.write('{"id": "3"}\n')
    with pytest.raises(ValueError, match="a.jsonl, line 3: is no sample"):
        read_samples(tmp_path, "s", "a")
