"""What a reward component gives is checked: its form, and that what could be measured is finite."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from adapt_recipes.signals.nonfinite import ADVICE, check_rewards

NAN, INF = math.nan, math.inf
NAMES = ["a", "b", "c"]


def batches(*tasks: list[int]) -> list[Any]:
    return [SimpleNamespace(tasks=torch.tensor(each), rows=torch.arange(len(each))) for each in tasks]


TRAIN, VALIDATION = batches([0, 2], [1, 0]), batches([0], [2])  # b has no validation split


def check(rewards: Any, *read: list[Any]) -> None:
    if isinstance(rewards, list):
        rewards = torch.tensor(rewards, dtype=torch.float64)
    check_rewards(rewards, iter(read), task_names=NAMES, step=7, reward="Mine")


@pytest.mark.parametrize(
    ("rewards", "read"),
    [
        ([0.0, -1.0, 1e300], [TRAIN]),
        ([1.0, NAN, 2.0], [VALIDATION]),
        ([1.0, NAN, 2.0], [TRAIN, VALIDATION]),
        ([1.0, NAN, 2.0], [VALIDATION, TRAIN]),
        ([1.0, 1.0, 2.0], [VALIDATION, TRAIN]),
    ],
)
def test_finite_rewards_and_nan_where_there_was_no_example(rewards: list[float], read: list[list[Any]]) -> None:
    check(rewards, *read)


@pytest.mark.parametrize(
    ("rewards", "read", "said"),
    [
        ([1.0, NAN, 2.0], [TRAIN], "the reward of task 'b' is nan"),
        ([NAN, NAN, 2.0], [TRAIN, VALIDATION], "the reward of task 'a' is nan"),
        ([1.0, NAN, NAN], [VALIDATION], "the reward of task 'c' is nan"),
        ([1.0, 2.0, INF], [TRAIN], "the reward of task 'c' is inf"),
        ([-INF, 2.0, 1.0], [TRAIN], "the reward of task 'a' is -inf"),
        ([1.0, INF, 1.0], [VALIDATION], "the reward of task 'b' is inf"),
    ],
)
def test_any_other_that_is_not_finite_is_named(rewards: list[float], read: list[list[Any]], said: str) -> None:
    with pytest.raises(ValueError) as error:
        check(rewards, *read)
    assert str(error.value) == f"step 7: {said}; {ADVICE}"


@pytest.mark.parametrize(
    ("rewards", "given"),
    [
        (torch.zeros(2, dtype=torch.float64), "(2,) torch.float64 on cpu"),
        (torch.zeros(3, 1, dtype=torch.float64), "(3, 1) torch.float64 on cpu"),
        (torch.zeros(3), "(3,) torch.float32 on cpu"),
        (torch.zeros(3, dtype=torch.float64, device="meta"), "(3,) torch.float64 on meta"),
        ((0.0, 0.0, 0.0), "tuple"),
        (None, "NoneType"),
    ],
)
def test_what_is_no_reward_a_task_is_named(rewards: Any, given: str) -> None:
    with pytest.raises(ValueError) as error:
        check(rewards, TRAIN)
    assert str(error.value) == f"reward: Mine has to return (3,) float64 on the CPU, not {given}"
