"""The signals that stop a run. Outside of the training loop they end the process, with one line and a status."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

# `kill` and torchrun; Ctrl-C; a closed terminal; SLURM's warning before a time limit (`--signal=USR1`).
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


# In the environment of processes that `tune run` starts: a file that the first one of a host removes when it has
# printed how it ended. Where it is left, the process ended before it could print, and `tune run` prints the line.
NOTHING_PRINTED = "ADAPT_RECIPES_NOTHING_PRINTED"


def stop_signals() -> list[signal.Signals]:
    """``STOP_SIGNALS``, without SIGHUP if it is ignored, as under ``nohup``."""
    return [each for each in STOP_SIGNALS if each != signal.SIGHUP or signal.getsignal(each) is not signal.SIG_IGN]


def print_nothing_saved(number: int) -> None:
    """Prints the line of a stop at which nothing is saved; whoever reads it may be gone."""
    with contextlib.suppress(OSError):
        os.write(2, f"stopped by {signal.Signals(number).name}; nothing new is saved\n".encode())


def end_is_printed() -> None:
    """Tells the `tune run` that has started this process, if any, that it need not print how the run ended."""
    if os.environ.get("LOCAL_RANK", "0") == "0" and (left := os.environ.get(NOTHING_PRINTED)):
        with contextlib.suppress(OSError):
            Path(left).unlink()


def exit_now(number: int, frame: FrameType | None) -> None:
    """A handler: ends the process at once. Of several processes the first one prints the line."""
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    if os.environ.get("RANK", "0") == "0":
        print_nothing_saved(number)
    end_is_printed()
    os._exit(128 + number)


def exit_on_signals() -> dict[signal.Signals, Any]:
    """Makes ``exit_now`` the handler, until a run sets its own. Returns the handlers before."""
    return {number: signal.signal(number, exit_now) for number in stop_signals()}
