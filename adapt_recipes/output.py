"""Standard output and error of a run: shown to people, and never a reason to end it."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

# Streams that could not be written, as warnings for the log.
_warnings: list[str] = []


class _Stream:
    """A text stream that becomes silent, with one warning, when it cannot be written."""

    def __init__(self, name: str, stream: Any) -> None:
        self._name, self._stream = name, stream
        self._is_silent = False

    def write(self, text: str) -> int:
        if not self._is_silent:
            try:
                return self._stream.write(text)
            except (OSError, ValueError) as error:
                self._silence(error)
        return len(text)

    def flush(self) -> None:
        if not self._is_silent:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._silence(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _silence(self, error: Exception) -> None:
        self._is_silent = True
        # What is still in a buffer, and what other code writes to the descriptor, goes nowhere.
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
        reason = getattr(error, "strerror", None) or error
        _warnings.append(f"{self._name} cannot be written ({reason}); the run goes on without it")
        other = sys.stderr if self._name == "stdout" else sys.stdout
        print(f"warning: {_warnings[-1]}", file=other)


@contextlib.contextmanager
def never_fatal() -> Iterator[None]:
    """In the block a closed pipe or a full disk under stdout or stderr silences it, and does not raise."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Stream("stdout", sys.stdout), _Stream("stderr", sys.stderr)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = streams


def take_warnings() -> list[str]:
    """Warnings about streams that were silenced since the last call."""
    taken = list(_warnings)
    _warnings.clear()
    return taken
