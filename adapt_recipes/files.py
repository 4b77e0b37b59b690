"""Files and folders that are written whole or not at all, whatever ends the process meanwhile."""

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
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a full disk, a full quota, a limit on the size of a file


class NoSpaceLeft(OSError):
    """There was no room to write something; nothing of it is left behind."""


@contextmanager
def atomic_file(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Yields a path to write to, which takes the place of ``path`` at the end of the block.

    If the block fails, ``path`` stays as it was.

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
    """Gives a folder to write into, which becomes ``folder`` at the end of the block, or is removed if the block fails.

    A ``folder`` that exists is replaced. For a moment there is none then, but never half of one.

    Raises:
        NoSpaceLeft: the disk, the quota or the allowed size of a file ran out.
    """
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
    """Removes a folder so that a kill in between leaves no half of it under its name."""
    removed = folder.with_name(folder.name + REMOVED)
    os.rename(folder, removed)
    fsync(folder.parent)
    shutil.rmtree(removed)


def fsync(path: Path) -> None:
    """Flushes a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_no_space(error: BaseException | None) -> bool:
    """Whether an exception, or one that it was raised during, says that there is no room."""
    while error is not None:
        # safetensors has no errno to look at: its writer says "... (os error 28)".
        spoken = re.search(r"\(os error (\d+)\)", str(error))
        if (isinstance(error, OSError) and error.errno in _NO_SPACE) or (spoken and int(spoken[1]) in _NO_SPACE):
            return True
        error = error.__cause__ or error.__context__
    return False
