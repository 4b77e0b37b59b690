"""The files of a run directory that people and scripts read: ``resolved.yaml``, ``log.jsonl``, ``summary.json``."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

import adapt_recipes

LOG, SUMMARY, RESOLVED, CHECKPOINTS = "log.jsonl", "summary.json", "resolved.yaml", "checkpoints"


def holds_run(folder: Path) -> bool:
    """Whether a run has begun in this folder."""
    return any((folder / name).exists() for name in (LOG, SUMMARY, RESOLVED, CHECKPOINTS))


def is_finished(folder: Path) -> bool:
    """Whether the run in this folder is over: the summary is written last."""
    return (folder / SUMMARY).exists()


class RunLog:
    """``log.jsonl``: one JSON object a line, flushed as it is written.

    Args:
        folder: the run directory.
        keep_bytes: what a resumed run keeps of the log: its length when the checkpoint was taken. What was written
            after it is written again, so it is cut off first. 0: a new log.
    """

    def __init__(self, folder: Path, *, keep_bytes: int = 0) -> None:
        path = folder / LOG
        if keep_bytes and (not path.exists() or path.stat().st_size < keep_bytes):
            raise ValueError(f"resume: {path} is shorter than it was at the checkpoint; it has been changed since")
        self._file = open(path, "ab")  # noqa: SIM115 (closed by `close`)
        self._file.truncate(keep_bytes)

    @property
    def num_bytes(self) -> int:
        """Length of the log now, flushed to the disk: a checkpoint that outlives a power cut counts on it."""
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def write(self, event: str, **values: Any) -> None:
        """Add one line. Tensors become lists, numbers that are not finite become null.

        Raises:
            OSError: it cannot be written, as on a full disk; it names the file.
        """
        try:
            self._file.write(_json({"event": event, **values}).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._file.name)) from error

    def close(self) -> None:
        with contextlib.suppress(OSError):  # of what could not be written, and `write` has said so
            self._file.close()


def write_resolved(folder: Path, config: Mapping[str, Any]) -> None:
    """``resolved.yaml``: the whole config as used, with the versions it ran on."""
    packages = ("torch", "torchtune", "torchao", "datasets", "tokenizers", "safetensors", "numpy")
    versions = {"adapt_recipes": adapt_recipes.__version__, "python": platform.python_version()}
    versions |= {package: version(package) for package in packages}
    text = yaml.safe_dump({**config, "versions": versions}, sort_keys=False, allow_unicode=True, width=120)
    _write_atomically(folder / RESOLVED, text)


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """``summary.json``, whole or absent."""
    _write_atomically(folder / SUMMARY, json.dumps(_plain(summary), indent=2) + "\n")


def _write_atomically(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _json(value: Any) -> str:
    return json.dumps(_plain(value), ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
