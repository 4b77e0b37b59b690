"""Checks what has changed between a run and its resume."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from adapt_recipes.errors import warn
from adapt_recipes.strict import config_differences
from adapt_recipes.training.checkpoint import Saved
from adapt_recipes.training.process_group import world_size


def check_same_run(before: Mapping[str, Any], now: Mapping[str, Any], *, free: Sequence[str]) -> None:
    """Refuses another config or other data.

    Args:
        before, now: fingerprints of a run that has begun and of the one that is starting, ``{"config": ..., "data": a
            hash}``.
        free: dotted keys of the config that may change.

    Raises:
        ValueError: it names the keys that differ, or says that the data has changed.
    """
    if changed := config_differences(before["config"], now["config"], free):
        advice = "change it back, or use another output_dir"
        if any(key.startswith("budget.") for key in changed):
            advice = f"{advice}; change_budget=true allows another budget"
        raise ValueError(f"resume: {', '.join(changed)} changed since the run began; {advice}")
    if before["data"] != now["data"]:
        advice = "restore it, or use another output_dir"
        raise ValueError(f"resume: tasks: the data changed since the run began; {advice}")


def check_budget(saved: Saved, now: Mapping[str, Any], *, budget_tokens: int) -> str | None:
    """Refuses a changed budget that leaves nothing to spend.

    Args:
        saved: the checkpoint.
        now: the fingerprint of the run that is starting.
        budget_tokens: its budget, supervised tokens.

    Returns:
        What changed, for the log; None: nothing.

    Raises:
        ValueError: the new budget is not above what is spent.
    """
    before, after = saved.shared["fingerprint"]["config"]["budget"], now["config"]["budget"]
    if before == after:
        return None
    spent = int(saved.shared["states"]["ledger"]["task_tokens"].sum())
    if budget_tokens <= spent:
        raise ValueError(
            f"budget: {budget_tokens} supervised tokens are not more than the {spent} that the run has spent by step "
            f"{saved.step}; raise it"
        )
    old, new = (next(f"{key} {value}" for key, value in each.items() if value is not None) for each in (before, after))
    now_is = f"{new} from here on: {budget_tokens} supervised tokens, of which {spent} are spent"
    return f"the budget was {old} and is {now_is}"


def check_resume(saved: Saved, now: Mapping[str, Any], *, free: Sequence[str]) -> None:
    """Refuses to resume a run with another config or other data, and warns of what gives up bit equality.

    Args:
        saved: the checkpoint, whose ``shared`` has ``{"fingerprint": {"config": ..., "data": fingerprint}}``.
        now: the fingerprint of the run that is starting.
        free: dotted keys of the config that may change.

    Raises:
        ValueError: it names the keys that differ, or says that the data has changed.
    """
    before = saved.shared["fingerprint"]
    check_same_run(before, now, free=free)
    if before["config"]["micro_batch_tokens"] != now["config"]["micro_batch_tokens"]:
        warn("micro_batch_tokens changed: the run goes on, but no longer bit for bit")
    if len(saved.own) != world_size():
        warn(f"{len(saved.own)} processes before, {world_size()} now: the run goes on, but no longer bit for bit")
