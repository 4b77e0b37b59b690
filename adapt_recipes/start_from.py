"""``mixture.start_from``: a mixture that begins with what another run has learned, on other data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from adapt_recipes.config import MixtureConfig
from adapt_recipes.run_directory import CHECKPOINTS, has_run, is_finished
from adapt_recipes.runlog import read_summary
from adapt_recipes.strict import locate
from adapt_recipes.training.checkpoint import newest_shared


def start_mixture(config: MixtureConfig, mixture: Any, task_names: Sequence[str]) -> str | None:
    """Gives a mixture the state that another run's ended with, by the names of tasks.

    Args:
        config: of the mixture; ``start_from`` is the other run's folder. None: the mixture is left as it is.
        mixture: built of it, and not yet updated.
        task_names: of this run.

    Returns:
        Which tasks began with what; None without ``start_from``.

    Raises:
        ValueError: the folder has no finished run, or one of another kind of mixture or of other tasks.
    """
    if config.start_from is None:
        return None
    try:
        return _start(Path(config.start_from), config.component, mixture, task_names)
    except ValueError as error:
        raise ValueError(f"mixture.start_from: {error}") from error


def _start(folder: Path, component: str, mixture: Any, task_names: Sequence[str]) -> str:
    # Whether there is such a run.
    if not has_run(folder):
        raise ValueError(f"{folder} is no run directory")
    if not is_finished(folder):
        raise ValueError(f"the run in {folder} is not finished; resume=true finishes it")
    shared = newest_shared(folder / CHECKPOINTS)
    before = shared["fingerprint"]["config"]["mixture"]["_component_"]
    if not _is_same(before, component):
        raise ValueError(f"the mixture of {folder} is {before}, and that of this run is {component}")
    if not hasattr(mixture, "start_from"):
        raise ValueError(f"{component} has no `start_from`: it keeps nothing for another run")

    # Where each task was.
    before_names = list(read_summary(folder)["task_tokens"])
    positions = [before_names.index(name) if name in before_names else -1 for name in task_names]
    if max(positions) < 0:
        raise ValueError(
            f"no task of this run, {', '.join(task_names)}, was one of {folder}, {', '.join(before_names)}"
        )
    mixture.start_from(shared["states"]["mixture"], torch.tensor(positions))

    new = [name for name, position in zip(task_names, positions, strict=True) if position < 0]
    unused = [name for name in before_names if name not in task_names]
    parts = [f"{len(task_names) - len(new)} of {len(task_names)} tasks start from {folder}"]
    parts += [f"at their prior share, because new: {', '.join(new)}"] if new else []
    parts += [f"of its tasks not in this run: {', '.join(unused)}"] if unused else []
    return "; ".join(parts)


def _is_same(before: str, now: str) -> bool:
    """Whether two import paths are of the same component."""
    try:
        return before == now or locate(before) is locate(now)
    except ValueError:
        return False
