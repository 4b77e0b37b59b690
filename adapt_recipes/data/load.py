"""The ``tasks`` node of a config: the source of the tasks, and how they are split."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, field_validator

from adapt_recipes.data.examples import Task
from adapt_recipes.data.prepare import prepare_tasks
from adapt_recipes.data.tokenize import Reading
from adapt_recipes.errors import nearest
from adapt_recipes.files import atomic_file
from adapt_recipes.strict import FREE_AT_RESUME, Component
from adapt_recipes.training.process_group import raise_on_all_ranks

_FINGERPRINT_BYTES = 16
# How long a process waits for another before it says so.
_SILENT_SECONDS = 10.0


class TasksConfig(Component):
    """A component that returns a list of ``RawTask``, and the settings that tasks of every source have."""

    validation_examples: Annotated[int, Field(ge=1)] = 32
    """prompts of each task held out for validation; a task with a validation split of its own keeps that"""
    test_examples: Annotated[int, Field(ge=0)] = 0
    """prompts of each task held out for the test after the run; 0: none; a task with a test split of its own keeps
    that"""
    max_examples_per_task: Annotated[int, Field(ge=1)] | None = None
    """use at most this many examples of each task"""
    max_epochs_per_task: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """draw no task more often than this (UniMax, arXiv 2304.09151); a task that would be is spread over the whole run,
    and the others share what is left; null: no limit"""
    no_validation: list[str] = []
    """tasks to train on, but to leave out of the objective and of the results"""
    targets: list[str] | Component = []
    """tasks to validate on and never train: names of tasks of this source, or a source of their own, a node with a
    _component_"""
    target_weights: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] | None = None
    """what the objective of a mixture that takes targets is over, by the names of targets and of tasks, all others 0;
    null: all targets alike, and no task that is trained"""
    supervise: Literal["all", "last"] = "all"
    """train on all answers of a conversation, or on the last alone"""
    system: Literal["merge_into_user"] | None = None
    """put the system message in front of the first user's, for a chat template without a system role"""
    on_bad_rows: Literal["refuse", "skip"] = "refuse"
    """whether a row that is no example is an error, or is left out and counted"""
    cache_dir: Annotated[str | None, FREE_AT_RESUME] = None
    """folder of the cache of tokenized tasks; default: $XDG_CACHE_HOME/adapt_recipes, or ~/.cache/adapt_recipes"""

    @field_validator("targets", mode="before")
    @classmethod
    def _check_targets(cls, targets: Any) -> Any:
        is_node = isinstance(targets, Component | Mapping) and "_component_" in dict(targets)
        if not is_node and not (isinstance(targets, list) and all(isinstance(name, str) for name in targets)):
            raise ValueError("tasks.targets: must be a list of names of tasks, or a node with a _component_")
        return targets

    @property
    def cache_folder(self) -> Path:
        """``cache_dir`` or its default, whether it exists or not."""
        default = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "adapt_recipes")
        return Path(self.cache_dir or default).expanduser()


def load_tasks(config: TasksConfig, *, tokenizer: Any, max_seq_len: int) -> list[Task]:
    """Reads the tasks of a config, tokenizes them (or reads them from the cache), and splits them.

    Args:
        config: the ``tasks`` node.
        tokenizer: a ``ChatTokenizer``, or an object with its ``encode`` and ``fingerprint``.
        max_seq_len: rendered tokens; longer examples are dropped and counted.

    Raises:
        ValueError: it names the file and line, or the task.
    """
    tasks = prepare_tasks(
        config.build(),
        tokenizer,
        max_seq_len=max_seq_len,
        validation_examples=config.validation_examples,
        test_examples=config.test_examples,
        max_examples_per_task=config.max_examples_per_task,
        no_validation=config.no_validation,
        targets=() if isinstance(config.targets, Component) else config.targets,
        raw_targets=config.targets.build() if isinstance(config.targets, Component) else (),
        reading=Reading(config.supervise, config.system),
        on_bad_rows=config.on_bad_rows,
        cache_dir=config.cache_folder,
    )
    if all(task.is_target for task in tasks):
        raise ValueError("tasks: there is no task to train on")
    if all(task.validation is None for task in tasks if not task.is_target):
        raise ValueError("tasks.no_validation: it names every task; leave at least one to validate on")
    _check_target_weights(config, tasks)
    return tasks


def split_targets(tasks: Sequence[Task]) -> tuple[list[Task], list[Task]]:
    """The tasks to train on, and the targets, which are validated on and never trained."""
    return [task for task in tasks if not task.is_target], [task for task in tasks if task.is_target]


def target_arguments(config: TasksConfig, tasks: Sequence[Task], targets: Sequence[Task]) -> dict[str, Any]:
    """What a mixture that takes targets is built with; empty without targets.

    Args:
        config: the ``tasks`` node.
        tasks: those to train on, in the order of the mixture.
        targets: the others.

    Returns:
        ``target_names``, and ``target_weights``: (num_tasks + num_targets,) float64, what the objective is over.
    """
    if not targets:
        return {}
    names = [task.name for task in targets]
    weights = config.target_weights or dict.fromkeys(names, 1.0)
    of_all = [weights.get(task.name, 0.0) for task in (*tasks, *targets)]
    return {"target_names": names, "target_weights": torch.tensor(of_all, dtype=torch.float64)}


def _check_target_weights(config: TasksConfig, tasks: Sequence[Task]) -> None:
    if config.target_weights is None:
        return
    names = [task.name for task in tasks if task.validation is not None]
    if not any(task.is_target for task in tasks):
        raise ValueError("tasks.target_weights: there are no targets; name them in tasks.targets, or remove it")
    for name in config.target_weights:
        if name not in names:
            raise ValueError(f"tasks.target_weights: no task or target {name!r} to validate on{nearest(name, names)}")
    if not any(config.target_weights.values()):
        raise ValueError("tasks.target_weights: at least one weight must be above 0, and all are 0")


def build_tasks(config: TasksConfig, tokenizer: Component, *, max_seq_len: int) -> tuple[Any, list[Task]]:
    """The tokenizer and the tasks of a config, the targets last, on every process.

    The first process of each host fills the cache.

    Args:
        config: the ``tasks`` node.
        tokenizer: the ``tokenizer`` node.
        max_seq_len: rendered tokens; longer examples are dropped and counted.

    Raises:
        ValueError: see ``load_tasks``.
    """
    waits = threading.Timer(_SILENT_SECONDS, _say_waiting)
    waits.daemon = True
    # One process per host says it.
    if os.environ.get("LOCAL_RANK", "0") == "1":
        waits.start()
    with raise_on_all_ranks(in_turn=True):
        waits.cancel()
        built = tokenizer.build()
        return built, load_tasks(config, tokenizer=built, max_seq_len=max_seq_len)


def _say_waiting() -> None:
    print("waiting for the first process of this host, which prepares the data", file=sys.stderr, flush=True)


def max_token(tasks: Sequence[Task]) -> int:
    """The highest token id that any of the tasks holds; 0 where there are no tasks."""
    return max((split.max_token for task in tasks for split in task.splits.values()), default=0)


def fingerprint(tasks: Sequence[Task], *, cache_dir: Path | None = None) -> str:
    """A hash of everything that a run reads. A resume on other data is refused by it.

    Args:
        tasks: of the run.
        cache_dir: where the hash of tasks out of the store is kept, because millions of examples take ten seconds.
            None: it is always computed.
    """
    known = None if cache_dir is None else _known_fingerprint(tasks, cache_dir)
    if known is not None:
        with suppress(OSError):
            if len(text := known.read_text()) == 2 * _FINGERPRINT_BYTES:
                return text
    digest = blake2b(digest_size=_FINGERPRINT_BYTES)
    for task in tasks:
        digest.update(task.name.encode() + b"\0")
        if task.is_target:
            digest.update(b"target\0")
        for split in task.splits.values():
            if split is task.test:
                # Without a test split the hash is that of earlier versions.
                digest.update(b"test\0")
            for block in chain(split.token_blocks(), split.supervised_blocks(), [split.offsets.numpy()]):
                digest.update(block.data)
    # A folder that cannot be written is no reason to stop.
    if known is not None:
        with suppress(OSError):
            known.parent.mkdir(exist_ok=True)
            with atomic_file(known, shared=True) as partial:
                partial.write_text(digest.hexdigest())
    return digest.hexdigest()


def _known_fingerprint(tasks: Sequence[Task], cache_dir: Path) -> Path | None:
    """The file of the fingerprint of these entries and selections; None: some of them are not out of the store."""
    digest = blake2b(digest_size=16)
    for task in tasks:
        digest.update(task.name.encode() + b"\0")
        for name, split in task.splits.items():
            keys = [columns.key for columns in split.sources]
            if not all(keys):
                return None
            digest.update(f"{name} {keys} {len(split)} {len(split.hidden)}\0".encode())
            for indices in (split.rows, split.hidden):
                digest.update(indices.numpy().data)
    return cache_dir / "fingerprints" / digest.hexdigest()
