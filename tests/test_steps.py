"""How many steps a run is said to make before it starts, and what is said of a size that surprises."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from adapt_recipes.budget import Ledger
from adapt_recipes.data import Examples, Task
from adapt_recipes.steps import batch_tokens_warning, expected_steps


def task(name: str, lengths: list[int]) -> Task:
    """Examples of so many supervised tokens, after a prompt of one token."""
    supervised = torch.cat([torch.tensor([False] + [True] * length) for length in lengths])
    offsets = torch.tensor([0] + [length + 1 for length in lengths]).cumsum(0)
    tokens = torch.zeros(len(supervised), dtype=torch.int32)
    return Task(name, Examples.in_memory(tokens, supervised, offsets, torch.arange(len(lengths))), validation=None)


# Mean answers of 2 and 10 supervised tokens.
TASKS = [task("short", [1, 2, 3]), task("long", [5, 10, 15])]
HALVES = torch.tensor([0.5, 0.5], dtype=torch.float64)


def said(ledger: Ledger, **config: Any) -> str:
    values: Any = SimpleNamespace(**{"batch_size": None, "batch_tokens": None, "sampling": "tokens"} | config)
    return str(expected_steps(TASKS, HALVES, ledger, values))


@pytest.mark.parametrize(
    ("config", "text"),
    [
        # A mean example of the mixture has 1 / (.5 / 2 + .5 / 10) = 3.33 tokens; drawn by task, it has 6.
        ({"batch_size": 10}, "about 30 steps of 10 examples"),
        ({"batch_size": 10, "sampling": "dataset"}, "about 17 steps of 10 examples"),
        ({"batch_tokens": 100}, "10 steps of 100 supervised tokens"),
        ({"batch_tokens": 100, "sampling": "dataset"}, "10 steps of 100 supervised tokens"),
        # The last step has 15 tokens, as many as the longest answer, and then fewer.
        ({"batch_tokens": 197}, "6 steps of 197 supervised tokens"),
        ({"batch_tokens": 199}, "about 6 steps of 199 supervised tokens"),
        ({"batch_tokens": 1}, "about 300 steps of 1 supervised token"),
        ({"batch_tokens": 2000}, "1 step of 2,000 supervised tokens"),
    ],
    ids=str,
)
def test_expected(config: dict[str, Any], text: str) -> None:
    assert said(Ledger(1000, 2), **config) == text


def test_caps_make_it_an_estimate() -> None:
    assert said(Ledger(1000, 2, caps=torch.tensor([900, 900])), batch_tokens=100).startswith("about 10 steps")


@pytest.mark.parametrize(
    ("batch_tokens", "text"),
    [
        (None, None),
        (80, None),
        (79, "batch_tokens: 79 is less than 8 mean answers of task 'long', 10.0 tokens each; expect 7 steps"),
        (15, "batch_tokens: 15 is less than 8 mean answers of task 'long', 10.0 tokens each; expect 7 steps"),
        (14, "batch_tokens: 14 is less than the longest answer, 15 supervised tokens of task 'long'; expect 7 steps"),
        (1000, None),
        (1001, "batch_tokens: 1,001 is more than the budget of 1,000 supervised tokens; expect 7 steps"),
    ],
)
def test_warned_about(batch_tokens: int | None, text: str | None) -> None:
    assert batch_tokens_warning(TASKS, Ledger(1000, 2), batch_tokens, num_steps=7) == text
