"""Balanced-PiKE: its formula by hand, what raises and lowers a share, and what it keeps."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from adapt_recipes.mixture import Pike

NAN = math.nan


def make(num_tasks: int = 3, **arguments: Any) -> Pike:
    names = [f"task {i}" for i in range(num_tasks)]
    return Pike(task_names=names, num_supervised_tokens=[100] * num_tasks, budget_tokens=1000, **arguments)


def update(mixture: Pike, losses: list[float], norms: list[float], variances: list[float]) -> Tensor:
    signals = {"train_losses": losses, "squared_gradient_norms": norms, "gradient_variances": variances}
    tensors = {name: torch.tensor(values, dtype=torch.float64) for name, values in signals.items()}
    return mixture.update(task_tokens=torch.zeros(len(losses), dtype=torch.float64), **tensors)["exponents"]


def test_by_hand() -> None:
    """Two updates: exponents add up."""
    mixture, expected = make(norm_weight=0.3, variance_weight=0.02, tilt=2.0, floor=0.1), [1 / 3] * 3
    for losses, norms, variances in (
        ([1.0, 2.0, 0.5], [0.4, 1.0, -0.1], [3.0, 9.0, 1.0]),
        ([0.7, 1.0, 0.5], [0.2, 2.0, 0.3], [3.0, 5.0, 2.0]),
    ):
        update(mixture, losses, norms, variances)
        tilts = [math.exp(2.0 * loss) for loss in losses]
        for i in range(3):
            y = 2.0 * tilts[i] / sum(tilts)
            expected[i] *= math.exp(0.3 * y**2 * norms[i] - 0.02 * y**2 * variances[i])
    shares = torch.tensor(expected, dtype=torch.float64)
    p = 0.9 * shares / shares.sum() + 0.1 / 3
    torch.testing.assert_close(mixture.probabilities(), p, rtol=0, atol=1e-14)


def test_equal_tasks_stay_even() -> None:
    mixture = make()
    for _ in range(20):
        update(mixture, [1.0] * 3, [0.5] * 3, [40.0] * 3)
    torch.testing.assert_close(
        mixture.probabilities(), torch.full((3,), 1 / 3, dtype=torch.float64), rtol=0, atol=1e-14
    )


def test_noise_falls_and_what_can_be_learned_rises() -> None:
    """Of three tasks with the same loss, one has a gradient, one is noise, and one is done."""
    mixture = make(norm_weight=0.1, variance_weight=1e-3)
    for _ in range(5):
        update(mixture, [1.0, 1.0, 1.0], [2.0, 0.0, 0.0], [20.0, 200.0, 0.0])
    learnable, noise, done = mixture.probabilities().tolist()
    assert learnable > done > noise


def test_the_tilt_balances() -> None:
    """Of two tasks with the same gradients the one with the higher loss gets more; without the tilt both the same."""
    for tilt, differ in ((3.0, True), (0.0, False)):
        mixture = make(2, tilt=tilt)
        update(mixture, [2.0, 1.0], [1.0, 1.0], [0.0, 0.0])
        high, low = mixture.probabilities().tolist()
        assert (high > low) == differ and high >= low


@pytest.mark.parametrize(
    ("losses", "norms", "variances"), [([1.0, NAN], [1.0] * 2, [1.0] * 2), ([1.0] * 2, [1.0, NAN], [1.0, NAN])]
)
def test_an_unmeasured_task_keeps_its_share(losses: list[float], norms: list[float], variances: list[float]) -> None:
    mixture = make(2)
    exponents = update(mixture, losses, norms, variances)
    assert exponents[1].isnan() and mixture.probabilities().tolist() == pytest.approx([0.5, 0.5], abs=1e-15)


def test_a_resume_goes_on_as_before() -> None:
    one, other = (
        make(prior={"task 0": 1, "task 1": 2, "task 2": 3}),
        make(prior={"task 0": 1, "task 1": 2, "task 2": 3}),
    )
    values = ([1.0, 2.0, 3.0], [0.1, 0.2, 0.3], [1.0, 2.0, 3.0])
    update(one, *values)
    other.load_state_dict(one.state_dict())
    update(one, *values)
    update(other, *values)
    assert torch.equal(one.probabilities(), other.probabilities())
    with pytest.raises(ValueError, match="state is of 3 tasks, this run has 2"):
        make(2).load_state_dict(one.state_dict())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"norm_weight": -1}, "mixture.norm_weight"),
        ({"variance_weight": "much"}, "mixture.variance_weight"),
        ({"tilt": -0.1}, "mixture.tilt"),
        ({"floor": 1.0}, "mixture.floor"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)) as refused:
        make(**arguments)
    assert len(str(refused.value).splitlines()) == 1
