"""The mean training loss of each task since the last mixture update."""

from __future__ import annotations

import torch

from adapt_recipes.signals import TrainLosses


def float64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def two_steps() -> TrainLosses:
    """Of the first of three tasks in both, of the second in one, of the third in none."""
    losses = TrainLosses(3)
    losses.add(float64(6, 0, 0), torch.tensor([2, 0, 0]))
    losses.add(float64(3, 5, 0), torch.tensor([4, 10, 0]))
    return losses


def test_the_mean_is_over_tokens_of_all_steps() -> None:
    mean = two_steps().mean()
    assert mean.dtype == torch.float64
    torch.testing.assert_close(mean, float64(1.5, 0.5, torch.nan), rtol=0, atol=0, equal_nan=True)


def test_a_reset_begins_a_new_mean() -> None:
    losses = two_steps()
    before = losses.mean()
    losses.reset()
    assert losses.mean().isnan().all() and before[:2].tolist() == [1.5, 0.5], "what was measured stays"
    losses.add(float64(0, 0, 8), torch.tensor([0, 0, 2]))
    torch.testing.assert_close(losses.mean(), float64(torch.nan, torch.nan, 4), rtol=0, atol=0, equal_nan=True)


def test_a_state_goes_on_where_it_was_saved() -> None:
    losses = two_steps()
    state = losses.state_dict()
    losses.reset()  # a state is a copy
    other = TrainLosses(3)
    other.add(float64(1, 1, 1), torch.tensor([1, 1, 1]))
    other.load_state_dict(state)
    other.add(float64(0, 0, 8), torch.tensor([0, 0, 2]))
    torch.testing.assert_close(other.mean(), float64(1.5, 0.5, 4), rtol=0, atol=0)
    torch.testing.assert_close(state, two_steps().state_dict(), rtol=0, atol=0)
