"""The process group of a run, errors that all processes share, and collectives on small values.

torchrun starts the processes (``tune run --nproc_per_node 2 RECIPE ...``), and each runs the same recipe from top to
bottom. All functions here also work on a single process without a group, so a recipe needs no branch.

Code that may fail on one process while the others wait for it belongs in ``raise_on_all_ranks``.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torchtune import utils

from adapt_recipes.strict import config_differences
from adapt_recipes.training.sockets import RENDEZVOUS_TIMEOUT, detect_lost_hosts, set_collective_timeout

# As in torch. Reading and saving, which take longer, use gloo.
NCCL_TIMEOUT = timedelta(minutes=10)
# How long a network file system may not show a file that another host has created.
NFS_VISIBILITY_SECONDS = 60
LAUNCH_HINT = "start them with `tune run --nproc_per_node N RECIPE --config FILE`"
INTERFACE_HINT = (
    "set GLOO_SOCKET_IFNAME, and NCCL_SOCKET_IFNAME for cuda, to the network interface that joins the hosts"
)

T = TypeVar("T")


def rank() -> int:
    """The number of this process; process 0 writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def process_group(device: str | None, *, batch_size: int | None) -> Iterator[None]:
    """The group of the processes that torchrun has started, for the time of the block; one process needs none.

    Only process 0 prints to standard output. An error that ``raise_on_all_ranks`` has shared is printed by it alone.
    After an error the group is not destroyed; ``command_line`` prints the error and exits.

    Args:
        device: of the config; ``cpu`` uses gloo, ``cuda`` nccl.
        batch_size: of the config; None: it has ``batch_tokens``, and a step may have fewer examples than processes.

    Raises:
        ValueError: the processes do not connect, there are too few devices or examples for them, or the device cannot
            be used by several processes.
        ConnectionError: another process has ended or is unreachable; it gives the reason if it is known.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield
        return
    _end_with_launcher()
    with detect_lost_hosts():
        store = _meet(size, device)
    try:
        with raise_on_all_ranks():
            get_device(device)
            if batch_size is not None and batch_size < size:
                raise ValueError(f"batch_size: {batch_size} examples are too few for {size} processes; one each")
        with open(os.devnull, "w") as devnull, contextlib.ExitStack() as silence:
            if rank() > 0:
                silence.enter_context(contextlib.redirect_stdout(devnull))
            yield
        # A process that is done waits for the others, which may still need it.
        all_gather_object(None)
        # Not after an error, because nccl waits for kernels that wait for other processes.
        dist.destroy_process_group()
    except _ReportedByRankZero:
        raise SystemExit(2) from None
    except Exception as error:
        # Every message of gloo names its source file.
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
            raise ConnectionError(_lost_peer_reason(store, error)) from error
        # The process that has the store may be the one that is gone.
        with contextlib.suppress(RuntimeError):
            store.set(f"error/{rank()}", _one_line(error))
        raise


def get_device(name: str | None) -> torch.device:
    """The device of a config, set as the current one; None: the best available, one device per process.

    Raises:
        ValueError: this machine has no such device (torchtune would use the CPU for ``cuda``), or too few of them for
            the processes.
    """
    size, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    if size > 1 and name not in (None, "cpu", "cuda"):
        raise ValueError(f"device: '{name}' cannot be that of each of {size} processes; allowed: cpu, cuda")
    if name != "cpu" and torch.cuda.is_available() and size > 1 and local >= torch.cuda.device_count():
        here = os.environ.get("LOCAL_WORLD_SIZE", "more")
        raise ValueError(f"--nproc_per_node: {here} processes and {torch.cuda.device_count()} CUDA devices; one each")
    try:
        device = utils.get_device(name)
        if name is not None and device.type != torch.device(name).type:
            raise RuntimeError("there is none on this machine")
    except (RuntimeError, AssertionError, AttributeError) as error:
        raise ValueError(f"device: '{name}' cannot be used: {str(error).splitlines()[0]}") from error
    return device


@contextlib.contextmanager
def raise_on_all_ranks(*, in_turn: bool = False) -> Iterator[None]:
    """A block that succeeds on all processes, or raises the first process's error on all of them.

    All processes must enter it. Inside, a process may wait for others only in collectives that all of them call.

    Args:
        in_turn: the first process of each host runs the block before the others, which then find its results in a
            cache, shared by all hosts or not.
    """
    error: Exception | None = None
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if in_turn and not first:
        _share(None)
    try:
        yield
    except Exception as raised:
        error = raised
    if in_turn and first:
        _share(error)
    _share(error)


def all_gather_object(value: T) -> list[T]:
    """The values of all processes, by rank; for small values that can be pickled."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def all_reduce_sum(values: Tensor) -> Tensor:
    """The sum of a tensor on the CPU over all processes, with the same bits on all of them."""
    if world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def check_same(values: Mapping[str, Any], *, advice: str) -> None:
    """Refuses values that differ between processes.

    Args:
        values: nested mappings are compared key by key.
        advice: end of the error message.

    Raises:
        ValueError: it names the keys that differ, dotted.
    """
    first, *rest = all_gather_object(values)
    for number, others in enumerate(rest, start=1):
        if keys := config_differences(first, others, ()):
            with raise_on_all_ranks():
                raise ValueError(f"{', '.join(keys)}: not the same on process {number} as on process 0; {advice}")


def create_shared_dir(folder: Path) -> None:
    """Creates the run directory if it does not exist, and refuses one that is not the same for all processes.

    Raises:
        ValueError: a process does not see a file that process 0 has just created there.
    """
    mark = folder / f".here_{all_gather_object(uuid.uuid4().hex)[0]}"
    with raise_on_all_ranks():
        if rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            # Left by runs that were killed at this point.
            for left in folder.glob(".here_*"):
                left.unlink()
            if world_size() > 1:
                mark.touch()
    if world_size() == 1:
        return
    limit = time.monotonic() + NFS_VISIBILITY_SECONDS
    while not os.path.exists(mark) and time.monotonic() < limit:
        time.sleep(0.1)
    visible = all_gather_object(os.path.exists(mark))
    with raise_on_all_ranks():
        if rank() == 0:
            mark.unlink()
        if False in visible:
            number = visible.index(False)
            raise ValueError(f"output_dir: {folder} is not the same folder on process {number} as on 0")


class _ReportedByRankZero(ValueError):
    """An error that process 0 also raises, and prints."""


def _share(error: Exception | None) -> None:
    """If any process has an error, raises that of the first one on all of them."""
    by_user = isinstance(error, ValueError | OSError)
    errors = all_gather_object(None if error is None else (by_user, _one_line(error)))
    failed = [number for number, each in enumerate(errors) if each is not None]
    if not failed:
        return
    first = failed[0]
    if error is not None and first == rank() and (rank() == 0 or not by_user):
        raise error
    by_user, line = errors[first] or (True, "")
    if rank() > 0:
        raise _ReportedByRankZero(line) from error
    raise ValueError(f"{line} (on process {first})") if by_user else RuntimeError(f"{line} (on process {first})")


def _end_with_launcher() -> None:
    """Has Linux kill this process when torchrun is killed, so that it does not meet a resume of the same run."""
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        pr_set_pdeathsig, parent = 1, os.getppid()
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        # It may have been killed before.
        if parent == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def _meet(size: int, device: str | None) -> dist.Store:
    """Connects the processes, and returns the store they used for it."""
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise ValueError(f"WORLD_SIZE is {size} in the environment, without {', '.join(missing)}; {LAUNCH_HINT}")

    # Meet over the store of torchrun.
    where, seconds = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}", int(RENDEZVOUS_TIMEOUT.total_seconds())
    backend = "cpu:gloo,cuda:nccl" if device != "cpu" and torch.cuda.is_available() else "gloo"
    try:
        store, number, _ = next(iter(dist.rendezvous("env://", timeout=RENDEZVOUS_TIMEOUT)))
        # After a restart (`--max_restarts`) torchrun's store still has the keys and addresses of the previous attempt.
        store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        keys = [f"here/{each}" for each in range(size)]
        store.set(keys[number], "")
        try:
            store.wait(keys, RENDEZVOUS_TIMEOUT)
        except RuntimeError as error:
            late = [str(each) for each, key in enumerate(keys) if not store.check([key])]
            raise RuntimeError(f"process {', '.join(late)} did not start") from error
    except RuntimeError as error:
        reason = _one_line(error).removesuffix(".")
        raise ValueError(
            f"{size} processes did not meet at {where} within {seconds} s: {reason}; {LAUNCH_HINT}"
        ) from error

    # Connect, with timeouts for collectives afterwards.
    try:
        dist.init_process_group(backend, store=store, rank=number, world_size=size, timeout=RENDEZVOUS_TIMEOUT)
    except RuntimeError as error:
        reason = _one_line(error).removesuffix(".")
        raise ValueError(f"{size} processes met at {where}, and cannot connect: {reason}; {INTERFACE_HINT}") from error
    assert dist.group.WORLD is not None
    if "nccl" in backend:
        dist.group.WORLD._get_backend(torch.device("cuda"))._set_default_timeout(NCCL_TIMEOUT)
    set_collective_timeout(dist.group.WORLD)
    return store


def _lost_peer_reason(store: dist.Store, error: Exception) -> str:
    """Why a process does not answer any more, if it is known."""
    try:
        for number in range(world_size()):
            if number != rank() and store.check([f"error/{number}"]):
                return f"process {number} has ended: {store.get(f'error/{number}').decode()}"
    except RuntimeError:
        # The process that had the store is gone.
        pass
    reason = re.sub(r"^\[\S*\] ", "", str(error)).partition(". ")[0]
    return f"another process has ended or does not answer, without an error message ({' '.join(reason.split())})"


def _one_line(error: Exception) -> str:
    """An error in one line, with its type unless the message is for users."""
    line = " ".join(str(error).split())
    return line if isinstance(error, ValueError | OSError | dist.DistError) else f"{type(error).__name__}: {line}"
