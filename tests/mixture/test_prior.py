"""The prior of every learned mixture: its start, its floor, and where it stays without evidence."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adapt_recipes.mixture import (
    Adapt,
    AdaptForecast,
    AdaptKSteps,
    AdaptPlanned,
    Dynamix,
    Exp3,
    Grape,
    GroupDRO,
    Scorer,
)
from adapt_recipes.mixture.prior import Prior

NAMES = ["a", "b", "c"]
SIZES = torch.tensor([600, 300, 100])
WEIGHTS = {"a": 1.0, "b": 2.5, "c": 0.01}
LEARNED: dict[str, tuple[Any, dict[str, Any]]] = {
    "adapt": (Adapt, {}),
    "adapt_forecast": (AdaptForecast, {}),
    "adapt_ksteps": (AdaptKSteps, {}),
    "adapt_planned": (AdaptPlanned, {"measure_after": 0.0}),
    "dro": (GroupDRO, {}),
    "dro_exponentiated": (GroupDRO, {"form": "exponentiated_gradient"}),
    "dynamix": (Dynamix, {"prior": "uniform", "exploration": 0.0}),
    "exp3": (Exp3, {}),
    "grape": (Grape, {}),
    "mos": (Scorer, {}),
    "mos_paper": (Scorer, {"form": "paper", "learning_rate": 0.1}),
}
every_mixture = pytest.mark.parametrize("name", LEARNED)


def make(name: str, **arguments: Any) -> Any:
    kind, own = LEARNED[name]
    return kind(task_names=NAMES, num_supervised_tokens=SIZES, budget_tokens=1000, **{**own, **arguments})


def signals(mixture: Any, values: Tensor) -> dict[str, Tensor]:
    return dict.fromkeys(mixture.observes, values)


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@every_mixture
@pytest.mark.parametrize(
    ("prior", "expected"),
    [
        ({"prior": "proportional"}, tensor(0.6, 0.3, 0.1)),
        ({"prior": "temperature", "temperature": 2.0}, tensor(6, 3, 1).sqrt() / tensor(6, 3, 1).sqrt().sum()),
        ({"prior": WEIGHTS}, tensor(*WEIGHTS.values()) / 3.51),
    ],
)
def test_every_mixture_starts_at_its_prior(name: str, prior: dict[str, Any], expected: Tensor) -> None:
    torch.testing.assert_close(make(name, **prior).probabilities(), expected, rtol=1e-14, atol=0)


@every_mixture
@settings(max_examples=20, deadline=None)
@given(updates=st.lists(st.lists(st.floats(0.01, 9.0), min_size=3, max_size=3), min_size=1, max_size=6))
def test_equal_weights_are_the_uniform_prior_to_the_last_bit(name: str, updates: list[list[float]]) -> None:
    without, given_one = make(name), make(name, prior=dict.fromkeys(NAMES, 0.3))
    tokens = torch.zeros(3, dtype=torch.float64)
    for values in updates:
        tokens = tokens + 50
        for mixture in (without, given_one):
            mixture.update(task_tokens=tokens, **signals(mixture, tensor(*values)))
        assert torch.equal(without.probabilities(), given_one.probabilities())


@pytest.mark.parametrize(
    "name", ["adapt", "adapt_forecast", "adapt_ksteps", "adapt_planned", "dro", "dro_exponentiated", "grape", "mos"]
)
@settings(max_examples=20, deadline=None)
@given(updates=st.lists(st.lists(st.floats(0.01, 9.0), min_size=3, max_size=3), min_size=1, max_size=6))
def test_the_floor_is_the_prior(name: str, updates: list[list[float]]) -> None:
    mixture = make(name, prior=WEIGHTS, floor=0.3)
    prior = mixture.probabilities()
    tokens = torch.zeros(3, dtype=torch.float64)
    for values in updates:
        tokens = tokens + 50
        mixture.update(task_tokens=tokens, **signals(mixture, tensor(*values)))
        p = mixture.probabilities()
        assert (p >= 0.3 * prior * (1 - 1e-12)).all()
        assert float(p.sum()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("name", ["adapt", "adapt_forecast", "adapt_ksteps", "dro", "dro_exponentiated", "grape"])
def test_without_differences_it_stays_at_its_prior(name: str) -> None:
    mixture = make(name, prior=WEIGHTS)
    prior = mixture.probabilities()
    for tokens in range(5):
        mixture.update(task_tokens=torch.full((3,), float(tokens)), **signals(mixture, tensor(2, 2, 2)))
    torch.testing.assert_close(mixture.probabilities(), prior, rtol=1e-12, atol=0)


def test_evidence_moves_the_odds_away_from_those_of_the_prior() -> None:
    """Group DRO in closed form: q ~ prior exp(beta L)."""
    mixture, losses = make("dro", prior="proportional", sharpness=1.5, floor=0.0), tensor(1.0, 0.2, 2.0)
    mixture.update(task_tokens=torch.zeros(3), validation_losses=losses)
    expected = tensor(0.6, 0.3, 0.1) * (1.5 * losses).exp()
    torch.testing.assert_close(mixture.probabilities(), expected / expected.sum(), rtol=1e-13, atol=0)


def test_adapt_descends_the_objective_relative_to_its_prior() -> None:
    """(3), (5) and (6) against autograd through p, away from the start."""
    prior, floor, rate, weight = "proportional", 0.1, 0.05, 0.7
    mixture = make(
        "adapt", prior=prior, floor=floor, meta_lr=rate, entropy_weight=weight, center_and_scale=False, ema_decay=0.0
    )
    mixture.logits = tensor(0.3, -0.8, 0.5)
    losses, dots = tensor(1.0, 2.0, 3.0), tensor(0.4, -1.0, 2.0)

    a, shares = mixture.logits.clone().requires_grad_(), tensor(0.6, 0.3, 0.1)
    p = (1 - floor) * torch.softmax(a + shares.log(), dim=0) + floor * shares
    # To first order, the validation losses fall by u_i = eta <v, g_i> per unit of p_i.
    objective = -(mixture.lookahead_lr * dots * p).sum() + weight * (p * (p / shares).log()).sum()
    (gradient,) = torch.autograd.grad(objective, a)
    mixture.update(task_tokens=torch.zeros(3), validation_losses=losses, gradient_dots=dots)
    torch.testing.assert_close(mixture.logits, (a - rate * gradient).detach(), rtol=0, atol=1e-14)


def test_the_plan_is_a_fixed_point_relative_to_the_prior() -> None:
    mixture = make("adapt_planned", prior=WEIGHTS, floor=0.0, entropy_weight=1.0)
    tokens = tensor(0, 0, 0)
    for losses in (tensor(3, 2, 1), tensor(2.5, 1.9, 1)):
        tokens = tokens + 100
        logged = mixture.update(task_tokens=tokens, validation_losses=losses)
    prior = tensor(*WEIGHTS.values())
    expected = prior * logged["values"].exp()
    torch.testing.assert_close(mixture.probabilities(), expected / expected.sum(), rtol=5e-3, atol=0)


@pytest.mark.parametrize(
    ("prior", "temperature", "message"),
    [
        ("proportionl", None, "mixture.prior: 'proportionl'; did you mean 'proportional'?"),
        ("temperature", None, "missing key 'mixture.temperature', for mixture.prior: temperature; a number > 0"),
        ("uniform", 2.0, "mixture.temperature is for mixture.prior: temperature, not for uniform"),
        (WEIGHTS, 2.0, "mixture.temperature is for mixture.prior: temperature, not for given weights"),
        ({"a": 1, "b": 1}, None, "mixture.prior lacks a weight for the task 'c'"),
        ({**WEIGHTS, "cc": 1}, None, "mixture.prior: 'cc' is no task of this run; did you mean 'c'?"),
        (dict.fromkeys(NAMES, 0), None, "mixture.prior['a'] must be a finite number > 0, not 0"),
        ({**WEIGHTS, "b": "much"}, None, "mixture.prior['b'] must be a finite number > 0, not 'much'"),
    ],
)
def test_wrong_priors_are_named_in_one_line(prior: Any, temperature: float | None, message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)) as error:
        Prior(prior, temperature, task_names=NAMES, num_supervised_tokens=SIZES)
    assert "\n" not in str(error.value)
