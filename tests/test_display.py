"""What a person sees: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from rich.console import Console

from adapt_recipes.budget import Ledger
from adapt_recipes.data import Examples, Task
from adapt_recipes.display import Display


def spent(ledger: Ledger, tokens: int) -> Ledger:
    ledger.spend(torch.tensor([tokens, 0]), unique=tokens, batches=[])
    ledger.tokens += 10 * tokens
    return ledger


def steps(console: Console, log_every: int) -> None:
    display = Display(100, log_every=log_every, console=console)
    display.start()
    ledger = Ledger(100, 2)
    for step in range(1, 6):
        display.step(step, 1.0 / step, spent(ledger, 20), seconds=2.0 * step)
    display.close()


def plain(log_every: int) -> list[str]:
    console = Console(file=io.StringIO(), width=120)
    steps(console, log_every)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_plain_lines_where_there_is_no_terminal() -> None:
    lines = plain(log_every=2)
    assert [line.split(":")[0] for line in lines] == ["step 1", "step 2", "step 4", "step 5"]
    assert lines[2] == "step 4: 80/100 supervised tokens (80.0%), loss 0.2500, 100 tokens/s, 2 s left"
    assert [line.split(":")[0] for line in plain(log_every=0)] == ["step 1", "step 5"]
    assert not any("\x1b" in line for line in lines)


def test_a_bar_on_a_terminal() -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    steps(console, log_every=1)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for part in ("step 5", "100%", "100/100", "loss", "0.200", "100", "tokens/s"):
        assert part in shown
    assert "step 4:" not in shown, "no plain lines besides"


def test_the_plan_and_the_results(tmp_path: Path) -> None:
    tokens = torch.zeros(40, dtype=torch.int32)
    examples = Examples(tokens, torch.tensor([False, True] * 20), torch.arange(0, 41, 2), torch.arange(20))
    tasks = [Task("one", examples, examples, num_dropped=3), Task("two", examples, None)]
    console = Console(file=io.StringIO(), width=100)
    display = Display(30, log_every=0, console=console)
    p = torch.tensor([0.25, 0.75], dtype=torch.float64)
    display.plan(tasks, p, ledger=Ledger(30, 2), batch_size=5, where="on cpu")
    summary = {
        "strategy": "uniform",
        "probabilities": {"one": 0.25, "two": 0.75},
        "task_tokens": {"one": 10, "two": 20},
        "budget_tokens": 30,
        "initial_validation_losses": {"one": 2.0, "two": float("nan")},
        "validation_losses": {"one": 1.0, "two": float("nan")},
        "worst_validation_loss": 1.0,
        "mean_validation_loss": 1.0,
        "supervised_tokens": 30,
        "steps": 6,
        "seconds": 3.21,
        "probe_tokens": 40,
    }
    display.results(summary, folder=tmp_path)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    rows = {line.split()[0]: line.split()[1:] for line in shown.splitlines() if line.split()}
    assert "budget: 30 of 40 supervised tokens, about 6 steps of 5 examples, on cpu" in shown
    assert rows["one"] == ["0.250", "10", "33.3%", "2.000", "1.000"]
    assert rows["two"] == ["0.750", "20", "66.7%", "-", "-"]
    assert "probes and validation read 40 more" in shown and str(tmp_path) in shown
