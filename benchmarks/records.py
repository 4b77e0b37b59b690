"""Keeps the results of finished runs in the repository, and rebuilds all tables and plots from what is kept.

    python benchmarks/records.py keep programs runs/programs/*_[0-9]
    python benchmarks/records.py tables

``keep TABLE RUNS`` copies of each run folder, named ROW_SEED as those of ``compare.py``, what tables need to
``docs/data/TABLE/ROW_SEED/``: ``summary.json``, ``resolved.yaml`` with only the last component of absolute paths, and
of ``log.jsonl`` all validations with their steps, but else only the first and the last step and mixture update. Where a
run is read, such a folder can be read as well.

``tables`` writes ``docs/tables/TABLE.md`` and ``TABLE.png`` for every ``docs/data/TABLE/table.yaml``, such as:

    title: Programs, 12,000 supervised tokens
    seeds: [0, 1, 2]
    rows:                      # by ROW; those with kind: static come first, those with kind: oracle are in italics
      uniform: {name: Uniform, kind: static}
      adapt_planned: {name: ADAPT planned}
    baselines: [uniform]       # rows from which the others are subtracted, seed by seed
    held_out: [random_1]       # rows that the frontier predicts, and is not fitted to; without them there is none
    columns: [worst, mean, exact_match, steps, mixture_updates, probe_tokens, mixture_time, noise_share]
    floors: {noise: 2.7726}    # the lowest loss that a task can have, subtracted from its losses
    noise_task: noise          # for noise_share

Rows and seeds without a kept run are listed under the table as missing; kept runs of no row or seed are refused. The
tables of ``docs/results-*.md`` with columns called mean loss and worst loss get a plot, ``docs/tables/PAGE-1.png``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from common import ROOT

sys.path.insert(0, str(ROOT))

# Below, so that it runs without an installation as well.
from record_tables import row_and_seed, write_tables  # noqa: E402

from adapt_recipes.files import atomic_folder  # noqa: E402
from adapt_recipes.report.read import THINNED, Mixtures, Steps, Validations, read_run  # noqa: E402
from adapt_recipes.run_directory import LOG, RESOLVED, SUMMARY  # noqa: E402

# The keys of the log that ``read_run`` needs have the names of its columns.
KEPT = {"mixture": Mixtures._fields, "validation": Validations._fields, "step": Steps._fields}


def keep(table: str, folders: Sequence[Path], docs: Path) -> None:
    """Copies what tables need of finished runs; of all or, if one is refused, of none."""
    runs = [read_run(folder) for folder in folders]
    for run in runs:
        if run.ended:
            raise ValueError(f"{run.folder}: the run {run.ended}; only finished runs are kept")
        _, seed = row_and_seed(run.folder)
        if run.seed not in (None, seed):
            raise ValueError(f"{run.folder}: by its name the seed is {seed}, by its config {run.seed}")
    if twice := [run for i, run in enumerate(runs) if run.name in [other.name for other in runs[:i]]]:
        raise ValueError(f"{twice[0].folder}: another run to keep has the same name")
    for run in runs:
        with atomic_folder(docs / "data" / table / run.name) as kept:
            (kept / SUMMARY).write_bytes((run.folder / SUMMARY).read_bytes())
            (kept / LOG).write_text("".join(f"{json.dumps(line)}\n" for line in short_log(run.folder / LOG)))
            if run.config:
                (kept / RESOLVED).write_text(yaml.safe_dump(without_folders(run.config), sort_keys=False))


def short_log(path: Path) -> list[dict[str, Any]]:
    """What tables need of the lines of a log: all validations with their steps, else the first and the last line."""
    lines: dict[str, list[dict[str, Any]]] = {event: [] for event in KEPT}
    validated = set()
    with open(path, encoding="utf-8") as file:
        for values in map(json.loads, file):
            if (event := values["event"]) in KEPT:
                lines[event].append({"event": event} | {key: values[key] for key in KEPT[event]})
                if event == "validation":
                    validated.add(values["step"])
    for event in THINNED:
        between = lines[event][1:-1]
        lines[event][1:-1] = [line for line in between if event == "step" and line["step"] in validated]
    return [line for of_event in lines.values() for line in of_event]


def without_folders(node: Any) -> Any:
    """A config with the last component of every absolute path."""
    if isinstance(node, dict):
        return {key: without_folders(value) for key, value in node.items()}
    if isinstance(node, list):
        return [without_folders(value) for value in node]
    return Path(node).name if isinstance(node, str) and Path(node).is_absolute() else node


def main(argv: Sequence[str] | None = None) -> int:
    docs = argparse.ArgumentParser(add_help=False)
    docs.add_argument("--docs", type=Path, default=ROOT / "docs", help="the folder with data/ and tables/")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    of_keep = commands.add_parser("keep", parents=[docs], help="copy what tables need of finished runs")
    of_keep.add_argument("table", metavar="TABLE")
    of_keep.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="a run folder, named ROW_SEED")
    commands.add_parser("tables", parents=[docs], help="write all tables and plots")
    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "keep":
            keep(arguments.table, arguments.runs, arguments.docs)
        else:
            write_tables(arguments.docs)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
