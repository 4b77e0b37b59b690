"""Finds the example whose loss or gradient is infinite or NaN. All processes end with the same error."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from adapt_recipes.data import MicroBatch, Task
from adapt_recipes.training.process_group import all_gather_object, raise_on_all_ranks
from adapt_recipes.training.sharding import device_of, to_local

ADVICE = "look at it, lower optimizer.lr, or set clip_grad_norm; checkpoints are from before this step"


def raise_nonfinite(model: nn.Module, batches: Sequence[MicroBatch], *, names: Sequence[str], step: int) -> NoReturn:
    """Computes examples one by one, and names the first one that is not finite, on any number of processes.

    Args:
        model: ``forward(tokens, labels)`` returns losses; its gradients are overwritten.
        batches: this process's micro-batches.
        names: of the examples, in the order in which they were batched.
        step: of the run.

    Raises:
        ValueError: always.
    """
    mine = [
        (row, batch.tokens[i : i + 1].cpu().clone(), batch.labels[i : i + 1].cpu().clone())
        for batch in batches
        for i, row in enumerate(batch.rows.tolist())
        if row >= 0
    ]
    device = device_of(model)
    with raise_on_all_ranks():
        # Each process computes every example, so that all find the same one and take part in every forward pass.
        for row, tokens, labels in sorted(chain(*all_gather_object(mine)), key=lambda example: example[0]):
            model.zero_grad(set_to_none=True)
            losses = model(tokens.to(device), labels.to(device))
            if not _finite([losses]):
                raise ValueError(f"step {step}: the loss of {names[row]} is not finite; {ADVICE}")
            losses.sum().backward()
            if not _finite([p.grad for p in model.parameters() if p.grad is not None]):
                raise ValueError(f"step {step}: the gradient of {names[row]} is not finite; {ADVICE}")
        raise ValueError(f"step {step}: the gradient is not finite, though that of every single example is; {ADVICE}")


def check_finite(
    model: nn.Module,
    batches: Sequence[MicroBatch],
    values: Sequence[Tensor],
    *,
    tasks: Sequence[Task],
    step: int,
    of: str = "validation",
) -> None:
    """Refuses losses or gradients that are not finite.

    Args:
        model: see ``raise_nonfinite``.
        batches: the examples they were measured on: all of each task, or the first ones.
        values: losses, or a gradient.
        tasks: in the order of the mixture.
        step: of the run.
        of: "training", "validation" or "test", for the error.

    Raises:
        ValueError: it names the step, the task and the example.
    """
    if not _finite(values):
        read = sum(all_gather_object(_num_examples(batches)), Counter())
        names = [f"{of} example {i} of task '{tasks[task].name}'" for task in sorted(read) for i in range(read[task])]
        raise_nonfinite(model, batches, names=names, step=step)


def check_dots(
    dots: Tensor,
    batches: Sequence[MicroBatch],
    *,
    task_names: Sequence[str],
    step: int,
    what: str = "the gradient",
    advice: str = ADVICE,
) -> None:
    """Refuses gradient dots (num_tasks,) that are not finite, for tasks with examples in ``batches``; or ``what``.

    Raises:
        ValueError: it names the step and the task.
    """
    measured = sum(all_gather_object(_num_examples(batches)), Counter())
    with raise_on_all_ranks():
        for task in sorted(measured):
            if not dots[task].isfinite():
                of = f"training examples of task '{task_names[task]}'"
                raise ValueError(f"step {step}: {what} of {of} is not finite; {advice}")


def check_rewards(
    rewards: Any, batches: Iterable[Sequence[MicroBatch]], *, task_names: Sequence[str], step: int, reward: str
) -> None:
    """Refuses rewards of a wrong shape, dtype or device, and rewards that are not finite.

    Args:
        rewards: the return value of the component.
        batches: the lists of batches it was called with; a task without an example in one of them may have NaN.
        task_names: in the order of the mixture.
        step: of the run.
        reward: name of the component.

    Raises:
        ValueError: it names the component, or the step and the task.
    """
    N = len(task_names)
    is_tensor = isinstance(rewards, Tensor)
    measured = [sum(all_gather_object(_num_examples(each)), Counter()) for each in batches]
    with raise_on_all_ranks():
        fits = is_tensor and rewards.shape == (N,) and rewards.dtype == torch.float64 and rewards.device.type == "cpu"
        if not fits or rewards.requires_grad:
            given = (
                f"{tuple(rewards.shape)} {rewards.dtype} on {rewards.device}" if is_tensor else type(rewards).__name__
            )
            given += " with a gradient" if is_tensor and rewards.requires_grad else ""
            raise ValueError(f"reward: {reward} has to return ({N},) float64 on the CPU, not {given}")
        for task in range(N):
            may_be_nan = not all(task in tasks for tasks in measured)
            if rewards[task].isinf() or (rewards[task].isnan() and not may_be_nan):
                raise ValueError(
                    f"step {step}: the reward of task '{task_names[task]}' is {float(rewards[task])}; {ADVICE}"
                )


def _finite(values: Sequence[Tensor]) -> bool:
    """Whether the values of all processes, including their shards, are finite."""
    return all(all_gather_object(all(bool(to_local(value).isfinite().all()) for value in values)))


def _num_examples(batches: Sequence[MicroBatch]) -> Counter[int]:
    """The number of examples of each task on this process."""
    return Counter(task for batch in batches for task in batch.tasks[batch.rows >= 0].tolist())
