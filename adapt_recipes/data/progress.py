"""Says how far the preparation of data is: a bar on a terminal, else a line every ten seconds."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TextIO

# Between lines, and between redrawings of the bar.
_LINE_SECONDS, _BAR_SECONDS = 10.0, 0.5
_BAR_WIDTH = 24


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
        self._is_terminal = self._stream.isatty()
        self._began = self._shown = time.monotonic()
        self._has_bar = False

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._has_bar:
            print(file=self._stream)

    def update(self, *, bytes_done: int, examples: int, tokens: int) -> None:
        """Shows what is done so far, if it is time to."""
        now = time.monotonic()
        if now - self._shown < (_BAR_SECONDS if self._is_terminal else _LINE_SECONDS):
            return
        self._shown = now
        seconds, share = now - self._began, min(1.0, bytes_done / self._total)
        text = f"{examples:,} examples, {tokens / seconds:,.0f} tokens/s"
        if share > 0:
            text += f", {_duration(seconds / share - seconds)} left"
        if self._is_terminal:
            done = round(share * _BAR_WIDTH)
            bar = f"[{'#' * done}{'.' * (_BAR_WIDTH - done)}]"
            # \x1b[K clears what is left of a longer line.
            print(f"\r{self._what} {bar} {share:4.0%}, {text}\x1b[K", end="", file=self._stream, flush=True)
            self._has_bar = True
        else:
            print(f"{self._what}: {share:.0%}, {text}", file=self._stream, flush=True)


def _duration(seconds: float) -> str:
    """1:02:03, 2:03."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
