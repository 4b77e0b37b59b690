"""What a recipe relies on in a reward is checked, and what is missing is named in one line."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor, nn

from adapt_recipes.signals.reward_interface import check_reward
from adapt_recipes.signals.rewards import (
    CosineSimilarity,
    GradientAlignment,
    GradientNorm,
    PerplexityRatio,
    Uncertainty,
)

LEARNS, DOES_NOT = SimpleNamespace(observes=("train_losses", "rewards")), SimpleNamespace(observes=("train_losses",))


class Mine:
    reads: Any = ("train",)

    def __call__(self, *, train: Any) -> Tensor:
        raise AssertionError("a reward is not called to be checked")


class Reading(Mine):
    def __call__(self, **batches: Any) -> Tensor:  # type: ignore[override]
        raise AssertionError


class NoCall:
    reads = ("train",)


class NoReads:
    def __call__(self) -> Tensor:
        raise AssertionError


def reads(what: Any, kind: type[Mine] = Mine) -> Mine:
    reward = kind()
    reward.reads = what
    return reward


@pytest.mark.parametrize(
    "reward",
    [
        Mine(),
        reads(("validation",) * 30, Reading),
        reads(("pool", "validation", "train"), Reading),
        reads(("base_losses", "train"), Reading),
    ],
)
def test_a_reward_that_will_do(reward: Mine) -> None:
    check_reward(reward, LEARNS)


@pytest.mark.parametrize("kind", [CosineSimilarity, PerplexityRatio, GradientAlignment, Uncertainty, GradientNorm])
def test_our_own_rewards_will_do(kind: Any) -> None:
    check_reward(kind(task_names=["a"], model=nn.Linear(1, 1)), LEARNS)


def test_neither_a_reward_nor_one_to_learn_from() -> None:
    check_reward(None, DOES_NOT)


def tokens(what: Any) -> Mine:
    reward = Mine()
    reward.tokens = what  # type: ignore[attr-defined]
    return reward


BASE = "reward: Mine reads 'base_losses', which is for `reads` with 'train' and without 'pool'"
CALLABLE = "has to be callable, with `reads`, a tuple out of train, validation, pool, base_losses"


@pytest.mark.parametrize(
    ("reward", "mixture", "message"),
    [
        (None, LEARNS, "missing key 'reward': mixture: SimpleNamespace observes rewards"),
        (
            Mine(),
            DOES_NOT,
            "reward: Mine is unused: mixture: SimpleNamespace does not observe rewards; remove it",
        ),
        (NoCall(), LEARNS, f"reward: NoCall {CALLABLE}"),
        (NoReads(), LEARNS, f"reward: NoReads {CALLABLE}"),
        (reads(()), LEARNS, f"reward: Mine {CALLABLE}"),
        (reads(["train"]), LEARNS, f"reward: Mine {CALLABLE}"),
        (reads("train"), LEARNS, f"reward: Mine {CALLABLE}"),
        (reads(("train", "validaton")), LEARNS, "reward: Mine reads 'validaton'; did you mean 'validation'?"),
        (reads(("test",)), LEARNS, "reward: Mine reads 'test'; allowed: train, validation, pool, base_losses"),
        (reads(("base_losses", "validation")), LEARNS, f"{BASE}: they are of these examples"),
        (reads(("train", "pool", "base_losses")), LEARNS, f"{BASE}: the pool comes with its own"),
        (tokens("al"), LEARNS, "reward: Mine.tokens: 'al'; did you mean 'all'?"),
        (tokens(None), LEARNS, "reward: Mine.tokens: None; allowed: answer, all"),
        (reads((3,)), LEARNS, "reward: Mine reads 3; allowed: train, validation, pool, base_losses"),
    ],
)
def test_a_reward_that_will_not_do_is_named(reward: Any, mixture: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:
        check_reward(reward, mixture)
    assert str(error.value) == message


def test_a_reward_that_does_not_take_what_it_is_given() -> None:
    with pytest.raises(ValueError) as error:
        check_reward(reads(("pool", "pool", "train")), LEARNS)
    cannot = "reward: Mine.__call__ cannot take pool, train, base_losses by name"
    assert str(error.value) == f"{cannot}: got an unexpected keyword argument 'pool'"
    with pytest.raises(ValueError, match="cannot take train, base_losses by name: got an unexpected .* 'base_losses'"):
        check_reward(reads(("train", "base_losses")), LEARNS)
