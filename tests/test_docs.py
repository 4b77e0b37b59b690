"""Every command in the README and in docs/ is one that works.

`tune` is run with the words of each command. What needs a model that is not here is held to its recipe's schema; that
its config runs is shown by tests/recipes/test_grid.py and test_shipped_configs.py, with a model of the same kind.
Benchmarks are held to their options, and the configs and overrides that they are given to the recipes' schemas;
test_benchmarks.py and test_compare.py run them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from string import Template

import pytest
from test_tune_cli import TUNE_MANY

from adapt_recipes.commands import add_new
from adapt_recipes.config import load
from adapt_recipes.shipped import recipe_of
from adapt_recipes.words import CommandParser

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
SHORT = ["budget.tokens=32", "checkpoint_every=0", "validate_every=0", "tasks.num_validation_rows=8"]
# Long enough that the mixture moves.
LEARNING = ["budget.tokens=320", "mixture_update_every=1", "mixture.measure_after=0", *SHORT[1:]]


def commands(first: str) -> list[list[str]]:
    """The words of every indented command, without comments; lines that go on are put together, variables filled in."""
    found = []
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        text = Template(text).safe_substitute(dict(re.findall(r'^    ([A-Z]+)="(.*)"$', text, re.MULTILINE)))
        for line in re.findall(rf"^    (?:\.venv/bin/)?{first}(.*)$", text, re.MULTILINE):
            found.append(shlex.split(line, comments=True))
    return found


TUNE, BENCHMARKS = commands("tune "), commands("python benchmarks/")
DOWNLOADS = [words for words in TUNE if words[0] == "download"]
# What is measured, and so reported, after runs of a real model.
EVALUATED = [words for words in TUNE if words[0] == "report" and "runs/base" in words]
# `tune new` needs a model and data. tests/recipes/test_new.py runs it, and the config that it writes.
NEW = [words for words in TUNE if words[0] == "new" or "mine.yaml" in words]
TUNE = [words for words in TUNE if words not in EVALUATED and words not in NEW]
LARGE = [words for words in TUNE if words[0] in ("plan", "run") and re.search("gemma3|smollm2|eval_", " ".join(words))]


def test_there_are_commands() -> None:
    assert {words[0] for words in TUNE} == {
        "ls",
        "cp",
        "cat",
        "validate",
        "plan",
        "run",
        "report",
        "export",
        "download",
    }
    assert len(BENCHMARKS) > 10 and len(LARGE) >= 5


def test_tune_new_takes_what_it_is_given() -> None:
    parser = CommandParser()
    add_new(parser.add_subparsers())
    given = [words for words in NEW if words[0] == "new"]
    assert [parser.parse_args(words).name for words in given] == ["mine"]


def test_downloads_are_those_of_the_configs() -> None:
    """Model and folder are what some config's header says, too."""
    headers = "".join(path.read_text() for path in (ROOT / "yaml").glob("*.yaml"))
    for words in DOWNLOADS:
        assert f"# Model:  tune {shlex.join(words)}".replace("'", '"') in headers


@pytest.mark.slow
def test_what_tune_is_told(tmp_path: Path) -> None:
    """In the order of the pages, in one folder, as a reader would; runs are shortened and there is what they follow."""
    before = ["run", "adapt_full_finetune", "--config", "yaml/tiny_adapt_planned.yaml"]  # make demo
    runs = [
        shortened(words, LEARNING if words == before else SHORT) if words[0] == "run" else words
        for words in [before, *TUNE]
        if words not in LARGE and words not in DOWNLOADS and words[0] != "report"
    ]
    own = next(i for i, words in enumerate(runs) if words[1:2] == ["my_recipe.py"])
    done = [*tune(runs[:own], tmp_path), *tune_one(runs[own], tmp_path), *tune(runs[own + 1 :], tmp_path)]
    for run in (tmp_path / "runs").iterdir():
        shutil.copytree(run, tmp_path / "runs" / "toy" / run.name)
        if run.name == "tiny_uniform":
            break
    reports = [sum((expanded(word, tmp_path) for word in words), []) for words in TUNE if words[0] == "report"]
    for words, (status, said) in zip([*runs, *reports], [*done, *tune(reports, tmp_path)], strict=True):
        assert status in (0, None), (words, said)
    assert {"compared.html", "toy.html"} <= {path.name for path in tmp_path.iterdir()}


def shortened(words: list[str], overrides: list[str]) -> list[str]:
    """A changed budget is short, too, and above what was spent."""
    if "change_budget=true" not in words:
        return [*words, *overrides]
    return [*(word for word in words if not word.startswith("budget.")), "budget.tokens=64", *overrides[1:]]


def environment(folder: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / "cache")}


def tune_one(words: list[str], folder: Path) -> list[tuple[int | None, str]]:
    """A recipe of one's own, which `tune` looks for as it starts."""
    command = [sys.executable, "-m", "tune_cli_ext", *words]
    done = subprocess.run(command, cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=300)
    return [(done.returncode, done.stdout + done.stderr)]


def tune(words: list[list[str]], folder: Path) -> list[tuple[int | None, str]]:
    """All in one process."""
    code = "import tune_cli_ext; tune_cli_ext.hook()\n" + TUNE_MANY
    command = [sys.executable, "-c", code, json.dumps(words)]
    done = subprocess.run(command, cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return [(status, said) for status, said in json.loads(done.stdout.splitlines()[-1])]


def expanded(word: str, folder: Path) -> list[str]:
    """As a shell does."""
    if "*" not in word:
        return [word]
    return [f"{path.relative_to(folder)}" for path in sorted(folder.glob(word)) if (path / "log.jsonl").exists()]


@pytest.mark.parametrize("words", LARGE, ids=" ".join)
def test_what_is_told_of_large_models(words: list[str]) -> None:
    """The recipe's schema takes the config and the overrides."""
    at = words.index("--config")
    check(words[at - 1], words[at + 1], words[at + 2 :])


def check(recipe: str, config: str, overrides: list[str]) -> None:
    spec = importlib.util.spec_from_file_location(f"{recipe}_of_docs", ROOT / "recipes" / f"{recipe}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert load(module.Config, ROOT / config, overrides)


@pytest.mark.parametrize("words", BENCHMARKS, ids=" ".join)
def test_benchmarks_have_what_they_are_told(words: list[str]) -> None:
    script, *rest = words
    text = (ROOT / "benchmarks" / script).read_text() + (ROOT / "benchmarks" / "common.py").read_text()
    for word in rest:
        if word.startswith("--"):
            assert f'"{word}"' in text, f"{script} has no {word}"
    at = [i for i, word in enumerate(rest) if re.fullmatch(r"(tiny|smollm2)_\w+", word)]
    for here, after in pairwise([*at, len(rest)]):
        config = ROOT / "yaml" / f"{rest[here]}.yaml"
        recipe = str(recipe_of(config))
        for_all = [word for word in rest[: at[0]] if "=" in word]
        check(recipe, str(config), [*for_all, *(word for word in rest[here + 1 : after] if "=" in word)])
