"""FAMO as shares: its equations by hand, equal relative rates on a simulated system, and what it keeps."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapt_recipes.mixture import Famo
from adapt_recipes.mixture.famo import SMALLEST_EXCESS
from adapt_recipes.mixture.interface import check_mixture, check_update

NAN = math.nan


def make(num_tasks, budget_tokens=1000, **arguments):
    names = [f"task {i}" for i in range(num_tasks)]
    return Famo(task_names=names, num_supervised_tokens=[100] * num_tasks, budget_tokens=budget_tokens, **arguments)


def tensor(values):
    return torch.as_tensor(values, dtype=torch.float64)


def update(mixture, losses):
    logged = mixture.update(task_tokens=torch.ones(len(losses)), **{mixture.observes[0]: tensor(losses)})
    check_update(mixture, logged, num_tasks=len(losses))
    return logged


@pytest.mark.parametrize("losses", ["train", "validation"])
def test_three_updates_by_hand(losses) -> None:
    """With references .5 and 0, a prior of 3 to 1, and Adam written out."""
    reference, prior = {"task 0": 0.5, "task 1": 0.0}, {"task 0": 3, "task 1": 1}
    mixture = make(2, losses=losses, reference=reference, prior=prior, floor=0.2, learning_rate=0.1, weight_decay=0.3)
    assert mixture.probabilities().tolist() == [0.75, 0.25]
    curve = [(2.5, 1.0), (1.5, 0.9), (1.0, 0.3)]
    excess = [(first - 0.5, second) for first, second in curve]
    w, m, v = [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]
    for t, now in enumerate(curve):
        odds = [3 * math.exp(w[0]), math.exp(w[1])]
        z = [each / sum(odds) for each in odds]
        logged = update(mixture, now)
        if t:
            delta = [math.log(excess[t - 1][k] / excess[t][k]) for k in (0, 1)]
            torch.testing.assert_close(logged["relative_progress"], tensor(delta))
            mean = z[0] * delta[0] + z[1] * delta[1]
            for k in (0, 1):
                gradient = z[k] * (delta[k] - mean) + 0.3 * w[k]
                m[k] = 0.9 * m[k] + 0.1 * gradient
                v[k] = 0.999 * v[k] + 0.001 * gradient**2
                corrected = m[k] / (1 - 0.9**t), v[k] / (1 - 0.999**t)
                w[k] -= 0.1 * corrected[0] / (math.sqrt(corrected[1]) + 1e-8)
        odds = [3 * math.exp(w[0]) / excess[t][0], math.exp(w[1]) / excess[t][1]]
        q = [each / sum(odds) for each in odds]
        expected = tensor([0.8 * q[0] + 0.2 * 0.75, 0.8 * q[1] + 0.2 * 0.25])
        torch.testing.assert_close(mixture.probabilities(), expected, rtol=0, atol=1e-13)
    assert min(map(abs, w)) > 0.01, "not trivially the prior"


def simulated_rates(mixture, *, speeds, num_updates):
    """The relative rates of the last updates: each log loss falls by share x speed in every update."""
    log_losses, rates = torch.zeros(len(speeds), dtype=torch.float64), []
    for _ in range(num_updates):
        if mixture is not None:
            update(mixture, log_losses.exp())
        p = torch.full((len(speeds),), 1 / len(speeds)) if mixture is None else mixture.probabilities()
        rates.append(p * tensor(speeds))
        log_losses -= rates[-1]
    return torch.stack(rates[-100:]).mean(0)


def test_all_tasks_come_to_improve_at_the_same_relative_rate() -> None:
    """For speeds that differ by a factor of 8, where uniform shares leave them as different."""
    system = {"speeds": [0.001, 0.002, 0.004, 0.008], "num_updates": 1000}
    exact = simulated_rates(make(4, floor=0.0, weight_decay=0.0), **system)
    assert float(exact.max() / exact.min()) == pytest.approx(1, abs=0.05)
    uniform = simulated_rates(None, **system)
    assert float(uniform.max() / uniform.min()) == pytest.approx(8)
    assert exact.min() > 1.5 * uniform.min(), "the slowest task gains"


def test_a_weight_decay_that_is_large_beside_the_progress_undoes_it() -> None:
    """Why the docstring warns: w stays near 0, and the shares are those of the losses alone."""
    mixture = make(4, floor=0.0)
    rates = simulated_rates(mixture, speeds=[0.001, 0.002, 0.004, 0.008], num_updates=300)
    assert rates.max() / rates.min() > 8 and mixture.logits.abs().max() < 0.1


def test_a_task_that_was_not_measured_keeps_its_state() -> None:
    mixture = make(3, floor=0.0)
    update(mixture, [2.0, NAN, 1.0])
    torch.testing.assert_close(mixture.probabilities(), tensor([2 / 9, 1 / 3, 4 / 9]))
    update(mixture, [1.0, 1.5, NAN])
    assert mixture.num_steps.tolist() == [1, 0, 0] and mixture.last_losses.tolist() == [1.0, 1.5, 1.0]
    assert mixture.logits[1:].tolist() == [0, 0]


def test_a_loss_at_or_below_its_minimum_stays_finite() -> None:
    mixture = make(2, floor=0.0, reference={"task 0": 1.0, "task 1": 0.0})
    update(mixture, [0.9, 1.0])
    update(mixture, [1.0, 1.0])
    assert mixture.probabilities()[0] == pytest.approx(1 / (1 + SMALLEST_EXCESS))


@settings(max_examples=40)
@given(
    st.integers(1, 5).flatmap(
        lambda n: st.lists(
            st.lists(st.one_of(st.floats(0, 1e6), st.just(NAN)), min_size=n, max_size=n), min_size=1, max_size=15
        )
    ),
    st.sampled_from([None, "asymptote"]),
)
def test_always_a_mixture_and_the_state_carries_everything(updates, reference) -> None:
    n = len(updates[0])
    mixture, resumed = make(n, reference=reference), make(n, reference=reference)
    for losses in updates:
        update(mixture, losses)
        update(resumed, losses)
        state, resumed = resumed.state_dict(), make(n, reference=reference)
        resumed.load_state_dict(state)
        p = mixture.probabilities()
        assert p.isfinite().all() and abs(p.sum() - 1) < 1e-12
        assert (p >= 0.05 / n * (1 - 1e-12)).all()
        assert torch.equal(resumed.probabilities(), p)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rate": 0}, "mixture.learning_rate must be a finite number > 0, not 0"),
        ({"weight_decay": -1}, "mixture.weight_decay must be a finite number >= 0, not -1"),
        ({"floor": 1}, "mixture.floor must be a finite number >= 0 and < 1, not 1"),
        ({"losses": "trains"}, "mixture.losses: 'trains'; did you mean 'train'?"),
        (
            {"reference": "initial"},
            "mixture.reference: 'initial' is above the loss of a task that learns; allowed: null, a loss for each "
            "task, or asymptote",
        ),
    ],
)
def test_wrong_arguments(arguments, message) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message) + "$"):
        make(2, **arguments)


def test_state_of_another_mixture_is_refused() -> None:
    with pytest.raises(ValueError, match="the state is of 4 tasks, this run has 3"):
        make(3).load_state_dict(make(4).state_dict())


def test_keeps_the_contract() -> None:
    check_mixture(make(3), ["train_losses"], num_tasks=3, recipe="a recipe")
