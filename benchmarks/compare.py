"""Runs several configs with several seeds, and prints a table of the results with their ranges over seeds.

    python benchmarks/compare.py --out runs/toy --seeds 30,31,32 tiny_uniform tiny_adapt tiny_adapt_planned
    python benchmarks/compare.py --out runs/noise --seeds 30,31,32 tasks.noise=true tiny_uniform tiny_dro \
        tiny_dro strategy=dro_mild mixture.sharpness=1

An override before the first config applies to all configs, one after a config to that config only. The name of a row is
that of its config, or its override of ``strategy``.

Losses are those of the test split if all runs have one (``tasks.test_examples=N``), else of validation; the columns say
which. The others are compared with the first config: "tokens to its loss" are the supervised tokens after which the
worst excess loss of a validation is first at or below the final one of the first config, for the same seed. Excess is
the loss above the lowest possible one: ln 16 for the toy tasks' noise, else 0. Finished runs are not run again, so an
interrupted comparison can be continued.

    python benchmarks/compare.py --evaluate "eval_tasks limit=100" --out runs/real --seeds 0,1 A B

measures all runs by a suite of yaml/, with its overrides, and prints a second table: the means of its scores over the
tasks of each family and over all tasks, and the differences of the latter from the first config, with their 95 %
intervals over examples. Where benchmarks could not be measured, the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from common import above_floors, markdown

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# Below, so that it runs without an installation as well.
from adapt_recipes.errors import nearest  # noqa: E402
from adapt_recipes.report.evaluation import (  # noqa: E402
    Column,
    differences,
    mean_rows,
    notes_of,
    read_measured,
    row_score,
    task_rows,
)
from adapt_recipes.report.read import Run, mean_over_tasks, on_one_split, read_run, worst_over_tasks  # noqa: E402
from adapt_recipes.report.tables import Spread, spread, tokens_to_reach  # noqa: E402
from adapt_recipes.shipped import recipe_file, recipe_of  # noqa: E402

ENTROPIES = {"noise": math.log(16)}


class Row(NamedTuple):
    """A row of the table: a shipped config and its overrides."""

    config: str
    overrides: list[str]

    @property
    def name(self) -> str:
        given = [word.removeprefix("strategy=") for word in self.overrides if word.startswith("strategy=")]
        return given[-1] if given else self.config


def rows(words: Sequence[str]) -> list[Row]:
    """The configs on the command line, each with the overrides for all configs and those that follow it."""
    for_all: list[str] = []
    found: list[Row] = []
    for word in words:
        if "=" not in word:
            found.append(Row(word, [*for_all]))
        elif found:
            found[-1].overrides.append(word)
        else:
            for_all.append(word)
    return found


def run(config: str, seed: int, folder: Path, overrides: Sequence[str]) -> None:
    """Runs a shipped config in a process of its own; does nothing if the run is finished."""
    seeds = [f"seed={seed}"] + ([f"tasks.seed={seed}"] if config.startswith("tiny_") else [])
    words = [*seeds, f"output_dir={folder}", "resume=true", *overrides]
    run_recipe(config, words, folder.with_suffix(".txt")).check_returncode()


def run_recipe(config: str, words: Sequence[str], output_file: Path) -> subprocess.CompletedProcess[bytes]:
    """Runs the recipe of a shipped config in a process of its own, with overrides."""
    path = ROOT / "yaml" / f"{config}.yaml"
    command = [sys.executable, recipe_file(str(recipe_of(path))), "--config", str(path), *words]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with open(output_file, "w") as output:
        return subprocess.run(command, stdout=output, stderr=output, env=environment)


def evaluate(config: str, folders: Sequence[Path], overrides: Sequence[str], output_file: Path) -> int:
    """Measures finished runs by a shipped suite. Returns 0, or 1 if some benchmarks could not be measured."""
    runs = f"runs={json.dumps([str(folder) for folder in folders])}"
    done = run_recipe(config, [runs, *overrides], output_file)
    if done.returncode != 1:
        done.check_returncode()
    return done.returncode


def suite_name(config: str, overrides: Sequence[str]) -> str:
    """Under which the scores of a suite are stored."""
    given = [word.removeprefix("suite=") for word in overrides if word.startswith("suite=")]
    shipped = yaml.safe_load((ROOT / "yaml" / f"{config}.yaml").read_text(encoding="utf-8"))["suite"]
    return given[-1] if given else shipped


def score_lines(suite: str, folders: dict[str, list[Path]]) -> tuple[list[list[str]], list[str]]:
    """The table of a suite, its header and a line for each row; and notes on what is missing in it."""
    columns = [
        Column(name, tuple(read_measured(folder.name, folder, suite) for folder in of_row))
        for name, of_row in folders.items()
    ]
    families, overall = mean_rows(task_rows(columns))
    found, why_not = differences([overall], columns)
    lines = [["", *(family.name for family in families), overall.name, f"difference from {columns[0].name}"]]
    for column, difference in zip(columns, [None, *found[0]], strict=True):
        means = [row_score(column, row) for row in (*families, overall)]
        said = f"{difference.mean:+.3f} ({difference.low:+.3f} to {difference.high:+.3f})" if difference else "–"
        lines.append([column.name, *(spread_cell(mean, 3) for mean in means), said])
    return lines, notes_of(columns) + why_not


def line(name: str, runs: Sequence[Run], baselines: Sequence[Run]) -> list[str]:
    """Of one row: means and ranges over seeds."""
    reached = [
        tokens_to_reach(run, float(worst_over_tasks(base.final_losses)))
        for run, base in zip(runs, baselines, strict=True)
    ]

    def of_summary(value: Callable[[dict[str, Any]], float], digits: int) -> str:
        return cell([value(run.summary) for run in runs], digits)

    return [
        name,
        cell([float(worst_over_tasks(run.result_losses)) for run in runs], 3),
        cell([float(mean_over_tasks(run.result_losses)) for run in runs], 3),
        cell(reached, 0),
        of_summary(lambda s: s["task_tokens"].get("noise", 0) / s["budget_tokens"], 2),
        of_summary(lambda s: s["steps"], 0),
        of_summary(lambda s: s["mixture_updates"], 0),
        of_summary(lambda s: s["probe_tokens"], 0),
        of_summary(lambda s: s.get("total_tokens", math.nan), 0),
        of_summary(lambda s: s["seconds"], 0),
        of_summary(lambda s: s["mixture_seconds"] / s["seconds"], 2),
    ]


def cell(values: Sequence[float], digits: int) -> str:
    """The mean, and the range where there is one; "never" where a value is missing."""
    found = spread(values)
    if math.isnan(found.mean):
        return "never" if all(math.isnan(value) for value in values) else "not always"
    return spread_cell(found, digits)


def spread_cell(values: Spread, digits: int) -> str:
    """The mean, and the range where there is one; "–" for NaN."""
    if math.isnan(values.mean):
        return "–"
    said = f"{values.mean:.{digits}f}"
    return said if values.low == values.high else f"{said} ({values.low:.{digits}f} to {values.high:.{digits}f})"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], required=True)
    parser.add_argument("--evaluate", type=shlex.split, metavar="'SUITE [key=value ...]'", help="a suite of yaml/")
    parser.add_argument("words", nargs="+", metavar="config|key=value", help="names in yaml/, and overrides")
    arguments = parser.parse_args(argv)
    table = rows(arguments.words)
    names = [each.name for each in table]
    if missing := [each.config for each in table if not (ROOT / "yaml" / f"{each.config}.yaml").is_file()]:
        parser.error(f"there is no yaml/{missing[0]}.yaml")
    if not table:
        parser.error("name a config of yaml/")
    if twice := [name for name in names if names.count(name) > 1]:
        parser.error(f"two rows have the name {twice[0]}: give one of them strategy=NAME")
    suite, *of_suite = arguments.evaluate or [None]
    suites = sorted(path.stem for path in (ROOT / "yaml").glob("eval_*.yaml"))
    if arguments.evaluate is not None and suite not in suites:
        parser.error(f"--evaluate: yaml/ has no suite {suite!r}{nearest(str(suite), suites)}")
    arguments.out.mkdir(parents=True, exist_ok=True)

    folders = {name: [arguments.out / f"{name}_{seed}" for seed in arguments.seeds] for name in names}
    for i, seed in enumerate(arguments.seeds):
        # All configs with the same seed in turn, so that changes of the machine's load affect all of them.
        for each in table:
            run(each.config, seed, folders[each.name][i], each.overrides)
    read = iter(on_one_split([above_floors(read_run(folder), ENTROPIES) for name in names for folder in folders[name]]))
    runs = {name: [next(read) for _ in folders[name]] for name in names}
    split = runs[names[0]][0].split
    columns = ["", f"worst {split} excess", f"mean {split} excess", "tokens to its loss", "noise share", "steps"]
    columns += ["updates", "probe tokens", "tokens read", "seconds", "of them updates"]
    print(markdown([columns, *(line(name, runs[name], runs[names[0]]) for name in names)]))
    if suite is None:
        return 0

    output_file = arguments.out / f"{suite}.txt"
    status = evaluate(suite, [folder for name in names for folder in folders[name]], of_suite, output_file)
    lines, notes = score_lines(suite_name(suite, of_suite), folders)
    print()
    print(markdown(lines))
    print("".join(f"{note}\n" for note in notes), end="")
    if status:
        print(f"Some benchmarks were not measured; {output_file} says why.")
    return status


if __name__ == "__main__":
    sys.exit(main())
