"""The signals that stop a run. Outside of the training loop they end the process, with one line and a status."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from types import FrameType
from typing import Any

# `kill` and torchrun; Ctrl-C; a closed terminal; SLURM's warning before a time limit (`--signal=USR1`).
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


def stop_signals() -> list[signal.Signals]:
    """``STOP_SIGNALS``, without SIGHUP if it is ignored, as under ``nohup``."""
    return [each for each in STOP_SIGNALS if each != signal.SIGHUP or signal.getsignal(each) is not signal.SIG_IGN]


def exit_now(number: int, frame: FrameType | None) -> None:
    """A handler: ends the process at once. Of several processes the first one prints the line."""
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):
            os.write(2, f"stopped by {signal.Signals(number).name}; nothing new is saved\n".encode())
    os._exit(128 + number)


def exit_on_signals() -> dict[signal.Signals, Any]:
    """Makes ``exit_now`` the handler, until a run sets its own. Returns the handlers before."""
    return {number: signal.signal(number, exit_now) for number in stop_signals()}
