"""Checkpoints for an exact resume, written atomically by one process or many.

``checkpoints/step_N/`` contains

- ``__RANK_0.distcp`` and ``.metadata``: weights and optimizer state (torch.distributed.checkpoint). Each process writes
  its shards; any number of processes can read them;
- ``shared.pt``: the state that is the same on every process, and the state of each process;
- ``checksums.json``: of all these files, so that damage is found before anything is loaded.

They are written into ``step_N.partial``, flushed to the disk, and renamed when all processes are done. A checkpoint
that is no longer needed is renamed to ``step_N.removed`` and then deleted. One that is written a second time is renamed
to ``step_N.replaced`` until the new one has its name. So a folder ``step_N`` is always whole, and so is
``step_N.replaced`` if there is no ``step_N``. Everything else was left by interrupted writes, and the next write
deletes it.
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
from adapt_recipes.training.sockets import RENDEZVOUS_TIMEOUT, detect_lost_hosts, set_collective_timeout

_SHARED, _METADATA, _CHECKSUMS = "shared.pt", ".metadata", "checksums.json"
_REPLACED = ".replaced"
_NAME = r"step_(\d+)(\.\w+)?"

# A single process is not a mistake here. Filtered permanently, because a write may run in another thread.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

T = TypeVar("T")


@dataclass(frozen=True)
class Saved:
    """A whole checkpoint: the part that can be read before there is a model.

    Attributes:
        folder: of the checkpoint.
        step: N.
        shared: the argument ``shared`` of ``Checkpoints.save``, with all tensors on the CPU.
        own: the argument ``own`` of every process that wrote it, by rank.
        optimizer: its param groups, and the names of the parameters for which it had state.
    """

    folder: Path
    step: int
    shared: dict[str, Any]
    own: list[Any]
    optimizer: dict[str, Any]


class Checkpoints:
    """The checkpoints of a run. Each process has an instance, and all call the same methods in the same order.

    Args:
        checkpoints_dir: created at the first save; the same folder for all processes.
        keep: number of checkpoints to keep, at least 1.
        asynchronous: ``save`` copies to host memory, which needs room for this process's share of weights and
            optimizer state, and writes in the background.
    """

    def __init__(self, checkpoints_dir: Path, *, keep: int, asynchronous: bool) -> None:
        assert keep >= 1
        # It may be a link to another disk, where nothing is yet.
        is_link = checkpoints_dir.is_symlink()
        self.checkpoints_dir = Path(os.path.realpath(checkpoints_dir)) if is_link else checkpoints_dir
        self._keep = keep
        self._group: dist.ProcessGroup | None = None
        self._rank, self._num_processes = 0, 1
        if dist.is_initialized():
            # A group of its own: a write in the background must not interleave with the collectives of the run.
            with detect_lost_hosts():
                self._group = dist.new_group(backend="gloo", timeout=RENDEZVOUS_TIMEOUT)
            set_collective_timeout(self._group)
            self._rank, self._num_processes = dist.get_rank(), dist.get_world_size()
        # A new thread uses the first CUDA device, whichever this process uses.
        device: dict[str, Any] = {}
        if torch.cuda.is_initialized():
            device = {"initializer": torch.cuda.set_device, "initargs": (torch.cuda.current_device(),)}
        self._background = ThreadPoolExecutor(1, "checkpoint", **device) if asynchronous else None
        self._pending: Future[None] | None = None
        self._damaged: list[int] = []
        # The step of the best whole checkpoint, until the write of a better one is complete.
        self._best: int | None = None

    def newest(self) -> Saved | None:
        """The whole checkpoint with the most steps, the same on every process; None: there are none.

        Reads every file of it. A newer one that is damaged is named on stderr, and ``clean`` removes it.

        Raises:
            ValueError: there are checkpoints, but all are damaged; or processes see different folders.
            OSError: a file exists but cannot be read, which is not damage; it names the file and the process.
        """
        damaged: dict[int, str] = {}
        checkpoints = self._on_all_ranks(lambda: whole_checkpoints(self.checkpoints_dir) if self._rank == 0 else {})[0]
        for step, folder in sorted(checkpoints.items(), reverse=True):
            findings = self._on_all_ranks(functools.partial(self._inspect, folder))
            if reasons := self._damage(folder, findings):
                # A wrong checksum is the cause; other processes may report errors that follow from it.
                damaged[step] = min(reasons, key=lambda reason: not reason.endswith("is not what was written"))
                continue
            self._damaged = list(damaged)
            if damaged and self._rank == 0:
                print(f"warning: {self._describe(damaged)}; going on from {folder.name}", file=sys.stderr)
            return _saved(folder, step)
        if damaged:
            advice = f"there is no whole one: remove {self.checkpoints_dir} to start again"
            raise ValueError(f"{self._describe(damaged)}; {advice}")
        return None

    def load_weights(self, step: int, model: nn.Module) -> None:
        """Gives the model the weights of one checkpoint; see ``load`` for those from which a run goes on.

        Args:
            step: N of the checkpoint.
            model: the same model; it may be sharded over another number of processes.

        Raises:
            ValueError: the checkpoint is missing, damaged, or of another model.
            OSError: a file exists but cannot be read; it names the file and the process.
        """
        default = self.checkpoints_dir / f"step_{step}"
        folder = self._on_all_ranks(lambda: whole_checkpoints(self.checkpoints_dir).get(step, default))[0]
        findings = self._on_all_ranks(functools.partial(self._inspect, folder))
        if reasons := self._damage(folder, findings):
            raise ValueError(f"{self._describe({step: reasons[0]})}; it cannot be loaded")
        state = {"model": model.state_dict()}
        self._read(_saved(folder, step), state, what="model")
        model.load_state_dict(state["model"])

    def load(self, saved: Saved, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Restores weights and optimizer state, bit for bit, on any number of processes.

        This may draw from generators, so restore those afterwards.

        Args:
            saved: from ``newest``.
            model: the same model; it may be sharded over another number of processes.
            optimizer: of its parameters; it has not taken a step.

        Raises:
            ValueError: the checkpoint is of another model or optimizer, or the optimizer's state cannot be split for
                this number of processes (torchao's 8-bit state, in the middle of a block).
        """
        assert not optimizer.state
        # A step creates state of the right types to load into. Its changes of weights and groups are overwritten.
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        # Load into the state dicts of model and optimizer; everything in the checkpoint must have a place there.
        created = optimizer.state_dict()["state"]
        index = {name: i for i, name in enumerate(_parameter_names(model, optimizer))}
        # A name that this optimizer does not have is one without a place.
        named = {name: created.get(index.get(name, -1), {}) for name in saved.optimizer["names"]}
        state: dict[str, Any] = {"model": model.state_dict(), "optimizer": named}
        self._read(saved, state, what="model and optimizer")
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
        best: int | None = None,
    ) -> None:
        """Writes ``step_N`` and removes the oldest checkpoints beyond ``keep``, after any write in the background.

        Args:
            step: N.
            model: all of its state is saved, including frozen weights.
            optimizer: of its parameters.
            shared: state that is the same on every process: tensors, numbers, strings, None, and lists, tuples and
                dicts of them. That of rank 0 is written.
            own: state of this process, of the same types.
            best: the step of a checkpoint that is kept beside them.

        Raises:
            NoSpaceLeft: the disk is full on any process. Earlier checkpoints are kept.
            Exception: any other failure, raised on every process. Either may come from the previous write.
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
            self._write(step, state, rest, own, best)
        else:
            self._pending = self._background.submit(self._write, step, _copy(state), _copy(rest), _copy(own), best)

    def wait(self) -> None:
        """Waits for the write in the background, if there is one.

        Raises:
            Exception: the write failed; see ``save``.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Waits for the write in the background, and frees the thread and the process group."""
        try:
            self.wait()
        finally:
            if self._background is not None:
                self._background.shutdown()
            if self._group is not None and dist.is_initialized():
                dist.destroy_process_group(self._group)

    def clean(self, *, best: int | None = None) -> None:
        """Deletes damaged checkpoints, what interruptions have left, and the oldest checkpoints beyond ``keep``.

        Must not be called between ``newest`` and ``load``.

        Args:
            best: the step of a checkpoint that is kept beside them.
        """
        self._best = best
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
            for step, old in sorted(whole_checkpoints(self.checkpoints_dir).items())[: -self._keep]:
                if step != best:
                    remove_folder(old)
        self._damaged = []

    def _read(self, saved: Saved, state: dict[str, Any], *, what: str) -> None:
        """Reads a checkpoint into state dicts; all that it has under their names must have a place there.

        Raises:
            ValueError: it is of another model or optimizer.
        """
        planner, reader = dcp.DefaultLoadPlanner(), dcp.FileSystemReader(saved.folder)
        try:
            with _first_cause():
                dcp.load(state, planner=planner, storage_reader=reader, **self._collectives())
            assert planner.metadata is not None
            stored = {name for name in planner.metadata.state_dict_metadata if name.split(".")[0] in state}
            if unread := stored - planner.state_dict.keys():
                raise KeyError(f"no place for {min(unread)}")
        except Exception as error:
            raise ValueError(
                f"checkpoint {saved.folder}, written by {_processes(len(saved.own))}, cannot be loaded into this "
                f"{what} on {_processes(self._num_processes)}: {_first_line(error)}"
            ) from error

    def _write(self, step: int, state: dict[str, Any], rest: dict[str, Any], own: Any, best: int | None) -> None:
        folder = self.checkpoints_dir / f"step_{step}"
        partial = folder.with_name(folder.name + PARTIAL)

        def create() -> None:
            self.clean(best=self._best)
            if self._rank == 0:
                if not self.checkpoints_dir.is_dir():
                    self.checkpoints_dir.mkdir(parents=True)
                    # Otherwise a power failure may remove the folder with everything in it.
                    fsync(self.checkpoints_dir.parent)
                partial.mkdir()

        def own_part() -> tuple[dict[str, str], Any]:
            return _checksums(partial.glob(f"__{self._rank}_*")), own

        try:
            self._on_all_ranks(create)
            with _first_cause():
                dcp.save(state, storage_writer=_Writer(partial), **self._collectives())
            parts = self._on_all_ranks(own_part)
            self._on_all_ranks(functools.partial(self._publish, partial, folder, rest, parts))
            self._on_all_ranks(functools.partial(self.clean, best=best))
        except BaseException as error:
            if self._rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            if not is_no_space(error):
                raise
            newest = max(whole_checkpoints(self.checkpoints_dir), default=None)
            standing = "there is no whole one" if newest is None else f"the newest whole checkpoint is step_{newest}"
            raise NoSpaceLeft(
                f"no space left while writing checkpoint {folder.name} in {self.checkpoints_dir}; {standing}"
            ) from error

    def _publish(
        self, partial: Path, folder: Path, rest: dict[str, Any], parts: list[tuple[dict[str, str], Any]]
    ) -> None:
        """On rank 0: completes the checkpoint that all processes have written, and gives it its name."""
        if self._rank != 0:
            return
        with open(partial / _SHARED, "wb") as file:
            # Python's file reports a full disk as such; torch's own writer does not.
            torch.save(rest | {"own": [own for _, own in parts]}, file)
        checksums = _checksums([partial / _METADATA, partial / _SHARED])
        for rank, (theirs, _) in enumerate(parts):
            if not all((partial / name).exists() for name in theirs):
                raise ValueError(f"output_dir: {self.checkpoints_dir} is not the same folder on process {rank} as on 0")
            checksums |= theirs
        (partial / _CHECKSUMS).write_text(json.dumps(checksums, indent=1))
        for path in (partial / _SHARED, partial / _CHECKSUMS, partial):
            fsync(path)
        # After a resume the same step may be saved again.
        if folder.exists():
            os.rename(folder, folder.with_name(folder.name + _REPLACED))
        os.rename(partial, folder)
        fsync(self.checkpoints_dir)

    def _inspect(self, folder: Path) -> tuple[list[str], Exception | None]:
        """The names of a checkpoint's files, and the error found in this process's share of them.

        ``OSError``: a file cannot be read, which may have other reasons than damage. ``ValueError``: it is damaged.
        """
        names: list[str] = []
        try:
            names = os.listdir(folder)
            checksums_bytes, shared_bytes = (folder / _CHECKSUMS).read_bytes(), (folder / _SHARED).read_bytes()
            try:
                checksums = json.loads(checksums_bytes)
                mine = sorted(checksums)[self._rank :: self._num_processes]
            except Exception as error:
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

    def _damage(self, folder: Path, findings: Sequence[tuple[list[str], Exception | None]]) -> list[str]:
        """The damage that processes have found in a checkpoint; raises where they disagree or one cannot read it."""
        seen, reasons = findings[0][0], []
        for number, (names, error) in enumerate(findings):
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

    def _describe(self, damaged: Mapping[int, str]) -> str:
        each = ", ".join(f"step_{step} ({reason})" for step, reason in damaged.items())
        return f"damaged checkpoints in {self.checkpoints_dir}: {each}"

    def _on_all_ranks(self, action: Callable[[], T]) -> list[T]:
        """Runs an action on every process. An error on one of them is raised on all, after all are done.

        Returns:
            The return values, by rank.
        """
        result: Any = None
        error: BaseException | None = None
        try:
            result = action()
        except BaseException as raised:
            error = raised
        report = None if error is None else (is_no_space(error), f"{type(error).__name__}: {error}")
        gathered: list[Any] = [(result, report)]
        if self._group is not None:
            gathered = [None] * self._num_processes
            dist.all_gather_object(gathered, (result, report), group=self._group)
        if error is not None:
            raise error
        for rank, (_, report) in enumerate(gathered):
            if report is not None:
                no_space, text = report
                raise OSError(errno.ENOSPC, text) if no_space else RuntimeError(f"process {rank}: {text}")
        return [result for result, _ in gathered]

    def _collectives(self) -> dict[str, Any]:
        return {"process_group": self._group, "no_dist": self._group is None}


class _Writer(dcp.FileSystemWriter):
    """Converts a full disk to an ``OSError`` here, because other processes get an error without its cause."""

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> Any:
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            if is_no_space(error):
                raise OSError(errno.ENOSPC, str(error)) from error
            raise


def whole_checkpoints(checkpoints_dir: Path) -> dict[int, Path]:
    """Every complete checkpoint, by step."""
    found = {}
    if checkpoints_dir.is_dir():
        # In reverse order step_N comes after step_N.replaced, and overrides it.
        for path in sorted(checkpoints_dir.iterdir(), reverse=True):
            match = re.fullmatch(_NAME, path.name)
            if match and match[2] in (None, _REPLACED) and path.is_dir():
                found[int(match[1])] = path
    return found


def _parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """The names of an optimizer's parameters, in the order in which its ``state_dict`` numbers them."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]


def _copy(value: Any) -> Any:
    """A copy that shares no memory, with tensors on the CPU."""
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    # A tensor that is sharded, in 8 bits, or both.
    if hasattr(value, "__tensor_flatten__"):
        parts, context = value.__tensor_flatten__()
        copies = {part: _copy(getattr(value, part)) for part in parts}
        return type(value).__tensor_unflatten__(copies, context, value.size(), value.stride())
    if isinstance(value, Tensor):
        return value.detach().clone() if value.device.type == "cpu" else value.detach().cpu()
    return copy.deepcopy(value)


def newest_shared(checkpoints_dir: Path) -> dict[str, Any]:
    """The argument ``shared`` of the newest checkpoint of some run, read by this process alone.

    Raises:
        ValueError: there is no checkpoint, or it is damaged.
    """
    found = whole_checkpoints(checkpoints_dir)
    if not found:
        raise ValueError(f"there is no checkpoint in {checkpoints_dir}")
    folder = found[max(found)]
    checksums = json.loads((folder / _CHECKSUMS).read_text())
    if _checksum(folder / _SHARED) != checksums[_SHARED]:
        raise ValueError(f"damaged checkpoint {folder}: {_SHARED} is not what was written")
    return _saved(folder, max(found)).shared


def _saved(folder: Path, step: int) -> Saved:
    return Saved(folder, step, **_read_shared((folder / _SHARED).read_bytes()))


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
    """Raises the first error that torch wraps: its own exception is not an ``Exception``, and has one per process."""
    try:
        yield
    except dcp.CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        raise next(filter(is_no_space, causes), causes[0]) from None
