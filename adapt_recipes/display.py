"""What a person sees of a run: a progress bar on a terminal, plain lines elsewhere, and a table at the end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from adapt_recipes.budget import Ledger
from adapt_recipes.data import Task


class Display:
    """Progress of the budget, loss and speed.

    Args:
        budget_tokens: supervised tokens the run will spend.
        log_every: steps between plain lines where there is no terminal; 0: only the first and the last step.
        console: where to write; default: standard output.
    """

    def __init__(self, budget_tokens: int, *, log_every: int, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self._budget_tokens = budget_tokens
        self._log_every = log_every
        self._progress = Progress(
            TextColumn("step {task.fields[step]}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} supervised tokens"),
            TextColumn("loss {task.fields[loss]:.3f}"),
            TextColumn("{task.fields[tokens_per_second]:,.0f} tokens/s"),
            TimeRemainingColumn(),
            console=self.console,
            expand=True,
            refresh_per_second=4,
        )
        self._bar = self._progress.add_task("run", total=budget_tokens, step=0, loss=0.0, tokens_per_second=0.0)
        self._resumed_at: tuple[float, int, int] | None = (
            None  # seconds, tokens and supervised tokens at the first step
        )

    def start(self) -> None:
        """Show the bar, where there is a terminal."""
        if self.console.is_terminal:
            self._progress.start()

    def say(self, text: str) -> None:
        """One line above the bar."""
        self.console.print(text, soft_wrap=True, markup=False)

    def step(self, step: int, loss: float, ledger: Ledger, seconds: float) -> None:
        """Training step ``step`` is done, ``seconds`` since the run began."""
        supervised_tokens, tokens = ledger.supervised_tokens, ledger.tokens
        first = self._resumed_at is None
        if self._resumed_at is None:
            self._resumed_at = (seconds, tokens, supervised_tokens)
        elapsed = max(seconds - self._resumed_at[0], 1e-9)
        speed = (tokens - self._resumed_at[1]) / elapsed
        if self.console.is_terminal:
            self._progress.update(self._bar, completed=supervised_tokens, step=step, loss=loss, tokens_per_second=speed)
        elif first or supervised_tokens >= self._budget_tokens or (self._log_every and step % self._log_every == 0):
            spent = supervised_tokens - self._resumed_at[2]
            left = (self._budget_tokens - supervised_tokens) * elapsed / spent if spent else float("nan")
            self.say(
                f"step {step}: {supervised_tokens:,}/{self._budget_tokens:,} supervised tokens "
                f"({supervised_tokens / self._budget_tokens:.1%}), loss {loss:.4f}, {speed:,.0f} tokens/s"
                + (f", {left:.0f} s left" if spent else "")
            )

    def plan(
        self, tasks: Sequence[Task], probabilities: Tensor, *, ledger: Ledger, batch_size: int, where: str
    ) -> None:
        """What is about to happen: each task's share, training split (in supervised tokens) and validation split."""
        available = [int(task.train.num_supervised.sum()) for task in tasks]
        table = _table("", "p", "examples", "tokens", "held out", "too long")
        for task, p, tokens in zip(tasks, probabilities.tolist(), available, strict=True):
            held_out = f"{len(task.validation):,}" if task.validation is not None else "-"
            table.add_row(
                task.name, f"{p:.3f}", f"{len(task.train):,}", f"{tokens:,}", held_out, f"{task.num_dropped:,}"
            )
        self.console.print(table)
        # p is a share of tokens: a task's share of examples is p over its mean length
        lengths = torch.tensor([tokens / len(task.train) for task, tokens in zip(tasks, available, strict=True)])
        num_steps = max(1, round(ledger.budget_tokens * float((probabilities / lengths).sum()) / batch_size))
        self.say(
            f"budget: {ledger.budget_tokens:,} of {sum(available):,} supervised tokens, about {num_steps:,} steps of "
            f"{batch_size} examples, {where}"
        )

    def results(self, summary: Mapping[str, Any], *, folder: Path) -> None:
        """The end of a run, from its ``summary.json``."""
        table = _table("", "p", "tokens", "share", "loss before", "loss after")
        for name, p in summary["probabilities"].items():
            tokens = summary["task_tokens"][name]
            losses = (summary[key][name] for key in ("initial_validation_losses", "validation_losses"))
            share = f"{tokens / summary['budget_tokens']:.1%}"
            shown = (f"{loss:.3f}" if math.isfinite(loss) else "-" for loss in losses)
            table.add_row(name, f"{p:.3f}", f"{tokens:,}", share, *shown)
        self.console.print(table)
        self.say(
            f"{summary['strategy']}: validation loss worst {summary['worst_validation_loss']:.4f}, mean "
            f"{summary['mean_validation_loss']:.4f}, after {summary['supervised_tokens']:,} supervised tokens in "
            f"{summary['steps']:,} steps and {summary['seconds']:.1f} s; probes and validation read "
            f"{summary['probe_tokens']:,} more\nresults: {folder}/summary.json, log.jsonl, model/"
        )

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self.console.is_terminal:
            self._progress.stop()


def _table(*columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    return table
