"""Shares the tasks of an evaluation between the processes that torchrun has started.

Each process opens the model by itself and takes the next task that nobody has taken; so scores do not depend on the
number of processes, and they need no communication but a counter.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")

_POLL_SECONDS = 0.5
# What makes accelerate and lm-eval, which share each task between processes, take this one for one of several.
_LAUNCHER_VARIABLES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class SharedWork:
    """The processes of an evaluation.

    Attributes:
        is_first: whether this process prints the results.
    """

    def __init__(self) -> None:
        self._store: Any = None
        self._size = int(os.environ.get("WORLD_SIZE", "1"))
        self.is_first = os.environ.get("RANK", "0") == "0"
        if self._size > 1:
            store, _, _ = next(iter(dist.rendezvous("env://")))
            self._store = dist.PrefixStore("mixture_eval", store)
            for name in _LAUNCHER_VARIABLES:
                os.environ.pop(name, None)

    def taken(self, jobs: Sequence[T]) -> Iterator[T]:
        """The jobs that this process does; all processes give the same ones."""
        if self._store is None:
            yield from jobs
            return
        while (number := self._store.add("taken", 1) - 1) < len(jobs):
            yield jobs[number]

    def wait(self) -> None:
        """Returns when all processes have come here, because torchrun ends the others when one exits with an error."""
        if self._store is None:
            return
        self._store.add("done", 1)
        # The first process, which has the counter, ends when all have come, and the others may ask once more.
        with contextlib.suppress(dist.DistNetworkError):
            while self._store.add("done", 0) < self._size:
                time.sleep(_POLL_SECONDS)
