"""Exp3 over tasks: its equations by hand, its exploration, rewards of any size, and what it keeps."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapt_recipes.mixture import Exp3, uniform
from adapt_recipes.mixture.interface import check_mixture

NAN = math.nan


def make(num_tasks, kind=Exp3, **arguments):
    names = [f"task {i}" for i in range(num_tasks)]
    return kind(task_names=names, num_supervised_tokens=[100] * num_tasks, budget_tokens=1000, **arguments)


def tensor(values):
    return torch.as_tensor(values, dtype=torch.float64)


def update(mixture, losses):
    return mixture.update(task_tokens=torch.zeros(len(losses)), train_losses=tensor(losses))


def test_three_turns_by_hand() -> None:
    """With two tasks, eps_2 is still 1/2, eps_3 is the first that is not, and its softmax uses eps_2."""
    mixture = make(2, ema_decay=0.8)
    update(mixture, [3.0, 1.0])  # turn 1, p = 1/2 each
    update(mixture, [2.0, NAN])  # turn 2: eps_2 = min(1/2, sqrt(ln 2 / 4)) = .416
    eps = [None] + [min(0.5, math.sqrt(math.log(2) / (2 * t))) for t in (1, 2, 3, 4)]
    assert eps[1] == 0.5 > eps[2] > eps[3] > eps[4]

    def mixed(rewards, turn):
        weights = [math.exp(eps[turn - 1] * reward) for reward in rewards]
        return [(1 - 2 * eps[turn]) * weight / sum(weights) + eps[turn] for weight in weights]

    rewards = [0.2 * 3 / 0.5, 0.2 * 1 / 0.5]
    p = mixed(rewards, 2)
    rewards = [0.8 * rewards[0] + 0.2 * 2 / p[0], rewards[1]]
    p = mixed(rewards, 3)
    torch.testing.assert_close(mixture.probabilities(), tensor(p), rtol=0, atol=1e-14)
    logged = update(mixture, [1.5, 4.0])
    rewards = [0.8 * rewards[0] + 0.2 * 1.5 / p[0], 0.8 * rewards[1] + 0.2 * 4 / p[1]]
    torch.testing.assert_close(logged["estimated_rewards"], tensor(rewards), rtol=0, atol=1e-13)
    torch.testing.assert_close(logged["exploration"], tensor(2 * eps[4]), rtol=0, atol=1e-15)
    torch.testing.assert_close(mixture.probabilities(), tensor(mixed(rewards, 4)), rtol=0, atol=1e-14)
    assert mixture.probabilities()[0] < 0.496, "not trivially uniform"


@pytest.mark.parametrize(("num_tasks", "turns"), [(1, 0), (2, 1), (7, 13), (49, 190)])
def test_uniform_to_the_last_bit_while_it_does_nothing_but_explore(num_tasks, turns) -> None:
    """As long as ln K / (K t) >= 1 / K^2."""
    mixture, even = make(num_tasks), make(num_tasks, kind=uniform).probabilities()
    losses = [1 + i / num_tasks for i in range(num_tasks)]
    for _ in range(turns):
        assert torch.equal(mixture.probabilities(), even)
        update(mixture, losses)
    if num_tasks > 1:
        assert turns == math.floor(num_tasks * math.log(num_tasks))
        assert not torch.equal(mixture.probabilities(), even)
        assert (mixture.probabilities().diff() > 0).all(), "more where the loss is higher"
    else:
        assert mixture.probabilities().tolist() == [1.0]


def test_exploration_never_ends_but_falls() -> None:
    mixture = make(4)
    for turn in (1, 10, 10**3, 10**6):
        mixture.load_state_dict({"rewards": tensor([1e9, 0, 0, 0]), "turn": tensor(turn)})
        share = min(1.0, math.sqrt(4 * math.log(4) / turn))
        torch.testing.assert_close(mixture.probabilities()[1:], tensor([share / 4] * 3), rtol=1e-12, atol=0)


@pytest.mark.parametrize("size", [1e6, 1e12, 1e300])
def test_rewards_of_any_size_are_safe(size) -> None:
    """A million updates' worth of reward, and far beyond: the softmax is taken in log space."""
    mixture = make(3)
    mixture.load_state_dict({"rewards": tensor([size, size, -size]), "turn": tensor(50)})
    p = mixture.probabilities()
    torch.testing.assert_close(p[0], p[1], rtol=0, atol=0)
    torch.testing.assert_close(p[2], tensor(math.sqrt(math.log(3) / (3 * 50))), rtol=1e-12, atol=0)
    assert abs(p.sum() - 1) < 1e-12
    logged = update(mixture, [size, 0.0, 1.0])
    assert logged["estimated_rewards"].isfinite().all()
    assert abs(mixture.probabilities().sum() - 1) < 1e-12


def test_the_rarer_task_is_rewarded_more_for_the_same_loss() -> None:
    mixture = make(2, ema_decay=0.0)
    mixture.load_state_dict({"rewards": tensor([20.0, 0.0]), "turn": tensor(100)})
    p = mixture.probabilities()
    assert p[0] > 0.7
    torch.testing.assert_close(update(mixture, [2.0, 2.0])["estimated_rewards"], 2.0 / p, rtol=1e-14, atol=0)


@settings(max_examples=50)
@given(
    st.integers(1, 6).flatmap(
        lambda n: st.lists(
            st.lists(st.one_of(st.floats(0, 1e6), st.just(NAN)), min_size=n, max_size=n), min_size=1, max_size=20
        )
    ),
    st.sampled_from([0.0, 0.5, 0.9]),
    st.randoms(use_true_random=False),
)
def test_always_a_mixture_whatever_the_order_and_the_state_carries_everything(updates, ema_decay, random) -> None:
    n = len(updates[0])
    order = list(range(n))
    random.shuffle(order)
    mixture, resumed, permuted = (make(n, ema_decay=ema_decay) for _ in range(3))
    for losses in updates:
        before = mixture.rewards
        update(mixture, losses)
        update(resumed, losses)
        update(permuted, [losses[i] for i in order])
        missing = tensor(losses).isnan()
        assert torch.equal(mixture.rewards[missing], before[missing])
        state, resumed = resumed.state_dict(), make(n, ema_decay=ema_decay)
        resumed.load_state_dict(state)
        p = mixture.probabilities()
        assert p.isfinite().all()
        assert abs(p.sum() - 1) < 1e-12
        assert (p >= mixture.exploration(float(mixture.turn)) / n * (1 - 1e-12)).all()
        assert torch.equal(resumed.probabilities(), p)
    torch.testing.assert_close(permuted.probabilities(), p[order], rtol=0, atol=1e-7)
    assert torch.equal(resumed.turn, mixture.turn)


@pytest.mark.parametrize("ema_decay", [1, -0.1, "much", NAN])
def test_averaging_out_of_range(ema_decay) -> None:
    message = f"mixture.ema_decay must be a finite number >= 0 and < 1, not {ema_decay!r}"
    with pytest.raises(ValueError, match="^" + re.escape(message) + "$"):
        make(2, ema_decay=ema_decay)


def test_state_of_another_mixture_is_refused() -> None:
    with pytest.raises(ValueError, match="the state is of 4 tasks, this run has 3"):
        make(3).load_state_dict(make(4).state_dict())
    with pytest.raises(
        ValueError, match=r"mixture: the state has \['rewards'\], and this mixture needs \['rewards', 'turn'\]"
    ):
        make(3).load_state_dict({"rewards": torch.zeros(3)})  # fmt: skip


def test_keeps_the_contract() -> None:
    check_mixture(make(3), ["train_losses"], num_tasks=3, recipe="a recipe")
