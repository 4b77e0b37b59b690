"""SIGTERM and Ctrl-C end a run at the next step boundary, where it can be saved."""

from __future__ import annotations

import signal
import sys
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from adapt_recipes.training.distributed import world_size
from adapt_recipes.training.sockets import ANSWER

PATIENCE = timedelta(seconds=10)  # at a boundary that all processes are about to reach


class StopSignals:
    """While entered, the first SIGTERM or SIGINT is noted, for all processes to agree on; a second one acts as it
    always does. Of several processes each ignores the second: the launcher passes on what others have sent already.

    Attributes:
        received: the signal on which all processes have agreed, or None.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._noted: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def exit_status(self) -> int:
        """What a process ends with that was stopped: 143 for SIGTERM, 130 for Ctrl-C; 0 where nothing was received."""
        return 128 + self.received if self.received else 0

    def agreed(self) -> bool:
        """Whether to stop here, as any process was told to; all of them ask at the same places.

        Raises:
            SystemExit: this process was told to stop, and the others do not answer; nothing may be saved.
        """
        if self.received is None:
            number = torch.tensor(self._noted or 0)
            if world_size() > 1:
                options = dist.AllreduceOptions()
                options.reduceOp = dist.ReduceOp.MAX  # type: ignore[assignment]
                options.timeout = PATIENCE if self._noted else ANSWER
                assert dist.group.WORLD is not None
                try:
                    dist.group.WORLD.allreduce([number], options).wait()
                except RuntimeError:
                    if self._noted is None:
                        raise
                    said = f"told to stop by {self._noted.name}, but not all processes answer"
                    print(f"error: {said}; nothing is saved, the newest checkpoint stands", file=sys.stderr)
                    raise SystemExit(128 + self._noted) from None
            self.received = signal.Signals(int(number)) if number else None
        return self.received is not None

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        self._restore()
        if kind is not None and world_size() > 1:
            # It ends by itself, with a line to say; the launcher, which saw another end before, would cut that off.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._noted is None:
            self._noted = signal.Signals(number)
        if world_size() == 1:
            self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
