"""The display of a run: a live view on a terminal or plain lines elsewhere, and a table before and after."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor

from adapt_recipes.budget import Ledger
from adapt_recipes.data import Examples, LeftOut, Task
from adapt_recipes.events import Summary

# A terminal with fewer columns has no room for all numbers beside the names of tasks.
WIDE = 100
# A refresh takes a few milliseconds.
REFRESHES_PER_SECOND = 1
# Mixture updates over which the direction of a probability is shown.
RECENT_UPDATES = 5
# Lines of the live view besides one per task.
OTHER_LINES = 6


class Display:
    """Shows the progress of the budget, loss and speed, and the state of each task.

    Args:
        tasks: in the order of the mixture.
        targets: tasks that are validated on and never trained.
        budget_tokens: supervised tokens the run will spend.
        log_every: steps between plain lines if there is no terminal; 0: only the first and the last step.
        console: default: standard output.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        *,
        targets: Sequence[Task] = (),
        budget_tokens: int,
        log_every: int,
        console: Console | None = None,
    ) -> None:
        self.console = console or Console(highlight=False)
        self._tasks, self._targets = tasks, targets
        self._budget_tokens = budget_tokens
        self._log_every = log_every
        # Seconds, tokens and supervised tokens at the first step since the start or resume.
        self._first_step: tuple[float, int, int] | None = None
        self._probabilities: deque[list[float]] = deque(maxlen=RECENT_UPDATES + 1)
        self._train_losses = [math.nan] * len(tasks)
        self._validation_losses = [math.nan] * len(tasks)
        self._task_tokens = [0] * len(tasks)
        self._num_drawn = [0] * len(tasks)
        self._step = 0
        self._line = ""
        self._mixture_seconds = 0.0
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} supervised"),
            TimeRemainingColumn(),
            console=self.console,
            expand=True,
        )
        self._bar = self._progress.add_task("step 0", total=budget_tokens)
        self._live = Live(
            get_renderable=self._view, console=self.console, refresh_per_second=REFRESHES_PER_SECOND, transient=True
        )

    def start(self) -> None:
        """Shows the live view, if there is a terminal."""
        if self.console.is_terminal:
            self._live.start()

    def close(self) -> None:
        """Removes the live view."""
        if self.console.is_terminal:
            self._live.stop()

    def say(self, text: str) -> None:
        """Prints text above the live view, wrapped on a terminal and unwrapped in a pipe."""
        self.console.print(text, soft_wrap=not self.console.is_terminal, markup=False)

    def doing(self, what: str) -> None:
        """Shows a phase that takes a while in place of the step number."""
        self._progress.update(self._bar, description=what)

    def mixture(self, probabilities: Tensor, seconds: float) -> None:
        """Shows the mixture that is used from now on. ``seconds`` is the total time of all updates."""
        self._probabilities.append(probabilities.tolist())
        self._mixture_seconds = seconds
        self.doing(f"step {self._step:,}")

    def validation(self, losses: Tensor) -> None:
        """Shows the losses of a validation; NaN for tasks without one."""
        self._validation_losses = losses.tolist()
        self.doing(f"step {self._step:,}")

    def step(
        self, step: int, loss: float, ledger: Ledger, seconds: float, *, task_losses: Tensor, num_drawn: Tensor
    ) -> None:
        """Shows training step ``step``, ``seconds`` after the run began; losses are NaN for tasks not in the step."""
        # Losses, as moving averages over steps.
        self._task_tokens, self._num_drawn = ledger.task_tokens.tolist(), num_drawn.tolist()
        for i, task_loss in enumerate(task_losses.tolist()):
            if not math.isnan(task_loss):
                before = self._train_losses[i]
                self._train_losses[i] = task_loss if math.isnan(before) else 0.9 * before + 0.1 * task_loss
        is_first = self._first_step is None
        if self._first_step is None:
            self._first_step = (seconds, ledger.tokens, ledger.supervised_tokens)

        # Speed over all tokens. The first step has none, because the time before it includes more than the step.
        elapsed = max(seconds - self._first_step[0], 1e-9)
        speed = "" if is_first else f"{(ledger.tokens - self._first_step[1]) / elapsed:,.0f} tokens/s"
        spent, total = ledger.supervised_tokens, self._budget_tokens
        self._step = step
        self._progress.update(self._bar, completed=spent, description=f"step {step:,}")
        updates = f"mixture updates {self._mixture_seconds / max(seconds, 1e-9):.1%} of the time"
        self._line = "   ".join(filter(None, (f"loss {loss:.4f}", speed, updates)))

        # A plain line.
        is_due = is_first or spent >= total or (self._log_every and step % self._log_every == 0)
        if is_due and not self.console.is_terminal:
            since = spent - self._first_step[2]
            left = f"{(total - spent) * elapsed / since:.0f} s left" if since else ""
            share = f"{spent:,}/{total:,} supervised tokens ({spent / total:.1%})"
            self.say(", ".join(filter(None, (f"step {step}: {share}", f"loss {loss:.4f}", speed, left))))

    def plan(self, probabilities: Tensor, *, ledger: Ledger, steps: str, where: str) -> None:
        """Prints each task's share, training split (in supervised tokens) and held-out examples before a run.

        Args:
            probabilities: (num_tasks,) float64, of the mixture.
            ledger: of the run.
            steps: how many there will be, of which size.
            where: the run computes, and how.
        """
        available = [int(task.train.num_supervised.sum()) for task in self._tasks]
        columns, cells = left_out_columns([task.left_out for task in self._tasks], width=self.console.width)
        has_test = any(task.test is not None for task in self._tasks)
        table = task_table("examples", *columns, "sup. tokens", "held out", *["test"] * has_test, "p")
        for task, p, tokens in zip(self._tasks, probabilities.tolist(), available, strict=True):
            held_out = [_size(task.validation), *[_size(task.test)] * has_test]
            table.add_row(
                task_name(task.name),
                f"{len(task.train):,}",
                *(f"{number:,}" for number in cells(task.left_out)),
                f"{tokens:,}",
                *held_out,
                f"{p:.3f}",
            )
        self.console.print(table)
        for line in [*unused_keys([task.left_out for task in self._tasks]), *target_lines(self._targets)]:
            self.say(line)
        self.say(f"budget: {of_available(ledger.budget_tokens, sum(available))}, in {steps}, {where}")

    def results(self, summary: Summary, *, folder: Path) -> None:
        """Prints the results at the end of a run."""
        test_losses = summary.test_losses
        split = "test" if test_losses else "validation"
        # Other units of the last loss, if there is room.
        units = {"exact match": f"{split}_exact_match", "bits/byte": f"{split}_bits_per_byte"}
        shown = units if self.console.width >= WIDE else {}
        columns = ["p", "spent", "of budget", "loss before", "loss after", *["test loss"] * bool(test_losses), *shown]
        table = task_table(*columns)
        for name, p in summary.probabilities.items():
            tokens = summary.task_tokens[name]
            losses = [summary.initial_validation_losses[name], summary.validation_losses[name]]
            losses += [test_losses[name]] if test_losses else []
            losses += [getattr(summary, key)[name] for key in shown.values()]
            share = f"{tokens / summary.budget_tokens:.1%}"
            table.add_row(task_name(name), f"{p:.3f}", f"{tokens:,}", share, *map(_number, losses))
        for name, loss in (summary.target_losses or {}).items():
            losses = [(summary.initial_target_losses or {})[name], loss]
            losses += [(summary.target_test_losses or {})[name]] if test_losses else []
            prefix = "target_test" if test_losses else "target"
            target_units = [key.replace(split, prefix) for key in shown.values()]
            losses += [getattr(summary, key)[name] for key in target_units]
            table.add_row(task_name(name), "target", "-", "-", *map(_number, losses))
        self.console.print(table)
        more = ""
        if summary.target_losses:
            more = f"; target loss worst {summary.worst_target_loss:.4f}, mean {summary.mean_target_loss:.4f}"
        if test_losses:
            more += f"; test loss worst {summary.worst_test_loss:.4f}, mean {summary.mean_test_loss:.4f}"
        means = [_number(getattr(summary, f"mean_{key}")) for key in units.values()]
        self.say(
            f"{summary.strategy}: validation loss worst {summary.worst_validation_loss:.4f}, "
            f"mean {summary.mean_validation_loss:.4f}{more}\n"
            f"{split}: exact match {means[0]}, {means[1]} bits per byte, means over tasks\n"
            f"{summary.supervised_tokens:,} supervised tokens in {summary.steps:,} steps and {summary.seconds:.1f} s; "
            f"mixture updates read {summary.probe_tokens:,} more, validation and test {summary.validation_tokens:,}; "
            f"{summary.total_tokens:,} tokens read in all\n"
            f"results: {folder}/summary.json, log.jsonl, model/"
        )

    def _view(self) -> RenderableType:
        """The live view: as many tasks as fit, those with the largest p, in columns if there is room.

        It consists of plain lines of text, because rich takes 50 ms to render a table of 60 tasks.
        """
        width, height = self.console.size
        rows = self._rows()
        name_width = max(4, min(max(len(name) for name, *_ in rows), 32, width - len(_HEADER)))
        num_columns = max(1, width // (name_width + len(_HEADER) + 3))
        per_column = min(max(height - OTHER_LINES, 3), math.ceil(len(rows) / num_columns))
        shown = sorted(range(len(rows)), key=lambda i: -rows[i][1])[: per_column * num_columns]
        lines = [f"{rows[i][0]:<{name_width}.{name_width}}{rows[i][2]}" for i in sorted(shown)]
        columns = [lines[start : start + per_column] for start in range(0, len(lines), per_column)]
        header = "   ".join([" " * name_width + _HEADER] * len(columns))
        body = ["   ".join(parts) for parts in zip_longest(*columns, fillvalue="")]
        rest = [f"and {count(len(rows) - len(shown), 'task')} with smaller p"] if len(shown) < len(rows) else []
        return Group(self._progress, Text("\n".join([self._line, header, *body, *rest]), no_wrap=True))

    def _rows(self) -> list[tuple[str, float, str]]:
        """For every task: name, probability, and the cells under ``_HEADER``."""
        now = self._probabilities[-1] if self._probabilities else [0.0] * len(self._tasks)
        before = self._probabilities[0] if self._probabilities else now
        spent = max(sum(self._task_tokens), 1)
        rows = []
        for i, task in enumerate(self._tasks):
            direction = "↑" if now[i] > 1.05 * before[i] else "↓" if now[i] < 0.95 * before[i] else " "
            cells = f"  {now[i]:.3f} {direction} {self._task_tokens[i] / spent:6.1%}"
            cells += f"  {_number(self._train_losses[i]):>6}  {_number(self._validation_losses[i]):>6}"
            cells += f"  {self._num_drawn[i]:8,}  {self._num_drawn[i] / len(task.train):6.2f}"
            rows.append((task.name, now[i], cells))
        return rows


_HEADER = "      p    spent   train   valid      seen  epochs"


def _number(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "-"


def _size(split: Examples | None) -> str:
    return "-" if split is None else f"{len(split):,}"


def count(number: int, noun: str) -> str:
    """A number and a noun, in the plural unless the number is 1."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def of_available(num_tokens: int, available: int) -> str:
    """A budget in supervised tokens, and as a share of the available ones."""
    ratio = num_tokens / available
    part = f"{ratio:.1f} times" if ratio > 1 else f"{ratio:.1%} of"
    return f"{count(num_tokens, 'supervised token')} ({part} the {available:,} there are)"


def task_table(*columns: str) -> Table:
    """An empty table with a row per task: ``task_name``, and then numbers, which are never truncated."""
    table = Table("task", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def left_out_columns(of_tasks: Sequence[LeftOut], *, width: int) -> tuple[list[str], Callable[[LeftOut], list[int]]]:
    """Columns of a ``task_table`` about what is not trained on, and a function that computes a task's cells.

    After the examples that are dropped come those for each reason that occurs besides their length, if there is room.
    """
    reasons = {"bad rows": "bad_rows", "no label": "unlabeled", "leaks": "leaked_examples", "context": "leaked_answers"}
    occur = {title: key for title, key in reasons.items() if any(getattr(each, key) for each in of_tasks)}
    shown = occur if width >= WIDE else {}
    return ["dropped", *shown], lambda each: [each.examples, *(getattr(each, key) for key in shown.values())]


def unused_keys(of_tasks: Sequence[LeftOut]) -> list[str]:
    """A line about the keys of rows that are not used, under the table of tasks; none if there are no such keys."""
    counts: Counter[str] = Counter()
    for each in of_tasks:
        counts.update(each.unused_keys)
    named = ", ".join(f"{key} ({count(number, 'row')})" for key, number in counts.most_common())
    return [f"keys that are not used: {named}"] if counts else []


def target_lines(targets: Sequence[Task]) -> list[str]:
    """A line about the targets under the table of tasks; none if there are none."""
    sizes = [
        f"{task.name} ({' + '.join(f'{len(split):,}' for split in task.splits.values())} of "
        f"{sum(map(len, task.splits.values())) + task.left_out.examples:,} examples)"
        for task in targets
    ]
    return [f"targets, validated or tested on and never trained: {', '.join(sizes)}"] if sizes else []


def task_name(name: str) -> Text:
    """The first cell of a row of a ``task_table``, which is shortened on a narrow terminal.

    rich shrinks only a column that may wrap; the text itself does not wrap.
    """
    return Text(name, no_wrap=True, overflow="ellipsis")
