"""K look-ahead steps: differences against autograd through the steps, their rate and signs, and that no trace stays."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapt_recipes.signals import passes
from adapt_recipes.signals.ksteps import kstep_differences, kstep_gradients

NUM_TASKS, VOCABULARY = 4, 13
EMPTY_TASK = 3  # has sequences, and no supervised token
P = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
WEIGHTS = torch.tensor([0.7, 0.0, 0.3, 0.0], dtype=torch.float64)


class TinyModel(nn.Module):
    """A causal model in float64 with dropout and a frozen weight: each position sees the mean of what came before."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden = nn.Embedding(VOCABULARY, 6), nn.Linear(6, 7)
        self.dropout, self.output = nn.Dropout(0.5), nn.Linear(7, VOCABULARY)
        self.double()
        self.output.bias.requires_grad_(False)
        self.calls, self.raise_at = 0, -1

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.raise_at:
            raise RuntimeError("a forward pass")
        x = self.embed(tokens)
        x = x.cumsum(1) / torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]
        logits = self.output(self.dropout(torch.tanh(self.hidden(x))))
        kept = labels != -100
        return F.cross_entropy(logits[kept], labels[kept], reduction="none")


def make_model() -> TinyModel:
    torch.manual_seed(0)
    return TinyModel()


def make_batches(seed: int) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(2):
        tasks = torch.arange(2 * NUM_TASKS) % NUM_TASKS
        tokens, labels = torch.randint(VOCABULARY, (2, 2 * NUM_TASKS, 9), generator=generator)
        labels[torch.rand(labels.shape, generator=generator) < 0.5] = -100
        labels[tasks == EMPTY_TASK] = -100
        batches.append(SimpleNamespace(tokens=tokens, labels=labels, tasks=tasks))
    return batches


VALIDATION = make_batches(99)


def steps(number: int) -> list[Any]:
    return [make_batches(seed) for seed in range(number)]


def differences(number: int, *, eta: float, weight: float = 1e-4, model: Any = None) -> Tensor:
    model = model or make_model()
    return kstep_differences(model, steps(number), VALIDATION, P, WEIGHTS, learning_rate=eta, validation_weight=weight)


def unrolled(number: int, *, eta: float, model: Any = None) -> Tensor:
    return kstep_gradients(model or make_model(), steps(number), VALIDATION, P, WEIGHTS, learning_rate=eta)


def error(one: Tensor, other: Tensor) -> float:
    return float((one - other)[:EMPTY_TASK].norm() / other[:EMPTY_TASK].norm())


@pytest.mark.parametrize("eta", [0.1, 0.5])
def test_one_step_is_a_dot_product_of_gradients(eta: float) -> None:
    """As lambda -> 0: eta <grad L_i(theta_1), grad F(theta_0)>, positive where training on a task decreases F."""
    model, (train,) = make_model(), steps(1)
    v = passes.loss_gradient(model, VALIDATION, WEIGHTS)
    with passes.stepped(model, passes.loss_gradient(model, train, P), -eta):
        dots = passes.gradient_dots_by_backward(model, train, v, NUM_TASKS)
    measured = differences(1, eta=eta, weight=1e-6)
    torch.testing.assert_close(measured, eta * dots, rtol=0, atol=1e-6, equal_nan=True)
    assert error(measured, eta * dots) < 1e-5
    assert measured.isnan().tolist() == [task == EMPTY_TASK for task in range(NUM_TASKS)]


def test_one_unrolled_step_is_a_dot_product_of_gradients() -> None:
    """eta <grad L_i(theta_0), grad F(theta_1)>, exactly."""
    model, (train,), eta = make_model(), steps(1), 0.5
    with passes.stepped(model, passes.loss_gradient(model, train, P), -eta):
        v = passes.loss_gradient(model, VALIDATION, WEIGHTS)
    dots = passes.gradient_dots_by_backward(model, train, v, NUM_TASKS)
    torch.testing.assert_close(unrolled(1, eta=eta), eta * dots, rtol=1e-12, atol=0, equal_nan=True)


@pytest.mark.parametrize("number", [1, 3])
def test_unrolled_steps_give_the_slope_of_the_objective(number: int) -> None:
    """Against a difference quotient in each p_i."""
    model, eta, eps = make_model(), 0.5, 1e-5

    def objective(p: Tensor) -> float:
        with passes.restored(model):
            for batches in steps(number):
                passes.move(model, passes.loss_gradient(model, batches, p), -eta)
            return float((WEIGHTS * passes.task_losses(model, VALIDATION, NUM_TASKS))[:EMPTY_TASK].sum())

    u = unrolled(number, eta=eta)
    for task in range(EMPTY_TASK):
        moved = eps * F.one_hot(torch.tensor(task), NUM_TASKS)
        assert float(u[task]) == pytest.approx((objective(P - moved) - objective(P + moved)) / (2 * eps), rel=1e-6)


@pytest.mark.parametrize("number", [1, 4])
def test_the_error_is_of_first_order_in_the_step_size(number: int) -> None:
    """Half the step size, half the relative error."""
    errors = [error(differences(number, eta=eta), unrolled(number, eta=eta)) for eta in (0.02, 0.01, 0.005)]
    assert errors[0] < 0.1
    for one, half in zip(errors, errors[1:], strict=False):
        assert half / one == pytest.approx(0.5, abs=0.05)


class TwoWeights(nn.Module):
    """The loss of a token is (its weight - 1)^2 / 2: tokens 0 and 1 are two tasks that share nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        return (self.weight[tokens[labels != -100]] - 1).square() / 2


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_signs_by_hand() -> None:
    """The task that the objective is over rises; one that shares nothing with it has 0."""
    eta, weight = 0.1, 0.5
    batch = [SimpleNamespace(tokens=torch.tensor([[0], [1]]), labels=torch.ones(2, 1).long(), tasks=torch.arange(2))]
    arguments: Any = (TwoWeights(), [batch], batch, tensor(0.5, 0.5), tensor(1, 0))
    measured = kstep_differences(*arguments, learning_rate=eta, validation_weight=weight)
    # One step from weight 0, whose gradient is -1: to eta / 2, and with the objective to eta (1 / 2 + lambda).
    by_hand = ((1 - eta / 2) ** 2 / 2 - (1 - eta * (0.5 + weight)) ** 2 / 2) / weight
    assert by_hand > 0
    torch.testing.assert_close(measured, tensor(by_hand, 0), rtol=1e-12, atol=1e-15)
    # F = (1 - eta p)^2 / 2, so -dF/dp = eta (1 - eta / 2).
    exact = kstep_gradients(*arguments, learning_rate=eta)
    torch.testing.assert_close(exact, tensor(eta * (1 - eta / 2), 0), rtol=1e-12, atol=1e-15)
    # A step from 0 to 1.25 and more: past the minimum, more of the task harms.
    assert kstep_differences(*arguments, learning_rate=2.5, validation_weight=weight)[0] < 0


@pytest.mark.parametrize("raise_at", [-1, 1, 3, 6, 9, 14])
@pytest.mark.parametrize("measure", [differences, unrolled])
def test_leaves_everything_as_it_was(measure: Any, raise_at: int) -> None:
    """Weights, ``.grad``, modes and generators to the bit, also when a forward pass raises."""
    model = make_model()
    for number, parameter in enumerate(model.parameters()):
        if number % 2 and parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)
    model.dropout.eval()
    before = copy.deepcopy([(p.detach(), p.grad) for p in model.parameters()])
    modes, generator = [module.training for module in model.modules()], torch.get_rng_state()
    model.raise_at = raise_at
    raises = False
    try:
        measure(2, eta=0.5, model=model)
    except RuntimeError:
        raises = True
    assert raises == (0 < raise_at <= model.calls) and (raises or raise_at in (-1, 9, 14))
    for (weight, grad), parameter in zip(before, model.parameters(), strict=True):
        assert torch.equal(weight, parameter)
        assert (grad is None) == (parameter.grad is None) and (grad is None or torch.equal(grad, parameter.grad))
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), generator)
    model.raise_at = -1
    again = measure(2, eta=0.5, model=model)
    assert torch.equal(again.nan_to_num(-9.0), measure(2, eta=0.5, model=model).nan_to_num(-9.0))
