"""One run on several processes: their group, their errors, and what all of them have to agree on.

torchrun starts the processes (``tune run --nproc_per_node 2 RECIPE ...``), and each runs the same recipe from top to
bottom. On one process every function here does the same without anybody to ask, so a recipe needs no branch.

What a process does alone may fail there alone, while the others wait for it: ``raise_on_all_ranks`` is for that.
"""

from __future__ import annotations

import contextlib
import os
import re
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
from adapt_recipes.training.sockets import RENDEZVOUS_TIMEOUT, notice_lost_hosts, set_collective_timeout

NCCL_TIMEOUT = timedelta(
    minutes=10
)  # with nccl, as by torch's default: what takes longer, reading and saving, is gloo's
NFS_VISIBILITY_SECONDS = 60  # seconds: for so long a network file system may go on to say that there is nothing
LAUNCH_HINT = "start them with `tune run --nproc_per_node N RECIPE --config FILE`"
INTERFACE_HINT = (
    "set GLOO_SOCKET_IFNAME, and NCCL_SOCKET_IFNAME for cuda, to the network interface that joins the hosts"
)

T = TypeVar("T")


def rank() -> int:
    """This process's number; 0 is the one that writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def process_group(device: str | None, *, batch_size: int) -> Iterator[None]:
    """The group of the processes that torchrun has started, until the end of the block; one alone needs none.

    Only rank 0's standard output is seen. An error that ``raise_on_all_ranks`` has shared is said once, by rank 0.
    After an error the group is left as it is, for ``command_line`` to say what is wrong and leave.

    Args:
        device: of the config; gloo joins processes on ``cpu``, nccl those on ``cuda``.
        batch_size: of the config.

    Raises:
        ValueError: processes that do not meet, too few devices or examples for them, or a device they cannot share.
        ConnectionError: another process has ended or is out of reach; it says why, as far as that is known.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield
        return
    store = _meet(size, device)
    try:
        with raise_on_all_ranks():
            get_device(device)
            if batch_size < size:
                raise ValueError(f"batch_size: {batch_size} examples are too few for {size} processes; one each")
        with open(os.devnull, "w") as nowhere, contextlib.ExitStack() as silence:
            if rank() > 0:
                silence.enter_context(contextlib.redirect_stdout(nowhere))
            yield
        all_gather_object(None)  # whoever is done first waits, for the others may still need it
        dist.destroy_process_group()  # not after an error: nccl waits for kernels that wait for other processes
    except _ReportedByRankZero:
        raise SystemExit(2) from None
    except Exception as error:
        # Every message of gloo's names the file that it comes from.
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
            raise ConnectionError(_lost_peer_reason(store, error)) from error
        with contextlib.suppress(RuntimeError):  # it may be the store's own process that is gone
            store.set(f"error/{rank()}", _one_line(error))
        raise


def get_device(name: str | None) -> torch.device:
    """The device that a config asks for, made the current one; None: the best there is, a device a process.

    Raises:
        ValueError: there is no such device on this machine (torchtune would take the CPU for ``cuda``), or too few of
            them for the processes.
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
    except (RuntimeError, AssertionError, AttributeError) as error:  # torch raises any of them
        raise ValueError(f"device: '{name}' cannot be used: {str(error).splitlines()[0]}") from error
    return device


@contextlib.contextmanager
def raise_on_all_ranks(*, in_turn: bool = False) -> Iterator[None]:
    """A block that succeeds on all processes or fails on all, with the error of the first one that has any.

    All processes have to come by. In the block none may wait for another, unless all of them do the same there.

    Args:
        in_turn: the first one of each host begins. The others go on when it is done, and find what it has left in a
            cache, which may be one for all hosts or each host's own.
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
    """What each process has brought, in their order: small values that can be pickled."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def all_reduce_sum(values: Tensor) -> Tensor:
    """The sum over processes of a tensor on the CPU, the same bits on all of them."""
    if world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def check_same(values: Mapping[str, Any], *, advice: str) -> None:
    """Refuse to go on with processes that differ.

    Args:
        values: what has to be the same on all of them; nested mappings are compared key by key.
        advice: how it would be.

    Raises:
        ValueError: it names the keys that differ, dotted.
    """
    first, *rest = all_gather_object(values)
    for number, others in enumerate(rest, start=1):
        if keys := config_differences(first, others, ()):
            with raise_on_all_ranks():
                raise ValueError(f"{', '.join(keys)}: not the same on process {number} as on process 0; {advice}")


def create_shared_dir(folder: Path) -> None:
    """Makes the run directory, if there is none, and refuses one that is not the same for all processes.

    Raises:
        ValueError: a process does not see there what process 0 has just made.
    """
    mark = folder / f".here_{all_gather_object(uuid.uuid4().hex)[0]}"
    with raise_on_all_ranks():
        if rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob(".here_*"):  # by a run that was killed at this moment
                left.unlink()
            if world_size() > 1:
                mark.touch()
    if world_size() == 1:
        return
    limit = time.monotonic() + NFS_VISIBILITY_SECONDS
    while not os.path.exists(mark) and time.monotonic() < limit:
        time.sleep(0.1)
    everyone = all_gather_object(os.path.exists(mark))
    with raise_on_all_ranks():
        if rank() == 0:
            mark.unlink()
        if False in everyone:
            number = everyone.index(False)
            raise ValueError(f"output_dir: {folder} is not the same folder on process {number} as on 0")


class _ReportedByRankZero(ValueError):
    """An error that process 0 raises as well, and says."""


def _share(error: Exception | None) -> None:
    """Raises, if any process has an error, that of the first one, on all of them."""
    by_user = isinstance(error, ValueError | OSError)
    everyone = all_gather_object(None if error is None else (by_user, _one_line(error)))
    failed = [number for number, each in enumerate(everyone) if each is not None]
    if not failed:
        return
    first = failed[0]
    if error is not None and first == rank() and (rank() == 0 or not by_user):
        raise error
    by_user, line = everyone[first] or (True, "")
    if rank() > 0:
        raise _ReportedByRankZero(line) from error
    raise ValueError(f"{line} (on process {first})") if by_user else RuntimeError(f"{line} (on process {first})")


def _meet(size: int, device: str | None) -> dist.Store:
    """Joins the processes, and returns the store over which they met."""
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise ValueError(f"WORLD_SIZE is {size} in the environment, without {', '.join(missing)}; {LAUNCH_HINT}")
    where, seconds = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}", int(RENDEZVOUS_TIMEOUT.total_seconds())
    backend = "cpu:gloo,cuda:nccl" if device != "cpu" and torch.cuda.is_available() else "gloo"
    try:
        store, number, _ = next(iter(dist.rendezvous("env://", timeout=RENDEZVOUS_TIMEOUT)))
        # After a restart (`--max_restarts`) torchrun's store still has the keys and addresses of the attempt before.
        store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        keys = [f"here/{each}" for each in range(size)]
        store.set(keys[number], "")
        try:
            store.wait(keys, RENDEZVOUS_TIMEOUT)
        except RuntimeError as error:
            late = [str(each) for each, key in enumerate(keys) if not store.check([key])]
            raise RuntimeError(f"process {', '.join(late)} did not come") from error
    except RuntimeError as error:
        reason = _one_line(error).removesuffix(".")
        raise ValueError(
            f"{size} processes did not meet at {where} within {seconds} s: {reason}; {LAUNCH_HINT}"
        ) from error
    try:
        dist.init_process_group(backend, store=store, rank=number, world_size=size, timeout=RENDEZVOUS_TIMEOUT)
    except RuntimeError as error:
        reason = _one_line(error).removesuffix(".")
        raise ValueError(f"{size} processes met at {where}, and cannot connect: {reason}; {INTERFACE_HINT}") from error
    assert dist.group.WORLD is not None
    if "nccl" in backend:
        dist.group.WORLD._get_backend(torch.device("cuda"))._set_default_timeout(NCCL_TIMEOUT)
    set_collective_timeout(dist.group.WORLD)
    notice_lost_hosts()
    return store


def _lost_peer_reason(store: dist.Store, error: Exception) -> str:
    """What is known of a process that does not answer any more."""
    try:
        for number in range(world_size()):
            if number != rank() and store.check([f"error/{number}"]):
                return f"process {number} has ended: {store.get(f'error/{number}').decode()}"
    except RuntimeError:  # the store went with it
        pass
    reason = re.sub(r"^\[\S*\] ", "", str(error)).partition(". ")[0]
    return f"another process has ended or does not answer, and left no word ({' '.join(reason.split())})"


def _one_line(error: Exception) -> str:
    """An error in one line, with its kind where that is no user's."""
    line = " ".join(str(error).split())
    return line if isinstance(error, ValueError | OSError | dist.DistError) else f"{type(error).__name__}: {line}"
