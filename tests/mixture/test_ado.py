"""ADO: the fit of known power laws, the mixture by hand, tasks that do not learn, and what it keeps."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapt_recipes.mixture import Ado
from adapt_recipes.mixture.ado import MAX_LOSSES, MIN_LOSSES, fit_power_law
from adapt_recipes.mixture.interface import check_mixture, check_update

NAN = math.nan


def make(num_tasks, **arguments):
    names = [f"task {i}" for i in range(num_tasks)]
    return Ado(task_names=names, num_supervised_tokens=[100] * num_tasks, budget_tokens=1000, **arguments)


def tensor(values):
    return torch.as_tensor(values, dtype=torch.float64)


def update(mixture, tokens, losses):
    logged = mixture.update(task_tokens=tensor(tokens), train_losses=tensor(losses))
    check_update(mixture, logged, num_tasks=len(losses))
    return logged


def learn(mixture, laws, *, every, num_updates, noise=0.0):
    """Updates after ``every`` tokens per task, with the losses of the laws at the middle of these tokens."""
    generator = torch.Generator().manual_seed(0)
    for number in range(1, num_updates + 1):
        tokens = number * tensor(every)
        middle = tokens - tensor(every) / 2
        losses = tensor([eps + beta * n**-alpha for (eps, beta, alpha), n in zip(laws, middle.tolist(), strict=True)])
        losses = losses + noise * torch.randn(len(laws), generator=generator, dtype=torch.float64)
        logged = update(mixture, tokens, losses)
    return logged


LAWS = [(0.5, 20.0, 0.5), (0.0, 4.0, 0.25), (1.5, 300.0, 1.0)]


@pytest.mark.parametrize(("eps", "beta", "alpha"), LAWS)
@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_the_fit_recovers_a_power_law(eps, beta, alpha, noise) -> None:
    n = torch.arange(1, 101, dtype=torch.float64) * 200
    generator = torch.Generator().manual_seed(0)
    losses = eps + beta * n**-alpha + noise * torch.randn(100, generator=generator, dtype=torch.float64)
    found = fit_power_law(n, losses)
    if not noise:
        torch.testing.assert_close(found, tensor([eps, beta, alpha]), rtol=0.05, atol=0.02)
    slope = found[2] * found[1] * n[-1] ** (-found[2] - 1)
    true = alpha * beta * float(n[-1]) ** (-alpha - 1)
    assert float(slope) == pytest.approx(true, rel=0.5 if noise else 0.03)


@pytest.mark.parametrize("losses", [[2.0] * 10, [1.0 + 0.1 * i for i in range(10)], [0.0] * 10])
def test_losses_that_do_not_fall_have_no_slope(losses) -> None:
    eps, beta, _ = fit_power_law(torch.arange(1, 11, dtype=torch.float64), tensor(losses))
    assert float(eps) == pytest.approx(sum(losses) / 10) and float(beta) == pytest.approx(0, abs=1e-12)


def test_the_mixture_has_the_ratio_of_the_slopes() -> None:
    """Without the average, the credit and the floor: prior x alpha (L - eps) / n."""
    every = [100, 300, 200]
    prior = {"task 0": 2, "task 1": 1, "task 2": 1}
    mixture = make(3, ema_decay=0.0, credit_exponent=0.0, floor=0.0, prior=prior)
    learn(mixture, LAWS, every=every, num_updates=40)
    slopes = [alpha * beta * (40 * n) ** (-alpha - 1) for (_, beta, alpha), n in zip(LAWS, every, strict=True)]
    expected = tensor([2.0, 1.0, 1.0]) * tensor(slopes)
    torch.testing.assert_close(mixture.probabilities(), expected / expected.sum(), rtol=0.03, atol=0)


def test_the_average_and_the_credit_by_hand() -> None:
    """The equations (2) to (6) from the slopes that are logged."""
    mixture = make(3, ema_decay=0.8, credit_exponent=0.7)
    assert mixture.floor == 0.03
    prior = h = mean = tensor([1 / 3] * 3)
    for number in range(1, MIN_LOSSES + 5):
        tokens = number * tensor([100, 300, 200])
        losses = [eps + beta * (number * 100) ** -alpha for eps, beta, alpha in LAWS]
        speeds = update(mixture, tokens, losses)["speeds"]
        rho = prior
        if number >= MIN_LOSSES:
            rho = prior * h**0.7 * speeds
            rho = rho / rho.sum()
        q = 0.2 * rho + 0.8 * mean
        mean = (number * mean + rho) / (number + 1)
        p = 0.97 * q + 0.03 / 3
        h = 0.8 * h + 0.2 * p
        torch.testing.assert_close(mixture.probabilities(), p, rtol=0, atol=1e-14)
    assert p.max() > 0.34, "not trivially uniform"


def test_a_task_that_does_not_learn_gets_little() -> None:
    """Its losses are noise around a constant. It ends below a fair share, and the newest preference is near nothing."""
    mixture = make(3)
    noise = (2.5, 0.0, 1.0)
    learn(mixture, [LAWS[0], LAWS[2], noise], every=[100] * 3, num_updates=60, noise=0.002)
    p = mixture.probabilities()
    assert p[2] < 0.15 and p[:2].min() > 0.2
    now = make(3, ema_decay=0.0, credit_exponent=0.0)
    learn(now, [LAWS[0], LAWS[2], noise], every=[100] * 3, num_updates=60, noise=0.002)
    assert now.probabilities()[2] < 0.1


def test_the_prior_to_the_last_bit_while_there_are_few_losses() -> None:
    prior = {"task 0": 3, "task 1": 1, "task 2": 2}
    mixture = make(3, prior=prior)
    shares = mixture.probabilities()
    logged = learn(mixture, LAWS, every=[100] * 3, num_updates=MIN_LOSSES - 1)
    assert logged["speeds"].isnan().all() and torch.equal(mixture.probabilities(), shares)


def test_a_task_with_few_losses_keeps_its_share() -> None:
    mixture = make(3, ema_decay=0.0)
    for number in range(1, MIN_LOSSES + 1):
        losses = [1 + 1 / number, 2.0, NAN if number % 2 else 1.0]
        logged = update(mixture, [100.0 * number, 100.0 * number, 50.0 * number], losses)
    assert logged["speeds"].isnan().tolist() == [False, False, True]
    p = mixture.probabilities()
    assert p[2] == pytest.approx(1 / 3) and p[0] > 0.6
    assert p[1] == pytest.approx(0.01), "the smallest share"


def test_only_the_newest_losses_count() -> None:
    mixture = make(1)
    for number in range(1, MAX_LOSSES + 3):
        update(mixture, [float(number)], [float(number)])
    assert mixture.curve_losses[0] == 3 and mixture.curve_losses[-1] == MAX_LOSSES + 2


@settings(max_examples=25)
@given(
    st.integers(1, 4).flatmap(
        lambda n: st.lists(
            st.lists(st.one_of(st.floats(0, 1e6), st.just(NAN)), min_size=n, max_size=n),
            min_size=MIN_LOSSES,
            max_size=16,
        )
    ),
    st.sampled_from([0.0, 0.9]),
)
def test_always_a_mixture_and_the_state_carries_everything(updates, ema_decay) -> None:
    n = len(updates[0])
    mixture, resumed = make(n, ema_decay=ema_decay), make(n, ema_decay=ema_decay)
    tokens = torch.zeros(n, dtype=torch.float64)
    for losses in updates:
        tokens = tokens + torch.where(tensor(losses).isnan(), 0.0, 10.0)
        update(mixture, tokens, losses)
        update(resumed, tokens, losses)
        state, resumed = resumed.state_dict(), make(n, ema_decay=ema_decay)
        resumed.load_state_dict(state)
        p = mixture.probabilities()
        assert p.isfinite().all() and abs(p.sum() - 1) < 1e-12
        assert (p >= 0.01 * (1 - 1e-12)).all()
        assert torch.equal(resumed.probabilities(), p)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ema_decay": 1}, "mixture.ema_decay must be a finite number >= 0 and < 1, not 1"),
        ({"credit_exponent": -1}, "mixture.credit_exponent must be a finite number >= 0, not -1"),
        ({"floor": 1}, "mixture.floor must be a finite number >= 0 and < 1, not 1"),
    ],
)
def test_wrong_arguments(arguments, message) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message) + "$"):
        make(2, **arguments)


def test_the_floor_of_many_tasks() -> None:
    assert make(200).floor == 0.5 and make(7).floor == 0.07 and make(7, floor=0.2).floor == 0.2


def test_state_of_another_mixture_is_refused() -> None:
    with pytest.raises(ValueError, match="the state is of"):
        make(3).load_state_dict(make(4).state_dict())


def test_keeps_the_contract() -> None:
    check_mixture(make(3), ["train_losses"], num_tasks=3, recipe="a recipe")
