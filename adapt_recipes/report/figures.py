"""The figures of a report. Each is described once, as lines in panels, and drawn by plotly and by matplotlib.

In a report of one run a color is a task; in a report of several runs it is a group of runs.
"""

from __future__ import annotations

import html
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import plotly.graph_objects as go
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter
from plotly.subplots import make_subplots

from adapt_recipes.report.read import Array, Run, mean_over_tasks
from adapt_recipes.report.tables import Group

# Tasks or groups with a color of their own.
NAMED = 12
# Petroff's (arXiv 2107.02270), with the second blue last. These eight are distinguishable with every kind of color
# vision, on a light and on a dark page. Further lines have the same colors in another texture.
COLORS = ("#1845FB", "#FF5E02", "#C91F16", "#C849A9", "#ADAD7D", "#86C8DD", "#656364", "#578DFF")
GRAY = "#A0A0A0"
# Of all lines of a figure together.
MAX_POINTS = 60_000
# Characters of a name in a legend, and above a panel.
LABEL_LENGTH, PANEL_LABEL_LENGTH = 32, 24
# Lines with at most this many values have markers.
MAX_MARKERS = 12
# matplotlib's settings for a file.
PNG_STYLE: dict[Any, Any] = {"text.parse_math": False, "font.size": 9, "axes.grid": True, "grid.alpha": 0.3}
# Of an axis with ticks at 1, 2 and 5.
MAX_LOG_TICKS = 8

# "points" are probabilities or shares on both axes, from 0 to the same end; "scatter" are points on any axes.
Kind = Literal["lines", "steps", "stack", "points", "scatter"]


class Texture(NamedTuple):
    """The texture of a line, as plotly's and matplotlib's arguments."""

    dash: Literal["solid", "dash", "dot"]
    pattern: str
    symbol: str
    linestyle: Literal["-", "--", ":"]
    hatch: str
    marker: str


PLAIN = Texture("solid", "", "circle", "-", "", "o")
DASHED = Texture("dash", "/", "diamond-open", "--", "//", "D")
DOTTED = Texture("dot", "", "x-thin-open", ":", "", "x")


@dataclass(frozen=True)
class Line:
    """A line, an area of a stack, or named points."""

    label: str
    look: int | None
    """number of a color and texture; None: gray, for several tasks combined or for a guide"""
    x: Array
    y: Array
    names: tuple[str, ...] = ()
    """of the points"""
    run: str = ""
    """distinguishes lines with the same label"""

    @property
    def color(self) -> str:
        return GRAY if self.look is None else COLORS[self.look % len(COLORS)]

    @property
    def texture(self) -> Texture:
        return DOTTED if self.look is None else PLAIN if self.look < len(COLORS) else DASHED


@dataclass(frozen=True)
class Panel:
    title: str
    lines: tuple[Line, ...]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A figure: panels with the same axes and one legend."""

    name: str
    """of its file, and its id on the page"""
    title: str
    caption: str
    x_title: str
    y_title: str
    kind: Kind
    panels: tuple[Panel, ...]

    @property
    def lines(self) -> list[Line]:
        return [line for panel in self.panels for line in panel.lines]

    @property
    def names(self) -> list[str]:
        """The labels in the legend."""
        return list(dict.fromkeys(line.label for line in self.lines))

    @property
    def legend_rows(self) -> int:
        """Upper bound of the rows of the legend on a phone: a row has 38 characters, the symbol of a line takes 6."""
        longest = max(map(len, self.names))
        return -(-len(self.names) // max(1, 38 // (longest + 6)))

    @property
    def columns(self) -> int:
        return min(len(self.panels), 2)

    @property
    def rows(self) -> int:
        return -(-len(self.panels) // self.columns)

    @property
    def shares_y(self) -> bool:
        """Whether panels share their y axis, so that probabilities of different tasks can be compared."""
        return self.kind in ("steps", "stack")

    @property
    def has_points(self) -> bool:
        """Whether points are drawn, not lines over tokens."""
        return self.kind in ("points", "scatter")

    @property
    def y_label(self) -> str:
        return self.y_title.replace("(nats)", "(nats, log scale)") if self.is_log else self.y_title

    @property
    def has_markers(self) -> bool:
        """Whether all lines have few values, so that each gets a marker."""
        return self.kind == "lines" and max(len(line.x) for line in self.lines) <= MAX_MARKERS

    @property
    def y_max(self) -> float:
        return max(float(np.nanmax(line.y)) for line in self.lines)

    @property
    def is_log(self) -> bool:
        """Whether the range of the losses needs a logarithmic axis."""
        lowest = min(float(np.nanmin(line.y)) for line in self.lines)
        return "nats" in self.y_title and 0 < 30 * lowest < self.y_max


def log_ticks(panel: Panel) -> list[float]:
    """Ticks of a logarithmic axis, from below the lowest value to above the highest.

    1, 2, 5, 10, ..., or only powers of ten if those are too many.
    """
    lowest = min(float(np.nanmin(line.y)) for line in panel.lines)
    highest = max(float(np.nanmax(line.y)) for line in panel.lines)
    powers = range(math.floor(math.log10(lowest)), math.ceil(math.log10(highest)) + 1)
    for steps in ((1, 2, 5), (1,)):
        ticks = [float(f"{step}e{power}") for power in powers for step in steps]
        below, above = (max(tick for tick in ticks if tick <= lowest), min(tick for tick in ticks if tick >= highest))
        ticks = [tick for tick in ticks if below <= tick <= above]
        if len(ticks) <= MAX_LOG_TICKS:
            break
    return ticks if len(ticks) > 1 else [ticks[0], 2 * ticks[0]]


TOKENS = "supervised tokens"


def charts(groups: Sequence[Group]) -> list[Chart]:
    """All figures of a report.

    Args:
        groups: runs over the same tasks; at most ``NAMED`` groups are drawn.
    """
    groups = groups[:NAMED]
    runs = [run for group in groups for run in group.runs]
    named = named_tasks(runs)
    one = len(runs) == 1
    meanings = {
        "tokens": "its share of the next supervised tokens",
        "example": "the chance that an example is of this task",
        "dataset": "the chance that a step is of this task",
    }
    sampled = [key for key in meanings if key in {run.config.get("sampling", "tokens") for run in runs}]
    p_is = ", or ".join(
        f"with sampling: {key} {meanings[key]}" if len(sampled) > 1 and key != "tokens" else meanings[key]
        for key in sampled
    )
    requests = {"example": "examples", "dataset": "steps"}
    no_tokens = "".join(
        f" With sampling: {key} the mixture requests {requests[key]}, not tokens." for key in sampled if key in requests
    )
    each = "A line per task." if one else "A panel per task, a line per run."
    all_charts = [
        Chart(
            name="probabilities_stacked",
            title="Mixture",
            caption=f"Each band is a task, as thick as its probability: {p_is}."
            + ("" if one else " For each strategy, the run with the first seed."),
            x_title=TOKENS,
            y_title="probability",
            kind="stack",
            panels=tuple(
                Panel("" if one else group.name, _lines_by_task(group.runs[0], _probabilities, named, np.sum))
                for group in groups
            ),
        ),
        Chart(
            name="probabilities",
            title="Probabilities",
            caption=f"{each} Probabilities change at mixture updates.",
            x_title=TOKENS,
            y_title="probability",
            kind="steps",
            panels=_by_task(groups, _probabilities, named),
        ),
        Chart(
            name="share_against_probability",
            title="Requested and actual share",
            caption="Each point is a task: its probability, averaged over the tokens spent, and its share of these "
            "tokens. On the gray line the share is the one that the mixture requested." + no_tokens,
            x_title="probability, averaged over tokens",
            y_title="share of supervised tokens",
            kind="points",
            panels=(Panel("", _shares(groups, named)),),
        ),
        Chart(
            name="validation_loss_by_task",
            title="Validation loss of each task",
            caption=f"{each} In nats per supervised token, on the whole validation split.",
            x_title=TOKENS,
            y_title="loss (nats)",
            kind="lines",
            panels=_by_task(groups, _losses, named),
        ),
        Chart(
            name="worst_and_mean_loss",
            title="Worst and mean validation loss",
            caption="Over tasks: the highest loss of any, and the unweighted mean."
            + ("" if one else " A line per run; seeds of a strategy have the same color."),
            x_title=TOKENS,
            y_title="loss (nats)",
            kind="lines",
            panels=(
                Panel(
                    "worst of all tasks", _by_run(groups, lambda run: (run.validations.supervised_tokens, run.worst))
                ),
                Panel("mean over tasks", _by_run(groups, lambda run: (run.validations.supervised_tokens, run.mean))),
            ),
        ),
        Chart(
            name="learning_rate",
            title="Learning rate",
            caption="Of the first parameter group, at each step.",
            x_title=TOKENS,
            y_title="learning rate",
            kind="lines",
            panels=(Panel("", _by_run(groups, lambda run: (run.steps.supervised_tokens, run.steps.lr))),),
        ),
        Chart(
            name="speed",
            title="Speed",
            caption="Tokens of training steps, including prompts, excluding padding, per second of total time, which "
            "includes mixture updates and validations; over windows of about a twentieth of the run.",
            x_title=TOKENS,
            y_title="tokens per second",
            kind="lines",
            panels=(Panel("", _by_run(groups, _speed)),),
        ),
        Chart(
            name="mixture_time",
            title="Time spent on mixture updates",
            caption="Share of the total time so far, including the measurements for the updates.",
            x_title=TOKENS,
            y_title="share of time (%)",
            kind="lines",
            panels=(Panel("", _by_run(groups, _mixture_time)),),
        ),
    ]
    return [chart for chart in map(_to_draw, all_charts) if chart.panels]


def exact_match_chart(groups: Sequence[Group], exact_match: Mapping[Path, float], suite: str) -> Chart:
    """The figure of exact match against validation loss: a point per run that has both.

    Args:
        groups: at most ``NAMED`` are drawn.
        exact_match: by folder of the run, the mean over its tasks; NaN if it was not measured.
        suite: that measured it.
    """
    lines = []
    for look, group in enumerate(groups[:NAMED]):
        losses = [float(mean_over_tasks(run.final_losses)) for run in group.runs]
        points = [(run, loss, exact_match[run.folder]) for run, loss in zip(group.runs, losses, strict=True)]
        points = [(run, loss, match) for run, loss, match in points if np.isfinite([loss, match]).all()]
        names = tuple(run.name for run, *_ in points)
        x, y = (np.array([point[i] for point in points]) for i in (1, 2))
        lines.append(Line(group.name, look, x, y, names))
    return _to_draw(
        Chart(
            name="exact_match_against_loss",
            title="Exact match against validation loss",
            caption="Each point is a run: the unweighted means over its tasks of the validation loss at the end, and "
            f"of the exact match of its answers in {suite}.",
            x_title="mean validation loss (nats)",
            y_title="exact match",
            kind="scatter",
            panels=(Panel("", tuple(lines)),),
        )
    )


def named_tasks(runs: Sequence[Run]) -> tuple[str, ...]:
    """The tasks with a color or a panel of their own: the worst task of each run, then those with the most tokens."""
    tasks = runs[0].tasks
    if len(tasks) <= NAMED:
        return tasks
    worst = {run.tasks[int(np.nanargmax(run.final_losses))] for run in runs if np.isfinite(run.final_losses).any()}
    spent = sum(run.task_tokens for run in runs) + np.zeros(len(tasks))
    ranked = sorted(range(len(tasks)), key=lambda i: (tasks[i] not in worst, -spent[i], i))
    return tuple(tasks[i] for i in sorted(ranked[:NAMED]))


# ---- values of runs


def _probabilities(run: Run) -> tuple[Array, Array]:
    """The probabilities over tokens; the last ones apply up to the last token of the log."""
    x, p = run.mixtures.supervised_tokens, run.mixtures.probabilities
    return np.append(x, max(run.logged, x[-1])), np.append(p, p[-1:], axis=0)


def _losses(run: Run) -> tuple[Array, Array]:
    return run.validations.supervised_tokens, run.validations.losses


def _speed(run: Run) -> tuple[Array, Array]:
    """Tokens per second in windows between validations; in up to 20 windows if there are few or many validations."""
    steps, validated = run.steps, run.validations.supervised_tokens
    every = np.searchsorted(steps.supervised_tokens, validated) if len(validated) > 5 else np.arange(len(steps.step))
    some = np.linspace(0, len(every) - 1, min(len(every), 21)).round().astype(int)
    edges = np.unique(np.minimum(every[some], len(steps.step) - 1)) if len(steps.step) else np.array([], int)
    seconds = np.maximum(np.diff(steps.seconds[edges]), 1e-9)
    return steps.supervised_tokens[edges[1:]], np.diff(steps.tokens[edges]) / seconds


def _mixture_time(run: Run) -> tuple[Array, Array]:
    """At each step, the share of time of the updates before it."""
    # An update follows the step with its number.
    before = np.searchsorted(run.mixtures.step, run.steps.step) - 1
    return run.steps.supervised_tokens, 100 * run.mixtures.mixture_seconds[before] / run.steps.seconds


def _shares(groups: Sequence[Group], named: Sequence[str]) -> tuple[Line, ...]:
    points = [(group, run, *_share(run)) for group in groups for run in group.runs if run.logged]
    if not points:
        return ()
    highest = max(float(np.max([asked, given])) for *_, asked, given in points)
    guide = Line("as requested", None, np.array([0.0, highest]), np.array([0.0, highest]))
    if len(points) > 1:
        return guide, *(
            Line(group.name, groups.index(group), x, y, run.tasks, _which(run, group)) for group, run, x, y in points
        )
    _, run, x, y = points[0]
    rest = [i for i, task in enumerate(run.tasks) if task not in named]
    lines = [
        Line(task, look, x[[i]], y[[i]], (task,)) for look, task in enumerate(named) for i in [run.tasks.index(task)]
    ]
    if rest:
        lines.append(Line(f"{len(rest)} others", None, x[rest], y[rest], tuple(run.tasks[i] for i in rest)))
    return guide, *lines


def _share(run: Run) -> tuple[Array, Array]:
    """For each task, the probability averaged over the tokens spent, and the task's share of them.

    The average is over the updates that were read: all of them, up to several hundred.
    """
    x, p = _probabilities(run)
    return np.diff(x) @ p[:-1] / (x[-1] - x[0]), run.steps.task_tokens[-1] / run.logged


# ---- layout in panels

Quantity = Callable[[Run], tuple[Array, Array]]


def _by_run(groups: Sequence[Group], quantity: Quantity) -> tuple[Line, ...]:
    return tuple(
        Line(group.name, look, *quantity(run), run=_which(run, group))
        for look, group in enumerate(groups)
        for run in group.runs
    )


def _which(run: Run, group: Group) -> str:
    """Distinguishes a run from others of its group."""
    return f"seed {run.seed}" if len(group.runs) > 1 and run.seed is not None else ""


def _by_task(groups: Sequence[Group], quantity: Quantity, named: Sequence[str]) -> tuple[Panel, ...]:
    """One run: a line per task. Several: a panel per task, a line per run. The mean of the other tasks comes last."""
    lines = [
        [
            replace(line, label=group.name, look=look, run=_which(run, group))
            for line in _lines_by_task(run, quantity, named, _mean)
        ]
        for look, group in enumerate(groups)
        for run in group.runs
    ]
    of_first = _lines_by_task(groups[0].runs[0], quantity, named, _mean)
    if len(lines) == 1:
        return (Panel("", of_first),)
    return tuple(Panel(task.label, of_task) for task, of_task in zip(of_first, zip(*lines, strict=True), strict=True))


def _lines_by_task(run: Run, quantity: Quantity, named: Sequence[str], fold: Callable[..., Any]) -> tuple[Line, ...]:
    """A line for every named task that was measured, and one for the others combined."""
    x, values = quantity(run)
    rest = [i for i, task in enumerate(run.tasks) if task not in named]
    lines = [Line(task, look, x, values[:, run.tasks.index(task)]) for look, task in enumerate(named)]
    if rest:
        word = "sum" if fold is np.sum else "mean"
        lines.append(Line(f"{word} of {len(rest)} others", None, x, fold(values[:, rest], axis=1)))
    return tuple(lines)


def _mean(values: Array, axis: int) -> Array:
    with np.errstate(invalid="ignore"):
        return np.nansum(values, axis=axis) / np.isfinite(values).sum(axis=axis)


def _to_draw(chart: Chart) -> Chart:
    """The chart without lines that have no values, with a limited number of points, and with short names."""
    points = max(50, MAX_POINTS // max(len(chart.lines), 1))
    labels = _short_names(chart.names, LABEL_LENGTH)
    titles = _short_names([panel.title for panel in chart.panels], PANEL_LABEL_LENGTH)
    panels = []
    for panel in chart.panels:
        lines = []
        for line in panel.lines:
            if np.isfinite(line.y).any():
                count = len(line.x) if line.names else min(points, len(line.x))
                some = np.unique(np.linspace(0, len(line.x) - 1, count).round().astype(int))
                lines.append(replace(line, label=labels[line.label], x=line.x[some], y=line.y[some]))
        if lines:
            panels.append(Panel(titles[panel.title], tuple(lines)))
    return replace(chart, panels=tuple(panels))


def _short_names(names: Iterable[str], length: int) -> dict[str, str]:
    """Long names without their middle, because names in a collection often start alike; unless two become equal."""
    half = length // 2
    short = {name: name if len(name) <= length else f"{name[:half]}…{name[-half + 1 :]}" for name in names}
    return short if len(set(short.values())) == len(short) else {name: name for name in short}


# ---- plotly, for the page


def to_plotly(chart: Chart) -> go.Figure:
    """The interactive chart: values under the pointer, and a click on a name hides it. The page sets its size."""
    figure = make_subplots(
        chart.rows,
        chart.columns,
        subplot_titles=[html.escape(panel.title) for panel in chart.panels],
        horizontal_spacing=0.12,
        vertical_spacing=0.3 / chart.rows,
        shared_xaxes="all",
        shared_yaxes="all" if chart.shares_y else False,
    )

    # Lines. A label is in the legend once.
    to_name = set(chart.names)
    one_by_one = chart.rows > 1 or chart.has_points or max(len(panel.lines) for panel in chart.panels) > NAMED + 1
    for i, panel in enumerate(chart.panels):
        for line in panel.lines:
            row, column = divmod(i, chart.columns)
            trace = _trace(chart, line, one_by_one=one_by_one).update(showlegend=line.label in to_name)
            figure.add_trace(trace, row=row + 1, col=column + 1)
            to_name.discard(line.label)

    # Layout. The whole legend is shown, the nearest value however far, and a finger on a figure scrolls the page.
    figure.update_layout(
        template="none",
        font={"family": "system-ui, sans-serif", "size": 13},
        margin={"l": 56, "r": 12, "t": 24, "b": 48},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        showlegend=len(chart.names) > 1,
        legend={
            "orientation": "h",
            "x": 0,
            "y": 1 + (0.14 if chart.panels[0].title else 0.02) / chart.rows,
            "yanchor": "bottom",
            "maxheight": 1,
        },
        hovermode="closest" if one_by_one else "x unified",
        hoverdistance=-1,
        dragmode=False,
    )
    figure.update_annotations(font_size=13)
    _set_axes(figure, chart, one_by_one=one_by_one)
    return figure


def _set_axes(figure: go.Figure, chart: Chart, *, one_by_one: bool) -> None:
    """Ranges, ticks and titles of the axes."""
    figure.update_xaxes(fixedrange=True, showspikes=not one_by_one, spikecolor=GRAY, spikethickness=1)
    figure.update_yaxes(fixedrange=True, automargin=True, showticklabels=True, ticklabelstandoff=4)
    figure.update_xaxes(rangemode="normal" if chart.kind == "scatter" else "tozero")
    figure.update_xaxes(tickformat="~g" if chart.has_points else "~s", hoverformat=",~r")
    figure.update_xaxes(showticklabels=True, tickangle=0, nticks=6 if chart.columns == 1 else 4)
    figure.update_yaxes(rangemode="tozero", tickformat="~g" if chart.y_max < 1000 else "~s", nticks=6)
    if chart.kind == "points":
        highest = 1.05 * max(float(np.max([line.x, line.y])) for line in chart.lines)
        figure.update_xaxes(range=[0, highest])
        figure.update_yaxes(range=[0, highest])
    if chart.is_log:
        for i, panel in enumerate(chart.panels):
            ticks = log_ticks(panel)
            figure.update_yaxes(
                type="log",
                tickvals=ticks,
                ticktext=[f"{tick:g}" for tick in ticks],
                range=[math.log10(ticks[0]), math.log10(ticks[-1])],
                row=i // chart.columns + 1,
                col=i % chart.columns + 1,
            )

    # Titles, below the lowest panel of each column and beside the first column.
    for i in range(max(len(chart.panels) - chart.columns, 0), len(chart.panels)):
        figure.update_xaxes(
            title={"text": chart.x_title, "standoff": 6, "font_size": 13},
            row=i // chart.columns + 1,
            col=i % chart.columns + 1,
        )
    figure.update_yaxes(title={"text": chart.y_label, "standoff": 6, "font_size": 13}, col=1)


def _trace(chart: Chart, line: Line, *, one_by_one: bool) -> go.Scatter:
    label, texture = html.escape(line.label), line.texture
    called = f"{label}, {line.run}" if line.run else label
    trace = go.Scatter(
        x=line.x.astype(np.float32), y=line.y.astype(np.float32), name=label, legendgroup=label, mode="lines"
    )
    if line.names:
        of_run = "" if line.names == (line.label,) else f"{called}<br>"
        x, y = ("requested", "actual") if chart.kind == "points" else (chart.x_title, chart.y_title)
        return trace.update(
            mode="markers",
            text=[html.escape(name) for name in line.names],
            hovertemplate=f"{of_run}%{{text}}: {x} %{{x:.4f}}, {y} %{{y:.4f}}<extra></extra>",
            marker={"color": line.color, "size": 9, "symbol": texture.symbol},
        )
    # With a unified hover label x is in its title.
    at = f"<br>after %{{x:,.0f}} {chart.x_title}" if one_by_one else ""
    trace.update(
        hovertemplate=f"{called}: %{{y:,.4~r}}{at}<extra></extra>", line={"color": line.color, "dash": texture.dash}
    )
    if chart.kind == "steps":
        trace.line.shape = "hv"
    if chart.kind == "stack":
        trace.update(stackgroup="tasks", fillcolor=line.color, line={"width": 0, "shape": "hv"})
        trace.fillpattern = {"shape": texture.pattern, "fgcolor": "white", "bgcolor": line.color, "solidity": 0.2}
    elif chart.has_markers:
        trace.mode = "lines+markers"
    if len(chart.lines) > NAMED + 1:
        trace.line.width = 1.4
    return trace


# ---- matplotlib, for files


def to_png(chart: Chart) -> bytes:
    """The chart as a PNG file, for papers and slides."""
    with rc_context(PNG_STYLE):
        file = io.BytesIO()
        to_matplotlib(chart).savefig(file, format="png", dpi=160)
        return file.getvalue()


def to_matplotlib(chart: Chart) -> Figure:
    """The static chart."""
    height = 4.2 if chart.rows == 1 else 1.2 + 1.9 * chart.rows
    figure = Figure(figsize=(8, height), layout="constrained")
    figure.suptitle(chart.title)
    every_axes = figure.subplots(chart.rows, chart.columns, sharex=True, sharey=chart.shares_y, squeeze=False).flatten()
    for axes, panel in zip(every_axes, chart.panels, strict=False):
        axes.set_title(panel.title, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelbottom=True, labelleft=True)
        axes.set_xlabel(chart.x_title)
        axes.set_ylabel(chart.y_label)
        _draw(axes, chart, panel)
        if chart.kind == "points":
            highest = 1.05 * max(float(np.max([line.x, line.y])) for line in panel.lines)
            axes.set_xlim(0, highest)
            axes.set_ylim(0, highest)
        elif chart.kind != "scatter":
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        if chart.is_log:
            axes.set_yscale("log")
            ticks = log_ticks(panel)
            axes.set_ylim(ticks[0], ticks[-1])
            axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.set_yticks([], minor=True)
        else:
            axes.set_ylim(bottom=0)
    for axes in every_axes[len(chart.panels) :]:
        axes.remove()
    if len(chart.names) > 1:
        first = {line.label: line for line in reversed(chart.lines)}
        handles = [_handle(chart, first[name]) for name in chart.names]
        figure.legend(handles, chart.names, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _draw(axes: Axes, chart: Chart, panel: Panel) -> None:
    if chart.kind == "stack":
        looks: dict[str, Any] = {
            "colors": [line.color for line in panel.lines],
            "hatch": [line.texture.hatch for line in panel.lines],
        }
        y = np.stack([line.y for line in panel.lines])
        axes.stackplot(panel.lines[0].x, y, **looks, edgecolor="white", linewidth=0, step="post")
        axes.margins(x=0)
        return
    for line in panel.lines:
        if line.names:
            # A point at the edge of the axes is drawn whole.
            axes.plot(line.x, line.y, linestyle="", marker=line.texture.marker, color=line.color, clip_on=False)
        else:
            drawstyle = "steps-post" if chart.kind == "steps" else "default"
            marker = "." if chart.has_markers else ""
            looks = {"color": line.color, "linestyle": line.texture.linestyle, "linewidth": 1.3}
            axes.plot(line.x, line.y, **looks, drawstyle=drawstyle, marker=marker)


def _handle(chart: Chart, line: Line) -> Line2D | Patch:
    """The symbol of a line in the legend."""
    if chart.kind == "stack":
        return Patch(facecolor=line.color, hatch=line.texture.hatch, edgecolor="white", linewidth=0)
    if line.names:
        return Line2D([], [], color=line.color, marker=line.texture.marker, linestyle="")
    return Line2D([], [], color=line.color, linestyle=line.texture.linestyle)
