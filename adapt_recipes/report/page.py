"""The page of a report: one HTML file that needs no network or server, and a PNG of each figure."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import jinja2
import numpy as np
import yaml
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from adapt_recipes.files import atomic_file
from adapt_recipes.report.evaluation import (
    NUM_EXAMPLES,
    OTHER_METRICS,
    Column,
    Difference,
    Example,
    Measured,
    Row,
    best_columns,
    by_metric,
    differences,
    examples,
    notes_of,
    other_metrics,
    own_exact_match,
    read_measured,
    row_score,
    row_stderr,
    suites_of,
    task_rows,
    with_means,
)
from adapt_recipes.report.figures import NAMED, Chart, charts, exact_match_chart, to_plotly, to_png
from adapt_recipes.report.read import UNITS, Array, Run, mean_over_tasks, on_one_split, read_run, worst_over_tasks
from adapt_recipes.report.tables import (
    COUNTERS,
    Group,
    Spread,
    TaskResult,
    all_tokens_to_reach,
    counters,
    differing_settings,
    final_mean,
    final_mean_in,
    final_targets,
    final_worst,
    group_runs,
    on_shared_tasks,
    spread,
    task_results,
)
from adapt_recipes.run_directory import EVALUATION, LOG, has_run

# On a phone the mode bar would cover names.
PLOTLY_CONFIG = {"displayModeBar": False, "responsive": True}
# Fewer points in a figure say nothing.
MIN_POINTS = 3
# The figures of each section of the page.
SECTIONS = {
    "worth": ("exact_match_against_loss",),
    "mixture": ("probabilities_stacked", "probabilities", "share_against_probability"),
    "losses": ("worst_and_mean_loss", "validation_loss_by_task"),
    "costs": ("mixture_time", "speed", "learning_rate"),
}
HEADINGS = {
    "worth": "What it is worth",
    "mixture": "What the mixture did",
    "losses": "Losses",
    "costs": "What it cost",
    "config": "Config",
}


def write_report(folders: Sequence[Path], out: Path | None = None) -> list[Path]:
    """Writes a page about one run, or one that compares several, and the figures in a folder beside it.

    Args:
        folders: run directories, of finished and unfinished runs; beside them, folders with the scores of a base model.
        out: the page. Default: ``report.html`` in the run directory, or for several runs in the current folder.

    Returns:
        The written files: the page, then the figures.

    Raises:
        ValueError: a folder contains no run, a file in it is malformed, or the runs share no task.
        OSError: the report cannot be written.
    """
    folders = [*{folder.resolve(): folder for folder in folders}.values()]
    runs = [read_run(folder) for folder in folders if not _has_scores_only(folder)]
    if not runs:
        raise ValueError(f"{folders[0]}: has scores but no run; give at least one run beside it")
    if out is None:
        out = folders[0] / "report.html" if len(folders) == 1 else Path("report.html")
    if out.suffix != ".html":
        raise ValueError(f"--out {out}: has to end in .html")
    if out.is_dir():
        raise ValueError(f"--out {out}: is a folder")
    page, drawn = render(runs, folders)
    figures = {out.with_name(f"{out.stem}_figures") / f"{chart.name}.png": to_png(chart) for chart in drawn}
    # The page comes last, so that its figures exist when it does.
    for path, content in {**figures, out: page.encode()}.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as partial:
            partial.write_bytes(content)
    return [out, *figures]


def _has_scores_only(folder: Path) -> bool:
    """Whether the folder is that of a base model's scores."""
    return (folder / EVALUATION).is_file() and not (folder / LOG).exists() and not has_run(folder)


def render(runs: Sequence[Run], folders: Sequence[Path]) -> tuple[str, list[Chart]]:
    """The page, and the figures on it.

    Args:
        runs: all that are on the page.
        folders: those of the runs, and of base models; scores are compared with those of the first.

    Raises:
        ValueError: the runs share no task, or a file of scores or answers is malformed.
    """
    # Groups, and notes for the reader.
    runs, notes = on_shared_tasks(runs)
    runs = on_one_split(runs)
    groups = group_runs(runs)
    if len(runs) > 1 and runs[0].split == "validation" and any(_is_measured(run.test_losses) for run in runs):
        notes.append("Not every run has a test loss of every task, so they are compared by their validation losses.")
    notes += [f"{_called(run, runs)} {run.ended}." for run in runs if run.ended and len(runs) > 1]
    notes += [f"{_called(run, runs)}: {note}." for run in runs for note in run.notes]
    if len(groups) > NAMED:
        notes.append(f"The figures show the {NAMED} strategies of the lowest worst loss; the tables show all.")

    # Figures and tables.
    members = _members(runs, groups, folders)
    suites = [_suite(suite, members) for suite in suites_of(folders)]
    made = [*charts(groups), *_worth_charts(groups, suites)]
    drawn = {
        chart.name: Markup(
            to_plotly(chart).to_html(
                config=PLOTLY_CONFIG, include_plotlyjs=False, full_html=False, default_height="100%", div_id=chart.name
            )
        )
        for chart in made
    }
    of_run = [_task_table(runs[0]), *([_target_table(runs[0])] if runs[0].targets else [])]
    tables = of_run if len(runs) == 1 else _comparison_tables(groups)

    # The page, with the scripts of plotly and itables in it.
    template = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    page = template.from_string(files(__package__).joinpath("page.html").read_text(encoding="utf-8")).render(
        title=_title(runs, groups),
        headline=_headline(runs[0]) if len(runs) == 1 else _comparison(groups),
        notes=notes,
        is_comparison=len(runs) > 1,
        headings={"results": _question(groups)}
        | {name: heading for name, heading in HEADINGS.items() if suites or name != "worth"},
        tables=tables,
        suites=suites,
        num_examples=NUM_EXAMPLES,
        sections={
            key: [(c, drawn[c.name]) for name in names for c in made if c.name == name]
            for key, names in SECTIONS.items()
        },
        counters=_counter_table(groups),
        settings=_setting_table(groups) if len(groups) > 1 else None,
        configs=[
            (_called(run, runs), yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True, width=120))
            for run in runs
            if run.config
        ],
        plotly_js=Markup(get_plotlyjs()),
        tables_js=base64.b64encode(files("itables").joinpath("html/dt_bundle.js").read_bytes()).decode(),
        versions={package: version(package) for package in ("plotly", "itables")},
    )
    return page, made


# ---- text


def _title(runs: Sequence[Run], groups: Sequence[Group]) -> str:
    tasks = _number(len(runs[0].tasks), "task")
    if len(runs) == 1:
        seed = "" if runs[0].seed is None else f", seed {runs[0].seed}"
        return f"{runs[0].strategy} on {tasks}{seed}"
    what = _number(len(groups), "way") + " to mix" if len(groups) > 1 else groups[0].name
    return f"{what} {tasks}" if len(groups) > 1 else f"{what} on {tasks}, {len(runs)} runs"


def _called(run: Run, runs: Sequence[Run]) -> str:
    """The name of the run's folder, or its path if several folders have that name."""
    return run.name if sum(other.name == run.name for other in runs) == 1 else str(run.folder)


def _question(groups: Sequence[Group]) -> str:
    """The heading of the first tables. Whether a mixture helped needs two finished groups."""
    if sum(group.is_finished for group in groups) > 1:
        return "Did the mixture help?"
    return "Over seeds" if len(groups) == 1 and len(groups[0].runs) > 1 else "What happened"


def _headline(run: Run) -> list[str]:
    """A summary of one run."""
    counts = counters(run)
    spent = f"{run.spent:,} supervised tokens"
    if run.ended and run.budget:
        spent = f"{run.spent:,} of {run.budget:,} supervised tokens ({run.spent / run.budget:.0%})"
    spent += f" in {_number(counts['steps'], 'step')} and {_time(counts['seconds'])}"
    text = [f"The run spent {spent}." if not run.ended else f"The run {run.ended}. It spent {spent}."]
    before, after = run.initial_losses, run.final_losses
    if len(run.worst) or run.summary:
        task = _worst_task(run, after)
        worst = [_loss(float(worst_over_tasks(losses))) for losses in (before, after)]
        mean = [_loss(float(mean_over_tasks(losses))) for losses in (before, after)]
        text.append(
            f"The worst validation loss went from {worst[0]} to {worst[1]} nats{task}, the mean from {mean[0]} to "
            f"{mean[1]}."
        )
    if _is_measured(saved := run.saved_losses) and np.nanmax(np.abs(saved - after)) >= 1e-4:
        text.append(
            f"As the weights were rounded in model/, the worst is {_loss(float(worst_over_tasks(saved)))} nats"
            f"{_worst_task(run, saved)}, the mean {_loss(float(mean_over_tasks(saved)))}."
        )
    if _is_measured(test := run.test_losses):
        text.append(
            f"On the test split the worst loss is {_loss(float(worst_over_tasks(test)))} nats{_worst_task(run, test)}, "
            f"the mean {_loss(float(mean_over_tasks(test)))}."
        )
    if run.targets:
        stages = [run.of_targets(key) for key in ("initial_target_losses", "target_losses")]
        worst, mean = ([_loss(float(over(each))) for each in stages] for over in (worst_over_tasks, mean_over_tasks))
        text.append(
            f"On the {_number(len(run.targets), 'target')}, which are never trained, the worst validation loss went "
            f"from {worst[0]} to {worst[1]} nats, the mean from {mean[0]} to {mean[1]}."
        )
    read = f"validations and test read {_count(counts['validation_tokens'])} supervised tokens in addition"
    if counts["mixture_updates"] > 0:
        share = 100 * counts["mixture_seconds"] / counts["seconds"]
        text.append(
            f"{_number(counts['mixture_updates'], 'mixture update')} took {share:.1f}% of the time and read "
            f"{_count(counts['probe_tokens'])} supervised tokens; {read}."
        )
    elif run.summary or not run.config.get("mixture_update_every"):
        text.append(f"The mixture was fixed; {read}.")
    else:
        text.append(f"The mixture has not been updated yet; {read}.")
    return text


def _is_measured(losses: Array) -> bool:
    return bool(np.isfinite(losses).any())


def _worst_task(run: Run, losses: Array) -> str:
    return f" ({run.tasks[int(np.nanargmax(losses))]})" if _is_measured(losses) else ""


def _comparison(groups: Sequence[Group]) -> list[str]:
    """A summary of several runs."""
    finished = [group for group in groups if group.is_finished]
    if not finished:
        return [f"None of the {sum(len(group.runs) for group in groups)} runs is finished."]
    best, worst, split = finished[0], final_worst(finished[0]), finished[0].split
    if len(finished) == 1:
        return [f"{best.name} ends with a worst {split} loss of {_range(worst)} nats{_over(best)}."]
    second, others = finished[1], final_worst(finished[1])
    text = [
        f"{best.name} has the best worst-task {split} loss of {len(finished)} strategies: {_range(worst)} nats"
        f"{_over(best)}. Next is {second.name}, with {_range(others)}{_over(second)}."
    ]
    if len(best.runs) == 1 or len(second.runs) == 1:
        text.append("At least one of the two has only one seed, so this may be chance.")
    else:
        text.append("Their ranges do not overlap." if worst.high < others.low else "Their ranges over seeds overlap.")
    reached = spread(all_tokens_to_reach(best, second))
    if not math.isnan(reached.mean):
        budget = spread(run.spent for run in second.runs).mean
        text.append(
            f"It reaches the worst validation loss {second.name} ends with after {reached.mean:,.0f} supervised "
            f"tokens, {reached.mean / budget:.0%} of the {budget:,.0f} tokens {second.name} used."
        )
    results = task_results(groups)
    won = sum(result.winner == 0 for result in results)
    text.append(f"It has the lowest {split} loss on {won} of {_number(len(results), 'task')}.")
    return text


def _over(group: Group) -> str:
    return f" over {_number(len(group.runs), 'seed')}" if len(group.runs) > 1 else ""


def _range(values: Spread) -> str:
    return (
        f"{_loss(values.mean)} ({_loss(values.low)} to {_loss(values.high)})"
        if values.low < values.high
        else _loss(values.mean)
    )


def _number(count: float, what: str) -> str:
    return f"{_count(count)} {what}{'' if count == 1 else 's'}"


def _count(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:,.0f}"


def _loss(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.4f}"


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.1%}"


def _time(seconds: float) -> str:
    if math.isnan(seconds):
        return "–"
    for length, unit in ((7200, "h"), (120, "min")):
        if seconds >= length:
            return f"{seconds / (length / 2):,.1f} {unit}"
    return f"{seconds:.1f} s"


# ---- tables


class Cell(NamedTuple):
    text: str
    order: float | str
    """the sort key of the column"""
    detail: str = ""
    """a range"""
    is_best: bool = False


class Table(NamedTuple):
    name: str
    title: str
    caption: str
    columns: list[str]
    """the first contains names, the others numbers"""
    rows: list[list[Cell]]


class Suite(NamedTuple):
    """What the page shows of a suite of evaluations."""

    name: str
    notes: list[str]
    tables: list[Table]
    models: list[Measured]
    examples: list[Example]


def _name(text: str, detail: str = "") -> Cell:
    return Cell(text, text, detail)


def _cell(values: float | Spread, say: Callable[[float], str] = _loss, *, is_best: bool = False) -> Cell:
    """A number, or a mean with its range."""
    if not isinstance(values, Spread):
        values = Spread(values, values, values)
    detail = f"{say(values.low)} to {say(values.high)}" if values.low < values.high else ""
    return Cell(say(values.mean), math.inf if math.isnan(values.mean) else values.mean, detail, is_best)


def _task_table(run: Run) -> Table:
    first, last, tokens = run.mixtures.probabilities[0], run.final_probabilities, run.task_tokens
    before, after, test = run.initial_losses, run.final_losses, run.test_losses
    has_test = _is_measured(test)
    units = {unit: run.results_in(unit) for unit in UNITS if _is_measured(run.results_in(unit))}
    rows = [
        [
            _name(task),
            _cell(first[i]),
            _cell(last[i]),
            _cell(tokens[i], _count),
            _cell(tokens[i] / max(run.spent, 1), _percent),
            _cell(before[i]),
            _cell(after[i]),
            _cell(after[i] - before[i]),
            *([_cell(test[i])] if has_test else []),
            *(_cell(values[i]) for values in units.values()),
        ]
        for i, task in enumerate(run.tasks)
    ]
    columns = ["task", "start p", "final p", "tokens", "share", "start loss", "final loss", "change"]
    columns += [*["test loss"] * has_test, *units]
    of_units = f" At the end, on the {run.split} split: {' and '.join(units)}." if units else ""
    caption = (
        f"Each task's probability, supervised tokens and validation loss (nats per supervised token).{of_units} To see "
        "whether the mixture helped, compare with another run: tune report RUN OTHER_RUN."
    )
    return Table("tasks", "Tokens and losses of each task", caption, columns, rows)


def _target_table(run: Run) -> Table:
    """Results on the tasks that were validated on and never trained."""
    keys = {"start loss": "initial_target_losses", "final loss": "target_losses", "test loss": "target_test_losses"}
    prefix = "target_test" if run.split == "test" else "target"
    keys |= {unit: f"{prefix}_{key}" for unit, key in UNITS.items()}
    columns = {title: values for title, key in keys.items() if _is_measured(values := run.of_targets(key))}
    rows = [[_name(target), *(_cell(values[i]) for values in columns.values())] for i, target in enumerate(run.targets)]
    caption = "Tasks that were validated on and never trained. Losses are nats per supervised token."
    return Table("targets", "Targets", caption, ["target", *columns], rows)


def _comparison_tables(groups: Sequence[Group]) -> list[Table]:
    """Tables of strategies, of the tokens that each needs to reach another's loss, and of tasks."""
    results = task_results(groups)
    several = any(len(group.runs) > 1 for group in groups)
    # A strategy can only win against another one.
    finished = [i for i, group in enumerate(groups) if group.is_finished]
    rivals = finished if len(finished) > 1 else []
    strategies = _strategy_table(groups, results, rivals, several=several)
    tasks = _result_table(groups, results, several=several, has_winners=bool(rivals))
    return [strategies, _reach_table(groups, several=several), tasks] if len(groups) > 1 else [strategies, tasks]


def _of_seeds(several: bool) -> str:
    return "Means over seeds, with the range below. " if several else ""


def _strategy_table(
    groups: Sequence[Group], results: Sequence[TaskResult], rivals: Sequence[int], *, several: bool
) -> Table:
    worst, means = [final_worst(group) for group in groups], [final_mean(group) for group in groups]
    units = {unit: [final_mean_in(group, unit) for group in groups] for unit in UNITS}
    units = {unit: values for unit, values in units.items() if not all(math.isnan(each.mean) for each in values)}
    of_targets = {"worst target loss": 0, "mean target loss": 1}
    targets = {title: [final_targets(group)[k] for group in groups] for title, k in of_targets.items()}
    units |= {title: each for title, each in targets.items() if not all(math.isnan(one.mean) for one in each)}
    rows = []
    for i, group in enumerate(groups):
        counts = [counters(run) for run in group.runs]
        share = spread(count["mixture_seconds"] / count["seconds"] for count in counts)
        rows.append(
            [
                _name(group.name, f"seed{'s' if len(group.runs) > 1 else ''} {group.seeds}" if group.seeds else ""),
                _cell(worst[i], is_best=i in rivals and worst[i].mean == min(worst[j].mean for j in rivals)),
                _cell(means[i], is_best=i in rivals and means[i].mean == min(means[j].mean for j in rivals)),
                *(_cell(values[i]) for values in units.values()),
                *([_cell(sum(result.winner == i for result in results), _count)] if rivals else []),
                _cell(spread(run.spent for run in group.runs), _count),
                _cell(spread(count["total_tokens"] for count in counts), _count),
                _cell(spread(count["probe_tokens"] for count in counts), _count),
                _cell(spread(count["seconds"] for count in counts), _time),
                _cell(share, _percent),
            ]
        )
    columns = [
        "strategy",
        "worst loss",
        "mean loss",
        *units,
        *(["tasks won"] if rivals else []),
        "tokens spent",
        "tokens read",
        "probe tokens",
        "time",
        "mixture time",
    ]
    means_too = [unit for unit in units if unit in UNITS]
    of_units = f" Means over tasks too: {' and '.join(means_too)}." if means_too else ""
    if len(means_too) < len(units):
        of_units += " Targets are validated on and never trained."
    caption = (
        f"{_of_seeds(several)}{groups[0].split.capitalize()} losses at the end, in nats per supervised token: the "
        f"highest of any task, and the unweighted mean.{of_units} Supervised tokens are spent on training. Tokens read "
        "are all, in training and outside of it, supervised or not. Probe tokens are supervised ones that mixture "
        "updates read. Click a heading to sort."
    )
    return Table("strategies", "Strategies", caption, columns, rows)


def _reach_table(groups: Sequence[Group], *, several: bool) -> Table:
    caption = (
        f"{_of_seeds(several)}Supervised tokens that the strategy of the row spent until its worst validation loss was "
        "first at or below the final one of the strategy of the column"
    )
    return Table(
        "tokens_to_reach",
        "Supervised tokens to reach another strategy's final worst validation loss",
        caption + (", for the same seed where both have it." if several else "."),
        ["strategy", *(group.name for group in groups)],
        [[_name(group.name), *(_reached(group, target) for target in groups)] for group in groups],
    )


def _result_table(groups: Sequence[Group], results: Sequence[TaskResult], *, several: bool, has_winners: bool) -> Table:
    caption = f"{_of_seeds(several)}Each task's {groups[0].split} loss at the end."
    if has_winners:
        clear = "; it is clear if every strategy has several seeds and its worst seed is below the others' best seed."
        caption += f" The lowest of finished runs is marked{clear if several else '.'}"
    rows = [
        [
            _name(result.task),
            *([_winner(result, groups)] if has_winners else []),
            *(_cell(losses, is_best=i == result.winner) for i, losses in enumerate(result.losses)),
        ]
        for result in results
    ]
    columns = ["task", *(["lowest"] if has_winners else []), *(group.name for group in groups)]
    return Table("winners" if has_winners else "losses", "Tasks", caption, columns, rows)


def _winner(result: TaskResult, groups: Sequence[Group]) -> Cell:
    return _name("–" if result.winner is None else groups[result.winner].name, "clear" if result.is_clear else "")


def _reached(group: Group, target: Group) -> Cell:
    tokens = all_tokens_to_reach(group, target)
    missing = sum(map(math.isnan, tokens))
    if not missing:
        return _cell(spread(tokens), _count)
    return Cell("never" if missing == len(tokens) else f"{len(tokens) - missing} of {len(tokens)}", math.inf)


def _counter_table(groups: Sequence[Group]) -> Table:
    counts = [[counters(run) for run in group.runs] for group in groups]
    rows = []
    for key, explanation in COUNTERS.items():
        say = _time if key.endswith("seconds") else _count
        rows.append([_name(key, explanation), *(_cell(spread(count[key] for count in runs), say) for runs in counts)])
    caption = "As in summary.json; for a run that is not finished, as in its log."
    return Table("counters", "Tokens, steps and time", caption, ["", *(group.name for group in groups)], rows)


def _setting_table(groups: Sequence[Group]) -> Table:
    rows = [
        [_name(key), *(_name("–" if value is None else str(value)) for value in values)]
        for key, values in differing_settings(groups).items()
    ]
    return Table(
        "settings", "Differences", "Keys of the configs that are not the same.", ["", *(g.name for g in groups)], rows
    )


# ---- what mixture_eval measured


def _members(
    runs: Sequence[Run], groups: Sequence[Group], folders: Sequence[Path]
) -> dict[str, list[tuple[str, Path]]]:
    """By column, the names and folders of its models: a column is a group or a base model, in the order of folders."""
    of_folder = {run.folder: group for group in groups for run in group.runs}
    members: dict[str, list[tuple[str, Path]]] = {}
    for folder in folders:
        if group := of_folder.get(folder):
            members[group.name] = [(_called(run, runs), run.folder) for run in group.runs]
            continue
        name = folder.resolve().name
        if name in members or name in [group.name for group in groups]:
            name = str(folder)
        members[name] = [(name, folder)]
    return members


def _suite(suite: str, members: Mapping[str, Sequence[tuple[str, Path]]]) -> Suite:
    """The scores of a suite, with a column for each of ``members``."""
    columns = [
        Column(name, tuple(read_measured(*member, suite) for member in of_column))
        for name, of_column in members.items()
    ]
    notes, tables = notes_of(columns), []
    # The likelihood of right answers too: the better signal where few answers are right.
    for kind, view in (("scores", columns), ("bits per byte", by_metric(columns, "bits_per_byte"))):
        rows = with_means(task_rows(view))
        if rows:
            tables.append(_score_table(suite, kind, rows, view))
        if rows and len(columns) > 1:
            found, why_not = differences(rows, view)
            tables.append(_difference_table(suite, kind, rows, view, found))
            notes += [note for note in why_not if note not in notes]
    if others := other_metrics(columns):
        tables.append(_metric_table(suite, others, columns))
    return Suite(suite, notes, tables, [model for column in columns for model in column.models], examples(columns))


def _row_name(row: Row) -> Cell:
    return _name(row.name, row.metric)


def _score_table(suite: str, kind: str, rows: Sequence[Row], columns: Sequence[Column]) -> Table:
    cells = []
    for row in rows:
        scores = [row_score(column, row) for column in columns]
        best = best_columns(scores, row)
        cells.append([_row_name(row), *(_score_cell(c, row, scores[i], i in best) for i, c in enumerate(columns))])
    several = any(len(column.models) > 1 for column in columns)
    caption = f"{_of_seeds(several)}Of one {'run' if several else 'model'}, the standard error over examples is below. "
    caption += "Means over tasks are unweighted."
    if kind == "bits per byte":
        caption += " How unlikely the right answers are to the model: lower is better."
    names = ["task", *(column.name for column in columns)]
    return Table(f"{_id(kind)}_{suite}", f"{suite}: {kind}", caption, names, cells)


def _id(kind: str) -> str:
    return kind.replace(" ", "_")


def _score_cell(column: Column, row: Row, score: Spread, is_best: bool) -> Cell:
    cell = _cell(score, _score, is_best=is_best)
    error = row_stderr(column, row)
    return cell if math.isnan(error) else cell._replace(detail=f"± {_score(error)}")


def _difference_table(
    suite: str, kind: str, rows: Sequence[Row], columns: Sequence[Column], found: Sequence[Sequence[Difference | None]]
) -> Table:
    count = sum(difference is not None for of_row in found for difference in of_row)
    caption = (
        f"From {columns[0].name}, with the 95 % interval of a paired bootstrap over the examples of each task; an "
        "example's value is its mean over seeds. If the interval does not contain 0, the difference is beyond chance, "
        f"as far as the choice of examples goes. There {'is' if count == 1 else 'are'} {_number(count, 'comparison')}: "
        "without any difference, one in twenty is beyond chance by luck."
    )
    cells = [
        [_row_name(row), *(_difference_cell(difference, row) for difference in of_row)]
        for row, of_row in zip(rows, found, strict=True)
    ]
    names = ["task", *(column.name for column in columns[1:])]
    return Table(f"{_id(kind)}_differences_{suite}", f"{suite}: differences in {kind}", caption, names, cells)


def _difference_cell(difference: Difference | None, row: Row) -> Cell:
    """Marked if it is better beyond chance."""
    if difference is None:
        return _cell(math.nan)
    detail = f"{_signed(difference.low)} to {_signed(difference.high)}"
    detail += ", beyond chance" if difference.is_beyond_chance else ""
    is_better = row.higher_is_better is not None and (difference.mean > 0) == row.higher_is_better
    return Cell(_signed(difference.mean), difference.mean, detail, difference.is_beyond_chance and is_better)


def _metric_table(suite: str, others: dict[tuple[str, str], list[Spread]], columns: Sequence[Column]) -> Table:
    def say(metric: str) -> Callable[[float], str]:
        return _score if metric in OTHER_METRICS else _time if metric == "seconds" else _count

    cells = [
        [_name(metric), _name(task), *(_cell(value, say(metric)) for value in values)]
        for (metric, task), values in others.items()
    ]
    caption = (
        "answer_tokens: mean length of answers. unstopped: share of answers that were cut. left out: examples that "
        "were not measured. seconds: of the measurement."
    )
    names = ["metric", "task", *(column.name for column in columns)]
    return Table(f"metrics_{suite}", f"{suite}: other metrics, examples and time", caption, names, cells)


def _worth_charts(groups: Sequence[Group], suites: Sequence[Suite]) -> list[Chart]:
    """Exact match against validation loss, if one suite measured it for enough runs."""
    for suite in suites:
        models = {model.folder: model for model in suite.models}
        chart = exact_match_chart(
            groups,
            {run.folder: own_exact_match(models[run.folder], run.tasks) for group in groups for run in group.runs},
            suite.name,
        )
        if sum(len(line.x) for line in chart.lines) >= MIN_POINTS:
            return [chart]
    return []


def _score(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"


def _signed(value: float) -> str:
    # Not -0.000.
    return f"{round(value, 3) + 0.0:+.3f}"
