"""What mixture_eval measured, on the page of `tune report`."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from evaluation_records import numbered, write_task
from report_runs import write_run
from test_page import Page, page_of, report

from adapt_recipes.report.figures import Chart, to_png
from adapt_recipes.report.page import render, write_report
from adapt_recipes.report.read import read_run

# Of 40 examples: how many each model has right. The difference of the runs from the base model is far beyond chance.
RIGHT = {"base": 4, "uniform_0": 20, "uniform_1": 24, "adapt_0": 32}


def score(folder: Path, right: int, **more: object) -> Path:
    """Two own tasks, of which only one has bits per byte."""
    values = numbered(np.arange(40) < right)
    settings = {"limit": 40, "dtype": "fp32"}
    common = {"suite": "eval_tasks", "metric": "exact_match", "family": "own tasks", "settings": settings}
    write_task(folder, "one", values, **common, others={"bits_per_byte": 1.5}, **more)
    write_task(folder, "two", values, **common, **more)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base model without a run, a strategy with two seeds, and one with one."""
    home = tmp_path_factory.mktemp("runs")
    for name in RIGHT:
        if name != "base":
            strategy, seed = name.split("_")
            # adapt ends with the lowest loss, so that it comes first in the other tables.
            write_run(home / name, strategy=strategy, seed=int(seed), loss=lambda t, s, n=strategy: 3 - len(n) % 2 * s)
        score(home / name, RIGHT[name])
    return {name: home / name for name in RIGHT}


def page_with(*folders: Path) -> tuple[Page, list[Chart]]:
    """Of runs and of folders without one."""
    source, charts = render([read_run(each) for each in folders if (each / "log.jsonl").exists()], folders)
    return Page(source), charts


def test_a_base_model_and_runs(folders: dict[str, Path]) -> None:
    """It is a column of the evaluation, the first as it was named first, and not of the other tables."""
    page, _ = page_with(*folders.values())
    assert page.tables["scores_eval_tasks"][0] == ["task", "base", "uniform", "adapt"]
    for task in ("one exact_match", "two exact_match"):
        row = next(row for row in page.tables["scores_eval_tasks"] if row[0] == task)
        # sqrt(p (1 - p) / 39)
        assert row[1:] == ["0.100 ± 0.048", "0.550 0.500 to 0.600", "0.800 ± 0.064"]
    mean = page.tables["scores_eval_tasks"][-1]
    assert mean == ["mean of own tasks", "0.100 ± 0.034", "0.550 0.500 to 0.600", "0.800 ± 0.045"]
    header, *differences = page.tables["scores_differences_eval_tasks"]
    assert header == ["task", "uniform", "adapt"] and len(differences) == 3
    for row in differences:
        assert [cell[:6] for cell in row[1:]] == ["+0.450", "+0.700"]
        assert all(cell.endswith("beyond chance") for cell in row[1:])
    assert "There are 6 comparisons: without any difference, one in twenty is beyond chance by luck." in " ".join(
        page.text.split()
    )
    metrics = {(row[0], row[1]): row[2:] for row in page.tables["metrics_eval_tasks"][1:]}
    assert page.tables["bits_per_byte_eval_tasks"][1:] == [["one bits_per_byte", *["1.500"] * 3]], "two has none"
    differences = page.tables["bits_per_byte_differences_eval_tasks"]
    assert differences[1:] == [["one bits_per_byte", *["+0.000 +0.000 to +0.000"] * 2]]
    assert metrics["num_examples", "two"] == ["40"] * 3
    for name in ("strategies", "counters", "winners"):
        assert "base" not in str(page.tables[name]), name
    best = re.findall(r'<td class="best "[^>]*>(\S+)', page.source.partition('id="scores_eval_tasks"')[2])
    assert best[:3] == ["0.800"] * 3, "the best score of each row"
    sections = [attributes["id"] for tag, attributes in page.tags if tag == "h2"]
    assert sections[:3] == ["section-results", "section-worth", "section-mixture"]
    assert [attributes["href"] for tag, attributes in page.tags if tag == "a"] == [f"#{name}" for name in sections]


def test_the_first_column_is_the_first_that_was_named(folders: dict[str, Path]) -> None:
    page, _ = page_with(folders["adapt_0"], folders["base"], folders["uniform_1"])
    assert page.tables["scores_differences_eval_tasks"][0] == ["task", "base", "uniform"]
    assert page.tables["scores_differences_eval_tasks"][1][1].startswith("-0.700")
    marked = page.source.partition('id="scores_differences_eval_tasks"')[2].partition("</table>")[0]
    assert 'class="best' not in marked, "what is worse beyond chance is not marked as the best"


def test_one_run_has_scores_and_nothing_to_compare_them_with(folders: dict[str, Path]) -> None:
    page = page_of(folders["adapt_0"])
    assert page.tables["scores_eval_tasks"][1] == ["one exact_match", "0.800 ± 0.064"]
    assert "scores_differences_eval_tasks" not in page.tables and "exact_match_against_loss" not in page.source
    assert 'class="best' not in page.source


def test_a_page_without_evaluations_has_no_such_section(tmp_path: Path) -> None:
    assert "section-worth" not in page_of(write_run(tmp_path / "run")).source


def test_what_only_some_were_measured_on(folders: dict[str, Path], tmp_path: Path) -> None:
    """A suite that one lacks, a run without any, and other settings: a dash, and a note that says why."""
    other = score(write_run(tmp_path / "other", strategy="other"), 8)
    write_task(other, "arc", numbered([0.0, 1.0]), suite="eval_ood")
    few = write_run(tmp_path / "few", strategy="few")
    for task in ("one", "two"):
        values = numbered([1.0] * 8)
        write_task(
            few, task, values, suite="eval_tasks", metric="exact_match", family="own tasks", settings={"limit": 8}
        )
    page, _ = page_with(other, few, write_run(tmp_path / "none", strategy="none"), folders["adapt_0"])
    text = " ".join(page.text.split())
    assert page.tables["scores_eval_ood"][0][1:] == ["other", "few", "none", "adapt"]
    assert page.tables["scores_eval_ood"][1][2:] == ["–"] * 3
    assert page.tables["scores_differences_eval_ood"][1][1:] == ["–"] * 3
    assert page.tables["scores_differences_eval_tasks"][1][1:3] == ["–"] * 2
    for note in (
        "eval_ood: Not measured: few, none, adapt_0.",
        "eval_tasks: Not measured: none.",
        "eval_tasks: The setting 'limit' is not the same: 40 of other, adapt_0; 8 of few.",
        "eval_tasks: No difference of few from other in one, two: they have 8 examples in common of 40 and 8.",
    ):
        assert note in text, note
    assert "There are 3 comparisons" in text


def test_answers_are_side_by_side_and_no_markup(folders: dict[str, Path], tmp_path: Path) -> None:
    hostile = "<script>alert('{id}')</script>"
    base = score(tmp_path / "base", 4, answer=hostile, prompt=hostile * 20)
    page, _ = page_with(base, folders["adapt_0"])
    header, *rows = page.tables["answers_eval_tasks"]
    assert header == ["task", "prompt", "references", "base", "adapt_0"]
    assert [row[0] for row in rows] == ["one"] * 20 + ["two"] * 20
    assert rows[0][2:] == [
        "reference of 0000",
        "<script>alert('0000')</script>exact_match 1",
        "answer to 0000exact_match 1",
    ]
    assert rows[4][3:] == ["<script>alert('0004')</script>exact_match 0", "answer to 0004exact_match 1"]
    assert "<script>alert" not in page.source and "alert('0" not in page.source
    assert page.source.count("<details><summary>…") == 40, "long prompts are closed"
    names = [attributes.get("class") for tag, attributes in page.tags if tag == "table"]
    assert names.count("searchable") == 1


def test_names_of_tasks_and_suites_are_no_markup(folders: dict[str, Path]) -> None:
    hostile = "<img src=x onerror=alert(1)>"
    folder = folders["base"].parent / "hostile"
    write_task(folder, hostile, numbered([0.0, 1.0]), suite="x", family=hostile, metric=hostile)
    page, _ = page_with(folder, folders["adapt_0"])
    assert "img" not in {tag for tag, _ in page.tags} and hostile in page.text


@pytest.mark.parametrize("runs", [2, 3])
def test_exact_match_against_validation_loss(tmp_path: Path, runs: int) -> None:
    """A point per run, of at least three runs that have both; a base model has no loss."""
    folders = [score(tmp_path / "base", 4)]
    for i in range(runs):
        folders.append(write_run(tmp_path / f"run_{i}", strategy="ab"[i % 2], seed=i, loss=lambda t, s, i=i: t + i + 1))
        for task, right in (("one", 4 * i), ("two", 8 * i), ("not trained", 40)):
            values = numbered(np.arange(40) < right)
            write_task(folders[-1], task, values, suite="eval_tasks", metric="exact_match", family="own tasks")
    _, charts = page_with(*folders)
    found = [chart for chart in charts if chart.name == "exact_match_against_loss"]
    assert len(found) == (runs == 3)
    if found:
        points = {
            name: (x, y) for line in found[0].lines for name, x, y in zip(line.names, line.x, line.y, strict=True)
        }
        # Losses 1 + i, 2 + i, 3 + i, and 3 i / 20 right on average.
        assert points == {f"run_{i}": pytest.approx((2 + i, 0.15 * i)) for i in range(3)}
        assert {line.label: list(line.names) for line in found[0].lines} == {"a": ["run_0", "run_2"], "b": ["run_1"]}
        assert to_png(found[0]).startswith(b"\x89PNG")


def test_folders_without_runs(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, output = report(capsys, folders["base"])
    assert status == 2 and output.count("\n") == 1
    assert output.endswith("base: has scores but no run; give at least one run beside it\n")
    status, output = report(capsys, folders["adapt_0"], folders["base"], tmp_path)
    assert status == 2 and "contains no run" in output and output.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "not valid JSON"),
        ('{"format": 7}', "has the format 7"),
        ('{"format": 1}', "is not what mixture_eval writes"),
    ],
)
def test_a_malformed_file_of_scores_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, said: str
) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "evaluation.json").write_text(content)
    status, output = report(capsys, folder)
    assert status == 2 and output.startswith(f"tune report: error: {folder}/evaluation.json: ")
    assert said in output and output.count("\n") == 1
    assert not (folder / "report.html").exists()


@pytest.mark.slow
def test_the_page_of_a_run_beside_a_base_model(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no page of one run: it does not go into its directory."""
    monkeypatch.chdir(tmp_path)
    assert write_report([folders["adapt_0"], folders["base"]])[0] == Path("report.html")
