"""SIGTERM and Ctrl-C end a run at the next step boundary, where it can be saved."""

from __future__ import annotations

import math
import os
import signal
import sys
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from adapt_recipes.training.process_group import world_size
from adapt_recipes.training.sockets import COLLECTIVE_TIMEOUT

DISK_SPEED = 200_000_000  # bytes per second, of a disk that is neither fast nor unshared
STOP_TIMEOUT = timedelta(seconds=10)  # at a boundary that all processes are about to reach


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
                options.timeout = STOP_TIMEOUT if self._noted else COLLECTIVE_TIMEOUT
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


def checkpoint_timeout_warning(model: nn.Module) -> str | None:
    """What to say where torchrun may kill a run before it is saved, as it does some time after SIGTERM or Ctrl-C.

    Reckoned from the model alone: its weights, and two numbers more for each that is trained, as Adam has them.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    wait = int(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30"))  # seconds; this is torchrun's own default
    num_bytes = sum(p.numel() * p.element_size() * (3 if p.requires_grad else 1) for p in model.parameters())
    seconds = num_bytes / DISK_SPEED
    if seconds <= wait:
        return None
    return (
        f"warning: a checkpoint of {num_bytes / 1e9:.1f} GB may take {seconds:.0f} s to write, and torchrun kills a "
        f"run {wait} s after SIGTERM or Ctrl-C; set TORCH_ELASTIC_SHUTDOWN_TIMEOUT={math.ceil(2 * seconds)} before "
        "`tune run`, or count on the checkpoint before"
    )
