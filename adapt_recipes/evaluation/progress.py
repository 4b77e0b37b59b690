"""Shows that something takes long: lm-eval's own bars on a terminal, else a line every minute."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import threading
import time
from collections.abc import Iterator

LINE_SECONDS = 60.0


@contextlib.contextmanager
def shows(what: str) -> Iterator[None]:
    """Says what the block does, and without a terminal every minute for how long."""
    # Its warnings are about options that the recipe sets.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if sys.stderr.isatty():
        print(what, file=sys.stderr, flush=True)
        yield
        return
    stream, began, ended = sys.stderr, time.monotonic(), threading.Event()

    def say_again() -> None:
        while not ended.wait(LINE_SECONDS):
            print(f"{what}: {time.monotonic() - began:.0f} s", file=stream, flush=True)

    threading.Thread(target=say_again, daemon=True).start()
    try:
        # The bars write a line per step where there is no terminal.
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        ended.set()
