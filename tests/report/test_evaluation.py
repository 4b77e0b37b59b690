"""Scores of several models side by side, and which differences are beyond chance."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluation_records import numbered, read, write_group, write_task
from scipy import stats

from adapt_recipes.report import evaluation
from adapt_recipes.report.evaluation import (
    NUM_EXAMPLES,
    RESAMPLES,
    Column,
    Difference,
    Row,
    best_columns,
    by_metric,
    differences,
    examples,
    mean_rows,
    notes_of,
    other_metrics,
    own_exact_match,
    resampled_means,
    row_score,
    row_stderr,
    suites_of,
    task_rows,
    with_means,
)
from adapt_recipes.report.tables import Spread

ROOT = Path(__file__).parents[2]
# Standard errors by which an end of an interval may be off, because it is of RESAMPLES draws: 0.03 is one deviation.
MONTE_CARLO = 0.15


def column(*folders: Path, name: str = "") -> Column:
    return Column(name or folders[0].name, tuple(read(folder) for folder in folders))


def compare(*columns: Column) -> dict[str, list[Difference | None]]:
    """Differences of all rows from the first column, by name."""
    rows = with_means(task_rows(columns))
    return dict(zip([row.name for row in rows], differences(rows, columns)[0], strict=True))


def binary(generator: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    first = generator.random(size) < 0.4
    return first.astype(float), np.where(generator.random(size) < 0.7, first, generator.random(size) < 0.7).astype(
        float
    )


def continuous(generator: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    first = generator.exponential(size=size)
    return first, first + generator.normal(0.1, 0.5, size=size)


# ---- differences


@pytest.mark.parametrize("values", [binary, continuous])
@pytest.mark.parametrize("size", [30, 400])
def test_intervals_are_those_of_a_paired_bootstrap_over_examples(tmp_path: Path, values: Any, size: int) -> None:
    first, other = values(np.random.default_rng(size), size)
    write_task(tmp_path / "a", "task", numbered(first))
    # The order in the file is not that of the pairs.
    write_task(tmp_path / "b", "task", dict(reversed(numbered(other).items())))
    (found,) = compare(column(tmp_path / "a"), column(tmp_path / "b"))["task"]
    oracle = stats.bootstrap(
        (other, first),
        lambda x, y, axis: np.mean(x, axis=axis) - np.mean(y, axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=10_000,
        method="percentile",
        rng=np.random.default_rng(7),
    )
    assert found is not None
    assert found.mean == pytest.approx(other.mean() - first.mean(), abs=1e-12)
    # Of binary values, the ends are multiples of 1 / size.
    near = MONTE_CARLO * oracle.standard_error + (1 / size if values is binary else 0)
    assert found[1:] == pytest.approx((oracle.confidence_interval.low, oracle.confidence_interval.high), abs=near)


def test_a_model_does_not_differ_from_itself(tmp_path: Path) -> None:
    for name in ("a", "b"):
        for task in ("one", "two"):
            write_task(tmp_path / name, task, numbered(np.random.default_rng(3).random(50)))
    found = compare(column(tmp_path / "a"), column(tmp_path / "b"))
    assert list(found) == ["one", "two", "mean of family"]
    for (difference,) in found.values():
        assert difference == (0, 0, 0) and difference is not None and not difference.is_beyond_chance


@pytest.mark.parametrize("shift", [0.25, -0.25, 1e-4])
def test_the_same_shift_of_every_example_is_beyond_chance(tmp_path: Path, shift: float) -> None:
    values = np.random.default_rng(3).random(50)
    write_task(tmp_path / "a", "task", numbered(values))
    write_task(tmp_path / "b", "task", numbered(values + shift))
    ((difference,),) = compare(column(tmp_path / "a"), column(tmp_path / "b")).values()
    assert difference is not None and difference.is_beyond_chance
    assert difference == pytest.approx((shift, shift, shift), abs=1e-12)


def test_two_samples_of_the_same_answers_are_rarely_beyond_chance(tmp_path: Path) -> None:
    """One in twenty is, by luck."""
    generator = np.random.default_rng(0)
    beyond = 0
    for i in range(100):
        for name in ("a", "b"):
            write_task(tmp_path / name, f"task {i}", numbered(generator.random(100) < 0.5), family=f"family {i}")
    found = compare(column(tmp_path / "a"), column(tmp_path / "b"))
    beyond = sum(bool(of_row[0] and of_row[0].is_beyond_chance) for of_row in found.values())
    assert len(found) == 101 and 1 <= beyond <= 12


def test_a_mean_over_tasks_is_resampled_inside_each_task(tmp_path: Path) -> None:
    """Its standard error is that of independent tasks, and a small one counts as much as a large one."""
    generator, errors, means = np.random.default_rng(1), [], []
    for task, size in (("small", 40), ("large", 500)):
        first, other = continuous(generator, size)
        write_task(tmp_path / "a", task, numbered(first))
        write_task(tmp_path / "b", task, numbered(other))
        means.append(float((other - first).mean()))
        errors.append(float((other - first).std()) / size**0.5)
    found = compare(column(tmp_path / "a"), column(tmp_path / "b"))
    (mean,) = found["mean of family"]
    assert mean is not None and mean.mean == pytest.approx(np.mean(means), abs=1e-12)
    error = math.hypot(*errors) / 2
    expected = [mean.mean + end * error for end in stats.norm.ppf([0.025, 0.975])]
    # That of normal means, which these are nearly.
    assert mean[1:] == pytest.approx(expected, abs=2 * MONTE_CARLO * error)


def test_tasks_are_resampled_independently(tmp_path: Path) -> None:
    """The mean of two tasks with the same answers has an interval narrower by the root of two."""
    first, other = continuous(np.random.default_rng(2), 100)
    for task in ("one", "two"):
        write_task(tmp_path / "a", task, numbered(first))
        write_task(tmp_path / "b", task, numbered(other))
    found = compare(column(tmp_path / "a"), column(tmp_path / "b"))
    one, _, mean = (of_row[0] for of_row in found.values())
    assert one is not None and mean is not None
    assert (one.high - one.low) / (mean.high - mean.low) == pytest.approx(math.sqrt(2), rel=0.1)


def test_seeds_are_averaged_example_by_example(tmp_path: Path) -> None:
    """A column of two models is the same as one of their mean."""
    generator = np.random.default_rng(4)
    first, one, other = (generator.random(60) for _ in range(3))
    write_task(tmp_path / "base", "task", numbered(first))
    write_task(tmp_path / "s0", "task", numbered(one))
    write_task(tmp_path / "s1", "task", numbered(other))
    write_task(tmp_path / "mean", "task", numbered((one + other) / 2))
    base = column(tmp_path / "base")
    seeds, mean = (
        compare(base, each)["task"] for each in (column(tmp_path / "s0", tmp_path / "s1"), column(tmp_path / "mean"))
    )
    assert seeds == mean
    ((as_first,),) = compare(column(tmp_path / "s0", tmp_path / "s1"), base).values()
    assert as_first is not None and seeds[0] is not None and as_first.mean == pytest.approx(-seeds[0].mean, abs=1e-12)


def test_the_examples_of_a_group_are_those_of_its_parts(tmp_path: Path) -> None:
    """As if they were of one task; parts are no rows. The same id in two parts is two examples."""
    generator = np.random.default_rng(5)
    for name in ("a", "b"):
        parts = {"mmlu_x": generator.random(10), "mmlu_y": generator.random(70)}
        for part, values in parts.items():
            write_task(tmp_path / name, part, numbered(values), group="mmlu")
        write_group(tmp_path / name, "mmlu", [*parts])
        write_task(tmp_path / f"{name} whole", "mmlu", numbered(np.concatenate([*parts.values()])))
    found = compare(column(tmp_path / "a"), column(tmp_path / "b"))
    assert list(found) == ["mmlu"]
    assert found == compare(column(tmp_path / "a whole"), column(tmp_path / "b whole"))


def test_examples_with_the_same_id_are_paired_in_their_order(tmp_path: Path) -> None:
    write_task(tmp_path / "a", "task", [("x", 0.0), ("x", 1.0), ("y", 0.0)])
    write_task(tmp_path / "b", "task", [("x", 0.5), ("y", 0.5), ("x", 1.5)])
    ((difference,),) = compare(column(tmp_path / "a"), column(tmp_path / "b")).values()
    assert difference == (0.5, 0.5, 0.5)


def test_an_interval_does_not_depend_on_the_other_columns(tmp_path: Path) -> None:
    for seed, name in enumerate("abc"):
        write_task(tmp_path / name, "task", numbered(np.random.default_rng(seed).random(30)))
    a, b, c = (column(tmp_path / name) for name in "abc")
    assert compare(a, b, c)["task"] == [*compare(a, b)["task"], *compare(a, c)["task"]]


def test_resamples_are_the_same_in_small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).random(20)
    whole = resampled_means(values, np.random.default_rng(1))
    assert whole.shape == (RESAMPLES,) and values.min() < whole.min() < values.mean() < whole.max() < values.max()
    monkeypatch.setattr(evaluation, "_CHUNK", 20 * 333)
    assert resampled_means(values, np.random.default_rng(1)) == pytest.approx(whole, rel=1e-12)


# ---- examples that are not the same

VALUES = numbered([0.0, 1.0, 1.0, 0.0])


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"values": numbered([0.0, 1.0, 1.0])}, "they have 3 examples in common of 4 and 3"),
        ({"values": {"other": 1.0}}, "they have 0 examples in common of 4 and 1"),
        ({"data": "test"}, "their data is not the same (hub, test)"),
        ({"num_fewshot": 5}, "their num_fewshot is not the same (0, 5)"),
        ({"task_version": "2"}, "their task_version is not the same (2, None)"),
        ({"metric": "f1"}, "their metric is not the same (acc, f1)"),
        ({"values": [*VALUES.items(), ("x", None)]}, "acc is known of the task alone, not of its examples"),
        ({"value": 0.6}, "the score of b is not the mean over its examples"),
    ],
)
def test_why_there_is_no_difference(tmp_path: Path, other: dict[str, Any], reason: str) -> None:
    """Of this task, and of a mean with it; the others have theirs."""
    write_task(tmp_path / "a", "task", VALUES)
    write_task(tmp_path / "b", "task", **{"values": VALUES} | other)
    for name in ("a", "b"):
        write_task(tmp_path / name, "fine", VALUES)
    columns = [column(tmp_path / name) for name in ("a", "b")]
    rows = with_means(task_rows(columns))
    found, notes = differences(rows, columns)
    assert found == [[None], [(0, 0, 0)], [None]]
    assert notes == [f"No difference of b from a in task: {reason}."]


def test_one_example_has_no_interval(tmp_path: Path) -> None:
    for name, value in (("a", 0.0), ("b", 1.0)):
        write_task(tmp_path / name, "task", {"x": value})
    columns = [column(tmp_path / name) for name in ("a", "b")]
    assert differences(task_rows(columns), columns) == (
        [[None]],
        ["No difference of b from a in task: it has one example only."],
    )


def test_answers_that_are_gone(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_task(tmp_path / name, "task", VALUES)
    (tmp_path / "a" / "evaluation" / "suite" / "task.jsonl").unlink()
    columns = [column(tmp_path / name) for name in ("a", "b")]
    found, notes = differences(task_rows(columns), columns)
    assert found == [[None]] and notes == ["No difference of b from a in task: the answers of a are gone."]
    assert [example.answers[0] for example in examples(columns)] == [None] * 4


def test_seeds_on_other_examples(tmp_path: Path) -> None:
    write_task(tmp_path / "a", "task", VALUES)
    write_task(tmp_path / "b", "task", {**VALUES, "x": 1.0})
    columns = [column(tmp_path / "a"), column(tmp_path / "a", tmp_path / "b", name="both")]
    found, (note,) = differences(task_rows(columns), columns)
    assert found == [[None]] and note.endswith("the runs of both were not measured on the same examples.")


def test_a_malformed_file_of_answers_is_named(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_task(tmp_path / name, "task", VALUES)
    path = tmp_path / "b" / "evaluation" / "suite" / "task.jsonl"
    path.write_text("{}\n")
    columns = [column(tmp_path / name) for name in ("a", "b")]
    with pytest.raises(ValueError, match=f"{path}, line 1"):
        differences(task_rows(columns), columns)


# ---- scores


@pytest.fixture
def columns(tmp_path: Path) -> list[Column]:
    """Two models that differ only in seed, and one that lacks a task."""
    for name, shift in (("s0", 0.0), ("s1", 0.2), ("other", 0.1)):
        write_task(tmp_path / name, "one", numbered([0.1 + shift, 0.3 + shift]), family="x")
        if name != "other":
            write_task(tmp_path / name, "three", numbered([0.0, 1.0]), family="y")
        write_task(tmp_path / name, "two", numbered([0.5, 0.7]), family="x")
        write_task(tmp_path / name, "chat", numbered([0.0]), metric=None, family="z", others={"answer_tokens": 4.0})
    return [column(tmp_path / "s0", tmp_path / "s1", name="seeds"), column(tmp_path / "other")]


def test_rows_are_tasks_by_family_and_means_where_there_are_several(columns: Sequence[Column]) -> None:
    rows = with_means(task_rows(columns))
    assert [row.name for row in rows] == ["one", "two", "mean of x", "three", "mean over tasks"]
    assert [row.metric for row in rows] == ["acc", "acc", "", "acc", ""]
    scores = [[row_score(each, row) for each in columns] for row in rows]
    assert scores[0] == [pytest.approx((0.3, 0.2, 0.4)), pytest.approx((0.3, 0.3, 0.3))]
    assert scores[2] == [pytest.approx((0.45, 0.4, 0.5)), pytest.approx((0.45, 0.45, 0.45))]
    assert scores[4][0] == pytest.approx(((0.3 + 0.6 + 0.5) / 3, (0.2 + 0.6 + 0.5) / 3, (0.4 + 0.6 + 0.5) / 3))
    assert all(map(math.isnan, (*scores[3][1], *scores[4][1]))), "not all of its tasks were measured"


def test_standard_errors_are_of_one_model(columns: Sequence[Column]) -> None:
    rows = with_means(task_rows(columns))
    # Of two values 0.2 apart it is 0.1.
    assert row_stderr(columns[1], rows[0]) == pytest.approx(0.1)
    assert row_stderr(columns[1], rows[2]) == pytest.approx(math.sqrt(0.1**2 + 0.1**2) / 2)
    assert math.isnan(row_stderr(columns[0], rows[0])) and math.isnan(row_stderr(columns[1], rows[4]))


def test_means_over_nothing(tmp_path: Path) -> None:
    nothing = [column(tmp_path / "a"), column(tmp_path / "b")]
    families, overall = mean_rows(task_rows(nothing))
    assert families == [] and math.isnan(row_score(nothing[0], overall).mean)
    assert differences([overall], nothing) == ([[None]], [])


@pytest.mark.parametrize(
    ("higher_is_better", "means", "best"),
    [
        (True, [0.1, 0.3, 0.2], [1]),
        (False, [0.1, 0.3, 0.2], [0]),
        (None, [0.1, 0.3, 0.2], []),
        (True, [0.3, 0.3, 0.2], [0, 1]),
        (True, [0.3, 0.3, 0.3], []),
        (False, [math.nan, 0.3, 0.2], [2]),
        (True, [math.nan, 0.3], []),
    ],
)
def test_the_best(higher_is_better: bool | None, means: list[float], best: list[int]) -> None:
    row = Row("task", ("task",), "family", "acc", higher_is_better)
    assert best_columns([Spread(mean, mean, mean) for mean in means], row) == best


def test_the_direction_of_a_mean_is_that_of_all_its_tasks(tmp_path: Path) -> None:
    write_task(tmp_path / "a", "one", VALUES)
    write_task(tmp_path / "a", "two", VALUES, metric="perplexity", higher_is_better=False)
    rows = with_means(task_rows([column(tmp_path / "a")]))
    assert [row.higher_is_better for row in rows] == [True, False, None]


def test_another_metric_is_of_the_tasks_that_have_it(tmp_path: Path) -> None:
    """Lower is better, and groups keep their parts."""
    for name, bits in (("a", 1.0), ("b", 0.5)):
        write_task(tmp_path / name, "one", VALUES, others={"bits_per_byte": bits})
        write_task(tmp_path / name, "two", VALUES)
    columns = by_metric([column(tmp_path / "a"), column(tmp_path / "b")], "bits_per_byte")
    (row,) = task_rows(columns)
    assert (row.name, row.metric, row.higher_is_better) == ("one", "bits_per_byte", False)
    assert best_columns([row_score(each, row) for each in columns], row) == [1]
    ((difference,),), _ = differences([row], columns)
    assert difference == (-0.5, -0.5, -0.5) and difference.is_beyond_chance


def test_other_metrics_examples_and_time(columns: Sequence[Column], tmp_path: Path) -> None:
    write_task(tmp_path / "s0", "own", VALUES, others={"rouge_l": 0.0, "unstopped": 0.5}, left_out={"trained on": 3})
    write_task(tmp_path / "s1", "own", VALUES, others={"rouge_l": 1.0, "unstopped": 0.5})
    found = other_metrics([column(tmp_path / "s0", tmp_path / "s1"), column(tmp_path / "other")])
    tasks = ["one", "three", "two", "chat", "own"]
    names = [("rouge_l", "own"), ("answer_tokens", "chat"), ("unstopped", "own")]
    names += [("num_examples", task) for task in tasks] + [("left out: trained on", "own")]
    assert list(found) == names + [("seconds", task) for task in tasks]
    assert found["rouge_l", "own"][0] == (0.5, 0, 1) and math.isnan(found["rouge_l", "own"][1].mean)
    assert found["left out: trained on", "own"][0] == (1.5, 0, 3)
    assert found["answer_tokens", "chat"] == [(4, 4, 4), (4, 4, 4)]


def test_what_is_missing_and_which_settings_differ_is_noted(columns: Sequence[Column], tmp_path: Path) -> None:
    write_task(tmp_path / "few", "one", VALUES, settings={"limit": 4, "own tasks": "a" * 32})
    found = notes_of([*columns, column(tmp_path / "few"), column(tmp_path / "base")])
    assert found == [
        "Not measured: base.",
        "Not measured on other: three.",
        "Not measured on few: two, three.",
        "The setting 'limit' is not the same: null of s0, s1, other; 4 of few.",
        "The setting 'own tasks' is not the same: null of s0, s1, other; aaaaaaaaaaaa of few.",
    ]
    assert notes_of([columns[0]]) == []


def test_suites_of_any_folder(tmp_path: Path) -> None:
    write_task(tmp_path / "a", "one", VALUES, suite="x")
    write_task(tmp_path / "b", "one", VALUES, suite="y")
    write_task(tmp_path / "b", "one", VALUES, suite="x")
    assert suites_of(tmp_path / name for name in ("gone", "a", "b")) == ["x", "y"]
    (tmp_path / "a" / "evaluation.json").write_text('{"format": 0}')
    with pytest.raises(ValueError, match="has the format 0"):
        suites_of([tmp_path / "a"])


# ---- answers


def test_the_same_examples_of_all_models(tmp_path: Path) -> None:
    """Those that most were asked, and among them those with the smallest ids."""
    write_task(tmp_path / "all", "task", dict(reversed(numbered([1.0] * 50).items())), prompt="{id}" * 2000)
    write_task(tmp_path / "few", "task", {f"{i:04}": 0.0 for i in range(40, 45)}, answer="few")
    write_task(tmp_path / "few", "chat", numbered([0.0]), metric=None)
    found = examples([column(tmp_path / "all"), column(tmp_path / "few")])
    of_task = [example for example in found if example.task == "task"]
    both, one = of_task[:5], of_task[5:]
    assert len(of_task) == NUM_EXAMPLES and len(found) == NUM_EXAMPLES + 1
    for i, example in enumerate(both, start=40):
        assert example.references == [f"reference of {i:04}"]
        assert [answer and answer.answer for answer in example.answers] == [f"answer to {i:04}", "few"]
        assert example.metrics == ["acc 1", "acc 0"]
        assert example.prompt == f"[without the first 4,000 characters]\n{f'{i:04}' * 1000}"
    assert [example.references[0] for example in one] == [f"reference of {i:04}" for i in range(15)]
    assert all(example.answers[1] is None and example.metrics == ["acc 1", ""] for example in one)
    assert found[-1].task == "chat" and found[-1].answers[0] is None and found[-1].metrics == ["", ""]


# ---- against the loss


def test_the_exact_match_of_own_tasks(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    for task, value in (("one", 0.2), ("two", 0.4), ("target", 0.9)):
        write_task(folder, task, {"x": value}, metric="exact_match", family="own tasks")
    write_task(folder, "three", {"x": 1.0}, metric="exact_match", family="unseen tasks")
    assert own_exact_match(read(folder), ["one", "two", "three", "four"]) == pytest.approx(0.3)
    assert math.isnan(own_exact_match(read(folder), ["three"]))


def test_it_needs_nothing_of_lm_eval() -> None:
    program = "import sys\nsys.modules.update(dict.fromkeys(('lm_eval', 'transformers', 'rouge_score', 'torch')))\n"
    program += "import adapt_recipes.report.evaluation"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
