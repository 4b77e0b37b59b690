"""What may change between a run and its resume, and how anything else is refused."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from adapt_recipes.training.checkpoint import config_differences

FREE_TO_CHANGE = (
    "resume",
    "output_dir",
    "device",
    "metric_logger",
    "checkpoint_every",
    "validate_every",
    "log_every",
    "keep_checkpoints",
    "tasks.cache_dir",
    "micro_batch_tokens",
)


def check_resume(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on with a run whose config or data is another.

    Args:
        saved: the checkpoint's ``{"config": ..., "data": fingerprint}``.
        now: the same of the run that is starting.

    Raises:
        ValueError: it names the keys that differ, or says that the data has changed.
    """
    changed = config_differences(saved["config"], now["config"], FREE_TO_CHANGE)
    if changed:
        raise ValueError(
            f"resume: {', '.join(changed)} changed since the run began; put back, or take another output_dir"
        )
    if saved["data"] != now["data"]:
        raise ValueError("resume: tasks: the data changed since the run began; put it back, or take another output_dir")
    if saved["config"]["micro_batch_tokens"] != now["config"]["micro_batch_tokens"]:
        print("warning: micro_batch_tokens changed: the run goes on, but no longer bit for bit", file=sys.stderr)
