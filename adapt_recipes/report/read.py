"""Reads a run directory into arrays; the run may be finished, interrupted, killed or still running.

The counts in a log are totals, so most lines can be skipped: of steps and of mixture updates a few hundred evenly
spaced ones are parsed, including the last. All validations are parsed, because tables need each of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray

from adapt_recipes.run_directory import LOG, RESOLVED, SUMMARY, has_run

Array = NDArray[np.float64]

# Lines kept of each thinned event: this many, up to twice as many.
KEPT_LINES = 400
THINNED = ("step", "mixture")
# Other units of results than nats per supervised token, as tables call them and as ``summary.json`` does.
UNITS = {"exact match": "exact_match", "bits per byte": "bits_per_byte"}


class Steps(NamedTuple):
    """Training steps. All but the learning rate are totals since the run began."""

    step: Array
    supervised_tokens: Array
    tokens: Array
    computed_tokens: Array
    seconds: Array
    lr: Array
    task_tokens: Array
    """(steps, tasks)"""


class Mixtures(NamedTuple):
    """The starting probabilities and those of every mixture update, used from that step on."""

    step: Array
    supervised_tokens: Array
    probe_tokens: Array
    mixture_seconds: Array
    probabilities: Array
    """(updates, tasks)"""


class Validations(NamedTuple):
    """Validations on the whole split."""

    supervised_tokens: Array
    losses: Array
    """(validations, tasks), nats per supervised token; NaN for tasks without a validation split"""


def worst_over_tasks(losses: Array) -> Array:
    """(..., tasks) to (...): the highest of the measured losses; NaN if there are none."""
    highest = np.where(np.isnan(losses), -np.inf, losses).max(axis=-1)
    return np.where(np.isnan(losses).all(axis=-1), np.nan, highest)


def mean_over_tasks(losses: Array) -> Array:
    """(..., tasks) to (...): the unweighted mean of the measured losses; NaN if there are none."""
    # 0 / 0 if no task is measured.
    with np.errstate(invalid="ignore"):
        return np.nansum(losses, axis=-1) / np.isfinite(losses).sum(axis=-1)


@dataclass(frozen=True, kw_only=True)
class Run:
    """The content of a run directory."""

    folder: Path
    config: dict[str, Any]
    """``resolved.yaml``"""
    summary: dict[str, Any]
    """``summary.json``; empty while the run is not finished"""
    ended: str
    """how the run ended, as text; empty if it finished"""
    notes: tuple[str, ...]
    """remarks about the files for the reader of a report"""
    tasks: tuple[str, ...]
    num_updates: int
    steps: Steps
    mixtures: Mixtures
    validations: Validations
    split: Literal["validation", "test"] = "validation"
    """of the results; see ``on_one_split``"""

    @property
    def strategy(self) -> str:
        """The config's ``strategy``; without a config the name of the folder."""
        return str(self.config.get("strategy", self.name))

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.folder.resolve().name

    @property
    def seed(self) -> int | None:
        return self.config.get("seed")

    @property
    def logged(self) -> int:
        """Supervised tokens at the last step in the log: all that were spent, unless the log is truncated."""
        return int(self.steps.supervised_tokens[-1]) if len(self.steps.step) else 0

    @property
    def spent(self) -> int:
        """Supervised tokens spent."""
        return int(self.summary.get("supervised_tokens", self.logged))

    @property
    def budget(self) -> int | None:
        """Supervised tokens the run may spend; None for an unfinished run whose config has no ``budget.tokens``."""
        return self.summary.get("budget_tokens") or (self.config.get("budget") or {}).get("tokens")

    @property
    def task_tokens(self) -> Array:
        """(tasks,): supervised tokens spent on each task."""
        return self._in_summary("task_tokens", self.steps.task_tokens[-1:], otherwise=0)

    @property
    def final_probabilities(self) -> Array:
        """(tasks,): the last probabilities."""
        return self._in_summary("probabilities", self.mixtures.probabilities[-1:])

    @property
    def initial_losses(self) -> Array:
        """(tasks,): the losses of the first validation; NaN if there is none."""
        return self._in_summary("initial_validation_losses", self.validations.losses[:1])

    @property
    def final_losses(self) -> Array:
        """(tasks,): the losses of the last validation; NaN if there is none."""
        return self._in_summary("validation_losses", self.validations.losses[-1:])

    @property
    def saved_losses(self) -> Array:
        """(tasks,): the validation losses of the model as it was saved; NaN if the run does not say."""
        return self._in_summary("saved_validation_losses", np.empty(0))

    @property
    def test_losses(self) -> Array:
        """(tasks,): the losses on the test split, measured at the end; NaN if there is none."""
        return self._in_summary("test_losses", np.empty(0))

    @property
    def result_losses(self) -> Array:
        """(tasks,): the losses at the end by which runs are compared, on ``split``."""
        return self.test_losses if self.split == "test" else self.final_losses

    def results_in(self, unit: str) -> Array:
        """(tasks,): the results at the end in one of ``UNITS``, on ``split``; NaN if the run does not say."""
        return self._in_summary(f"{self.split}_{UNITS[unit]}", np.empty(0))

    @property
    def targets(self) -> tuple[str, ...]:
        """The tasks that were validated on and never trained, as the summary names them."""
        return tuple(self.summary.get("target_losses") or ())

    def of_targets(self, key: str) -> Array:
        """(targets,): values of the summary, such as ``target_losses``; NaN if the run does not say."""
        by_target = self.summary.get(key) or {}
        return _array([by_target.get(target) for target in self.targets])

    @property
    def result_target_losses(self) -> Array:
        """(targets,): the losses of targets at the end, on ``split``."""
        return self.of_targets("target_test_losses" if self.split == "test" else "target_losses")

    def _in_summary(self, key: str, of_log: Array, otherwise: float = math.nan) -> Array:
        """One value per task from the summary, or without a summary from the log."""
        if by_task := self.summary.get(key):
            return _array([by_task.get(task) for task in self.tasks])
        return of_log[0] if len(of_log) else np.full(len(self.tasks), float(otherwise))

    @property
    def worst(self) -> Array:
        """(validations,): the highest loss of any task."""
        return worst_over_tasks(self.validations.losses)

    @property
    def mean(self) -> Array:
        """(validations,): the mean loss over tasks, unweighted."""
        return mean_over_tasks(self.validations.losses)

    def only(self, tasks: Sequence[str]) -> Run:
        """The same run restricted to some of its tasks, in that order."""
        columns = [self.tasks.index(task) for task in tasks]
        return replace(
            self,
            tasks=tuple(tasks),
            steps=self.steps._replace(task_tokens=self.steps.task_tokens[:, columns]),
            mixtures=self.mixtures._replace(probabilities=self.mixtures.probabilities[:, columns]),
            validations=self.validations._replace(losses=self.validations.losses[:, columns]),
        )


def on_one_split(runs: Sequence[Run]) -> list[Run]:
    """The runs with the ``split`` by which to compare them.

    The test split if all runs have a test loss of every task that has a validation loss, else validation.
    """

    def is_tested(run: Run) -> bool:
        tested = np.isfinite(run.test_losses)
        return bool(tested.any() and tested[np.isfinite(run.final_losses)].all())

    return [replace(run, split="test" if all(map(is_tested, runs)) else "validation") for run in runs]


def read_run(folder: Path) -> Run:
    """Reads a run directory.

    Raises:
        ValueError: it contains no run, or a file in it is malformed; it names the file, and the line of a log.
    """
    # The files.
    if not (folder / LOG).is_file():
        raise ValueError(_no_run(folder))
    lines, notes = _read_log(folder / LOG)
    config = _read_mapping(folder / RESOLVED, yaml.safe_load) if (folder / RESOLVED).exists() else {}
    summary = _read_mapping(folder / SUMMARY, json.loads) if (folder / SUMMARY).exists() else {}
    if not config:
        notes.append(f"there is no {RESOLVED}: its strategy and seed are not known")
    if "mixture" not in lines:
        raise ValueError(f"{folder / LOG}: the run has not begun: there is no line with its probabilities")

    # Columns of the log.
    def column(event: str, *keys: str) -> dict[str, Array]:
        """The values of some keys on all lines of an event."""
        return {key: _array([line.number(key) for line in lines.get(event, [])]) for key in keys}

    tasks = lines["mixture"][0].tasks("probabilities")

    def by_task(event: str, key: str) -> Array:
        rows = [line.by_task(key, tasks) for line in lines.get(event, [])]
        return _array(rows).reshape(len(rows), len(tasks))

    steps = column("step", "step", "supervised_tokens", "tokens", "computed_tokens", "seconds", "lr")
    mixtures = column("mixture", "step", "supervised_tokens", "probe_tokens", "mixture_seconds")
    run = Run(
        folder=folder,
        config=config,
        summary=summary,
        ended=_how_it_ended(lines, is_finished=bool(summary)),
        notes=tuple(notes),
        tasks=tasks,
        num_updates=lines["mixture"][-1].count - 1,
        steps=Steps(**steps, task_tokens=by_task("step", "task_tokens")),
        mixtures=Mixtures(**mixtures, probabilities=by_task("mixture", "probabilities")),
        validations=Validations(**column("validation", "supervised_tokens"), losses=by_task("validation", "losses")),
    )
    if run.logged < run.spent:
        note = f"{LOG} is truncated: figures end at token {run.logged:,} of {run.spent:,}; tables are of {SUMMARY}"
        return replace(run, notes=(*notes, note))
    return run


class _Line:
    """A line of the log, the ``count``-th of its event, parsed lazily."""

    def __init__(self, path: Path, line_number: int, count: int, text: bytes) -> None:
        self.line_number = line_number
        self.count = count
        self._where = f"{path}, line {line_number}"
        self._text = text
        self._values: dict[str, Any] | None = None

    def value(self, key: str) -> Any:
        if self._values is None:
            self._values = _parse(self._text)
        if self._values is None:
            raise ValueError(f"{self._where}: is not a JSON object")
        if key not in self._values:
            raise ValueError(f"{self._where}: has no '{key}'")
        return self._values[key]

    def number(self, key: str) -> float | None:
        value = self.value(key)
        if not _is_number(value):
            raise ValueError(f"{self._where}: '{key}' has to be a number")
        return value

    def tasks(self, key: str) -> tuple[str, ...]:
        values = self.value(key)
        if not isinstance(values, dict) or not values:
            raise ValueError(f"{self._where}: '{key}' has to be a mapping of tasks to numbers")
        return tuple(values)

    def by_task(self, key: str, tasks: Sequence[str]) -> list[float | None]:
        if set(self.tasks(key)) != set(tasks):
            raise ValueError(f"{self._where}: '{key}' has to have the tasks of the log's first line")
        values = [self.value(key)[task] for task in tasks]
        if not all(map(_is_number, values)):
            raise ValueError(f"{self._where}: '{key}' has to be a mapping of tasks to numbers")
        return values


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _read_log(path: Path) -> tuple[dict[str, list[_Line]], list[str]]:
    """The lines of each event, with those of ``THINNED`` events thinned out, and notes about the file."""
    # Every n-th line of a thinned event is kept; n doubles when there are too many lines.
    kept: dict[str, list[_Line]] = {}
    last: dict[str, _Line] = {}
    every = dict.fromkeys(THINNED, 1)
    prefixes = {event: f'{{"event": "{event}"'.encode() for event in THINNED}
    notes = []
    with open(path, "rb") as file:
        for number, text in enumerate(file, 1):
            is_whole = text.endswith(b"\n") or _parse(text) is not None
            if not is_whole:
                notes.append(f"{LOG} ends in the middle of line {number}, and is read up to there")
                break
            event = next((event for event, prefix in prefixes.items() if text.startswith(prefix)), None)
            if event is None:
                event = str(_Line(path, number, 0, text).value("event"))
            count = last[event].count + 1 if event in last else 1
            last[event] = _Line(path, number, count, text)
            if (count - 1) % every.get(event, 1) == 0:
                lines = kept.setdefault(event, [])
                lines.append(last[event])
                if event in THINNED and len(lines) == 2 * KEPT_LINES:
                    del lines[1::2]
                    every[event] *= 2
    # The last line of every event.
    for event, lines in kept.items():
        if lines[-1] is not last[event]:
            lines.append(last[event])
    return kept, notes


def _parse(text: bytes) -> dict[str, Any] | None:
    """The JSON object in a line; None if there is none."""
    try:
        values = json.loads(text)
    except ValueError:
        return None
    return values if isinstance(values, dict) else None


def _read_mapping(path: Path, parse: Any) -> dict[str, Any]:
    try:
        values = parse(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: has to be a mapping of keys to values")
    return values


def _array(values: list[Any]) -> Array:
    """Null becomes NaN."""
    return np.array(values, dtype=np.float64)


def _how_it_ended(lines: dict[str, list[_Line]], *, is_finished: bool) -> str:
    if is_finished:
        return ""
    ends, resumes = lines.get("end", []), lines.get("resume", [])
    if not ends or (resumes and resumes[-1].line_number > ends[-1].line_number):
        return "was killed or is still running"
    reason = ends[-1].value("reason")
    if reason == "finished":
        return f"spent its budget, but has no {SUMMARY}"
    return f"ended in an error: {ends[-1].value('message')}" if reason == "error" else f"was {reason}"


def _no_run(folder: Path) -> str:
    """Why a folder cannot be read, and whether there are runs in its subfolders."""
    if not folder.is_dir():
        return f"{folder}: " + ("is not a folder" if folder.exists() else "there is no such folder")
    if has_run(folder):
        return f"{folder}: the run has no {LOG}"
    inside = sum((child / LOG).is_file() for child in folder.iterdir())
    hint = f" itself, but {inside} of its folders do: give {folder}/*/" if inside else ""
    return f"{folder}: contains no run{hint}"
