"""The plot of a table: mean and worst loss of each row, of kept runs or as they stand in a document."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from adapt_recipes.report.read import Array

Kind = Literal["static", "learned", "oracle"]
# How the names of static rows begin in documents.
STATIC = ("uniform", "proportional", "temperature")
# A cell with a number and its range: 3.042 (3.016 to 3.065), or the number alone.
CELL = re.compile(r"(-?\d[\d.]*)(?: \((-?\d[\d.]*) to (-?\d[\d.]*)\))?")


class Value(NamedTuple):
    """A loss in nats, and the ends of its bar."""

    value: float
    low: float
    high: float


class Point(NamedTuple):
    """A row of a table."""

    name: str
    kind: Kind
    mean: Value
    worst: Value


def points_of_document(text: str) -> list[list[Point]]:
    """The rows of each Markdown table with columns called worst loss and mean loss, the first of each name."""
    found: list[list[Point]] = []
    header: list[str] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if not header:
            header = cells
            if {"worst loss", "mean loss"} <= set(header):
                found.append([])
        elif not cells:
            header = []
        elif {"worst loss", "mean loss"} <= set(header) and set(cells) != {"---"}:
            mean, worst = (_value(cells[header.index(column)]) for column in ("mean loss", "worst loss"))
            name = cells[0].strip("*")
            kind: Kind = "oracle" if cells[0] != name else "static" if name.startswith(STATIC) else "learned"
            found[-1].append(Point(name, kind, mean, worst))
    return found


def _value(cell: str) -> Value:
    found = CELL.match(cell)
    assert found, f"no number in {cell!r}"
    value = float(found[1])
    return Value(value, float(found[2] or value), float(found[3] or value))


def plot(
    title: str,
    loss: str,  # how losses are called on both axes
    points: Sequence[Point],
    frontier: Array | None = None,  # (mixtures, tasks): losses of the best static mixtures
) -> bytes:
    """A PNG file: mean and worst loss of each point with its bars, and the frontier as a line."""
    # Here, because keeping runs does not need the extra `report`.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from adapt_recipes.report.figures import COLORS, PNG_STYLE

    # Color and marker.
    looks = {"static": (COLORS[6], "s"), "learned": (COLORS[0], "o"), "oracle": (COLORS[1], "*")}
    points = sorted(points, key=lambda point: (point.worst.value, point.mean.value))
    with rc_context(PNG_STYLE):
        figure = Figure(figsize=(8, max(4.2, 0.25 * len(points))), layout="constrained")
        axes = figure.subplots()
        for i, (name, kind, mean, worst) in enumerate(points):
            color, marker = looks[kind]
            across, up = ([[at - low], [high - at]] for at, low, high in (mean, worst))
            axes.errorbar(mean.value, worst.value, up, across, marker, color=color, elinewidth=0.8)
            # The names stand one above the other beside the axes, in the order of the points, so that none overlap.
            axes.annotate(
                name,
                (mean.value, worst.value),
                (1.03, (i + 0.5) / len(points)),
                textcoords="axes fraction",
                va="center",
                color=color,
                style="italic" if kind == "oracle" else "normal",
                arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.4, "relpos": (0, 0.5)},
            )
        if frontier is not None:
            axes.plot(frontier.mean(1), np.max(frontier, 1), "--", color=COLORS[6], label="best static, by curves")
        for kind in dict.fromkeys(point.kind for point in points):
            color, marker = looks[kind]
            axes.plot([], [], color=color, marker=marker, linestyle="", label=kind)
        axes.legend(frameon=False)
        axes.set_title(title)
        axes.set_xlabel(f"mean {loss} (nats)")
        axes.set_ylabel(f"worst {loss} (nats)")
        axes.spines[["top", "right"]].set_visible(False)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=160)
    return file.getvalue()
