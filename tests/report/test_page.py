"""The page says what the runs did, needs nothing beside itself, and is written whole or not at all."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from report_runs import events, write_run

from adapt_recipes import commands
from adapt_recipes.report.page import render, write_report
from adapt_recipes.report.read import read_run
from adapt_recipes.words import CommandParser

ROOT = Path(__file__).parents[2]


class Page(HTMLParser):
    """The tables of a page by the id of their heading, as rows of texts, and all its text outside of scripts."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source
        self.tables: dict[str, list[list[str]]] = {}
        self.text = ""
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._heading = self._inside = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "wbr":
            return
        self._inside = tag
        if tag == "h3" and (name := dict(attrs).get("id")):
            self._heading = name
        if tag == "tr":
            self.tables.setdefault(self._heading, []).append([])
        if tag in ("td", "th"):
            self.tables[self._heading][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th", "table", "script", "style"):
            self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside in ("script", "style"):
            return
        self.text += data
        if self._inside in ("td", "th", "small"):
            self.tables[self._heading][-1][-1] += data

    def rows(self, name: str) -> dict[str, list[str]]:
        """Texts of a table by its first column, in which what the cell details is left out."""
        return {row[0].split(" ")[0]: row[1:] for row in self.tables[name][1:]}


def page_of(*folders: Path) -> Page:
    return Page(render([read_run(folder) for folder in folders], folders)[0])


def loss(value: float) -> str:
    return f"{value:.4f}"


# ---- one run


def test_a_page_on_one_run(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", seed=4)
    summary = json.loads((folder / "summary.json").read_text())
    page = page_of(folder)
    assert "adapt on 3 tasks, seed 4" in page.text
    worst_task = max(summary["validation_losses"], key=summary["validation_losses"].get)
    first = summary["initial_validation_losses"].values()
    for said in [
        f"The run spent {summary['supervised_tokens']:,} supervised tokens in 20 steps and {summary['seconds']:.1f} s.",
        f"The worst validation loss went from {loss(max(first))} to {loss(summary['worst_validation_loss'])} nats "
        f"({worst_task}), the mean from {loss(sum(first) / 3)} to {loss(summary['mean_validation_loss'])}.",
        f"3 mixture updates took {summary['mixture_seconds'] / summary['seconds']:.1%} of the time and read "
        f"{summary['probe_tokens']} supervised tokens; validations and test read {summary['validation_tokens']} "
        "supervised tokens in addition.",
    ]:
        assert said in page.text
    p = [update["probabilities"] for update in events(folder, "mixture")]
    for task, row in page.rows("tasks").items():
        before, after = summary["initial_validation_losses"][task], summary["validation_losses"][task]
        tokens = summary["task_tokens"][task]
        expected = [loss(p[0][task]), loss(p[-1][task]), f"{tokens:,}", f"{tokens / summary['supervised_tokens']:.1%}"]
        units = [loss(summary[f"validation_{key}"][task]) for key in ("exact_match", "bits_per_byte")]
        assert row == [*expected, loss(before), loss(after), loss(after - before), *units]
    assert page.tables["tasks"][0][-2:] == ["exact match", "bits per byte"]
    assert "At the end, on the validation split: exact match and bits per byte." in page.text
    counters = page.rows("counters")
    for key in (
        "budget_tokens",
        "supervised_tokens",
        "tokens",
        "probe_tokens",
        "validation_tokens",
        "total_tokens",
        "steps",
    ):
        assert counters[key] == [f"{summary[key]:,}"]
    assert counters["seconds"] == [f"{summary['seconds']:.1f} s"]
    assert "strategy: adapt" in page.text and 'class="notes"' not in page.source
    assert all(f'id="{name}"' in page.source for name in ("probabilities", "speed", "learning_rate"))


def test_a_fixed_mixture(tmp_path: Path) -> None:
    assert (
        "The mixture was fixed; validations and test read" in page_of(write_run(tmp_path / "run", update_every=0)).text
    )


@pytest.mark.parametrize(
    ("resolved", "said"),
    [
        ({"mixture_update_every": 50}, "The mixture has not been updated yet; validations and test read"),
        ({"mixture_update_every": 0}, "The mixture was fixed; validations and test read"),
        ({}, "The mixture was fixed; validations and test read"),
    ],
)
def test_a_mixture_before_its_first_update_is_not_called_fixed(tmp_path: Path, resolved: dict, said: str) -> None:
    folder = write_run(tmp_path / "run", update_every=0, finished=False, resolved=resolved)
    assert said in page_of(folder).text


@pytest.mark.slow
@pytest.mark.parametrize("steps_left", [0, 3])
def test_a_finished_run_with_a_cut_log_is_told_by_its_summary(tmp_path: Path, steps_left: int) -> None:
    folder = write_run(tmp_path / "run", resolved={"mixture_update_every": 5})
    whole = page_of(folder)
    log = folder / "log.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[: 2 + steps_left]))
    page = page_of(folder)
    headlines = [re.search("The run spent .* supervised tokens [a-z ]+[.]", text) for text in (page.text, whole.text)]
    assert headlines[0] and headlines[1] and headlines[0][0] == headlines[1][0]
    assert page.tables == whole.tables
    assert f"run: log.jsonl is truncated: figures end at token {64 * steps_left} of 1,280" in page.text

    other = write_run(tmp_path / "other", strategy="uniform", loss=lambda task, share: 1.5)
    log.write_bytes(b"".join(lines))
    compared = page_of(folder, other)
    log.write_bytes(b"".join(lines[: 2 + steps_left]))
    cut = page_of(folder, other)
    assert {name: cut.tables[name] for name in ("strategies", "winners", "counters")} == {
        name: compared.tables[name] for name in ("strategies", "winners", "counters")
    }
    assert cut.tables["tokens_to_reach"][1:] == [["adapt", "1,280", "1,280"], ["uniform", "never", "0"]]


def test_a_run_that_goes_on(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", finished=False)
    with open(folder / "log.jsonl", "a") as log:
        log.write('{"event": "st')
    page = page_of(folder)
    assert "The run was killed or is still running. It spent 1,280 supervised tokens in 20 steps" in page.text
    lines = (folder / "log.jsonl").read_text().count("\n")
    assert f"run: log.jsonl ends in the middle of line {lines + 1}, and is read up to there." in page.text
    assert page.rows("counters")["budget_tokens"] == ["–"]


def test_a_run_that_goes_on_says_how_far_it_is(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run", finished=False, resolved={"budget": {"tokens": 3200}}))
    assert "It spent 1,280 of 3,200 supervised tokens (40%) in 20 steps" in page.text
    assert page.rows("counters")["budget_tokens"] == ["3,200"]


def test_a_run_of_which_only_the_beginning_is_there(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", finished=False)
    log = folder / "log.jsonl"
    whole = log.read_bytes().splitlines(keepends=True)
    for count in range(1, 6):
        log.write_bytes(b"".join(whole[:count]))
        page = page_of(folder)
        assert "It spent" in page.text and "nan" not in page.text.lower()


def test_a_real_run_from_end_to_end(real_run: Path, tmp_path: Path) -> None:
    summary = json.loads((real_run / "summary.json").read_text())
    page, *figures = write_report([real_run], tmp_path / "page.html")
    assert len(figures) == 8 and all(figure.read_bytes().startswith(b"\x89PNG") for figure in figures)
    assert f"to {loss(summary['worst_validation_loss'])} nats" in page.read_text()


# ---- several


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Two strategies over two seeds: adapt ends better and is faster, uniform is better at one task."""
    home = tmp_path_factory.mktemp("runs")
    ends = {"adapt": [0.2, 0.2, 0.3], "uniform": [0.1, 1.0, 2.0]}
    return {
        strategy: [
            write_run(
                home / f"{strategy}_{seed}",
                strategy=strategy,
                seed=seed,
                update_every=5 if strategy == "adapt" else 0,
                validate_every=5,
                loss=lambda task, share, seed=seed, end=end: 4 - (4 - end[task] - 0.05 * seed) * share,
            )
            for seed in (0, 1)
        ]
        for strategy, end in ends.items()
    }


def test_a_comparison(folders: dict[str, list[Path]]) -> None:
    page = page_of(*folders["uniform"], *folders["adapt"])
    assert "Did the mixture help?" in page.text
    summaries = {
        strategy: [json.loads((folder / "summary.json").read_text()) for folder in runs]
        for strategy, runs in folders.items()
    }
    assert "2 ways to mix 3 tasks" in page.text
    # From 4 to 0.3 at a constant pace, it is above 2 after half of the tokens and below at the next validation.
    for said in [
        "adapt has the best worst-task validation loss of 2 strategies: 0.3250 (0.3000 to 0.3500) nats over 2 "
        "seeds. Next is uniform, with 2.0250 (2.0000 to 2.0500) over 2 seeds.",
        "Their ranges do not overlap.",
        "It reaches the worst validation loss uniform ends with after 960 supervised tokens, 75% of the 1,280 tokens "
        "uniform used.",
        "It has the lowest validation loss on 2 of 3 tasks.",
    ]:
        assert said in page.text
    strategies = page.tables["strategies"][1:]
    assert [row[0] for row in strategies] == ["adapt seeds 0, 1", "uniform seeds 0, 1"]
    for row, strategy in zip(strategies, ("adapt", "uniform"), strict=True):
        runs = summaries[strategy]
        worst = [run["worst_validation_loss"] for run in runs]
        means = [run["mean_validation_loss"] for run in runs]
        match, bits = ([run[f"mean_validation_{key}"] for run in runs] for key in ("exact_match", "bits_per_byte"))
        for cell, values in zip(row[1:5], (worst, means, match, bits), strict=True):
            assert cell == f"{loss(sum(values) / 2)} {loss(min(values))} to {loss(max(values))}"
        assert row[6:9] == ["1,280", f"{runs[0]['total_tokens']:,}", str(runs[0]["probe_tokens"])]
        seconds = sorted(run["seconds"] for run in runs)
        assert row[9] == f"{sum(seconds) / 2:.1f} s {seconds[0]:.1f} s to {seconds[1]:.1f} s"
        shares = [run["mixture_seconds"] / run["seconds"] for run in runs]
        assert row[10].split(" ")[0] == f"{sum(shares) / 2:.1%}"
    assert [row[5] for row in strategies] == ["2", "1"]
    assert "Means over tasks too: exact match and bits per byte." in page.text
    assert page.tables["tokens_to_reach"][1:] == [["adapt", "1,280", "960"], ["uniform", "never", "1,280"]]
    one, two, three = page.tables["winners"][1:]
    assert one[:2] == ["one", "uniform clear"] and three[:2] == ["three", "adapt clear"]
    assert two == ["two", "adapt clear", "0.2250 0.2000 to 0.2500", "1.0250 1.0000 to 1.0500"]
    settings = page.rows("settings")
    assert settings == {"strategy": ["adapt", "uniform"]}
    assert page.text.count("/resolved.yaml") == 4


@pytest.fixture(scope="module")
def tested_folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two strategies: validation ranks a before b, and the test b before a."""
    home, ends = tmp_path_factory.mktemp("tested"), {"a": ([1.0, 2.0], [6.0, 7.0]), "b": ([3.0, 4.0], [3.5, 4.5])}
    return [
        write_run(
            home / name,
            strategy=name,
            tasks=("one", "two"),
            loss=lambda task, share, end=end: 9 - (9 - end[task]) * share,
            test=test,
        )
        for name, (end, test) in ends.items()
    ]


def test_a_page_on_one_run_with_a_test_split(tested_folders: list[Path]) -> None:
    page = page_of(tested_folders[0])
    assert (
        "The worst validation loss went from 9.0000 to 2.0000 nats (two), the mean from 9.0000 to 1.5000." in page.text
    )
    assert "On the test split the worst loss is 7.0000 nats (two), the mean 6.5000." in page.text
    assert page.tables["tasks"][0][-3:] == ["test loss", "exact match", "bits per byte"]
    assert "At the end, on the test split: exact match and bits per byte." in page.text
    assert {task: row[-5:] for task, row in page.rows("tasks").items()} == {
        "one": ["1.0000", "-8.0000", "6.0000", loss(math.exp(-6)), "3.0000"],
        "two": ["2.0000", "-7.0000", "7.0000", loss(math.exp(-7)), "3.5000"],
    }


def with_targets(folder: Path, *losses: float) -> Path:
    """The run as if it had two targets, with these losses at first, at the end, and of the test."""
    summary = json.loads((folder / "summary.json").read_text())
    for key, low in zip(("initial_target_losses", "target_losses", "target_test_losses"), losses, strict=True):
        summary[key] = {"mmlu": low, "gsm8k": low + 1}
    summary["target_exact_match"] = {"mmlu": 0.25, "gsm8k": None}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_targets(tmp_path: Path) -> None:
    folders = [
        with_targets(write_run(tmp_path / name, strategy=name), 5.0, end, 3.0) for name, end in (("a", 4.0), ("b", 4.5))
    ]
    page = page_of(folders[0])
    assert (
        "On the 2 targets, which are never trained, the worst validation loss went from 6.0000 to 5.0000 nats, "
        "the mean from 5.5000 to 4.5000." in page.text
    )
    assert page.tables["targets"] == [
        ["target", "start loss", "final loss", "test loss", "exact match"],
        ["mmlu", "5.0000", "4.0000", "3.0000", "0.2500"],
        ["gsm8k", "6.0000", "5.0000", "4.0000", "–"],
    ]
    page = page_of(*folders)
    columns = page.tables["strategies"][0]
    worst, mean = (columns.index(f"{which} target loss") for which in ("worst", "mean"))
    assert {name: (row[worst - 1], row[mean - 1]) for name, row in page.rows("strategies").items()} == {
        "a": ("5.0000", "4.5000"),
        "b": ("5.5000", "5.0000"),
    }
    other = page_of(folders[0], write_run(tmp_path / "c", strategy="c"))
    assert [row[worst - 1] for row in other.rows("strategies").values()].count("5.0000") == 1


@pytest.mark.parametrize("finished", [True, False])
def test_runs_of_earlier_versions_have_no_other_units(tmp_path: Path, finished: bool) -> None:
    """Beside one that has them there is a dash."""
    old = write_run(tmp_path / "old", has_units=False, finished=finished)
    assert page_of(old).tables["tasks"][0][-1] == "change" and "exact match" not in page_of(old).text
    new = write_run(tmp_path / "new", strategy="uniform")
    page = page_of(old, new)
    assert page.tables["strategies"][0][3:5] == ["exact match", "bits per byte"]
    assert page.rows("strategies")["adapt" if finished else "adapt,"][2:4] == ["–", "–"]
    assert "–" not in page.rows("strategies")["uniform"][2:4]


def test_a_page_on_one_run_whose_weights_were_rounded(tmp_path: Path) -> None:
    """Only then is there a sentence about it, and not for a run that does not say."""
    settings: dict[str, Any] = {"tasks": ("one", "two"), "loss": lambda task, share: 9 - (8 - task) * share}
    page = page_of(write_run(tmp_path / "rounded", **settings, saved=(1.25, 2.5)))
    said = "to 1.5000. As the weights were rounded in model/, the worst is 2.5000 nats (two), the mean 1.8750."
    assert said in " ".join(page.text.split())
    folder = write_run(tmp_path / "same", **settings)
    assert "rounded" not in page_of(folder).text
    summary = json.loads((folder / "summary.json").read_text())
    del summary["saved_validation_losses"]
    (folder / "summary.json").write_text(json.dumps(summary))
    assert "rounded" not in page_of(folder).text


def test_a_comparison_by_test_losses(tested_folders: list[Path]) -> None:
    page = page_of(*tested_folders)
    for said in [
        "b has the best worst-task test loss of 2 strategies: 4.5000 nats. Next is a, with 7.0000.",
        "It has the lowest test loss on 2 of 2 tasks.",
        "Test losses at the end, in nats per supervised token",
        "Each task's test loss at the end.",
        "until its worst validation loss was first at or below the final one",
    ]:
        assert said in page.text, said
    assert "compared by their validation losses" not in page.text
    assert {name: row[:2] for name, row in page.rows("strategies").items()} == {
        "b": ["4.5000", "4.0000"],
        "a": ["7.0000", "6.5000"],
    }
    assert [row[3] for row in page.rows("strategies").values()] == ["2.0000", "3.2500"], "bits per byte of the test"
    assert page.rows("winners") == {"one": ["b", "3.5000", "6.0000"], "two": ["b", "4.5000", "7.0000"]}
    # The course of training is that of validation: b never gets to where a ends.
    assert page.rows("tokens_to_reach")["b"] == ["1,280", "never"]


def test_a_comparison_with_a_run_without_a_test_split_is_by_validation(
    tested_folders: list[Path], tmp_path: Path
) -> None:
    page = page_of(
        *tested_folders, write_run(tmp_path / "c", strategy="c", tasks=("one", "two"), loss=lambda t, s: 5.0)
    )
    for said in [
        "Not every run has a test loss of every task, so they are compared by their validation losses.",
        "a has the best worst-task validation loss of 3 strategies: 2.0000 nats. Next is b, with 4.0000.",
        "It has the lowest validation loss on 2 of 2 tasks.",
        "Validation losses at the end, in nats per supervised token",
        "Each task's validation loss at the end.",
    ]:
        assert said in page.text, said
    assert list(page.rows("strategies")) == ["a", "b", "c"] and "7.0000" not in page.text


def test_some_seeds_reach_a_loss_and_others_do_not(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / f"a_{seed}", strategy="a", seed=seed, loss=lambda t, s: 1.0) for seed in (0, 1)]
    folders += [
        write_run(tmp_path / f"b_{seed}", strategy="b", seed=seed, loss=lambda t, s, seed=seed: 0.5 + seed)
        for seed in (0, 1)
    ]
    assert page_of(*folders).tables["tokens_to_reach"][1:] == [["a", "0", "1 of 2"], ["b", "1 of 2", "0"]]


@pytest.mark.parametrize(
    ("seeds", "gap", "said"),
    [
        (1, 1.0, "At least one of the two has only one seed, so this may be chance."),
        (2, 0.05, "Their ranges over seeds overlap."),
    ],
)
def test_what_may_be_chance_is_called_so(tmp_path: Path, seeds: int, gap: float, said: str) -> None:
    folders = [
        write_run(
            tmp_path / f"{name}_{seed}",
            strategy=name,
            seed=seed,
            loss=lambda task, share, seed=seed, more=more: 1 + 0.1 * seed + more,
        )
        for name, more in (("a", 0.0), ("b", gap))
        for seed in range(seeds)
    ]
    assert said in page_of(*folders).text


def test_one_strategy_over_seeds(folders: dict[str, list[Path]]) -> None:
    page = page_of(*folders["adapt"])
    assert "adapt on 3 tasks, 2 runs" in page.text
    assert "adapt ends with a worst validation loss of 0.3250 (0.3000 to 0.3500) nats over 2 seeds." in page.text
    assert "settings" not in page.tables and "tokens_to_reach" not in page.tables
    assert "Over seeds" in page.text and "Did the mixture help?" not in page.text
    assert_nobody_wins(page)
    assert page.tables["losses"][1] == ["one", "0.2250 0.2000 to 0.2500"]


def assert_nobody_wins(page: Page) -> None:
    assert "winners" not in page.tables and "tasks won" not in page.tables["strategies"][0]
    assert not [attributes for tag, attributes in page.tags if tag == "td" and "best" in (attributes["class"] or "")]


def test_runs_that_go_on_beside_one_that_is_finished(tmp_path: Path, folders: dict[str, list[Path]]) -> None:
    going = write_run(tmp_path / "going", strategy="dro", finished=False, loss=lambda task, share: 0.01)
    page = page_of(folders["adapt"][0], going)
    assert "going was killed or is still running." in page.text
    assert page.text.count("adapt ends with a worst validation loss of 0.3000 nats.") == 1
    assert [row[0] for row in page.tables["strategies"][1:]] == ["adapt seed 0", "dro, unfinished seed 0"]
    assert "Did the mixture help?" not in page.text
    assert_nobody_wins(page)
    other = write_run(tmp_path / "other", strategy="adapt", finished=False)
    assert "None of the 2 runs is finished." in page_of(going, other).text


def test_runs_over_different_tasks(tmp_path: Path) -> None:
    one = write_run(tmp_path / "a", strategy="a", tasks=["x", "y"])
    other = write_run(tmp_path / "b", strategy="b", tasks=["y", "z"])
    page = page_of(one, other)
    assert "They are compared on the 1 they share; left out: x, z." in page.text
    assert list(page.rows("winners")) == ["y"]


def test_folders_of_the_same_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name / "run", strategy=name, finished=False) for name in ("a", "b")]
    text = page_of(*folders).text
    assert all(f"{folder} was killed" in text and f"{folder}/resolved.yaml" in text for folder in folders)


# ---- the file


def test_the_page_needs_nothing_beside_itself(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run"))
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "img") or attributes.get("href") == "data:,"
        assert "src" not in attributes, tag
    style = re.search("<style>(.*?)</style>", page.source, re.DOTALL)
    assert style and "url(" not in style[1] and "@import" not in style[1]
    for tag in ("table", "figure", "details", "thead", "tbody"):
        assert page.source.count(f"<{tag}") > 0


def test_every_section_is_linked_at_the_top(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run"))
    sections = [attributes["id"] for tag, attributes in page.tags if tag == "h2"]
    assert len(sections) == 5
    assert [attributes["href"] for tag, attributes in page.tags if tag == "a"] == [f"#{name}" for name in sections]


def test_names_are_no_markup(tmp_path: Path) -> None:
    hostile = "</script><img src=x onerror=alert(1)>&"
    folder = write_run(tmp_path / "run", strategy=hostile, tasks=[hostile, "other"])
    page = page_of(folder, write_run(tmp_path / "b", strategy="b", tasks=[hostile, "other"]))
    assert "img" not in {tag for tag, _ in page.tags}
    assert hostile in page.text


@pytest.mark.slow
def test_the_page_lies_where_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    one, other = write_run(tmp_path / "one"), write_run(tmp_path / "other", strategy="uniform")
    assert write_report([Path("one")])[0] == Path("one/report.html")
    assert write_report([Path("one"), other])[0] == Path("report.html")
    page, *figures = write_report([one, Path("one"), tmp_path / "other" / ".." / "one"], Path("new/folder/page.html"))
    assert "adapt on 3 tasks, seed 0" in page.read_text(), "the same folder thrice is one run"
    assert page == Path("new/folder/page.html")
    assert {figure.parent for figure in figures} == {Path("new/folder/page_figures")}
    assert sorted(path.name for path in Path("new/folder").rglob("*") if path.is_file()) == sorted(
        ["page.html", *(figure.name for figure in figures)]
    )


@pytest.mark.slow
def test_nothing_is_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_run(tmp_path / "run")
    before = sorted(folder.iterdir())
    for others, said in [
        ([tmp_path / "gone"], "no such folder"),
        ([write_run(tmp_path / "b", tasks=["x"])], "in common"),
    ]:
        with pytest.raises(ValueError, match=said):
            write_report([folder, *others], folder / "new" / "page.html")
    for out, said in [("page.txt", "end in .html"), ("folder.html", "is a folder")]:
        (tmp_path / "folder.html").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match=said):
            write_report([folder], tmp_path / out)
    assert sorted(folder.iterdir()) == before

    def full(path: Path, content: bytes) -> int:
        os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY), 3)
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="no space left"):
        write_report([folder], folder / "page.html")
    assert {path for path in folder.rglob("*") if path.is_file()} == set(before)


# ---- the command


def report(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    """(exit status, output) of `tune report`."""
    parser = CommandParser()
    commands.add_report(parser.add_subparsers())
    status = 0
    try:
        args = parser.parse_args(["report", *map(str, words)])
        args.func(args)
    except SystemExit as exit:
        status = int(exit.code or 0)
    captured = capsys.readouterr()
    return status, captured.out + captured.err


@pytest.mark.slow
def test_the_command_says_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "run")
    assert report(capsys, folder) == (0, f"{folder}/report.html\n8 figures in {folder}/report_figures/\n")
    out = tmp_path / "page.html"
    assert report(capsys, folder, "--out", out) == (0, f"{out}\n8 figures in {tmp_path}/page_figures/\n")


def test_errors_are_one_line_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, other = write_run(tmp_path / "run"), write_run(tmp_path / "other", tasks=["x"])
    broken = write_run(tmp_path / "broken")
    (broken / "log.jsonl").write_text('{"event": "mixture"}\nnonsense\n')
    (tmp_path / "file").touch()
    for words, said in [
        ([tmp_path / "gone"], "gone: there is no such folder"),
        ([tmp_path], f"contains no run itself, but 3 of its folders do: give {tmp_path}/*/"),
        ([folder, other], "have no task in common"),
        ([broken], "log.jsonl, line 2: is not a JSON object"),
        ([folder, "--out", "page"], "--out page: has to end in .html"),
        ([folder, "--out", tmp_path / "file" / "page.html"], "Not a directory"),
    ]:
        status, output = report(capsys, *words)
        assert status == 2 and output.startswith("tune report: error: ") and said in output, output
        assert output.count("\n") == 1
    status, output = report(capsys)
    assert status == 2 and "RUN" in output


def test_a_package_that_is_missing_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_run(tmp_path / "run")
    for missing in (["plotly"], ["itables", "matplotlib", "plotly"]):
        for name in missing:
            monkeypatch.setitem(sys.modules, name, None)
        said = f"tune report: error: it needs {', '.join(missing)}; pip install 'adapt-recipes[report]'\n"
        assert report(capsys, folder, "--schedule", tmp_path / "schedule.yaml") == (2, said)
    assert not (tmp_path / "schedule.yaml").exists()


@pytest.mark.slow
def test_tune_has_the_command(tmp_path: Path) -> None:
    """Torchtune's own command line, in a process of its own."""
    folder = write_run(tmp_path / "run")
    program = "import runpy, sys\nfor sys.argv in (['tune', '--help'], ['tune', 'report', 'run']):\n    "
    program += (
        "try: runpy.run_module('tune_cli_ext', run_name='__main__')\n    except SystemExit as exit: print(exit.code)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^    report +Show a run", done.stdout, re.MULTILINE)
    assert re.search(r"^    cat  ", done.stdout, re.MULTILINE), "and has not lost its last"
    assert done.stdout.endswith("run/report.html\n8 figures in run/report_figures/\n")
    assert math.isclose((folder / "report.html").stat().st_size, 5.7e6, rel_tol=0.1), (
        "4.8 MB of plotly, 0.8 of DataTables"
    )
