"""Says how far the preparation of data is: a bar on a terminal, else a line every ten seconds."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

_LINE_SECONDS = 10.0


class Progress:
    """The progress of one kind of work, on standard error.

    Args:
        what: is done: ``preparing data``.
        total_bytes: of the sources.
        stream: where it is written; None: standard error.
    """

    def __init__(self, what: str, *, total_bytes: int, stream: TextIO | None = None) -> None:
        self._what = what
        self._total = max(1, total_bytes)
        self._stream = stream or sys.stderr
        self._began = self._shown = time.monotonic()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TextColumn("{task.fields[counts]}"),
            TimeRemainingColumn(),
        )
        self._bar = Bar(*columns, console=Console(file=self._stream), disable=not self._stream.isatty())
        self._task = self._bar.add_task(what, total=self._total, counts="")

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._bar.stop()

    def update(self, *, bytes_done: int, examples: int, tokens: int) -> None:
        """What is done so far; shows it if it is time to."""
        now = time.monotonic()
        seconds, share = now - self._began, min(1.0, bytes_done / self._total)
        counts = f"{examples:,} examples, {tokens / max(seconds, 1e-9):,.0f} tokens/s"
        self._bar.update(self._task, completed=bytes_done, counts=counts)
        if self._bar.disable and now - self._shown >= _LINE_SECONDS:
            self._shown = now
            left = f", {timedelta(seconds=round(seconds / share - seconds))} left" if share else ""
            print(f"{self._what}: {share:.0%}, {counts}{left}", file=self._stream, flush=True)
