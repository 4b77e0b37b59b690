"""GRAPE: its equations by hand and by autograd, who gets weight and who gets tokens, and what it keeps."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adapt_recipes.mixture import Grape
from adapt_recipes.mixture.adapt import MIN_NORMALIZER
from adapt_recipes.signals import passes

NAN = math.nan


def make(num_tasks: int = 3, **arguments: Any) -> Grape:
    names = [f"task {i}" for i in range(num_tasks)]
    return Grape(task_names=names, num_supervised_tokens=[100] * num_tasks, budget_tokens=1000, **arguments)


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def update(mixture: Grape, losses: Tensor, dots: Tensor, **targets: Tensor) -> dict[str, Tensor]:
    return mixture.update(
        task_tokens=torch.zeros(len(dots), dtype=torch.float64),
        validation_losses=losses,
        gradient_dots=dots,
        **targets,
    )


def test_by_hand() -> None:
    """Three updates, with a target that has twice the weight of one task, and two tasks that have none."""
    o = [1.0, 0.0, 0.0, 2.0]
    arguments: dict[str, Any] = {"target_names": ["x"], "target_weights": tensor(*o)}
    mixture = make(step_size=2.0, lookahead_lr=0.3, floor=0.1, **arguments)
    assert mixture.observes == ("validation_losses", "gradient_dots", "target_losses")
    z, q, last = [value / 3 for value in o], [1 / 3] * 3, None
    for losses, dots in (
        ([2.0, 1.0, 3.0, 1.5], [0.4, -0.2, 0.0]),
        ([1.0, 1.0, 2.0, 1.4], [1.0, 0.5, -0.3]),
        ([0.05, 0.9, 2.0, 1.6], [0.2, 0.1, 0.7]),
    ):
        if last is not None:
            z = [w * math.exp(-2 * (a - b) / max(a, MIN_NORMALIZER)) for w, a, b in zip(z, last, losses, strict=True)]
            z = [w / sum(z) for w in z]
        weights = mixture.objective_weights(tensor(*losses[:3]), tensor(losses[3]))
        expected = [w / max(loss, MIN_NORMALIZER) for w, loss in zip(z, losses, strict=True)]
        torch.testing.assert_close(weights, tensor(*expected), rtol=1e-13, atol=0)
        logged = update(mixture, tensor(*losses[:3]), tensor(*dots), target_losses=tensor(losses[3]))
        torch.testing.assert_close(torch.cat([logged["weights"], logged["target_weights"]]), tensor(*z))
        q = [share * math.exp(2 * 0.3 * dot) for share, dot in zip(q, dots, strict=True)]
        p = [0.9 * share / sum(q) + 0.1 / 3 for share in q]
        torch.testing.assert_close(mixture.probabilities(), tensor(*p), rtol=1e-13, atol=0)
        last = losses


class Shared(nn.Module):
    """The logits of a token are a row of a table, times a matrix that all rows share."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.output = nn.Embedding(7, 4), nn.Linear(4, 7)
        self.double()

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.output(self.embed(tokens[:, 0])), labels[:, 0], reduction="none")


def test_the_values_are_the_relative_improvements_per_step_on_each_task() -> None:
    """u_i of (4) is the slope, in the size of a step on task i alone, of what (1) measures after it, weighted by z."""
    model, N, eta, eps = Shared(), 3, 0.2, 1e-5
    tokens = torch.arange(6)[:, None]
    train, validation = (
        [SimpleNamespace(tokens=tokens, labels=labels[:, None], tasks=torch.arange(6) % N)]
        for labels in torch.randint(7, (2, 6), generator=torch.Generator().manual_seed(1))
    )
    mixture = make(N, lookahead_lr=eta)
    update(mixture, tensor(2.5, 2.0, 3.0), tensor(0, 0, 0))
    losses = passes.task_losses(model, validation, N)
    v = passes.loss_gradient(model, validation, mixture.objective_weights(losses))
    logged = update(mixture, losses, passes.gradient_dots_by_backward(model, train, v, N))
    assert float(logged["values"].abs().min()) > 1e-3
    for task, g in enumerate(passes.loss_gradient(model, train, torch.eye(N).double()[i]) for i in range(N)):
        sums = []
        for size in (eps, -eps):
            with passes.stepped(model, g, -size * eta):
                after = passes.task_losses(model, validation, N)
            sums.append(float((logged["weights"] * (losses - after) / losses).sum()))
        assert float(logged["values"][task]) == pytest.approx((sums[0] - sums[1]) / (2 * eps), rel=1e-7)


def test_what_improves_least_gets_weight_and_what_helps_it_gets_tokens() -> None:
    """The losses fall by the same number of nats, so that the highest one improves least."""
    mixture = make(step_size=5.0)
    update(mixture, tensor(1.0, 2.0, 4.0), tensor(0, 0, 0))
    logged = update(mixture, tensor(0.8, 1.8, 3.8), tensor(0.1, -0.1, 0.3))
    assert logged["weights"].argsort().tolist() == [0, 1, 2]
    assert mixture.probabilities().argsort().tolist() == [1, 0, 2]


def test_noise_gets_weight_and_no_tokens() -> None:
    """Task 2 never improves, and its validation gradient has nothing to do with any training gradient."""
    mixture = make(step_size=5.0, floor=0.1)
    for number in range(20):
        losses = tensor(2 * 0.9**number, 2 * 0.8**number, 2.0)
        weights = mixture.objective_weights(losses)
        # <v, g_i> if each task's gradient has the squared norm of its loss, and products across tasks are 0.
        logged = update(mixture, losses, weights * tensor(1, 1, 0) * losses)
    assert float(logged["weights"][2]) > 0.99
    p = mixture.probabilities()
    assert float(p[2]) < 1 / 3 and float(p[:2].min()) > 0.3


def test_the_noise_of_a_learned_task_does_not_decide() -> None:
    """A loss that rises from .001 to .004 is worth .03 of relative improvement, and not -3."""
    mixture = make(2, step_size=1.0)
    update(mixture, tensor(0.001, 1.0), tensor(0, 0))
    logged = update(mixture, tensor(0.004, 1.0), tensor(0, 0))
    assert logged["relative_improvements"].tolist() == pytest.approx([-0.003 / MIN_NORMALIZER, 0.0])


def test_one_large_product_does_not_take_all_tokens_for_good() -> None:
    """A product of 200 counts as an improvement by all of the loss, so that others that keep improving get ahead."""
    mixture = make(2, step_size=5.0)
    losses = tensor(1.0, 1.0)
    assert update(mixture, losses, tensor(200.0, 1.0))["values"].tolist() == [1.0, pytest.approx(0.1)]
    assert mixture.probabilities()[0] > 0.9
    for _ in range(10):
        update(mixture, losses, tensor(0.0, 1.0))
    assert mixture.probabilities()[0] < 0.5


def test_without_a_split_a_task_has_no_weight_and_without_a_product_it_keeps_its_share() -> None:
    mixture = make(3, step_size=3.0, floor=0.0)
    update(mixture, tensor(1.0, NAN, 2.0), tensor(0.0, 0.0, 0.0))
    logged = update(mixture, tensor(0.5, NAN, 2.0), tensor(0.3, 0.1, NAN))
    assert logged["weights"][1] == 0 and float(logged["weights"].sum()) == pytest.approx(1)
    assert logged["relative_improvements"].isnan().tolist() == [False, True, False]
    p = mixture.probabilities()
    assert float(p[2]) == pytest.approx(1 / 3, abs=1e-15) and p[0] > p[1] > 0


@pytest.mark.parametrize("arguments", [{"step_size": 0.0}, {}])
def test_it_stays_at_its_prior_without_differences(arguments: dict[str, Any]) -> None:
    mixture = make(prior={"task 0": 1, "task 1": 2, "task 2": 3}, **arguments)
    dots = tensor(0.1, 0.5, -0.2) if arguments else tensor(0.4, 0.4, 0.4)
    for _ in range(10):
        update(mixture, tensor(1.0, 2.0, 3.0), dots)
    torch.testing.assert_close(mixture.probabilities(), tensor(1, 2, 3) / 6, rtol=1e-12, atol=0)


def test_a_resume_continues_to_the_bit() -> None:
    signals = torch.rand((6, 2, 3), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole, begun = make(), make()
    for number, (losses, dots) in enumerate(signals):
        update(whole, losses, dots)
        update(begun, losses, dots)
        if number == 2:
            state, begun = begun.state_dict(), make()
            begun.load_state_dict(state)
    assert torch.equal(begun.probabilities(), whole.probabilities())
    assert torch.equal(begun.objective_weights(signals[0, 0]), whole.objective_weights(signals[0, 0]))
    with pytest.raises(ValueError, match="mixture: the state is of 3 tasks, this run has 2"):
        make(2).load_state_dict(state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step_size": -1}, "mixture.step_size must be a finite number >= 0, not -1"),
        ({"lookahead_lr": 0}, "mixture.lookahead_lr must be a finite number > 0, not 0"),
        ({"floor": 1}, "mixture.floor must be a finite number >= 0 and < 1, not 1"),
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
