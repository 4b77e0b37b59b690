"""The figures show what the logs say, on the page and in the files, in colours that all people tell apart."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from report_runs import events, write_run

from adapt_recipes.report.figures import (
    COLORS,
    DASHED,
    DOTTED,
    GRAY,
    NAMED,
    PLAIN,
    Chart,
    Line,
    Panel,
    charts,
    log_ticks,
    named_tasks,
    to_matplotlib,
    to_plotly,
    to_png,
)
from adapt_recipes.report.read import read_run
from adapt_recipes.report.tables import Group, group_runs

EVERY = [
    "probabilities_stacked",
    "probabilities",
    "share_against_probability",
    "validation_loss_by_task",
    "worst_and_mean_loss",
    "learning_rate",
    "speed",
    "mixture_time",
]


def drawn(*folders: Path) -> dict[str, Chart]:
    return {chart.name: chart for chart in charts(group_runs([read_run(folder) for folder in folders]))}


def lines(chart: Chart, panel: int = 0) -> dict[str, Line]:
    return {line.label: line for line in chart.panels[panel].lines}


def check(line: Line, x: list[float], y: list[float]) -> None:
    assert line.x.tolist() == x
    assert line.y.tolist() == pytest.approx(y, rel=1e-12)


# ---- one run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("one") / "run", steps=50, update_every=5, validate_every=7)


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, Chart]:
    return drawn(folder)


def test_every_figure_has_a_title_a_caption_and_units(one: dict[str, Chart]) -> None:
    assert list(one) == EVERY
    for chart in one.values():
        assert chart.title and chart.caption.endswith(".") and chart.x_title and chart.y_title


def test_captions_say_what_a_probability_is(tmp_path: Path) -> None:
    """A share of tokens, or where a step is of one task the chance of it."""
    tokens = write_run(tmp_path / "a", resolved={"sampling": "tokens"})
    dataset = write_run(tmp_path / "b", resolved={"sampling": "dataset"})
    example = write_run(tmp_path / "c", resolved={"sampling": "example"})
    share, chance, steps = (
        "its share of the next supervised tokens",
        "the chance that a step is of this task",
        "requests steps",
    )
    of_examples = "the chance that an example is of this task"
    for folders, said, unsaid in [
        ([tokens], [share], [chance, steps, of_examples]),
        ([example], [of_examples, "requests examples"], [share, chance]),
        ([dataset], [chance, steps], [share]),
        ([tokens, dataset], [share, chance, steps], []),
    ]:
        made = drawn(*folders)
        text = made["probabilities_stacked"].caption + made["share_against_probability"].caption
        assert all(words in text for words in said) and not any(words in text for words in unsaid)


def test_probabilities_hold_until_the_next_update_and_to_the_end(one: dict[str, Chart], folder: Path) -> None:
    updates = events(folder, "mixture")
    end = events(folder, "step")[-1]["supervised_tokens"]
    for name in ("probabilities", "probabilities_stacked"):
        for task, line in lines(one[name]).items():
            p = [update["probabilities"][task] for update in updates]
            check(line, [*(update["supervised_tokens"] for update in updates), end], [*p, p[-1]])
    assert sum(line.y for line in one["probabilities_stacked"].lines) == pytest.approx(1)


def test_the_share_of_tokens_stands_against_the_probability_asked_for(one: dict[str, Chart], folder: Path) -> None:
    last = events(folder, "step")[-1]
    total = last["supervised_tokens"]
    updates = [*events(folder, "mixture"), {"supervised_tokens": total}]
    points = lines(one["share_against_probability"])
    guide = points.pop("as requested")
    assert guide.x.tolist() == guide.y.tolist()
    assert list(points) == list(last["task_tokens"])
    for task, point in points.items():
        asked = sum(
            before["probabilities"][task] * (after["supervised_tokens"] - before["supervised_tokens"])
            for before, after in pairwise(updates)
        )
        assert point.names == (task,)
        check(point, pytest.approx([asked / total]), [last["task_tokens"][task] / total])


def test_losses(one: dict[str, Chart], folder: Path) -> None:
    validations = events(folder, "validation")
    x = [line["supervised_tokens"] for line in validations]
    for task, line in lines(one["validation_loss_by_task"]).items():
        check(line, x, [validation["losses"][task] for validation in validations])
    worst, mean = one["worst_and_mean_loss"].panels
    check(worst.lines[0], x, [max(validation["losses"].values()) for validation in validations])
    check(mean.lines[0], x, [sum(validation["losses"].values()) / 3 for validation in validations])


def test_learning_rate(one: dict[str, Chart], folder: Path) -> None:
    steps = events(folder, "step")
    check(one["learning_rate"].lines[0], [step["supervised_tokens"] for step in steps], [step["lr"] for step in steps])


@pytest.mark.parametrize("validate_every", [7, 50])
def test_speed_is_tokens_over_time_between_two_steps(tmp_path: Path, validate_every: int) -> None:
    folder = write_run(tmp_path / "run", steps=50, validate_every=validate_every)
    at = {step["supervised_tokens"]: step for step in events(folder, "step")}
    (line,) = drawn(folder)["speed"].lines
    x = [events(folder, "step")[0]["supervised_tokens"], *line.x]
    assert 5 < len(line.x) <= 20 and x[-1] == max(at)
    for (before, after), speed in zip(pairwise(x), line.y, strict=True):
        tokens, seconds = (at[after][key] - at[before][key] for key in ("tokens", "seconds"))
        assert speed == pytest.approx(tokens / seconds)


def test_time_on_updates_counts_those_before_the_step(one: dict[str, Chart], folder: Path) -> None:
    updates, steps = events(folder, "mixture"), events(folder, "step")
    expected = []
    for step in steps:
        before = [update["mixture_seconds"] for update in updates if update["step"] < step["step"]]
        expected.append(100 * before[-1] / step["seconds"])
    check(one["mixture_time"].lines[0], [step["supervised_tokens"] for step in steps], expected)
    assert max(expected) > 0


# ---- many tasks


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 tasks; the one that ends worst has few tokens."""
    folder = tmp_path_factory.mktemp("many") / "run"
    tasks = [f"task_{i}" for i in range(100)]
    return write_run(folder, tasks=tasks, loss=lambda task, share: 9.0 if task == 41 else 3 - share + task / 100)


def test_at_most_twelve_tasks_are_named_and_the_rest_folded(many: Path) -> None:
    made, run = drawn(many), read_run(many)
    named = named_tasks([run])
    assert len(named) == NAMED and "task_41" in named
    tokens = dict(zip(run.tasks, run.steps.task_tokens[-1], strict=True))
    assert min(tokens[task] for task in named if task != "task_41") >= max(
        tokens[t] for t in run.tasks if t not in named
    )
    rest = [i for i, task in enumerate(run.tasks) if task not in named]
    for name, label, fold in [
        ("probabilities_stacked", "sum of 88 others", lambda p: p.sum(1)),
        ("probabilities", "mean of 88 others", lambda p: p.mean(1)),
    ]:
        shown = lines(made[name])
        assert list(shown) == [*named, label]
        assert shown[label].look is None
        assert shown[label].y[:-1] == pytest.approx(fold(run.mixtures.probabilities[:, rest]))
    assert sum(line.y for line in made["probabilities_stacked"].lines) == pytest.approx(1)
    losses = lines(made["validation_loss_by_task"])["mean of 88 others"]
    assert losses.y == pytest.approx(run.validations.losses[:, rest].mean(1))
    points = lines(made["share_against_probability"])["88 others"]
    assert set(points.names) == {run.tasks[i] for i in rest}


def test_tasks_that_are_not_measured_have_no_line(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", loss=lambda task, share: math.nan if task == 1 else 1.0)
    assert list(lines(drawn(folder)["validation_loss_by_task"])) == ["one", "three"]
    assert list(lines(drawn(folder)["probabilities"])) == ["one", "two", "three"]
    both = drawn(folder, write_run(tmp_path / "other", strategy="uniform"))["validation_loss_by_task"]
    assert [len(panel.lines) for panel in both.panels] == [2, 1, 2]


@pytest.mark.slow
def test_what_has_not_happened_yet_is_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", finished=False)
    log = folder / "log.jsonl"
    whole = log.read_bytes().splitlines(keepends=True)
    for count, expected in {
        1: ["probabilities_stacked", "probabilities"],
        2: ["probabilities_stacked", "probabilities", "validation_loss_by_task", "worst_and_mean_loss"],
        3: [name for name in EVERY if name != "speed"],
        4: EVERY,
    }.items():
        log.write_bytes(b"".join(whole[:count]))
        made = drawn(folder)
        assert list(made) == expected
        for chart in made.values():
            assert to_matplotlib(chart) and to_plotly(chart)


# ---- several runs


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    home = tmp_path_factory.mktemp("several")
    return {s: [write_run(home / f"{s}_{k}", strategy=s, seed=k) for k in (0, 1)] for s in ("adapt", "uniform")}


@pytest.fixture(scope="module")
def several(folders: dict[str, list[Path]]) -> dict[str, Chart]:
    return drawn(*folders["adapt"], *folders["uniform"])


def test_every_line_is_that_of_its_run(several: dict[str, Chart], folders: dict[str, list[Path]]) -> None:
    for panel in several["validation_loss_by_task"].panels:
        for strategy, runs in folders.items():
            expected = [[line["losses"][panel.title] for line in events(run, "validation")] for run in runs]
            assert [line.y.tolist() for line in panel.lines if line.label == strategy] == expected
    for panel in several["probabilities"].panels:
        for strategy, runs in folders.items():
            expected = [[line["probabilities"][panel.title] for line in events(run, "mixture")] for run in runs]
            assert [line.y[:-1].tolist() for line in panel.lines if line.label == strategy] == expected


def test_several_runs_are_laid_over_each_other(several: dict[str, Chart]) -> None:
    tasks = ["one", "two", "three"]
    assert list(several) == EVERY
    for name in ("probabilities", "validation_loss_by_task"):
        assert [panel.title for panel in several[name].panels] == tasks
    assert sorted(panel.title for panel in several["probabilities_stacked"].panels) == ["adapt", "uniform"]
    for name in EVERY[1:]:
        for panel in several[name].panels:
            labels = [line.label for line in panel.lines if line.look is not None]
            assert sorted(labels) == ["adapt", "adapt", "uniform", "uniform"], "a line a run"
            looks = {(line.label, line.look) for line in panel.lines if line.look is not None}
            assert len(looks) == len({look for _, look in looks}) == 2, "a colour a strategy"
        assert len(set(several[name].names)) == len(several[name].names)
    for panel in several["probabilities_stacked"].panels:
        assert sum(line.y for line in panel.lines) == pytest.approx(1)


def test_no_more_than_twelve_groups_are_drawn(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / f"{i}", strategy=f"s{i:02}", steps=2, loss=lambda t, s, i=i: i + 1) for i in range(14)
    ]
    made = drawn(*folders)
    best = [f"s{i:02}" for i in range(NAMED)]
    assert made["worst_and_mean_loss"].names == made["learning_rate"].names == best
    assert [panel.title for panel in made["probabilities_stacked"].panels] == best


# ---- both drawings


def chart(kind: str = "lines", num_lines: int = 2, num_panels: int = 1, top: float = 10.0) -> Chart:
    x = np.array([0.0, 100.0, 200.0])
    panels = tuple(
        Panel(f"panel {k}", tuple(Line(f"line {i}", i, x, x / 200 * (top - i - 1) + i + 1) for i in range(num_lines)))
        for k in range(num_panels)
    )
    return Chart(
        name="n",
        title="T",
        caption="C.",
        x_title="tokens",
        y_title="loss (nats)",
        kind=kind,
        panels=panels,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("kind", ["lines", "steps", "stack"])
@pytest.mark.parametrize("num_panels", [1, 3])
def test_both_drawings_show_every_line(kind: str, num_panels: int) -> None:
    described = chart(kind, num_lines=NAMED, num_panels=num_panels)
    page, file = to_plotly(described), to_matplotlib(described)
    assert len(page.data) == NAMED * num_panels and len(file.axes) == num_panels
    for trace, line in zip(page.data, described.lines, strict=True):
        assert trace.name == line.label and trace.x.tolist() == line.x.tolist()
        assert trace.y == pytest.approx(line.y)
        if kind == "stack":
            assert trace.stackgroup and trace.fillcolor == COLORS[line.look % len(COLORS)]
            assert (trace.fillpattern.shape == "/") == (line.look >= len(COLORS))
        else:
            assert trace.line.color == COLORS[line.look % len(COLORS)]
            assert (trace.line.dash == "dash") == (line.look >= len(COLORS))
    assert sum(bool(trace.showlegend) for trace in page.data) == NAMED, "a name stands once, whatever the panels"
    assert len({trace.legendgroup for trace in page.data}) == NAMED, "and hides its line in every panel"
    assert [text.get_text() for text in file.legends[0].get_texts()] == described.names
    for axes, panel in zip(file.axes, described.panels, strict=True):
        assert axes.get_title() == panel.title
        if kind == "stack":
            assert len(axes.collections) == NAMED
            assert [bool(area.get_hatch()) for area in axes.collections] == [i >= len(COLORS) for i in range(NAMED)]
            assert axes.get_ylim()[1] >= sum(line.y[-1] for line in panel.lines)
        else:
            assert [artist.get_ydata().tolist() for artist in axes.lines] == [line.y.tolist() for line in panel.lines]
            assert [artist.get_linestyle() == "--" for artist in axes.lines] == [i >= len(COLORS) for i in range(NAMED)]


@pytest.mark.parametrize("kind", ["lines", "steps", "stack"])
def test_the_file_has_every_colour(kind: str) -> None:
    image = np.asarray(Image.open(io.BytesIO(to_png(chart(kind, num_lines=len(COLORS))))).convert("RGB"))
    for colour in COLORS:
        assert (image == list(bytes.fromhex(colour[1:]))).all(axis=2).any(), colour
    assert image.shape[1] >= 1200


@pytest.mark.parametrize(("top", "is_log"), [(10.0, False), (1000.0, True)])
def test_the_axis_is_logarithmic_where_losses_fall_far(top: float, is_log: bool) -> None:
    described = chart(top=top)
    assert (to_plotly(described).layout.yaxis.type == "log") == is_log
    assert (to_matplotlib(described).axes[0].get_yscale() == "log") == is_log


@pytest.mark.parametrize(
    ("lowest", "highest", "ticks"),
    [
        (0.03, 1.3, [0.02, 0.05, 0.1, 0.2, 0.5, 1, 2]),
        (0.11, 5.0, [0.1, 0.2, 0.5, 1, 2, 5]),
        (0.0018, 5.7, [0.001, 0.01, 0.1, 1, 10]),
        (1.0, 1.0, [1, 2]),
        (5.2, 5.6, [5, 10]),
    ],
)
def test_a_logarithmic_axis_has_few_round_ticks_around_the_values(
    lowest: float, highest: float, ticks: list[float]
) -> None:
    x = np.array([0.0, 1.0])
    panel = Panel("", (Line("a", 0, x, np.array([highest, math.nan])), Line("b", 1, x, np.array([lowest, lowest]))))
    assert log_ticks(panel) == ticks


def test_both_drawings_have_the_ticks_of_each_panel_and_say_that_the_axis_is_logarithmic() -> None:
    falls = chart(top=1000.0)
    low = Panel("low", (Line("line 0", 0, np.array([0.0, 1.0]), np.array([3.0, 1.0])),))
    both = replace(falls, panels=(*falls.panels, low))
    page, file = to_plotly(both), to_matplotlib(both)
    for axis, axes, ticks in [
        (page.layout.yaxis, file.axes[0], [1, 10, 100, 1000]),
        (page.layout.yaxis2, file.axes[1], [1, 2, 5]),
    ]:
        assert axis.tickvals == tuple(ticks) and axes.get_yticks().tolist() == ticks
        assert list(axis.ticktext) == [text.get_text() for text in axes.get_yticklabels()] == list(map(str, ticks))
        assert [10**end for end in axis.range] == pytest.approx(axes.get_ylim()) == [ticks[0], ticks[-1]]
    assert page.layout.yaxis.title.text == file.axes[0].get_ylabel() == "loss (nats, log scale)"


def test_panels_of_probabilities_share_their_axis(several: dict[str, Chart]) -> None:
    for name, is_shared in (
        ("probabilities", True),
        ("probabilities_stacked", True),
        ("validation_loss_by_task", False),
    ):
        page, file = to_plotly(several[name]), to_matplotlib(several[name])
        assert (page.layout.yaxis2.matches is not None) == is_shared and page.layout.yaxis2.showticklabels
        assert file.axes[0].get_shared_y_axes().joined(*file.axes[:2]) == is_shared


def test_what_was_requested_and_what_was_had_have_equal_axes(one: dict[str, Chart]) -> None:
    described = one["share_against_probability"]
    page, (axes,) = to_plotly(described), to_matplotlib(described).axes
    highest = max(float(max(line.x.max(), line.y.max())) for line in described.lines)
    assert page.layout.xaxis.range == page.layout.yaxis.range
    assert axes.get_xlim() == axes.get_ylim() == pytest.approx(page.layout.xaxis.range)
    assert axes.get_xlim()[0] == 0 and axes.get_xlim()[1] > highest


def test_values_are_marked_where_all_lines_have_few() -> None:
    few = chart(num_lines=2)
    x = np.arange(13.0)
    many = replace(few, panels=(Panel("", (*few.lines, Line("long", 2, x, x))),))
    for described, is_marked in ((few, True), (many, False)):
        assert {trace.mode for trace in to_plotly(described).data} == {"lines+markers" if is_marked else "lines"}
        assert {line.get_marker() for line in to_matplotlib(described).axes[0].lines} == {"." if is_marked else ""}


def test_names_mean_themselves(tmp_path: Path) -> None:
    """Not mark-up, not mathematics, and not hidden; a long one loses its middle, unless it becomes another's."""
    long = "task_{}_of_a_collection_with_long_names_{}"
    tasks = ["<b>bold</b>", "_hidden", "$\\x$", long.format(1, "a"), long.format(2, "b")]
    made = drawn(write_run(tmp_path / "run", tasks=tasks))["probabilities"]
    assert made.names == [*tasks[:3], "task_1_of_a_coll…th_long_names_a", "task_2_of_a_coll…th_long_names_b"]
    assert [trace.name for trace in to_plotly(made).data][0] == "&lt;b&gt;bold&lt;/b&gt;"
    assert [text.get_text() for text in to_matplotlib(made).legends[0].get_texts()] == made.names
    assert to_png(made)

    alike = ["a" * 40 + "x" + "b" * 40, "a" * 40 + "y" + "b" * 40]
    assert drawn(write_run(tmp_path / "alike", tasks=alike))["probabilities"].names == alike


def test_long_lines_are_thinned_for_the_page_and_keep_their_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adapt_recipes.report import figures

    monkeypatch.setattr(figures, "MAX_POINTS", 0)
    run = read_run(write_run(tmp_path / "run", steps=300, tasks=[f"task_{i}" for i in range(70)]))
    made = {chart.name: chart for chart in charts([Group("g", (run,))])}
    (line,) = made["learning_rate"].lines
    assert len(line.x) == 50
    assert (line.x[0], line.x[-1]) == (run.steps.supervised_tokens[0], run.spent)
    assert len(lines(made["share_against_probability"])["58 others"].x) == 58, "tasks are not left out"


# ---- colours

# Viénot-style matrices for full dichromacy in linear sRGB, from Machado, Oliveira and Fernandes (2009), table 1.
VISION = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def linear(colour: str) -> np.ndarray:
    channels = np.array(list(bytes.fromhex(colour[1:]))) / 255
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def oklab(rgb: np.ndarray) -> np.ndarray:
    """Ottosson's OKLab, in which distances are how different colours look; black and white are 1 apart."""
    to_cones = [[0.41222, 0.53633, 0.05145], [0.21190, 0.68070, 0.10740], [0.08830, 0.28172, 0.62998]]
    to_lab = [[0.21045, 0.79362, -0.00407], [1.97800, -2.42859, 0.45059], [0.02590, 0.78277, -0.80868]]
    return np.array(to_lab) @ np.cbrt(np.array(to_cones) @ rgb.clip(0, 1))


@pytest.mark.parametrize("vision", VISION)
def test_people_of_every_colour_vision_tell_the_colours_apart(vision: str) -> None:
    """Two areas side by side can just be distinguished at a distance of about 0.02; thin lines need more."""
    seen = [oklab(np.array(VISION[vision]) @ linear(colour)) for colour in COLORS]
    assert min(float(np.linalg.norm(a - b)) for a, b in combinations(seen, 2)) > 0.08


@pytest.mark.parametrize("page", ["#ffffff", "#14181d"])
def test_the_colours_stand_out_from_the_page(page: str) -> None:
    luminance = [float(linear(colour) @ [0.2126, 0.7152, 0.0722]) + 0.05 for colour in (page, *COLORS, GRAY)]
    for colour in luminance[1:]:
        assert max(colour, luminance[0]) / min(colour, luminance[0]) > 1.8


def test_what_has_the_same_colour_has_another_texture() -> None:
    x = np.zeros(1)
    looks = [(line.color, line.texture) for line in (Line("", look, x, x) for look in (None, *range(NAMED)))]
    assert len(set(looks)) == NAMED + 1
    assert looks[0] == (GRAY, DOTTED) and DOTTED not in [texture for _, texture in looks[1:]]
    assert len({texture for _, texture in looks}) == len({PLAIN, DASHED, DOTTED}) == 3
    for one, other in combinations((PLAIN, DASHED, DOTTED), 2):
        parts = one._asdict().items() if DOTTED not in (one, other) else [("dash", one.dash), ("marker", one.marker)]
        assert all(value != getattr(other, name) for name, value in parts), "in lines, areas and points"
