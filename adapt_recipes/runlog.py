"""The files of a run directory for people and scripts: ``resolved.yaml``, ``log.jsonl``, ``summary.json``."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from torch import Tensor

import adapt_recipes
from adapt_recipes.errors import warn
from adapt_recipes.events import (
    Event,
    MixtureEvent,
    SavedValidationEvent,
    StepEvent,
    Summary,
    TestEvent,
    ValidationEvent,
    to_line,
)
from adapt_recipes.files import atomic_file
from adapt_recipes.run_directory import LOG, RESOLVED, SUMMARY

# The names of metrics of a whole split, and the keys of events that they are of.
UNITS = {"loss": "losses", "exact_match": "exact_match", "bits_per_byte": "bits_per_byte"}
# What the metrics of targets begin with, by event.
TARGET_METRICS = {"validation": "target", "saved_validation": "saved_target", "test": "target_test"}


class RunLog:
    """``log.jsonl``, one JSON object per line, flushed as it is written; and the metric logger.

    Args:
        folder: the run directory.
        metric_logger: one of torchtune's; None: there is none. It gets the first step,
            the last one, and every ``log_every``-th one.
        log_every: steps; 0: none in between.
        budget_tokens: supervised tokens, to recognize the last step.
        keep_bytes: length of the log at the checkpoint from which a run resumes. Later lines will be written again, so
            the log is truncated to it. 0: a new log.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep_bytes: int = 0,
        metric_logger: Any = None,
        log_every: int = 0,
        budget_tokens: int = 0,
    ) -> None:
        self._metric_logger, self._log_every, self._budget_tokens = metric_logger, log_every, budget_tokens
        path = folder / LOG
        self._file = open(path, "ab+")  # noqa: SIM115 (closed by `close`)
        if (size := os.fstat(self._file.fileno()).st_size) < keep_bytes:
            warn(f"{path} is shorter than at the checkpoint; the run goes on without the missing lines")
            # Whole lines only.
            self._file.seek(0)
            keep_bytes = self._file.read(size).rfind(b"\n") + 1
        self._file.truncate(keep_bytes)

    @property
    def num_bytes(self) -> int:
        """Length of the log, flushed to the disk, because a checkpoint that survives a power failure relies on it."""
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def write(self, event: Event) -> None:
        """Writes one line. Tensors become lists, and numbers that are not finite become null.

        Raises:
            OSError: the line cannot be written, for example on a full disk; it names the file.
        """
        try:
            self._file.write(_json(to_line(event)).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._file.name)) from error
        if self._metric_logger and (metrics := self._metrics(event)):
            try:
                self._metric_logger.log_dict(metrics, step=event.step)
            except Exception as error:
                _warn_about_metric_logger(error)
                self._metric_logger = None

    def close(self) -> None:
        # ``write`` has already raised an error about what could not be written.
        with contextlib.suppress(OSError):
            self._file.close()

    def _metrics(self, event: Event) -> dict[str, float]:
        """The values for the metric logger, by the names listed in docs/watching.md."""
        if isinstance(event, StepEvent):
            is_last = event.supervised_tokens == self._budget_tokens
            if event.step > 1 and not is_last and not (self._log_every and event.step % self._log_every == 0):
                return {}
            totals = ("supervised_tokens", "total_tokens", "tokens", "computed_tokens", "seconds")
            return {name: getattr(event, name) for name in ("loss", "lr", "grad_norm", *totals)}
        if isinstance(event, MixtureEvent):
            probabilities = {f"p/{task}": p for task, p in event.probabilities.items()}
            effective = event.effective_probabilities or {}
            probabilities |= {f"effective_p/{task}": p for task, p in effective.items()}
            return probabilities | {
                n: getattr(event, n) for n in ("supervised_tokens", "probe_tokens", "mixture_seconds")
            }
        if isinstance(event, ValidationEvent | SavedValidationEvent | TestEvent):
            units = {"loss": event.losses, "exact_match": event.exact_match, "bits_per_byte": event.bits_per_byte}
            of_targets = {unit: event.targets[f"target_{key}"] for unit, key in UNITS.items()} if event.targets else {}
            return {
                "validation_tokens": event.validation_tokens,
                **_metrics_of(event.event, units),
                **_metrics_of(TARGET_METRICS[event.event], of_targets),
            }
        return {}


def _metrics_of(name: str, units: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Each task's value in each unit, their means, and the worst loss."""
    metrics: dict[str, float] = {}
    for unit, by_task in units.items():
        if known := {f"{name}_{unit}/{task}": value for task, value in by_task.items() if value == value}:
            metrics |= known | {f"mean_{name}_{unit}": sum(known.values()) / len(known)}
            if unit == "loss":
                metrics[f"worst_{name}_loss"] = max(known.values())
    return metrics


class NullLog:
    """The log of a process that does not write."""

    num_bytes = 0

    def write(self, event: Event) -> None: ...
    def close(self) -> None: ...


def log_config(metric_logger: Any, config: Mapping[str, Any]) -> None:
    """Gives a metric logger what ``resolved.yaml`` has, if it takes configs; an error is a warning.

    Metrics are logged even then. W&B, for example, refuses a key that has changed since the run that it resumes.

    Args:
        metric_logger: torchtune's, whose ``log_config`` takes a ``DictConfig``, or one of the user's own.
        config: nested.
    """
    if hasattr(metric_logger, "log_config"):
        try:
            metric_logger.log_config(OmegaConf.create(_with_versions(config)))
        except Exception as error:
            _warn_about_metric_logger(error, "without its config")


def close_metric_logger(metric_logger: Any) -> None:
    """Closes a metric logger; an error is a warning."""
    try:
        metric_logger.close()
    except Exception as error:
        _warn_about_metric_logger(error)


def _warn_about_metric_logger(error: Exception, how: str = "without it") -> None:
    warn(f"metric_logger: {type(error).__name__}: {' '.join(str(error).split())}; the run goes on {how}")


def _with_versions(config: Mapping[str, Any]) -> dict[str, Any]:
    """The whole config as used, with the versions of packages."""
    packages = ("torch", "torchtune", "torchao", "datasets", "tokenizers", "safetensors", "numpy")
    versions = {"adapt_recipes": adapt_recipes.__version__, "python": platform.python_version()}
    versions |= {package: version(package) for package in packages}
    return {**config, "versions": versions}


def write_resolved(folder: Path, config: Mapping[str, Any]) -> None:
    """Writes ``resolved.yaml``: the whole config as used, with the versions of packages."""
    text = yaml.safe_dump(_with_versions(config), sort_keys=False, allow_unicode=True, width=120)
    with atomic_file(folder / RESOLVED) as partial:
        partial.write_text(text, encoding="utf-8")


def read_resolved(folder: Path) -> dict[str, Any]:
    """The config in ``resolved.yaml``."""
    config = yaml.safe_load((folder / RESOLVED).read_text(encoding="utf-8"))
    return {key: value for key, value in config.items() if key != "versions"}


def read_summary(folder: Path) -> dict[str, Any]:
    """``summary.json``."""
    return json.loads((folder / SUMMARY).read_text(encoding="utf-8"))


def write_summary(folder: Path, summary: Summary) -> None:
    """Writes ``summary.json`` atomically."""
    with atomic_file(folder / SUMMARY) as partial:
        partial.write_text(json.dumps(_plain(asdict(summary)), indent=2) + "\n", encoding="utf-8")


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
