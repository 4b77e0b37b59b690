"""The run directory: what a run writes there, whether what is there is a run's, and a lock for one run at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from adapt_recipes.errors import warn
from adapt_recipes.files import fsync

LOG, SUMMARY, RESOLVED = "log.jsonl", "summary.json", "resolved.yaml"
CHECKPOINTS, MODEL, ADAPTER = "checkpoints", "model", "adapter"
# Of the weights with the lowest validation loss.
MODEL_BEST, ADAPTER_BEST = "model_best", "adapter_best"
# Of ``mixture_eval``, on the model.
EVALUATION, SAMPLES = "evaluation.json", "evaluation"
WRITTEN = (LOG, SUMMARY, RESOLVED, CHECKPOINTS, MODEL, ADAPTER, MODEL_BEST, ADAPTER_BEST)
LOCK = ".lock"


def has_run(folder: Path) -> bool:
    """Whether a run has begun here: there is our ``resolved.yaml``, which is written first, or a checkpoint."""
    try:
        resolved = yaml.safe_load((folder / RESOLVED).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        resolved = None
    versions = resolved.get("versions") if isinstance(resolved, dict) else None
    is_ours = isinstance(versions, dict) and "adapt_recipes" in versions
    return is_ours or has_checkpoint(folder)


def has_checkpoint(folder: Path) -> bool:
    """Whether the folder holds a complete checkpoint of a run."""
    return any((folder / CHECKPOINTS).glob("step_*/checksums.json"))


def has_model(folder: Path) -> bool:
    """Whether the folder holds the trained model."""
    return (folder / MODEL / "config.json").exists()


def is_finished(folder: Path) -> bool:
    """Whether the run in this folder is finished: the summary is written last."""
    return (folder / SUMMARY).exists() and has_run(folder)


def keep_results(folder: Path, step: int) -> None:
    """Renames the results of a finished run, so that it can go on: ``model`` to ``model_step_N``, and so on.

    The summary, without which the run is not finished, is renamed last: after a kill it is done again.

    Args:
        folder: of the run.
        step: N, its last one.

    Raises:
        ValueError: such a name is taken.
    """
    names = {name: f"{name}_step_{step}" for name in (MODEL, ADAPTER, MODEL_BEST, ADAPTER_BEST, SAMPLES)}
    names |= {name: name.replace(".json", f".step_{step}.json") for name in (EVALUATION, SUMMARY)}
    renames = {folder / name: folder / kept for name, kept in names.items() if (folder / name).exists()}
    for path, kept in renames.items():
        if kept.exists():
            raise ValueError(f"change_budget: {path} would be kept as {kept.name}, which is there already; move it")
    for path, kept in renames.items():
        os.rename(path, kept)
    fsync(folder)


def check_output_dir(config: Mapping[str, Any]) -> None:
    """Refuses an ``output_dir`` in which a run would replace something that no run of this project has written.

    Args:
        config: nested, with ``output_dir``.

    Raises:
        ValueError: such a file or folder is there, or a path of the config is one that the run would write.
    """
    folder = Path(config["output_dir"])
    if not has_run(folder):
        for path in (folder / name for name in WRITTEN):
            # An empty folder may be a link to another disk.
            if path.is_file() or (path.is_dir() and any(path.iterdir())):
                raise ValueError(
                    f"output_dir: {path} is there already, and not of a run; move it, or choose another output_dir"
                )
    written = [(folder / name).resolve() for name in WRITTEN]
    for section in ("model", "tokenizer", "checkpointer", "tasks"):
        for key, text in _texts(section, config.get(section)):
            path = Path(text).resolve()
            # Sources of tasks may read all files of a folder.
            reads_all = section == "tasks" and path == folder.resolve()
            if reads_all or any(own == path or own in path.parents for own in written):
                raise ValueError(f"output_dir: the run would write to {text}, which is {key}; choose another one")


@contextlib.contextmanager
def one_run_at_a_time(folder: Path) -> Iterator[None]:
    """Creates the folder and holds a lock in it until the block or the process ends.

    The lock is the process's, so a kill cannot leave it behind. POSIX locks also work on most network file systems, and
    are not inherited by child processes.

    Raises:
        ValueError: another process has the lock; it names host and process.
        OSError: the folder cannot be created or written.
    """
    folder = Path(os.path.realpath(folder))
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _locked(folder / LOCK) as file:
            file.truncate()
            file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
            file.flush()
            try:
                yield
            finally:
                (folder / LOCK).unlink(missing_ok=True)
    finally:
        # Only empty folders: the run has written nothing.
        with contextlib.suppress(OSError):
            for path in created:
                path.rmdir()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[Any]:
    while True:
        with open(path, "ab+") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    warn(f"output_dir: {path.parent} cannot be locked ({error.strerror}); start no other run in it")
                else:
                    file.seek(0)
                    holder = file.read().decode(errors="replace") or "another process"
                    raise ValueError(f"output_dir: {path.parent} is in use by {holder}") from None
            # The process that had the lock may have removed the file since it was opened.
            try:
                if not os.path.samestat(os.stat(path), os.fstat(file.fileno())):
                    continue
            except FileNotFoundError:
                continue
            yield file
            return


def _texts(key: str, value: Any) -> Iterator[tuple[str, str]]:
    """The strings of a node of a config, each with its dotted key."""
    if isinstance(value, str) and not key.endswith("._component_"):
        yield key, value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _texts(f"{key}.{name}", item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(key, item)
