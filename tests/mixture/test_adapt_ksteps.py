"""ADAPT by K look-ahead steps: its equations by hand, its resume, and what it refuses."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from adapt_recipes.mixture import Adapt, AdaptKSteps
from adapt_recipes.mixture.adapt import MIN_NORMALIZER

NAMES = ["a", "b", "c"]


def make(kind: Any = AdaptKSteps, **arguments: Any) -> Any:
    return kind(task_names=NAMES, num_supervised_tokens=[600, 300, 100], budget_tokens=1000, **arguments)


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def update(mixture: Any, losses: Tensor, differences: Tensor) -> dict[str, Tensor]:
    logged: dict[str, Tensor] = mixture.update(
        task_tokens=torch.zeros(3), validation_losses=losses, kstep_differences=differences
    )
    return logged


def test_the_weights_are_the_gradient_of_the_smooth_worst_case() -> None:
    """(3) and (4) against autograd; c_j are the first losses, at least ``MIN_NORMALIZER``."""
    mixture, first, losses = make(sharpness=2.5), tensor(1.0, 2.0, 0.01), tensor(0.7, 1.9, 0.02).requires_grad_()
    update(mixture, first, tensor(0, 0, 0))
    excess = losses / tensor(1.0, 2.0, MIN_NORMALIZER)
    objective = (2.5 * excess).exp().mean().log() / 2.5
    (gradient,) = torch.autograd.grad(objective, losses)
    torch.testing.assert_close(mixture.objective_weights(losses.detach()), gradient, rtol=1e-12, atol=0)
    # The entropy of the uniform mixture is log 3.
    logged = update(mixture, losses.detach(), tensor(0, 0, 0))
    torch.testing.assert_close(logged["objective"], objective.detach() - 0.5 * math.log(3), rtol=1e-12, atol=0)


def test_the_step_is_the_gradient_through_the_softmax() -> None:
    """(1) and (6) against autograd, away from the start, with the values centered and scaled."""
    floor, rate, weight, u = 0.1, 0.05, 0.7, tensor(0.4, -1.0, 2.0)
    mixture = make(prior="proportional", floor=floor, meta_lr=rate, entropy_weight=weight, ema_decay=0.0)
    mixture.logits = tensor(0.3, -0.8, 0.5)
    z = (u - u.mean()) / (u - u.mean()).square().mean().sqrt()

    a, prior = mixture.logits.clone().requires_grad_(), tensor(0.6, 0.3, 0.1)
    p = (1 - floor) * torch.softmax(a + prior.log(), dim=0) + floor * prior
    torch.testing.assert_close(mixture.probabilities(), p.detach(), rtol=1e-14, atol=0)
    (gradient,) = torch.autograd.grad((z * p).sum() - weight * (p * (p / prior).log()).sum(), a)
    update(mixture, tensor(1, 2, 3), u)
    torch.testing.assert_close(mixture.logits, (a + 3 * rate * gradient).detach(), rtol=0, atol=1e-14)


def test_the_task_whose_loss_falls_more_with_validation_rises() -> None:
    mixture = make()
    p = mixture.probabilities()
    update(mixture, tensor(1, 1, 1), tensor(0.02, -0.01, 0.0))
    assert torch.equal(mixture.probabilities() > p, torch.tensor([True, False, False]))
    assert mixture.probabilities()[1] < mixture.probabilities()[2]


def test_it_is_the_one_step_form_if_the_signals_are_equal() -> None:
    """u = eta <v, g_i>, with the other arguments' meanings the same, over several updates and tasks not measured."""
    arguments = {"sharpness": 2.0, "floor": 0.2, "prior": "proportional", "entropy_weight": 0.3, "lookahead_lr": 0.25}
    one, many = make(Adapt, **arguments), make(**arguments)
    for dots in (tensor(1.0, math.nan, 0.3), tensor(0.4, 2.0, math.nan), tensor(-1.0, 0.5, 0.1)):
        losses = tensor(1.5, 0.9, math.nan)
        assert torch.equal(one.objective_weights(losses), many.objective_weights(losses))
        expected = one.update(task_tokens=torch.zeros(3), validation_losses=losses, gradient_dots=dots)
        logged = update(many, losses, 0.25 * dots)
        for name, value in logged.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-14, atol=0)
        torch.testing.assert_close(many.probabilities(), one.probabilities(), rtol=1e-13, atol=0)


def test_a_resume_continues_to_the_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    signals = torch.rand((6, 2, 3), generator=generator, dtype=torch.float64)
    whole, begun = make(), make()
    for number, (losses, differences) in enumerate(signals):
        update(whole, losses, differences)
        update(begun, losses, differences)
        if number == 2:
            state, begun = begun.state_dict(), make()
            begun.load_state_dict(state)
    assert torch.equal(begun.probabilities(), whole.probabilities())
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in begun.state_dict().items())
    with pytest.raises(ValueError, match="mixture: the state is of 2 tasks, this run has 3"):
        whole.load_state_dict({name: value[:2] for name, value in state.items()})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"meta_lr": -1}, "mixture.meta_lr must be a finite number >= 0, not -1"),
        ({"entropy_weight": "x"}, "mixture.entropy_weight must be a finite number >= 0, not 'x'"),
        ({"sharpness": 0}, "mixture.sharpness must be a finite number > 0, not 0"),
        ({"floor": 1}, "mixture.floor must be a finite number >= 0 and < 1, not 1"),
        ({"ema_decay": 1.0}, "mixture.ema_decay must be a finite number >= 0 and < 1, not 1.0"),
        ({"lookahead_lr": 0}, "mixture.lookahead_lr must be a finite number > 0, not 0"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make(**arguments)


def test_values_that_are_not_finite_end_the_run() -> None:
    with pytest.raises(AssertionError, match="diverged"):
        update(make(), tensor(1, 1, math.inf), tensor(0, 0, 0))
    with pytest.raises(AssertionError, match="diverged"):
        update(make(), tensor(1, 1, 1), tensor(0, 0, math.inf))
