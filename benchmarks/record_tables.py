"""The tables and plots that ``records.py`` makes of kept runs, as ``table.yaml`` describes them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from common import above_floors, markdown
from frontier import Frontier, check_runs, fit_frontier
from plane import Kind, Point, Value, plot, points_of_document
from pydantic.dataclasses import dataclass

from adapt_recipes.errors import check_installed, nearest
from adapt_recipes.files import atomic_file
from adapt_recipes.report.read import Run, mean_over_tasks, on_one_split, read_run, worst_over_tasks
from adapt_recipes.report.tables import on_shared_tasks, spread, tokens_to_reach
from adapt_recipes.strict import STRICT, load

SPEC = "table.yaml"


class Column(NamedTuple):
    """A number of a finished run."""

    header: str
    digits: int
    value: Callable[[Run, Table], float]


def worst(run: Run) -> float:
    return float(worst_over_tasks(run.result_losses))


def mean(run: Run) -> float:
    return float(mean_over_tasks(run.result_losses))


COLUMNS = {
    "worst": Column("worst {loss}", 3, lambda run, _: worst(run)),
    "mean": Column("mean {loss}", 3, lambda run, _: mean(run)),
    "exact_match": Column("exact match", 3, lambda run, _: float(mean_over_tasks(run.results_in("exact match")))),
    "steps": Column("steps", 0, lambda run, _: run.summary["steps"]),
    "mixture_updates": Column("mixture updates", 0, lambda run, _: run.summary["mixture_updates"]),
    "probe_tokens": Column("probe tokens", 0, lambda run, _: run.summary["probe_tokens"]),
    "mixture_time": Column(
        "mixture, % of time", 1, lambda run, _: 100 * run.summary["mixture_seconds"] / run.summary["seconds"]
    ),
    "noise_share": Column(
        "noise, % of tokens",
        1,
        lambda run, table: 100 * run.summary["task_tokens"][table.noise_task] / run.summary["supervised_tokens"],
    ),
}


@dataclass(kw_only=True, config=STRICT)
class Row:
    """A row of a table."""

    name: str
    kind: Kind = "learned"

    @property
    def label(self) -> str:
        return f"*{self.name}*" if self.kind == "oracle" else self.name


@dataclass(kw_only=True, config=STRICT)
class Table:
    """``table.yaml``; an example is at the top of ``records.py``."""

    title: str
    seeds: list[int]
    rows: dict[str, Row]
    columns: list[str]
    baselines: list[str] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)
    floors: dict[str, float] = field(default_factory=dict)
    noise_task: str | None = None

    def __post_init__(self) -> None:
        of_keys: list[tuple[str, list[str], Collection[str]]] = [
            ("columns", self.columns, COLUMNS),
            ("baselines", self.baselines, self.rows),
            ("held_out", self.held_out, self.rows),
        ]
        for key, words, allowed in of_keys:
            if unknown := [word for word in words if word not in allowed]:
                raise ValueError(f"{key}: no {unknown[0]!r}{nearest(unknown[0], allowed)}")
        if "noise_share" in self.columns and self.noise_task is None:
            raise ValueError("columns: noise_share needs noise_task")
        self.rows = dict(sorted(self.rows.items(), key=lambda item: item[1].kind != "static"))


def row_and_seed(folder: Path) -> tuple[str, int]:
    """From the name of a run folder."""
    if not (found := re.fullmatch(r"(.+)_(\d+)", folder.resolve().name)):
        raise ValueError(f"{folder}: a run folder has to be named ROW_SEED, such as uniform_0")
    return found[1], int(found[2])


def read_kept(folder: Path) -> tuple[Table, dict[str, dict[int, Run]], list[str]]:
    """The table, its runs by row and seed, with losses above the floors on one split, and notes on the tasks."""
    try:
        table = load(Table, folder / SPEC)
    except ValueError as error:
        raise ValueError(f"{folder / SPEC}: {error}") from error
    folders = {row_and_seed(path): path for path in sorted(folder.iterdir()) if path.is_dir()}
    for (row, seed), path in folders.items():
        if row not in table.rows:
            raise ValueError(f"{path}: {SPEC} has no row {row!r}{nearest(row, table.rows)}")
        if seed not in table.seeds:
            raise ValueError(f"{path}: {SPEC} has no seed {seed}")
    if not folders:
        raise ValueError(f"{folder}: no run is kept there")
    runs, notes = on_shared_tasks([read_run(path) for path in folders.values()])
    of_config = [*(("floors", task) for task in table.floors), ("noise_task", table.noise_task)]
    for key, task in of_config:
        if task is not None and task not in runs[0].tasks:
            raise ValueError(f"{folder / SPEC}: {key}: no task {task!r}{nearest(task, runs[0].tasks)}")
    by_place = dict(zip(folders, on_one_split([above_floors(run, table.floors) for run in runs]), strict=True))
    by_row = {row: {s: by_place[row, s] for s in table.seeds if (row, s) in by_place} for row in table.rows}
    return table, by_row, notes


def standard_error(values: Sequence[float]) -> float:
    """Of the mean; NaN for a single value."""
    return float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def cell(values: Sequence[float], digits: int, sign: str = "") -> str:
    """Mean ± standard error, which is left out for one value and for equal ones; "–" if a value is missing."""
    found = spread(values)
    if math.isnan(found.mean):
        return "–"
    if found.low == found.high:
        return f"{found.mean:{sign},.{digits}f}"
    # The mean of counts is no whole number.
    digits = max(digits, 1)
    return f"{found.mean:{sign},.{digits}f} ± {standard_error(values):,.{digits}f}"


def loss_name(table: Table, by_row: dict[str, dict[int, Run]]) -> str:
    """With the split, which is the same for all runs."""
    split = next(run.split for runs in by_row.values() for run in runs.values())
    return f"{split} excess" if table.floors else f"{split} loss"


def difference_cells(runs: dict[int, Run], base: dict[int, Run]) -> list[str]:
    """Of the worst and the mean loss, and the tokens to the base's worst loss, over the seeds of both."""
    common = [seed for seed in runs if seed in base]
    if not common or runs is base:
        return ["–", "–", "–"]
    differences = [[value(runs[seed]) - value(base[seed]) for seed in common] for value in (worst, mean)]
    tokens = [tokens_to_reach(runs[seed], float(worst_over_tasks(base[seed].final_losses))) for seed in common]
    reached = [each for each in tokens if not math.isnan(each)]
    of_tokens = cell(reached, 0) if reached else "never"
    if 0 < len(reached) < len(common):
        of_tokens += f", {len(common) - len(reached)} never"
    return [*(f"{cell(values, 3, '+')} ({len(common)})" for values in differences), of_tokens]


def frontier_of(table: Table, by_row: dict[str, dict[int, Run]]) -> Frontier | None:
    """The curves fitted to all rows but those of ``held_out``; None: there are no such rows, or no others."""
    fitted = [run for row, runs in by_row.items() if row not in table.held_out for run in runs.values()]
    if not (table.held_out and fitted):
        return None
    check_runs([*fitted, *(run for row in table.held_out for run in by_row[row].values())])
    return fit_frontier(fitted)


def frontier_section(table: Table, by_row: dict[str, dict[int, Run]], frontier: Frontier) -> list[str]:
    """The parts of a page: how well the curves predict runs, and the best static mixtures by them."""
    loss = loss_name(table, by_row)
    lines = [
        ["", f"mean {loss}: predicted", "measured", "worst: predicted", "measured", "mean absolute error of a task"]
    ]
    for row in table.held_out:
        for seed, run in by_row[row].items():
            found = frontier.losses(run.task_tokens / run.spent)
            numbers = [found.mean(), mean(run), found.max(), worst(run), np.abs(found - run.result_losses).mean()]
            lines.append([f"{table.rows[row].name}, seed {seed}", *(f"{number:.3f}" for number in numbers)])
    fitted = sum(len(runs) for row, runs in by_row.items() if row not in table.held_out)
    about = f"A learning curve of each task, fitted to the validations of the other {fitted} runs"
    about += " (`benchmarks/frontier.py`). What it says of runs that it was not fitted to:"

    tasks = next(run.tasks for runs in by_row.values() for run in runs.values())
    best = [["", f"mean {loss}", f"worst {loss}", *tasks]]
    for risk, shares in frontier.best.items():
        found = frontier.losses(shares)
        of_tasks = [f"{100 * share:.0f} % ({each:.2f})" for share, each in zip(shares, found, strict=True)]
        best.append([f"risk {risk:g}", f"{found.mean():.3f}", f"{found.max():.3f}", *of_tasks])
    then = f"The best static mixtures by it, for (1 - risk) mean + risk worst: share and {loss} of each task."
    return ["## Frontier", about, markdown(lines), then, markdown(best)]


def page(
    name: str, table: Table, by_row: dict[str, dict[int, Run]], notes: Sequence[str], frontier: Frontier | None
) -> str:
    """The Markdown of a table."""
    there = {row: runs for row, runs in by_row.items() if runs}
    loss = loss_name(table, by_row)
    columns = [COLUMNS[column] for column in table.columns]
    lines = [["", "seeds", *(column.header.format(loss=loss) for column in columns)]]
    for row, runs in there.items():
        cells = [cell([column.value(run, table) for run in runs.values()], column.digits) for column in columns]
        lines.append([table.rows[row].label, str(len(runs)), *cells])

    about = "Mean ± standard error over seeds; losses in nats per supervised token, worst and mean over tasks."
    if table.floors:
        floors = ", ".join(f"{task} {floor:g}" for task, floor in table.floors.items())
        about += f" Excess is the loss above the lowest possible one ({floors}; else 0)."
    if any(row.kind == "oracle" for row in table.rows.values()):
        about += " Rows in italics are oracles."
    parts = [f"# {table.title}", "Written by `python benchmarks/records.py tables`; do not edit.", about]
    parts += [markdown(lines), *notes]
    gaps = {row: [str(seed) for seed in table.seeds if seed not in by_row[row]] for row in table.rows}
    if missing := [f"{table.rows[row].name} {', '.join(seeds)}" for row, seeds in gaps.items() if seeds]:
        parts.append(f"Missing seeds: {'; '.join(missing)}.")
    parts.append(f"![Mean and worst {loss} of each row]({name}.png)")

    if table.baselines:
        names = [table.rows[row].name for row in table.baselines]
        headers = [[f"worst {loss} - {name}", f"mean {loss} - {name}", f"tokens to {name}'s worst"] for name in names]
        lines = [["", *(header for of_base in headers for header in of_base)]]
        for row, runs in there.items():
            cells = [cell for base in table.baselines for cell in difference_cells(runs, by_row[base])]
            lines.append([table.rows[row].label, *cells])
        caption = (
            "Differences with the same seed: mean ± standard error (number of seeds that both have). Tokens are the"
        )
        caption += " supervised ones until a validation first shows the worst loss that the other run ends with."
        parts += ["## Differences from baselines", caption, markdown(lines)]

    if frontier:
        parts += frontier_section(table, by_row, frontier)

    lines = [["", *(f"seed {seed}" for seed in table.seeds)]]
    for row, runs in there.items():
        cells = [f"{worst(runs[s]):.3f} / {mean(runs[s]):.3f}" if s in runs else "–" for s in table.seeds]
        lines.append([table.rows[row].label, *cells])
    parts += ["## Every seed", f"Worst / mean {loss}.", markdown(lines)]
    return "\n\n".join(parts) + "\n"


def points(table: Table, by_row: dict[str, dict[int, Run]]) -> list[Point]:
    """Of every row with a run, with a standard error to each side; a missing one counts as 0."""

    def value(of_runs: Callable[[Run], float], runs: Collection[Run]) -> Value:
        values = [of_runs(run) for run in runs]
        center, error = spread(values).mean, float(np.nan_to_num(standard_error(values)))
        return Value(center, center - error, center + error)

    rows = [(table.rows[row], runs.values()) for row, runs in by_row.items() if runs]
    return [Point(row.name, row.kind, value(mean, runs), value(worst, runs)) for row, runs in rows]


def write_tables(docs: Path) -> None:
    """Writes the page and the plot of every table, and plots of the tables that ``results-*.md`` contain."""
    check_installed(("matplotlib", "plotly"), extra="report")
    specs = sorted((docs / "data").glob(f"*/{SPEC}"))
    if not specs:
        raise ValueError(f"{docs / 'data'}: contains no TABLE/{SPEC}")
    (docs / "tables").mkdir(exist_ok=True)
    for spec in specs:
        name = spec.parent.name
        table, by_row, notes = read_kept(spec.parent)
        frontier = frontier_of(table, by_row)
        with atomic_file(docs / "tables" / f"{name}.md") as path:
            path.write_text(page(name, table, by_row, notes, frontier), encoding="utf-8")
        best = np.stack([frontier.losses(shares) for shares in frontier.best.values()]) if frontier else None
        with atomic_file(docs / "tables" / f"{name}.png") as path:
            path.write_bytes(plot(table.title, loss_name(table, by_row), points(table, by_row), best))
    for document in sorted(docs.glob("results-*.md")):
        text = document.read_text(encoding="utf-8")
        for i, of_table in enumerate(points_of_document(text), 1):
            with atomic_file(docs / "tables" / f"{document.stem}-{i}.png") as path:
                path.write_bytes(plot(f"{text.splitlines()[0].strip('# ')} ({i})", "loss", of_table))
