"""Size and noise of gradients from two half batches: unbiased over all ways to halve a batch, and without a trace."""

from __future__ import annotations

from itertools import combinations
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapt_recipes.signals import passes

VOCABULARY, NUM_TASKS, NUM_EXAMPLES, LENGTH = 11, 3, 4, 6
# Has examples in one half only.
ALONE = 2


class Bigrams(nn.Module):
    """The next token from this one, in float64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.output = nn.Embedding(VOCABULARY, 5), nn.Linear(5, VOCABULARY)
        self.double()

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        kept = labels != -100
        return F.cross_entropy(self.output(torch.tanh(self.embed(tokens)))[kept], labels[kept], reduction="none")


MODEL = Bigrams()
TOKENS, LABELS = torch.randint(
    VOCABULARY, (2, NUM_TASKS, NUM_EXAMPLES, LENGTH), generator=torch.Generator().manual_seed(1)
)


def half(examples: tuple[int, ...], tasks: tuple[int, ...]) -> list[Any]:
    """A batch per task."""
    rows = list(examples)
    return [
        SimpleNamespace(tokens=TOKENS[i, rows], labels=LABELS[i, rows], tasks=torch.full((len(rows),), i))
        for i in tasks
    ]


def example_gradients(task: int) -> Tensor:
    """(NUM_EXAMPLES, num_weights) by plain autograd."""
    gradients = []
    for tokens, labels in zip(TOKENS[task], LABELS[task], strict=True):
        parts = torch.autograd.grad(MODEL(tokens[None], labels[None]).mean(), list(MODEL.parameters()))
        gradients.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(gradients)


def test_the_mean_over_all_halves_is_the_unbiased_estimate() -> None:
    """<g_i, g_j> over pairs of different examples, and the trace of the sample covariance."""
    measured = []
    for first in combinations(range(NUM_EXAMPLES), NUM_EXAMPLES // 2):
        second = tuple(i for i in range(NUM_EXAMPLES) if i not in first)
        halves = [half(first, (0, 1, ALONE)), half(second, (0, 1))]
        measured.append(torch.stack(passes.gradient_moments(MODEL, halves, NUM_TASKS)))
    squared_norms, variances = torch.stack(measured).mean(0)
    for task in (0, 1):
        g = example_gradients(task)
        variance = g.var(0).sum()
        torch.testing.assert_close(variances[task], variance, rtol=1e-10, atol=0)
        expected = g.mean(0).square().sum() - variance / NUM_EXAMPLES
        torch.testing.assert_close(squared_norms[task], expected, rtol=1e-10, atol=1e-14)
    assert squared_norms[ALONE].isnan() and variances[ALONE].isnan()
    assert all(parameter.grad is None for parameter in MODEL.parameters())


def test_halves_of_unequal_size() -> None:
    """1 / m + 1 / n is what the squared difference of means of m and n examples is divided by."""
    squared_norms, variances = passes.gradient_moments(MODEL, [half((0,), (0,)), half((1, 2, 3), (0,))], 1)
    g = example_gradients(0)
    a, b = g[0], g[1:].mean(0)
    torch.testing.assert_close(squared_norms[0], (a * b).sum(), rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(variances[0], (a - b).square().sum() / (1 + 1 / 3), rtol=1e-10, atol=1e-14)
