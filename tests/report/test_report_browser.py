"""A page of `tune report` in a real browser, from the disk: wide and narrow, light and dark.

Needs a Chromium of the system (on Debian: apt-get install chromium) and playwright, which only drives it.
"""

from __future__ import annotations

import io
import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from evaluation_records import numbered, write_task
from report_runs import write_run

from adapt_recipes.report.figures import NAMED, charts
from adapt_recipes.report.page import write_report
from adapt_recipes.report.read import read_run
from adapt_recipes.report.tables import group_runs

pytestmark = pytest.mark.browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
PARTS = {"lines": ".scatterlayer .js-line", "steps": ".scatterlayer .js-line", "stack": ".scatterlayer .js-fill"}

Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """One run of twenty tasks, and three strategies over two seeds; names are long."""
    home = tmp_path_factory.mktemp("browser")
    one = write_run(home / "one", tasks=[f"task_{i:02}" for i in range(20)], steps=40)
    ends = {"adapt": 0.3, "uniform": 2.0, "proportional": 10.0}
    several = [
        write_run(
            home / f"{strategy}_with_a_long_name_in_one_word_that_no_phone_can_show_{seed}",
            strategy=strategy,
            tasks=["one", "two", "Basic Sentiment Analysis"],
            seed=seed,
            loss=lambda task, share, end=end, seed=seed: 12 - (12 - end) * share + 0.1 * seed + task / 10,
        )
        for strategy, end in ends.items()
        for seed in (0, 1)
    ]
    # A base model and a run, with 25 answers to each of two tasks.
    evaluated = [home / "base", write_run(home / "run")]
    for i, folder in enumerate(evaluated):
        for task, answer in (("short", "to {id}"), ("long", "<b>word</b> " * 50)):
            write_task(folder, task, numbered([i] * 25), answer=answer, prompt="question {id} " * 60)
    return {"one": [one], "several": several, "evaluated": evaluated}


@pytest.fixture(scope="module")
def pages(folders: dict[str, list[Path]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("pages")
    return {name: write_report(runs, home / f"{name}.html")[0] for name, runs in folders.items()}


@pytest.fixture
def open_page(browser: Any, pages: dict[str, Path]) -> Iterator[Open]:
    """Opens a page from the disk; what it says on the console and every request it makes are errors."""
    contexts: list[Any] = []
    heard: list[str] = []

    def open_page(name: str, size: str = "desktop", scheme: str = "light") -> Any:
        width, height = SIZES[size]
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: heard.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: heard.append(str(error)))
        page.on("request", lambda request: requested.append(request.url))
        page.goto(pages[name].as_uri())
        page.wait_for_selector("th.dt-orderable-asc, th[aria-sort], .dt-column-order")
        return page

    requested: list[str] = []
    yield open_page
    for context in contexts:
        context.close()
    assert heard == []
    assert set(requested) <= {page.as_uri() for page in pages.values()}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["one", "several"])
def test_every_figure_is_drawn_and_fits(open_page: Open, folders: dict[str, list[Path]], name: str, size: str) -> None:
    page = open_page(name, size)
    width = SIZES[size][0]
    assert page.evaluate("document.documentElement.scrollWidth") == width, "nothing hangs over"
    made = charts(group_runs([read_run(folder) for folder in folders[name]]))
    assert page.locator("figure").count() == len(made) == 8
    for chart in made:
        figure = page.locator(f"#{chart.name}")
        panels = figure.locator(".subplot.xy, .subplot[class*=' x']").count()
        assert panels == len(chart.panels)
        box = figure.bounding_box()
        seen = page.locator(f".scroll:has(> .plot #{chart.name})").bounding_box()
        assert seen["x"] >= 0 and seen["x"] + seen["width"] <= width
        if chart.kind == "points":
            points = figure.locator(".scatterlayer .point").count()
            assert points == sum(len(line.x) for line in chart.lines if line.names)
            continue
        paths = figure.locator(PARTS[chart.kind])
        assert paths.count() == len(chart.lines)
        for path in paths.all():
            assert len(path.get_attribute("d")) > 10
        plots = figure.locator(".plot-container .bglayer, .cartesianlayer").first.bounding_box()
        assert plots["width"] > 0.6 * box["width"] and plots["height"] > 100
    names = page.locator("#probabilities .legendtext").all_text_contents()
    assert names == made[1].names and len(names) == (NAMED + 1 if name == "one" else 3)


@pytest.mark.parametrize("name", ["one", "several"])
def test_no_name_of_a_legend_is_cut_off_on_a_phone(open_page: Open, name: str) -> None:
    page = open_page(name, "phone")
    for chart in ("probabilities", "probabilities_stacked", "validation_loss_by_task"):
        whole, shown = (
            page.locator(f"#{chart} .legend {part}").evaluate("node => node.getBBox().height")
            for part in (".scrollbox", ".bg")
        )
        assert whole <= shown
        plot = page.locator(f"#{chart} .nsewdrag").first.bounding_box()
        assert plot["height"] > 80


@pytest.mark.parametrize("size", SIZES)
def test_answers_are_paged_and_searched(open_page: Open, size: str) -> None:
    page = open_page("evaluated", size)
    assert page.evaluate("document.documentElement.scrollWidth") == SIZES[size][0], "nothing hangs over"
    answers = page.locator(".scroll:has(> * table.searchable)")
    rows = answers.locator("tbody tr")
    assert rows.count() == 10 and "1 to 10 of 40" in answers.locator(".dt-info").text_content()
    answers.locator(".dt-paging-button", has_text="»").click()
    assert "31 to 40 of 40" in answers.locator(".dt-info").text_content()
    assert rows.first.locator("th").text_content() == "long"
    # A long text is closed until it is clicked on.
    long = rows.first.locator("details").last
    before = long.bounding_box()["height"]
    long.locator("summary").click()
    assert long.bounding_box()["height"] > before and "<b>word</b>" in long.text_content()
    answers.locator(".dt-search input").fill("0007")
    assert rows.count() == 2 and all("question 0007" in text for text in rows.all_text_contents())


def test_panels_side_by_side_keep_their_distance_on_a_phone(open_page: Open) -> None:
    """They are scrolled where both do not fit: no label of the right one lies over the left."""
    page = open_page("several", "phone")
    for chart in ("worst_and_mean_loss", "probabilities", "validation_loss_by_task"):
        assert is_cut(page.locator(f".scroll:has(> .plot #{chart})"))
        left, right = (page.locator(f"#{chart} .nsewdrag").nth(i).bounding_box() for i in (0, 1))
        labels = [label.bounding_box() for label in page.locator(f"#{chart} .y2tick text").all()]
        assert labels and all(label["x"] > left["x"] + left["width"] for label in labels)
        assert min(left["width"], right["width"]) > 200


def is_cut(table: Any) -> bool:
    return table.evaluate("node => node.scrollWidth > node.clientWidth")


def test_numbers_of_one_run_fit_on_a_phone(open_page: Open) -> None:
    counters = open_page("one", "phone").locator("#counters ~ .scroll").first
    assert not is_cut(counters)
    first, number = (counters.locator(f"tbody tr:first-child > :nth-child({i})").bounding_box() for i in (1, 2))
    assert first["width"] > 120 and first["x"] + first["width"] <= number["x"]


def test_a_table_that_is_cut_has_a_shadow_until_it_is_scrolled_to_its_end(open_page: Open) -> None:
    """Beside a row of numbers, in which the last pixels of the box are darker than those of a table that is whole."""
    image = pytest.importorskip("PIL.Image")
    page = open_page("several", "phone")
    table = page.locator("#tokens_to_reach ~ .scroll").first
    assert is_cut(table)

    def edge() -> int:
        pixels = image.open(io.BytesIO(table.screenshot())).convert("L")
        return pixels.getpixel((pixels.width - 3, pixels.height - 4))

    before = edge()
    table.evaluate("node => { node.scrollLeft = node.scrollWidth }")
    assert before < 230 and edge() > 250


def style(element: Any, name: str) -> str:
    return element.evaluate(f"node => getComputedStyle(node).{name}")


def luminance(colour: str) -> float:
    """Relative luminance of a computed colour, as the Web Content Accessibility Guidelines have it."""
    channels = [int(value) / 255 for value in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def visible_lines(page: Any, chart: str) -> int:
    return page.locator(f"#{chart} .scatterlayer .trace").count()


@pytest.mark.parametrize("size", SIZES)
def test_a_click_on_a_name_hides_the_task(open_page: Open, size: str) -> None:
    page = open_page("one", size)
    for chart in ("probabilities", "probabilities_stacked", "validation_loss_by_task"):
        before = visible_lines(page, chart)
        toggle = page.locator(f"#{chart} .legendtoggle").nth(2)
        toggle.click()
        page.wait_for_function(f"document.querySelectorAll('#{chart} .scatterlayer .trace').length == {before - 1}")
        hidden = page.locator(f"#{chart} .legend .traces").nth(2)
        assert float(hidden.evaluate("node => getComputedStyle(node).opacity")) <= 0.5
        toggle.click()
        page.wait_for_function(f"document.querySelectorAll('#{chart} .scatterlayer .trace').length == {before}")


def test_a_click_hides_a_strategy_in_every_panel(open_page: Open) -> None:
    page = open_page("several")
    assert visible_lines(page, "probabilities") == 3 * 6
    page.locator("#probabilities .legendtoggle").first.click()
    page.wait_for_function("document.querySelectorAll('#probabilities .scatterlayer .trace').length == 12")


def test_pointing_at_a_figure_shows_its_values(open_page: Open, folders: dict[str, list[Path]]) -> None:
    """In the middle of the run, which is where the middle one of its validations is."""
    page = open_page("one")
    figure = page.locator("#validation_loss_by_task")
    figure.scroll_into_view_if_needed()
    box = figure.locator(".nsewdrag").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + box["height"] * 0.5)
    page.wait_for_selector("#validation_loss_by_task .hoverlayer .legendtext")
    texts = page.locator("#validation_loss_by_task .hoverlayer .legendtext").all_text_contents()
    shown = {name: float(value) for name, value in (text.split(": ") for text in texts)}
    made = {chart.name: chart for chart in charts(group_runs([read_run(folders["one"][0])]))}
    expected = {line.label: line.y[2] for line in made["validation_loss_by_task"].lines}
    assert len(shown) == NAMED + 1 and shown == pytest.approx(expected, rel=1e-3)


def test_the_line_under_the_pointer_hides_nothing(open_page: Open) -> None:
    page = open_page("one")
    page.locator("#probabilities_stacked").scroll_into_view_if_needed()
    page.locator("#probabilities_stacked .nsewdrag").first.hover()
    page.wait_for_selector("#probabilities_stacked .spikeline", state="attached")
    lines = page.locator("#probabilities_stacked .spikeline").all()
    assert [style(line, "strokeWidth") for line in lines if style(line, "stroke") != "none"] == ["1px"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pointing_at_a_line_among_many_names_it(open_page: Open, scheme: str) -> None:
    """At the end of the first panel, one of the losses that the task ends with."""
    page = open_page("several", scheme=scheme)
    figure = page.locator("#validation_loss_by_task")
    figure.scroll_into_view_if_needed()
    box = figure.locator(".nsewdrag").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] - 2, box["y"] + box["height"] * 0.5)
    page.wait_for_selector("#validation_loss_by_task .hovertext text.nums")
    text = page.locator("#validation_loss_by_task .hovertext text.nums").first
    ends = {"adapt": 0.3, "uniform": 2.0, "proportional": 10.0}
    ends_with = "after 1,280 supervised tokens"
    assert text.text_content() in [
        f"{name}, seed {seed}: {end + 0.1 * seed:.4g}{ends_with}" for name, end in ends.items() for seed in (0, 1)
    ]
    label = page.locator("#validation_loss_by_task .hovertext path").first
    assert contrast(style(text, "fill"), style(label, "fill")) >= 4.5


def sort(heading: Any) -> str:
    """Click on a heading, and wait for what that does."""
    before = heading.get_attribute("aria-sort")
    heading.click()
    changed = "([heading, before]) => heading.getAttribute('aria-sort') != before"
    heading.page.wait_for_function(changed, arg=[heading.element_handle(), before])
    return heading.get_attribute("aria-sort")


def column(page: Any, table: str, index: int) -> list[float]:
    cells = page.locator(f"#{table} ~ .scroll").first.locator(f"tbody tr > :nth-child({index})")
    return [float(cell.get_attribute("data-order")) for cell in cells.all()]


@pytest.mark.parametrize("size", SIZES)
def test_a_click_on_a_heading_sorts(open_page: Open, size: str) -> None:
    """By the mean, not by what is printed; what is never reached comes after all that is."""
    page = open_page("several", size)
    for table, index in (("strategies", 2), ("tokens_to_reach", 2)):
        heading = page.locator(f"#{table} ~ .scroll").first.locator(f"thead th:nth-child({index})")
        seen = []
        for _ in range(2):
            seen.append((sort(heading), column(page, table, index)))
        by_order = dict(seen)
        assert by_order["ascending"] == sorted(by_order["ascending"]) == by_order["descending"][::-1]
        assert len(set(by_order["ascending"])) > 1
    assert math.inf in by_order["ascending"]
    names = page.locator("#strategies ~ .scroll").first.locator("tbody th")
    assert sort(page.locator("#strategies ~ .scroll").first.locator("thead th").first) == "ascending"
    assert [name.split("\n")[0] for name in names.all_inner_texts()] == ["adapt", "proportional", "uniform"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_is_readable_in_light_and_dark(open_page: Open, scheme: str) -> None:
    page = open_page("several", scheme=scheme)
    background = style(page.locator("body"), "backgroundColor")
    assert (luminance(background) > 0.5) == (scheme == "light")
    texts = dict.fromkeys(("h1", ".headline", ".caption", "td", "td small", "footer", "pre"), "color")
    texts |= {f"#speed {text}": "fill" for text in (".xtick text", ".ytick text", ".legendtext", ".xtitle")}
    texts["#probabilities .annotation-text"] = "fill"
    for selector, name in texts.items():
        assert contrast(style(page.locator(selector).first, name), background) >= 4.5, selector


def test_numbers_stand_to_the_right(open_page: Open) -> None:
    page = open_page("several")
    for cell in page.locator("#strategies ~ .scroll").first.locator("tbody td").all():
        assert style(cell, "textAlign") == "right"
