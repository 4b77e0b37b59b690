"""What one step on a task alone decreases its loss: against plain autograd in float64, and without a trace."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import NAMES, batched, tiny_examples, tiny_model
from torch import Tensor, nn
from torch.func import functional_call

from adapt_recipes.models.adapters import train_adapters_alone
from adapt_recipes.signals import passes

VOCABULARY, NUM_TASKS, LENGTH = 11, 4, 6
# Has sequences, and no supervised token.
EMPTY_TASK = 2


class TinyModel(nn.Module):
    """A causal model in float64 with dropout and a frozen weight: each position sees the mean of what came before."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.dropout, self.output = nn.Embedding(VOCABULARY, 5), nn.Dropout(0.5), nn.Linear(5, VOCABULARY)
        self.double()
        self.output.bias.requires_grad_(False)
        self.calls, self.raise_at = 0, -1

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.raise_at:
            raise RuntimeError("a forward pass")
        x = self.embed(tokens).cumsum(1) / torch.arange(1, tokens.shape[1] + 1, dtype=torch.float64)[:, None]
        kept = labels != -100
        return F.cross_entropy(self.output(self.dropout(torch.tanh(x)))[kept], labels[kept], reduction="none")


def make_batches() -> list[list[Any]]:
    """Of each task two batches, whose examples have different numbers of supervised tokens."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for task in range(NUM_TASKS):
        tokens, labels = torch.randint(VOCABULARY, (2, 2, 3, LENGTH), generator=generator)
        labels[torch.rand(labels.shape, generator=generator) < 0.5] = -100
        labels[:, 0, -1] = 3
        if task == EMPTY_TASK:
            labels[:] = -100
        batches.append(
            [
                SimpleNamespace(tokens=t, labels=y, tasks=torch.full((3,), task))
                for t, y in zip(tokens, labels, strict=True)
            ]
        )
    return batches


def by_autograd(model: TinyModel, batches: list[Any], learning_rate: float) -> float:
    """(before - after) / before of one task, with all its tokens in one batch and weights that are never written."""
    tokens, labels = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("tokens", "labels"))
    theta = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    moving = [name for name, weight in model.named_parameters() if weight.requires_grad]
    for name in moving:
        theta[name].requires_grad_()
    model.eval()
    before = functional_call(model, theta, (tokens, labels)).mean()
    for name, g in zip(moving, torch.autograd.grad(before, [theta[name] for name in moving]), strict=True):
        theta[name] = theta[name].detach() - learning_rate * g
    after = functional_call(model, theta, (tokens, labels)).mean()
    model.train()
    return float(((before - after) / before).detach())


@pytest.mark.parametrize("learning_rate", [0.01, 0.7, 50.0])
def test_it_is_the_relative_decrease_of_plain_autograd(learning_rate: float) -> None:
    """Every task's step starts from the same weights, and a step that is much too long has a negative gain."""
    model, batches = TinyModel(), make_batches()
    gains = passes.step_gains(model, batches, learning_rate=learning_rate)
    assert gains.isnan().tolist() == [task == EMPTY_TASK for task in range(NUM_TASKS)]
    for task in set(range(NUM_TASKS)) - {EMPTY_TASK}:
        assert float(gains[task]) == pytest.approx(by_autograd(model, batches[task], learning_rate), rel=1e-7)
    assert (gains.nan_to_num().min() < 0) == (learning_rate > 10)


@pytest.mark.parametrize("raise_at", [-1, 1, 4, 6, 11])
def test_it_leaves_everything_as_it_was(raise_at: int) -> None:
    """Weights, ``.grad``, modes and generators to the bit, also when a forward pass raises."""
    model, batches = TinyModel(), make_batches()
    model.embed.weight.grad = torch.randn_like(model.embed.weight)
    model.dropout.eval()
    before = copy.deepcopy([(p.detach(), p.grad) for p in model.parameters()])
    modes, generator = [module.training for module in model.modules()], torch.get_rng_state()
    model.raise_at, raised = raise_at, False
    try:
        passes.step_gains(model, batches, learning_rate=0.7)
    except RuntimeError:
        raised = True
    assert raised == (raise_at > 0)
    for (weight, grad), parameter in zip(before, model.parameters(), strict=True):
        assert torch.equal(weight, parameter)
        assert (grad is None) == (parameter.grad is None) and (grad is None or torch.equal(grad, parameter.grad))
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), generator)


def test_a_loss_of_zero_has_no_gain() -> None:
    """Its relative decrease is 0, and not 0 / 0."""

    class Known(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))

        def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
            return self.weight.square().expand(int((labels != -100).sum()))

    assert passes.step_gains(Known(), [make_batches()[0]], learning_rate=0.1).tolist() == [0.0]


def test_with_adapters_they_alone_move() -> None:
    """The gain is that of a step on the adapters, and no copy of a base weight is made."""
    model = tiny_model(lora_dropout=0.1)
    train_adapters_alone(model.decoder)
    own = [batched([each for each in tiny_examples(seed=1) if each[0] == task]) for task in range(len(NAMES))]
    gains = passes.step_gains(model, own, learning_rate=0.3)
    adapters = [p for name, p in model.named_parameters() if "lora" in name]
    with passes.restored(model) as copies:
        assert sum(each.numel() for each in copies) == sum(p.numel() for p in adapters)
        assert 0 < sum(p.numel() for p in adapters) < sum(p.numel() for p in model.parameters()) / 4
    for task, weights in enumerate(torch.eye(len(NAMES), dtype=torch.float64)):
        before = passes.task_losses(model, own[task], len(NAMES))[task]
        gradient = passes.loss_gradient(model, own[task], weights)
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for p, g in zip((p for name, p in moved.named_parameters() if "lora" in name), gradient, strict=True):
                p -= 0.3 * g
        after = passes.task_losses(moved, own[task], len(NAMES))[task]
        assert float(gains[task]) == pytest.approx(float((before - after) / before), rel=1e-5)
