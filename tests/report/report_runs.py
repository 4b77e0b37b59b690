"""Run directories as recipes write them, without a model: the same writer, numbers from a generator."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adapt_recipes.events import EndEvent, MixtureEvent, StepEvent, Summary, TestEvent, ValidationEvent
from adapt_recipes.runlog import RunLog, write_resolved, write_summary

Loss = Callable[[int, float], float]


def write_run(
    folder: Path,
    *,
    strategy: str = "adapt",
    seed: int = 0,
    tasks: Sequence[str] = ("one", "two", "three"),
    steps: int = 20,
    update_every: int = 5,
    validate_every: int = 10,
    loss: Loss | None = None,
    test: Sequence[float] | None = None,
    saved: Sequence[float] | None = None,
    has_units: bool = True,
    finished: bool = True,
    resolved: dict[str, Any] | None = None,
) -> Path:
    """Write a run.

    Args:
        update_every: 0 is a fixed mixture.
        loss: of a task by its index, at a share of the run in [0, 1]; NaN for a task that is not measured.
        test: the test loss of each task, NaN for one that is not measured; None: there is no test split.
        saved: the validation loss of each task of what was saved; None: it is what was trained.
        has_units: false leaves out exact match and bits per byte, as earlier versions did.
        finished: false leaves the log where a kill after its last step would.
        resolved: keys of the config besides the usual ones.
    """
    generator = np.random.default_rng([seed, len(strategy), len(tasks)])
    loss = loss or (lambda task, share: float((task + 1) * np.exp(-3 * share) + generator.uniform(0, 0.1)))
    folder.mkdir(parents=True)
    config = {"strategy": strategy, "seed": seed, "output_dir": str(folder), **(resolved or {})}
    write_resolved(folder, config)
    log = RunLog(folder)
    spent = np.zeros(len(tasks), dtype=np.int64)
    p = np.full(len(tasks), 1 / len(tasks))
    seconds = mixture_seconds = validation_seconds = 0.0
    probe_tokens = validation_tokens = updates = 0
    losses: dict[str, float] = {}

    def by_task(values: Any) -> dict[str, Any]:
        return dict(zip(tasks, values, strict=True))

    def scores(losses: dict[str, float]) -> dict[str, Any]:
        """Made of the losses: any numbers that differ from them."""
        exact_match = {task: math.exp(-value) for task, value in losses.items()}
        return {"losses": losses, "exact_match": exact_match, "bits_per_byte": {k: v / 2 for k, v in losses.items()}}

    def results(split: str, losses: dict[str, float]) -> dict[str, Any]:
        found = {f"{split}_{key}": by_task for key, by_task in scores(losses).items()}
        for key in ("exact_match", "bits_per_byte"):
            measured = [value for value in found[f"{split}_{key}"].values() if value == value]
            found[f"mean_{split}_{key}"] = sum(measured) / len(measured)
        return found

    def read() -> dict[str, int]:
        total = int(spent.sum())
        return {"supervised_tokens": total, "total_tokens": 3 * (total + probe_tokens + validation_tokens)}

    def totals() -> dict[str, int]:
        total = int(spent.sum())
        return {**read(), "tokens": 3 * total, "computed_tokens": 4 * total}

    def mixture(step: int, **signals: Any) -> None:
        log.write(
            MixtureEvent(
                step=step,
                **read(),
                probe_tokens=probe_tokens,
                seconds=seconds,
                mixture_seconds=mixture_seconds,
                probabilities=by_task(p.tolist()),
                signals=signals,
            )
        )

    def validate(step: int) -> None:
        nonlocal losses, validation_seconds, seconds, validation_tokens
        losses = by_task(loss(i, step / steps) for i in range(len(tasks)))
        validation_seconds, seconds = validation_seconds + 0.5, seconds + 0.5
        validation_tokens += 10
        measured = {"validation_tokens": validation_tokens, "seconds": seconds}
        log.write(ValidationEvent(step=step, **read(), **measured, **scores(losses)))

    mixture(0)
    validate(0)
    first = dict(losses)
    for step in range(1, steps + 1):
        spent += generator.multinomial(64, p)
        seconds += generator.uniform(0.1, 0.2)
        values = {"loss": 2.0, "lr": 1e-3 * (1 - step / steps), "grad_norm": 1.0}
        by = {"task_tokens": by_task(spent.tolist()), "task_losses": {tasks[0]: 2.0}}
        log.write(StepEvent(step=step, **values, **totals(), **by, seconds=seconds))
        if update_every and step % update_every == 0 and step < steps:
            p = np.exp(generator.normal(size=len(tasks)))
            p /= p.sum()
            mixture_seconds, seconds, probe_tokens = mixture_seconds + 0.3, seconds + 0.3, probe_tokens + 5
            updates += 1
            mixture(step, gradient_dots=by_task(p.tolist()), objective=-1.0)
        if step % validate_every == 0 and (finished or step < steps):
            validate(step)
    if finished:
        if steps % validate_every:
            validate(steps)
        test_losses = by_task(test) if test else None
        if test_losses:
            tested_at = {"validation_tokens": validation_tokens, "seconds": seconds}
            log.write(TestEvent(step=steps, **read(), **tested_at, **scores(test_losses)))
        log.write(EndEvent(reason="finished", step=steps, seconds=seconds))
        measured = [value for value in losses.values() if value == value]
        tested = [value for value in test or () if value == value]
        summary = Summary(
            strategy=strategy,
            seed=seed,
            budget_tokens=int(spent.sum()),
            **totals(),
            unique_supervised_tokens=int(spent.sum()) - 1,
            stopped_early=False,
            unspent_tokens=0,
            probe_tokens=probe_tokens,
            probe_total_tokens=3 * probe_tokens,
            validation_tokens=validation_tokens,
            validation_total_tokens=3 * validation_tokens,
            task_tokens=by_task(spent.tolist()),
            probabilities=by_task(p.tolist()),
            **results("validation", losses),
            **(results("test", test_losses) if test_losses else {}),
            initial_validation_losses=first,
            worst_validation_loss=max(measured),
            mean_validation_loss=sum(measured) / len(measured),
            saved_validation_losses=by_task(saved) if saved else losses,
            worst_test_loss=max(tested) if tested else None,
            mean_test_loss=sum(tested) / len(tested) if tested else None,
            seconds=seconds,
            mixture_seconds=mixture_seconds,
            validation_seconds=validation_seconds,
            steps=steps,
            mixture_updates=updates,
            left_out={},
            data_fingerprint="0",
        )
        write_summary(folder, summary)
    log.close()
    if not has_units:
        _remove_units(folder)
    return folder


def _remove_units(folder: Path) -> None:
    def without(values: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in values.items() if not key.endswith(("exact_match", "bits_per_byte"))}

    log, summary = folder / "log.jsonl", folder / "summary.json"
    lines = [json.dumps(without(json.loads(line))) + "\n" for line in log.read_text(encoding="utf-8").splitlines()]
    log.write_text("".join(lines), encoding="utf-8")
    if summary.exists():
        summary.write_text(json.dumps(without(json.loads(summary.read_text()))))


def events(folder: Path, name: str) -> list[dict[str, Any]]:
    """The lines of one event, read plainly."""
    lines = map(json.loads, (folder / "log.jsonl").read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line["event"] == name]
