"""Checkpoints for an exact resume: whole or absent whatever happens while they are written.

``checkpoints/step_N/state.pt`` holds everything. It is written into ``step_N.partial``, flushed to the disk and
renamed; a checkpoint that is no longer wanted is renamed to ``step_N.removed`` and then deleted. So a folder called
``step_N`` is whole at every moment. The rest is what interrupted writes have left; the next write clears it away.
"""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

_STATE = "state.pt"
_PARTIAL, _REMOVED = ".partial", ".removed"
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a full disk, a full quota, a limit on the size of a file


class NoSpaceLeft(OSError):
    """There was no room to write something; nothing of it is left behind."""


def save_checkpoint(checkpoints_dir: Path, step: int, state: Mapping[str, Any], *, keep: int) -> Path:
    """Writes ``step_N`` and removes the oldest beyond ``keep``.

    Args:
        checkpoints_dir: made if it does not exist.
        step: N.
        state: tensors, numbers, strings, None, and lists, tuples and dicts of them.
        keep: how many checkpoints stay, this one among them; at least 1.

    Returns:
        The checkpoint's folder.

    Raises:
        NoSpaceLeft: the disk is full. The earlier checkpoints stand.
    """
    assert keep >= 1
    clean(checkpoints_dir)
    folder = checkpoints_dir / f"step_{step}"
    try:
        with _partial(folder) as partial, open(partial / _STATE, "wb") as file:
            # Through Python's file, which tells a full disk from other trouble; torch's own writer does not.
            torch.save(dict(state), file)
    except NoSpaceLeft as error:
        newest = newest_checkpoint(checkpoints_dir)
        standing = f"the newest whole checkpoint is {newest.name}" if newest else "there is no whole one"
        raise NoSpaceLeft(
            f"no space left while writing checkpoint step_{step} in {checkpoints_dir}; {standing}"
        ) from error
    if folder.exists():  # this step again, after a resume: only its file changes hands, so it is whole throughout
        os.replace(partial / _STATE, folder / _STATE)
        partial.rmdir()
        _sync(folder)
    else:
        os.rename(partial, folder)
    _sync(checkpoints_dir)
    for old in sorted(_whole_checkpoints(checkpoints_dir), key=_step)[:-keep]:
        _remove(old)
    return folder


def newest_checkpoint(checkpoints_dir: Path) -> Path | None:
    """The folder of the whole checkpoint with the most steps; None: there is none."""
    return max(_whole_checkpoints(checkpoints_dir), key=_step, default=None)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """What was given to ``save_checkpoint``, with all tensors on the CPU.

    Raises:
        ValueError: the file is missing or damaged.
    """
    file = path / _STATE
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and torch each raise their own for a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"checkpoint {file} cannot be read ({reason}); remove {path} to go on from an earlier one"
        ) from error


def clean(checkpoints_dir: Path) -> None:
    """Clears away what interrupted writes and removals have left."""
    if checkpoints_dir.is_dir():
        for path in checkpoints_dir.iterdir():
            if re.fullmatch(rf"step_\d+({re.escape(_PARTIAL)}|{re.escape(_REMOVED)})", path.name):
                shutil.rmtree(path)


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """Gives a folder to write into, which becomes ``folder`` at the end of the block, or is removed if the block fails.

    A ``folder`` that exists is replaced. For a moment there is none then, but never half of one.

    Raises:
        NoSpaceLeft: the disk, the quota or the allowed size of a file ran out.
    """
    with _partial(folder) as partial:
        yield partial
    if folder.exists():
        _remove(folder)
    os.rename(partial, folder)
    _sync(folder.parent)


@contextmanager
def _partial(folder: Path) -> Iterator[Path]:
    """An empty folder beside ``folder``: flushed to the disk after the block, removed if the block fails."""
    partial = folder.with_name(folder.name + _PARTIAL)
    try:
        for rest in (partial, folder.with_name(folder.name + _REMOVED)):
            if rest.exists():
                shutil.rmtree(rest)
        partial.mkdir(parents=True)
        yield partial
        for path in (*partial.rglob("*"), partial):
            _sync(path)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if _is_no_space(error):
            raise NoSpaceLeft(f"no space left while writing {folder}") from error
        raise


def rng_state() -> dict[str, Any]:
    """Every generator that a run may draw from: Python's, numpy's, torch's on the CPU and on the current CUDA device.

    In types that ``load_checkpoint`` accepts.
    """
    numpy_state = np.random.get_state(legacy=False)
    numpy_state["state"]["key"] = numpy_state["state"]["key"].tolist()
    return {
        "python": random.getstate(),
        "numpy": numpy_state,
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Puts every generator where ``rng_state`` found it; CUDA's only where both were on such a device."""
    random.setstate(state["python"])
    numpy_state = state["numpy"]
    key = np.array(numpy_state["state"]["key"], dtype=np.uint32)
    np.random.set_state(numpy_state | {"state": numpy_state["state"] | {"key": key}})
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def config_differences(saved: Mapping[str, Any], now: Mapping[str, Any], free: Collection[str]) -> list[str]:
    """The settings in which two configs differ.

    Args:
        saved, now: nested dicts; lists are compared as wholes, and a key that one lacks differs.
        free: dotted keys that may differ, each with everything below it.

    Returns:
        Dotted keys, in the order of ``saved`` and then of ``now``.
    """
    old, new = dict(_leaves(saved)), dict(_leaves(now))
    missing = object()
    return [
        key
        for key in old | new
        if old.get(key, missing) != new.get(key, missing)
        and not any(key == prefix or key.startswith(f"{prefix}.") for prefix in free)
    ]


def _leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _whole_checkpoints(checkpoints_dir: Path) -> list[Path]:
    if not checkpoints_dir.is_dir():
        return []
    return [path for path in checkpoints_dir.iterdir() if re.fullmatch(r"step_\d+", path.name) and path.is_dir()]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def _remove(folder: Path) -> None:
    """Removes a folder so that a kill in between leaves no half of it under its name."""
    removed = folder.with_name(folder.name + _REMOVED)
    os.rename(folder, removed)
    _sync(folder.parent)
    shutil.rmtree(removed)


def _sync(path: Path) -> None:
    """Flushes a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_no_space(error: BaseException | None) -> bool:
    """Whether an exception, or one that it was raised during, says that there is no room."""
    while error is not None:
        # safetensors has no errno to look at: its writer says "... (os error 28)".
        spoken = re.search(r"\(os error (\d+)\)", str(error))
        if (isinstance(error, OSError) and error.errno in _NO_SPACE) or (spoken and int(spoken[1]) in _NO_SPACE):
            return True
        error = error.__cause__ or error.__context__
    return False
