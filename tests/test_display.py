"""What a person sees: a live view on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiers import slow_but

from adapt_recipes import shipped
from adapt_recipes.budget import Ledger
from adapt_recipes.config import load
from adapt_recipes.data import Examples, LeftOut, Task
from adapt_recipes.display import Display
from adapt_recipes.events import Summary


def task(name: str, *, validated: bool = True, tested: bool = False) -> Task:
    """20 examples of one supervised token each."""
    tokens, supervised = torch.zeros(40, dtype=torch.int32), torch.tensor([False, True] * 20)
    examples = Examples.in_memory(tokens, supervised, torch.arange(0, 41, 2), torch.arange(20))
    return Task(
        name, examples, examples if validated else None, left_out=LeftOut(too_long=3), test=examples if tested else None
    )


def console(*, width: int = 120, height: int = 24, terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), width=width, height=height, force_terminal=terminal)


def shown(console: Console) -> str:
    return console.file.getvalue()  # type: ignore[attr-defined]


def five_steps(console: Console, log_every: int) -> Display:
    display = Display([task("one"), task("two")], budget_tokens=100, log_every=log_every, console=console)
    display.start()
    ledger = Ledger(100, 2)
    for step in range(1, 6):
        ledger.spend(torch.tensor([20, 0]), unique=20, batches=[])
        ledger.tokens += 200
        losses = torch.tensor([1.0 / step, torch.nan])
        display.step(step, 1.0 / step, ledger, 2.0 * step, task_losses=losses, num_drawn=torch.tensor([20 * step, 0]))
    return display


def plain(log_every: int) -> list[str]:
    out = console()
    five_steps(out, log_every).close()
    return shown(out).splitlines()


def test_plain_lines_where_there_is_no_terminal() -> None:
    lines = plain(log_every=2)
    assert [line.split(":")[0] for line in lines] == ["step 1", "step 2", "step 4", "step 5"]
    assert lines[0] == "step 1: 20/100 supervised tokens (20.0%), loss 1.0000", "no speed of 0 tokens/s"
    assert lines[2] == "step 4: 80/100 supervised tokens (80.0%), loss 0.2500, 100 tokens/s, 2 s left"
    assert [line.split(":")[0] for line in plain(log_every=0)] == ["step 1", "step 5"]
    assert not any("\x1b" in line for line in lines)


def test_a_live_view_on_a_terminal() -> None:
    out = console(width=90, terminal=True)
    display = five_steps(out, log_every=1)
    display.mixture(torch.tensor([0.5, 0.5]), seconds=0.0)
    display.mixture(torch.tensor([0.75, 0.25]), seconds=1.0)
    display.validation(torch.tensor([0.5, torch.nan]))
    display.close()
    assert "step 5:" not in shown(out), "no plain lines besides"
    view = console(width=90)
    view.print(display._view())
    lines = shown(view).splitlines()
    assert "step 5" in lines[0] and "100%" in lines[0] and "100/100 supervised" in lines[0]
    assert lines[1] == "loss 0.2000   100 tokens/s   mixture updates 0.0% of the time"
    # p and its direction, share of the tokens, train loss (smoothed), validation loss, examples seen, passes
    rows = {line.split()[0]: line.split()[1:] for line in lines[3:]}
    assert rows["one"] == ["0.750", "↑", "100.0%", "0.762", "0.500", "100", "5.00"]
    assert rows["two"] == ["0.250", "↓", "0.0%", "-", "-", "0", "0.00"]


@pytest.mark.parametrize("terminal", [True, False])
def test_lines_are_broken_between_words_on_a_terminal_alone(terminal: bool) -> None:
    out, text = console(width=20, terminal=terminal), "supervised tokens of all tasks together"
    Display([task("one")], budget_tokens=20, log_every=1, console=out).say(text)
    lines = [line.rstrip() for line in shown(out).splitlines()]
    assert lines == (["supervised tokens of", "all tasks together"] if terminal else [text])


def test_it_shows_what_takes_a_while() -> None:
    out = console(width=80)
    display = five_steps(out, log_every=0)

    def first_line() -> str:
        view = console(width=80)
        view.print(display._view())
        return shown(view).splitlines()[0]

    assert first_line().startswith("step 5 ")
    for what, is_over in {
        "validating": lambda: display.validation(torch.zeros(2)),
        "updating the mixture": lambda: display.mixture(torch.tensor([0.5, 0.5]), 1.0),
    }.items():
        display.doing(what)
        assert first_line().startswith(f"{what} ") and "━" in first_line()
        is_over()
        assert first_line().startswith("step 5 ")


@pytest.mark.parametrize("recipe", slow_but(["mos"], ["sft", "adapt", "mos"]))
def test_recipes_say_what_takes_a_while(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    doings: list[str] = []
    monkeypatch.setattr(Display, "doing", lambda display, what: doings.append(what))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = {"sft": "uniform", "adapt": "adapt", "mos": "mos_diff"}[recipe]
    root = Path(__file__).parents[1]
    schema = shipped.schema(str(root / "recipes" / f"{recipe}_full_finetune.py"))
    few = ["budget.tokens=192", "tasks.num_validation_rows=8", "probe.examples=2", "mixture_update_every=1"]
    few += ["reward.examples=fixed"] * (recipe == "mos")
    overrides = [f"output_dir={tmp_path / 'run'}", "validate_every=0", *few[: 2 if recipe == "sft" else None]]
    assert sys.modules[schema.__module__].main(load(schema, root / "yaml" / f"tiny_{config}.yaml", overrides)) == 0
    slow = [what for what in doings if not what.startswith("step")]
    assert slow[0] == ("measuring the base model" if recipe == "mos" else "validating") and slow[-1] == "validating"
    assert ("updating the mixture" in slow) == (recipe != "sft")


@pytest.mark.parametrize("num_tasks", [1, 3, 60, 200])
@pytest.mark.parametrize(("width", "height"), [(80, 24), (100, 40), (200, 50)])
def test_it_stays_readable(num_tasks: int, width: int, height: int) -> None:
    names = [f"A Task Type With a Rather Long Name {i}" if i % 2 else f"task {i}" for i in range(num_tasks)]
    out = console(width=width, height=height)
    display = Display([task(name) for name in names], budget_tokens=10**9, log_every=1, console=out)
    p = torch.arange(1, num_tasks + 1).double()
    display.mixture(p / p.sum(), seconds=1.0)
    out.print(display._view())
    lines = shown(out).splitlines()
    assert len(lines) <= height and max(map(len, lines)) <= width
    if num_tasks <= height - 6:
        assert all(any(name[:16] in line for line in lines) for name in names)
    else:
        assert names[-1][:16] in "".join(lines), "the largest shares stay"
    assert "…" not in "".join(lines), "no number is cut"


@pytest.mark.parametrize("width", [60, 80])
def test_names_in_the_tables_give_way_and_numbers_do_not(width: int, tmp_path: Path) -> None:
    out = console(width=width)
    names = [f"A Task Type With a Rather Long Name {i}" for i in range(2)]
    display = Display([task(name) for name in names], budget_tokens=30, log_every=0, console=out)
    p = torch.tensor([0.25, 0.75], dtype=torch.float64)
    display.plan(p, ledger=Ledger(30, 2), steps="about 6 steps of 5 examples", where="on cpu")
    rows = [line for line in shown(out).splitlines() if line.strip().startswith("A Task")]
    assert [row.split()[-5:] for row in rows] == [["20", "3", "20", "20", f"{each:.3f}"] for each in p.tolist()]


SUMMARY = Summary(
    strategy="uniform",
    seed=0,
    budget_tokens=30,
    supervised_tokens=30,
    total_tokens=300,
    tokens=60,
    computed_tokens=90,
    unique_supervised_tokens=30,
    stopped_early=False,
    unspent_tokens=0,
    probe_tokens=40,
    probe_total_tokens=120,
    validation_tokens=50,
    validation_total_tokens=120,
    task_tokens={"one": 10, "two": 20},
    probabilities={"one": 0.25, "two": 0.75},
    validation_losses={"one": 1.0, "two": float("nan")},
    initial_validation_losses={"one": 2.0, "two": float("nan")},
    worst_validation_loss=1.0,
    mean_validation_loss=1.0,
    saved_validation_losses={"one": 1.0, "two": float("nan")},
    validation_exact_match={"one": 0.25, "two": float("nan")},
    mean_validation_exact_match=0.25,
    validation_bits_per_byte={"one": 1.5, "two": float("nan")},
    mean_validation_bits_per_byte=1.5,
    seconds=3.21,
    mixture_seconds=0.0,
    validation_seconds=0.0,
    steps=6,
    mixture_updates=0,
    left_out={},
    data_fingerprint="0",
)


def test_the_plan_and_the_results(tmp_path: Path) -> None:
    out = console(width=80)
    display = Display([task("one"), task("two", validated=False)], budget_tokens=30, log_every=0, console=out)
    p = torch.tensor([0.25, 0.75], dtype=torch.float64)
    display.plan(p, ledger=Ledger(30, 2), steps="about 6 steps of 5 examples", where="on cpu")
    assert "budget: 30 supervised tokens (75.0% of the 40 there are), in about 6 steps of 5" in shown(out)
    rows = {line.split()[0]: line.split()[1:] for line in shown(out).splitlines() if line.split()}
    assert rows["task"] == ["examples", "dropped", "sup.", "tokens", "held", "out", "p"], "the words of a plan"
    assert rows["one"] == ["20", "3", "20", "20", "0.250"] and rows["two"] == ["20", "3", "20", "-", "0.750"]
    display.results(SUMMARY, folder=tmp_path)
    rows = {line.split()[0]: line.split()[1:] for line in shown(out).splitlines() if line.split()}
    assert rows["one"] == ["0.250", "10", "33.3%", "2.000", "1.000"]
    assert rows["two"] == ["0.750", "20", "66.7%", "-", "-"]
    assert "uniform: validation loss worst 1.0000, mean 1.0000\n" in shown(out)
    assert "validation: exact match 0.250, 1.500 bits per byte, means over tasks\n" in shown(out)
    said = " ".join(shown(out).split())
    assert "mixture updates read 40 more, validation and test 50; 300 tokens read in all" in said
    assert str(tmp_path) in shown(out)


def test_the_plan_and_the_results_with_a_test_split(tmp_path: Path) -> None:
    out = console(width=80)
    display = Display([task("one"), task("two", tested=True)], budget_tokens=30, log_every=0, console=out)
    display.plan(
        torch.full((2,), 0.5, dtype=torch.float64),
        ledger=Ledger(30, 2),
        steps="about 6 steps of 5 examples",
        where="on cpu",
    )
    rows = {line.split()[0]: line.split()[1:] for line in shown(out).splitlines() if line.split()}
    assert rows["task"][-4:] == ["held", "out", "test", "p"]
    assert rows["one"][-3:] == ["20", "-", "0.500"] and rows["two"][-3:] == ["20", "20", "0.500"]
    nan = float("nan")
    measured = {"test_losses": {"one": 3.0, "two": nan}, "worst_test_loss": 3.0, "mean_test_loss": 3.0}
    measured |= {"test_exact_match": {"one": 0.125, "two": nan}, "mean_test_exact_match": 0.125}
    measured |= {"test_bits_per_byte": {"one": nan, "two": nan}, "mean_test_bits_per_byte": nan}
    display.results(replace(SUMMARY, **measured), folder=tmp_path)
    rows = {line.split()[0]: line.split()[1:] for line in shown(out).splitlines() if line.split()}
    assert rows["task"][-2:] == ["test", "loss"]
    assert rows["one"][-2:] == ["1.000", "3.000"] and rows["two"][-2:] == ["-", "-"]
    assert "uniform: validation loss worst 1.0000, mean 1.0000; test loss worst 3.0000, mean 3.0000\n" in shown(out)
    assert "test: exact match 0.125, - bits per byte, means over tasks\n" in shown(out)


@pytest.mark.parametrize("width", [80, 100])
def test_a_wide_terminal_has_room_for_other_units(tmp_path: Path, width: int) -> None:
    out = console(width=width)
    Display([task("one"), task("two")], budget_tokens=30, log_every=0, console=out).results(SUMMARY, folder=tmp_path)
    rows = {line.split()[0]: line.split()[1:] for line in shown(out).splitlines() if line.split()}
    assert rows["task"][-3:] == (["exact", "match", "bits/byte"] if width == 100 else ["before", "loss", "after"])
    assert rows["one"][-2:] == (["0.250", "1.500"] if width == 100 else ["2.000", "1.000"])
