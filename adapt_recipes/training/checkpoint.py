"""Checkpoints for an exact resume: whole or absent whatever happens while they are written, by one process or many.

``checkpoints/step_N/`` holds

- ``__RANK_0.distcp`` and ``.metadata``: weights and optimizer state, written by all processes, each its shards
  (torch.distributed.checkpoint). Any other number of processes can read them;
- ``shared.pt``: what is the same on every process, and each one's own;
- ``checksums.json``: of all of these, so that damage is seen before a byte of them is used.

They are written into ``step_N.partial``, flushed to the disk, and renamed when all processes are done. A checkpoint
that is no longer wanted is renamed to ``step_N.removed`` and then deleted; one that is written a second time stands as
``step_N.replaced`` until the new one has its name. So a folder called ``step_N`` is whole at every moment, and so is
``step_N.replaced`` where there is no ``step_N``. The rest is what interrupted writes have left; the next write clears
it away.
"""

from __future__ import annotations

import copy
import errno
import functools
import hashlib
import io
import json
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from adapt_recipes.files import PARTIAL, REMOVED, NoSpaceLeft, fsync, is_no_space, remove_folder
from adapt_recipes.training.sockets import RENDEZVOUS_TIMEOUT, notice_lost_hosts, set_collective_timeout

_SHARED, _METADATA, _CHECKSUMS = "shared.pt", ".metadata", "checksums.json"
_REPLACED = ".replaced"
_NAME = r"step_(\d+)(\.\w+)?"

# One process is no mistake here. For good, not for the time of a write: that may be in another thread.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

T = TypeVar("T")


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is whole, as far as it can be read before there is a model.

    Attributes:
        folder: where it is.
        step: N.
        shared: what was given to ``Checkpoints.save``, with all tensors on the CPU.
        own: the same of every process that wrote it, by rank.
        optimizer: its param groups, and the names of the parameters that it had state for.
    """

    folder: Path
    step: int
    shared: dict[str, Any]
    own: list[Any]
    optimizer: dict[str, Any]


class Checkpoints:
    """The checkpoints of a run. Each of its processes makes one, and calls the same methods in the same order.

    Args:
        checkpoints_dir: made when something is saved. All processes see the same one.
        keep: how many checkpoints stay; at least 1.
        asynchronous: ``save`` copies to host memory, which must have room for this process's share of weights and
            optimizer, and writes while the run goes on.
    """

    def __init__(self, checkpoints_dir: Path, *, keep: int, asynchronous: bool) -> None:
        assert keep >= 1
        self.checkpoints_dir = checkpoints_dir
        self._keep = keep
        self._group: dist.ProcessGroup | None = None
        self._rank, self._num_processes = 0, 1
        if dist.is_initialized():
            # A group of its own: a write in the background must not come between the collectives of the run.
            self._group = dist.new_group(backend="gloo", timeout=RENDEZVOUS_TIMEOUT)
            set_collective_timeout(self._group)
            notice_lost_hosts()
            self._rank, self._num_processes = dist.get_rank(), dist.get_world_size()
        device: dict[str, Any] = {}  # a thread has CUDA's first one, whichever this process has
        if torch.cuda.is_initialized():
            device = {"initializer": torch.cuda.set_device, "initargs": (torch.cuda.current_device(),)}
        self._background = ThreadPoolExecutor(1, "checkpoint", **device) if asynchronous else None
        self._pending: Future[None] | None = None
        self._damaged: list[int] = []

    def newest(self) -> Saved | None:
        """The checkpoint with the most steps that is whole, the same one on every process; None: there are none.

        Reads every file of it. A newer one that is damaged is named on stderr; ``clean`` removes it.

        Raises:
            ValueError: there are checkpoints, but all are damaged; or they are not the same ones on another process.
            OSError: a file is there and cannot be read, which is no damage; it names the file and the process.
        """
        damaged: dict[int, str] = {}
        checkpoints = self._together(lambda: _whole_checkpoints(self.checkpoints_dir) if self._rank == 0 else {})[0]
        for step, folder in sorted(checkpoints.items(), reverse=True):
            looks = self._together(functools.partial(self._look_at, folder))
            if reasons := self._damage(folder, looks):
                # another process may have stumbled over what one has seen to be damaged
                damaged[step] = min(reasons, key=lambda reason: not reason.endswith("is not what was written"))
                continue
            self._damaged = list(damaged)
            if damaged and self._rank == 0:
                print(f"warning: {self._say(damaged)}; going on from {folder.name}", file=sys.stderr)
            return Saved(folder, step, **_read_shared((folder / _SHARED).read_bytes()))
        if damaged:
            raise ValueError(
                f"{self._say(damaged)}; there is no whole one: remove {self.checkpoints_dir} to start anew"
            )
        return None

    def load(self, saved: Saved, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Puts weights and optimizer where they were, bit for bit, on any number of processes.

        May draw from generators: put those back afterwards.

        Args:
            saved: from ``newest``.
            model: as it was when it was saved, but for the processes it is sharded over.
            optimizer: of its parameters; it has not taken a step.

        Raises:
            ValueError: the checkpoint is of another model or optimizer, or of an optimizer whose state cannot be cut
                where this number of processes needs it (torchao's 8-bit state, in the middle of a block).
        """
        assert not optimizer.state
        # A step makes the state to read into, of the right kinds. What it does to weights and groups is overwritten.
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        made = optimizer.state_dict()["state"]
        index = {name: i for i, name in enumerate(_parameter_names(model, optimizer))}
        try:
            named = {name: made.get(index[name], {}) for name in saved.optimizer["names"]}
            state: dict[str, Any] = {"model": model.state_dict(), "optimizer": named}
            planner, reader = dcp.DefaultLoadPlanner(), dcp.FileSystemReader(saved.folder)
            with _first_cause():
                dcp.load(state, planner=planner, storage_reader=reader, **self._collectives())
            assert planner.metadata is not None
            if unread := planner.metadata.state_dict_metadata.keys() - planner.state_dict.keys():
                raise KeyError(f"no place for {min(unread)}")
        except Exception as error:
            raise ValueError(
                f"checkpoint {saved.folder}, written by {_processes(len(saved.own))}, cannot be loaded into this "
                f"model and optimizer on {_processes(self._num_processes)}: {_first_line(error)}"
            ) from error
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(
            {
                "state": {index[name]: values for name, values in state["optimizer"].items()},
                "param_groups": saved.optimizer["param_groups"],
            }
        )

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        shared: Mapping[str, Any],
        own: Any,
    ) -> None:
        """Writes ``step_N`` and removes the oldest beyond ``keep``. Waits first for a write in the background.

        Args:
            step: N.
            model: all of its state is saved, frozen weights as well.
            optimizer: of its parameters.
            shared: what is the same on every process: tensors, numbers, strings, None, and lists, tuples and dicts of
                them. That of rank 0 is written.
            own: what is this process's own, of the same kinds.

        Raises:
            NoSpaceLeft: the disk is full, for whichever process. The earlier checkpoints stand.
            Exception: what else went wrong, on every process. Both may be of the write before this one.
        """
        self.wait()
        packed = optimizer.state_dict()
        names = _parameter_names(model, optimizer)
        named = {names[i]: values for i, values in packed["state"].items()}
        state = {"model": model.state_dict(), "optimizer": named}
        rest = {
            "shared": dict(shared),
            "optimizer": {"names": list(named), "param_groups": packed["param_groups"]},
        }
        if self._background is None:
            self._write(step, state, rest, own)
        else:
            self._pending = self._background.submit(self._write, step, _copy(state), _copy(rest), _copy(own))

    def wait(self) -> None:
        """Waits for the write in the background, if there is one.

        Raises:
            Exception: what went wrong with it; see ``save``.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """The same, and nothing can be saved any more."""
        try:
            self.wait()
        finally:
            if self._background is not None:
                self._background.shutdown()
            if self._group is not None and dist.is_initialized():
                dist.destroy_process_group(self._group)

    def clean(self) -> None:
        """Clears away what ``newest`` found damaged, what interruptions have left, and the oldest beyond ``keep``.

        Not between ``newest`` and ``load``.
        """
        if self._rank == 0 and self.checkpoints_dir.is_dir():
            for path in self.checkpoints_dir.iterdir():
                match = re.fullmatch(_NAME, path.name)
                if match is None or not path.is_dir():
                    continue
                folder, damaged = self.checkpoints_dir / f"step_{match[1]}", int(match[1]) in self._damaged
                if match[2] == _REPLACED and not folder.exists() and not damaged:
                    os.rename(path, folder)
                elif match[2] in (PARTIAL, REMOVED, _REPLACED) or (match[2] is None and damaged):
                    shutil.rmtree(path)
            for _, old in sorted(_whole_checkpoints(self.checkpoints_dir).items())[: -self._keep]:
                remove_folder(old)
        self._damaged = []

    def _write(self, step: int, state: dict[str, Any], rest: dict[str, Any], own: Any) -> None:
        folder = self.checkpoints_dir / f"step_{step}"
        partial = folder.with_name(folder.name + PARTIAL)

        def make() -> None:
            self.clean()
            if self._rank == 0:
                if not self.checkpoints_dir.is_dir():
                    self.checkpoints_dir.mkdir(parents=True)
                    fsync(self.checkpoints_dir.parent)  # or a power cut takes it away with all that is in it
                partial.mkdir()

        def mine() -> tuple[dict[str, str], Any]:
            return _checksums(partial.glob(f"__{self._rank}_*")), own

        try:
            self._together(make)
            with _first_cause():
                dcp.save(state, storage_writer=_Writer(partial), **self._collectives())
            parts = self._together(mine)
            self._together(functools.partial(self._publish, partial, folder, rest, parts))
        except BaseException as error:
            if self._rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            if not is_no_space(error):
                raise
            newest = max(_whole_checkpoints(self.checkpoints_dir), default=None)
            standing = "there is no whole one" if newest is None else f"the newest whole checkpoint is step_{newest}"
            raise NoSpaceLeft(
                f"no space left while writing checkpoint {folder.name} in {self.checkpoints_dir}; {standing}"
            ) from error

    def _publish(
        self, partial: Path, folder: Path, rest: dict[str, Any], parts: list[tuple[dict[str, str], Any]]
    ) -> None:
        """Makes a checkpoint of what all processes have written, on rank 0."""
        if self._rank != 0:
            return
        with open(partial / _SHARED, "wb") as file:
            # Through Python's file, which tells a full disk from other trouble; torch's own writer does not.
            torch.save(rest | {"own": [own for _, own in parts]}, file)
        checksums = _checksums([partial / _METADATA, partial / _SHARED])
        for rank, (theirs, _) in enumerate(parts):
            if not all((partial / name).exists() for name in theirs):
                raise ValueError(f"output_dir: {self.checkpoints_dir} is not the same folder on process {rank} as on 0")
            checksums |= theirs
        (partial / _CHECKSUMS).write_text(json.dumps(checksums, indent=1))
        for path in (partial / _SHARED, partial / _CHECKSUMS, partial):
            fsync(path)
        if folder.exists():  # this step again, after a resume
            os.rename(folder, folder.with_name(folder.name + _REPLACED))
        os.rename(partial, folder)
        fsync(self.checkpoints_dir)
        self.clean()

    def _look_at(self, folder: Path) -> tuple[list[str], Exception | None]:
        """The names of a checkpoint's files, and what is wrong with this process's share of them.

        An ``OSError`` says that one cannot be read, which need not be the checkpoint's fault; ``ValueError``: it is.
        """
        names: list[str] = []
        try:
            names = os.listdir(folder)
            checksums_bytes, shared_bytes = (folder / _CHECKSUMS).read_bytes(), (folder / _SHARED).read_bytes()
            try:
                checksums = json.loads(checksums_bytes)
                mine = sorted(checksums)[self._rank :: self._num_processes]
            except Exception as error:  # whatever the bytes happen to be
                raise ValueError(_first_line(error)) from error
            for name in mine:
                if name not in names:
                    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder / name))
                if _checksum(folder / name) != checksums[name]:
                    raise ValueError(f"{name} is not what was written")
            try:
                _read_shared(shared_bytes)
            except Exception as error:
                raise ValueError(_first_line(error)) from error
        except (ValueError, OSError) as error:
            return names, error
        return names, None

    def _damage(self, folder: Path, looks: Sequence[tuple[list[str], Exception | None]]) -> list[str]:
        """What is wrong with a checkpoint, as far as processes have seen the same; else an error."""
        seen, reasons = looks[0][0], []
        for number, (names, error) in enumerate(looks):
            missing = isinstance(error, FileNotFoundError)
            if missing and seen and not names:
                raise ValueError(
                    f"output_dir: {self.checkpoints_dir} is not the same folder on process {number} as on 0"
                )
            if isinstance(error, OSError) and not (missing and Path(error.filename).name not in seen):
                path = error.filename or folder
                raise OSError(f"resume: process {number} cannot read {path}: {error.strerror or error}")
            if error is not None:
                reasons.append(_first_line(error))
        return reasons

    def _say(self, damaged: Mapping[int, str]) -> str:
        each = ", ".join(f"step_{step} ({reason})" for step, reason in damaged.items())
        return f"damaged checkpoints in {self.checkpoints_dir}: {each}"

    def _together(self, action: Callable[[], T]) -> list[T]:
        """Runs an action on every process. An error on one of them is raised on all, when all are done.

        Returns:
            What it returned, by rank.
        """
        result: Any = None
        error: BaseException | None = None
        try:
            result = action()
        except BaseException as raised:
            error = raised
        said = None if error is None else (is_no_space(error), f"{type(error).__name__}: {error}")
        everyone: list[Any] = [(result, said)]
        if self._group is not None:
            everyone = [None] * self._num_processes
            dist.all_gather_object(everyone, (result, said), group=self._group)
        if error is not None:
            raise error
        for rank, (_, said) in enumerate(everyone):
            if said is not None:
                no_space, text = said
                raise OSError(errno.ENOSPC, text) if no_space else RuntimeError(f"process {rank}: {text}")
        return [result for result, _ in everyone]

    def _collectives(self) -> dict[str, Any]:
        return {"process_group": self._group, "no_dist": self._group is None}


class _Writer(dcp.FileSystemWriter):
    """An error is sent to the other processes without what it was raised from, so a full disk is told here."""

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> Any:
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            if is_no_space(error):
                raise OSError(errno.ENOSPC, str(error)) from error
            raise


def _whole_checkpoints(checkpoints_dir: Path) -> dict[int, Path]:
    """Every checkpoint that was finished, by its step."""
    found = {}
    if checkpoints_dir.is_dir():
        for path in sorted(checkpoints_dir.iterdir(), reverse=True):  # step_N behind the step_N.replaced it takes over
            match = re.fullmatch(_NAME, path.name)
            if match and match[2] in (None, _REPLACED) and path.is_dir():
                found[int(match[1])] = path
    return found


def _parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """By the numbers that an optimizer's ``state_dict`` has for them."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]


def _copy(value: Any) -> Any:
    """A copy that shares no memory, with tensors on the CPU."""
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    if hasattr(value, "__tensor_flatten__"):  # a tensor that is sharded, in 8 bits, or both
        parts, context = value.__tensor_flatten__()
        copies = {part: _copy(getattr(value, part)) for part in parts}
        return type(value).__tensor_unflatten__(copies, context, value.size(), value.stride())
    if isinstance(value, Tensor):
        return value.detach().clone() if value.device.type == "cpu" else value.detach().cpu()
    return copy.deepcopy(value)


def _read_shared(content: bytes) -> dict[str, Any]:
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _checksum(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _checksums(files: Iterable[Path]) -> dict[str, str]:
    return {file.name: _checksum(file) for file in files}


def _processes(number: int) -> str:
    return "1 process" if number == 1 else f"{number} processes"


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


@contextmanager
def _first_cause() -> Iterator[None]:
    """Raises what torch wraps: its own exception is no ``Exception``, and has an error of each process that failed."""
    try:
        yield
    except dcp.CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        raise next(filter(is_no_space, causes), causes[0]) from None
