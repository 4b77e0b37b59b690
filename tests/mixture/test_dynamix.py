"""DynamixSFT: its equations by hand, the bounds that it promises, what it ignores, and what it keeps."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adapt_recipes.mixture import Dynamix

NAN = math.nan
SIZES = [600, 300, 100]
every_gain = st.lists(st.lists(st.floats(-5.0, 1.0), min_size=3, max_size=3), min_size=1, max_size=8)


def make(**arguments: Any) -> Dynamix:
    return Dynamix(task_names=["a", "b", "c"], num_supervised_tokens=SIZES, budget_tokens=1000, **arguments)


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def update(mixture: Dynamix, *gains: float) -> Tensor:
    return mixture.update(task_tokens=torch.zeros(3), step_gains=tensor(*gains))["estimated_rewards"]


def test_by_hand() -> None:
    """It starts at the shares of the tasks' sizes; three updates, one of which lacks a task."""
    mixture = make(sharpness=3.0, ema_decay=0.6, exploration=0.2)
    torch.testing.assert_close(mixture.probabilities(), 0.8 * tensor(0.6, 0.3, 0.1) + 0.2 / 3, rtol=1e-14, atol=0)
    for gains, expected in (
        ([0.1, 0.3, -0.1], [0.4 * 0.5, 0.4, 0.0]),
        ([NAN, 0.2, 0.4], [0.4 * 0.5, 0.6 * 0.4, 0.4]),
        ([0.2, 0.2, 0.2], [0.6 * 0.4 * 0.5, 0.6 * 0.6 * 0.4, 0.6 * 0.4]),
    ):
        torch.testing.assert_close(update(mixture, *gains), tensor(*expected), rtol=1e-13, atol=1e-16)
    q = tensor(0.6, 0.3, 0.1) * (3 * tensor(*expected)).exp()
    torch.testing.assert_close(mixture.probabilities(), 0.8 * q / q.sum() + 0.2 / 3, rtol=1e-13, atol=0)


@settings(max_examples=50, deadline=None)
@given(updates=every_gain, sharpness=st.floats(0.0, 10.0), exploration=st.floats(0.0, 0.9))
def test_no_task_leaves_the_prior_further_than_promised(
    updates: list[list[float]], sharpness: float, exploration: float
) -> None:
    """p >= gamma / K, and the odds of two tasks in q are those of the prior up to a factor of exp(beta)."""
    mixture = make(sharpness=sharpness, exploration=exploration, ema_decay=0.5)
    for gains in updates:
        update(mixture, *gains)
        p = mixture.probabilities()
        assert float(p.sum()) == pytest.approx(1, abs=1e-12) and (p >= exploration / 3 * (1 - 1e-12)).all()
        ratios = ((p - exploration / 3) / (tensor(*SIZES) / 1000)).tolist()
        assert max(ratios) <= min(ratios) * math.exp(sharpness) * (1 + 1e-6) + 1e-12


@settings(max_examples=50, deadline=None)
@given(updates=every_gain, scale=st.floats(0.1, 100.0), shift=st.floats(-1.0, 1.0))
def test_only_differences_count_and_not_their_size(updates: list[list[float]], scale: float, shift: float) -> None:
    """Another step size, to first order another scale of all gains, gives the same mixture."""
    one, other = make(), make()
    for gains in updates:
        # Differences that the shift would round away.
        if 0 < max(gains) - min(gains) < 1e-6:
            continue
        update(one, *gains)
        update(other, *(scale * gain + shift for gain in gains))
    torch.testing.assert_close(one.probabilities(), other.probabilities(), rtol=0, atol=1e-8)


def test_the_task_that_learns_fastest_rises_and_falls_when_it_is_done() -> None:
    mixture = make(prior="uniform", ema_decay=0.5)
    for _ in range(5):
        update(mixture, 0.5, 0.2, 0.0)
    assert mixture.probabilities().argsort().tolist() == [2, 1, 0]
    for _ in range(5):
        update(mixture, 0.0, 0.2, 0.1)
    assert mixture.probabilities().argmax() == 1 and mixture.probabilities().argmin() == 0


def test_without_differences_it_returns_to_its_prior() -> None:
    mixture = make(exploration=0.0)
    update(mixture, 0.5, 0.2, 0.0)
    far = float((mixture.probabilities() - tensor(0.6, 0.3, 0.1)).abs().max())
    for _ in range(400):
        update(mixture, 0.1, 0.1, 0.1)
    assert far > 0.01
    torch.testing.assert_close(mixture.probabilities(), tensor(0.6, 0.3, 0.1), rtol=0, atol=1e-8)


def test_with_nothing_measured_nothing_changes() -> None:
    mixture = make()
    update(mixture, 0.5, 0.2, 0.0)
    before = mixture.probabilities()
    update(mixture, NAN, NAN, NAN)
    assert torch.equal(mixture.probabilities(), before)


def test_a_resume_continues_to_the_bit() -> None:
    signals = torch.rand((6, 3), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole, begun = make(), make()
    for number, gains in enumerate(signals.tolist()):
        update(whole, *gains)
        update(begun, *gains)
        if number == 2:
            state, begun = begun.state_dict(), make()
            begun.load_state_dict(state)
    assert torch.equal(begun.probabilities(), whole.probabilities())
    with pytest.raises(ValueError, match="mixture: the state is of 2 tasks, this run has 3"):
        whole.load_state_dict({name: value[:2] for name, value in state.items()})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sharpness": -1}, "mixture.sharpness must be a finite number >= 0, not -1"),
        ({"ema_decay": 1}, "mixture.ema_decay must be a finite number >= 0 and < 1, not 1"),
        ({"exploration": 1.0}, "mixture.exploration must be a finite number >= 0 and < 1, not 1.0"),
        ({"lookahead_lr": 0}, "mixture.lookahead_lr must be a finite number > 0, not 0"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make(**arguments)


def test_a_gain_that_is_not_finite_ends_the_run() -> None:
    with pytest.raises(AssertionError, match="diverged"):
        update(make(), 0.1, math.inf, 0.2)
