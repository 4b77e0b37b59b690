"""How many optimizer steps a run makes, as far as that is known before it starts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from adapt_recipes.budget import Ledger
from adapt_recipes.config import TrainConfig
from adapt_recipes.data import Task
from adapt_recipes.display import count

# Fewer mean answers of a task in a step than this are warned about.
FEW_ANSWERS = 8


class ExpectedSteps(NamedTuple):
    """The optimizer steps of a run.

    Attributes:
        number: of steps.
        size: what each of them takes.
        exact: every mixture makes as many; if not, it is an estimate for one mixture.
    """

    number: int
    size: str
    exact: bool

    def __str__(self) -> str:
        return f"{'' if self.exact else 'about '}{count(self.number, 'step')} of {self.size}"


def expected_steps(
    tasks: Sequence[Task],
    probabilities: Tensor,  # (num_tasks,) float64
    ledger: Ledger,
    config: TrainConfig,
) -> ExpectedSteps:
    """The steps of a run whose mixture stays as it is, without drawing its examples."""
    budget, lengths = ledger.budget_tokens, _mean_answers(tasks)
    # The mean length of an example. If p is a share of tokens, a task's share of examples is p / its mean length.
    mean = float(1 / (probabilities / lengths).sum() if config.sampling == "tokens" else probabilities @ lengths)
    if config.batch_tokens is None:
        assert config.batch_size is not None
        size = count(config.batch_size, "example")
        return ExpectedSteps(max(1, round(budget / mean / config.batch_size)), size, exact=False)

    # A step takes less than an answer too much. That may spare a step only where an answer is longer than a step, the
    # last one included. With caps, a step also ends where all tasks with a share are used up.
    number, size = math.ceil(budget / config.batch_tokens), count(config.batch_tokens, "supervised token")
    last_step = budget - (number - 1) * config.batch_tokens
    if ledger.caps is None and (number == 1 or _longest_answer(tasks)[0] <= last_step):
        return ExpectedSteps(number, size, exact=True)
    # A step has at least one example.
    return ExpectedSteps(max(1, min(number, round(budget / mean))), size, exact=False)


def batch_tokens_warning(
    tasks: Sequence[Task], ledger: Ledger, batch_tokens: int | None, *, num_steps: int
) -> str | None:
    """What may surprise about ``batch_tokens``, with the number of steps to expect: one step, or few examples in each.

    None: nothing, or ``batch_size`` is given.
    """
    if batch_tokens is None:
        return None
    (longest, of_task), means = _longest_answer(tasks), _mean_answers(tasks)
    most = int(means.argmax())
    if batch_tokens > ledger.budget_tokens:
        reason = f"more than the budget of {ledger.budget_tokens:,} supervised tokens"
    elif batch_tokens < longest:
        reason = f"less than the longest answer, {longest:,} supervised tokens of task '{of_task}'"
    elif batch_tokens < FEW_ANSWERS * means[most]:
        reason = f"less than {FEW_ANSWERS} mean answers of task '{tasks[most].name}', {means[most]:,.1f} tokens each"
    else:
        return None
    return f"batch_tokens: {batch_tokens:,} is {reason}; expect {count(num_steps, 'step')}"


def _longest_answer(tasks: Sequence[Task]) -> tuple[int, str]:
    """The most supervised tokens of a training example, and its task."""
    return max(((int(task.train.num_supervised.max()), task.name) for task in tasks), key=lambda each: each[0])


def _mean_answers(tasks: Sequence[Task]) -> Tensor:
    """(num_tasks,) float64, mean supervised tokens of a training example."""
    return torch.stack([task.train.num_supervised.double().mean() for task in tasks])
