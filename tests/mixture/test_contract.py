"""What a recipe relies on in a component is checked, and what is missing is named in one line."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adapt_recipes.mixture import Adapt
from adapt_recipes.mixture.contract import check_mixture, check_reward
from adapt_recipes.rewards import CosineSimilarity, GradientAlignment, GradientNorm, PerplexityRatio, Uncertainty

LEARNS, DOES_NOT = SimpleNamespace(observes=("train_losses", "rewards")), SimpleNamespace(observes=("train_losses",))


class Mine:
    reads: Any = ("train",)

    def __call__(self, *, train: Any) -> Tensor:
        raise AssertionError("a reward is not called to be checked")


class NoCall:
    reads = ("train",)


class NoReads:
    def __call__(self) -> Tensor:
        raise AssertionError


def reads(what: Any) -> Mine:
    reward = Mine()
    reward.reads = what
    return reward


@pytest.mark.parametrize("reward", [Mine(), reads(("validation",) * 30), reads(("pool", "validation", "train"))])
def test_a_reward_that_will_do(reward: Mine) -> None:
    check_reward(reward, LEARNS)


@pytest.mark.parametrize("kind", [CosineSimilarity, PerplexityRatio, GradientAlignment, Uncertainty, GradientNorm])
def test_our_own_rewards_will_do(kind: Any) -> None:
    check_reward(kind(task_names=["a"], model=nn.Linear(1, 1)), LEARNS)


def test_neither_a_reward_nor_one_to_learn_from() -> None:
    check_reward(None, DOES_NOT)


CALLABLE = "has to be callable, with `reads`, a tuple out of train, validation, pool"


@pytest.mark.parametrize(
    ("reward", "mixture", "message"),
    [
        (None, LEARNS, "missing key 'reward': mixture: SimpleNamespace observes rewards"),
        (
            Mine(),
            DOES_NOT,
            "reward: Mine is for nothing: mixture: SimpleNamespace does not observe rewards; take it out",
        ),
        (NoCall(), LEARNS, f"reward: NoCall {CALLABLE}"),
        (NoReads(), LEARNS, f"reward: NoReads {CALLABLE}"),
        (reads(()), LEARNS, f"reward: Mine {CALLABLE}"),
        (reads(["train"]), LEARNS, f"reward: Mine {CALLABLE}"),
        (reads("train"), LEARNS, f"reward: Mine {CALLABLE}"),
        (reads(("train", "validaton")), LEARNS, "reward: Mine reads 'validaton'; did you mean 'validation'?"),
        (reads(("test",)), LEARNS, "reward: Mine reads 'test'; allowed: train, validation, pool"),
        (reads((3,)), LEARNS, "reward: Mine reads 3; allowed: train, validation, pool"),
    ],
)
def test_a_reward_that_will_not_do_is_named(reward: Any, mixture: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:
        check_reward(reward, mixture)
    assert str(error.value) == message


class Fixed:
    """A mixture that observes nothing."""

    observes: Any = ()

    def __init__(self, p: Any = (0.5, 0.5)) -> None:
        self.p = torch.tensor(p, dtype=torch.float64) if isinstance(p, tuple) else p

    def probabilities(self) -> Any:
        return self.p

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Learned(Fixed):
    observes = ("rewards",)

    def update(self, **signals: Tensor) -> dict[str, Tensor]:
        return {}


def observing(what: Any, kind: type[Fixed] = Learned, without: str | None = None) -> Any:
    """A mixture that observes this and lacks a method."""
    methods = {name: value for base in kind.__mro__[::-1][1:] for name, value in vars(base).items() if name != without}
    mixture = type("Changed", (), methods | {"observes": what})()
    return mixture


def test_a_mixture_that_will_do() -> None:
    check_mixture(Fixed(), (), num_tasks=2, recipe="r")
    check_mixture(Learned((0.0, 1.0)), ["rewards"], num_tasks=2, recipe="r")
    adapt = Adapt(task_names=["a", "b"], num_supervised_tokens=[1, 1], budget_tokens=1)
    check_mixture(adapt, ["validation_losses", "gradient_dots"], num_tasks=2, recipe="r")


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        (observing(["rewards"]), "mixture: Changed needs `observes`, a tuple of the signals it wants; () for none"),
        (observing((), Fixed, "state_dict"), "mixture: Changed needs `state_dict`, because it observes nothing"),
        (observing(("rewards",), Fixed), "mixture: Changed needs `update`, because it observes ('rewards',)"),
        (
            observing(("gradient_dots",)),
            "mixture: Changed needs `objective_weights`, because it observes ('gradient_dots',)",
        ),
        (
            observing(("rewards", "losses")),
            "mixture: Changed observes 'losses', which r does not measure; it measures rewards, gradient_dots",
        ),
    ],
)
def test_a_mixture_that_will_not_do_is_named(mixture: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:
        check_mixture(mixture, ["rewards", "gradient_dots"], num_tasks=2, recipe="r")
    assert str(error.value) == message


@pytest.mark.parametrize(
    "p",
    [(1.0,), (0.5, 0.4), (1.5, -0.5), (float("nan"), 1.0), torch.tensor([0.5, 0.5]), torch.ones(1, 2).double() / 2],
    ids=str,
)
def test_probabilities_that_are_none_are_refused(p: Any) -> None:
    message = "mixture: Fixed.probabilities() has to be (2,) float64 on the CPU, sum to 1 and hold none below 0"
    with pytest.raises(ValueError) as error:
        check_mixture(Fixed(p), (), num_tasks=2, recipe="r")
    assert str(error.value) == message
