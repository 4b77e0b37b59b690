"""SIGTERM, Ctrl-C, SIGHUP and SIGUSR1 end a run at the next step boundary, where it can be saved."""

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

from adapt_recipes.stop import end_is_printed, stop_signals
from adapt_recipes.training.process_group import world_size
from adapt_recipes.training.sockets import COLLECTIVE_TIMEOUT

# Bytes per second, of a slow or shared disk.
DISK_SPEED = 200_000_000
# How long processes wait for each other to agree on a signal.
STOP_TIMEOUT = timedelta(seconds=10)


class StopSignals:
    """A context that records the first signal to stop, so that all processes can agree on it.

    On a single process a second signal has its usual effect. Several processes ignore it, because the launcher forwards
    signals that the processes have already received.

    Attributes:
        received: the signal on which all processes have agreed, or None.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._noted: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def exit_status(self) -> int:
        """The exit status after the signal: SIGTERM 143, Ctrl-C 130, SIGHUP 129, SIGUSR1 138; else 0."""
        return 128 + self.received if self.received else 0

    def agreed(self) -> bool:
        """Whether any process has received a signal; all processes call this at the same points.

        Raises:
            SystemExit: this process received a signal, and the others do not answer; nothing can be saved.
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
                    reason = f"stopped by {self._noted.name}, but not all processes answer"
                    print(f"error: {reason}; nothing is saved, the newest checkpoint stands", file=sys.stderr)
                    end_is_printed()
                    raise SystemExit(128 + self._noted) from None
            self.received = signal.Signals(int(number)) if number else None
        return self.received is not None

    def __enter__(self) -> StopSignals:
        for number in stop_signals():
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        self._restore()
        if kind is not None and world_size() > 1:
            # The process ends by itself and still has an error to print. The launcher, which has seen another process
            # end, would kill it before.
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
    """A warning if torchrun may kill a run after SIGTERM or Ctrl-C before its checkpoint is written; None: it will not.

    The size of the checkpoint is estimated from the model: its weights, and two more numbers per trained weight, as in
    Adam.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    # In seconds, with torchrun's default.
    wait = int(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30"))
    num_bytes = sum(p.numel() * p.element_size() * (3 if p.requires_grad else 1) for p in model.parameters())
    seconds = num_bytes / DISK_SPEED
    if seconds <= wait:
        return None
    return (
        f"warning: a checkpoint of {num_bytes / 1e9:.1f} GB may take {seconds:.0f} s to write, and torchrun kills a "
        f"run {wait} s after SIGTERM or Ctrl-C; set TORCH_ELASTIC_SHUTDOWN_TIMEOUT={math.ceil(2 * seconds)} before "
        "`tune run`, or count on the checkpoint before"
    )
