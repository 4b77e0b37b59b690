"""Writes files and folders atomically: complete or not at all, even if the process is killed."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

PARTIAL, REMOVED = ".partial", ".removed"
# A full disk, a full quota, a limit on the size of a file.
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"


class NoSpaceLeft(OSError):
    """There was no space to write a file or folder; nothing of it is left behind."""


@contextmanager
def atomic_file(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Yields a path to write to; at the end of the block that file replaces ``path``.

    If the block fails, ``path`` is unchanged.

    Args:
        path: in a folder that exists.
        shared: other processes may write the same file at the same time, as in a cache.

    Raises:
        NoSpaceLeft: the disk, the quota or the allowed size of a file ran out.
    """
    partial = path.with_name(path.name + (f".{uuid4().hex}" if shared else "") + PARTIAL)
    try:
        yield partial
        fsync(partial)
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if is_no_space(error):
            raise NoSpaceLeft(f"no space left while writing {path}") from error
        raise


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yields a folder to write into, which is renamed to ``folder`` at the end of the block, or removed if it fails.

    An existing ``folder`` is replaced. For a moment there is none, but never an incomplete one. A symbolic link stays,
    and the folder that it names is replaced.

    Raises:
        NoSpaceLeft: the disk, the quota or the allowed size of a file ran out.
    """
    folder = Path(os.path.realpath(folder))
    partial = folder.with_name(folder.name + PARTIAL)
    try:
        for rest in (partial, folder.with_name(folder.name + REMOVED)):
            if rest.exists():
                shutil.rmtree(rest)
        partial.mkdir(parents=True)
        yield partial
        for path in (*partial.rglob("*"), partial):
            fsync(path)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if is_no_space(error):
            raise NoSpaceLeft(f"no space left while writing {folder}") from error
        raise
    if folder.exists():
        remove_folder(folder)
    os.rename(partial, folder)
    fsync(folder.parent)


def remove_folder(folder: Path) -> None:
    """Removes a folder so that a kill does not leave an incomplete one under its name."""
    removed = folder.with_name(folder.name + REMOVED)
    os.rename(folder, removed)
    fsync(folder.parent)
    shutil.rmtree(removed)


def check_not_lfs(path: Path) -> None:
    """Refuses a Git LFS pointer, which a clone without Git LFS has in place of a large file.

    Raises:
        ValueError: the file is one (https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md).
    """
    with open(path, "rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise ValueError(f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` in {path.parent}")


def fsync(path: Path) -> None:
    """Flushes a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_no_space(error: BaseException | None) -> bool:
    """Whether an exception, or one of its causes, means that there is no space left."""
    while error is not None:
        # safetensors has no errno; its message ends in "(os error 28)".
        number = re.search(r"\(os error (\d+)\)", str(error))
        if (isinstance(error, OSError) and error.errno in _NO_SPACE) or (number and int(number[1]) in _NO_SPACE):
            return True
        error = error.__cause__ or error.__context__
    return False
