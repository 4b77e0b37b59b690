"""What a recipe relies on in a mixture is checked, and what is missing is named in one line."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from adapt_recipes.mixture import Adapt
from adapt_recipes.mixture.interface import check_mixture, check_update


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
        (observing(["rewards"]), "mixture: Changed needs `observes`, a tuple of the signals it observes; () for none"),
        (observing((), Fixed, "state_dict"), "mixture: Changed needs `state_dict`, because it observes nothing"),
        (observing(("rewards",), Fixed), "mixture: Changed needs `update`, because it observes ('rewards',)"),
        (
            observing(("gradient_dots",)),
            "mixture: Changed needs `objective_weights`, because it observes ('gradient_dots',)",
        ),
        (
            observing(("kstep_differences",)),
            "mixture: Changed needs `objective_weights`, because it observes ('kstep_differences',)",
        ),
        (
            observing(("step_gains",)),
            "mixture: Changed needs `lookahead_lr`, because it observes ('step_gains',)",
        ),
        (
            observing(("reward",)),
            "mixture: Changed observes 'reward', which r does not measure; did you mean 'rewards'?",
        ),
        (
            observing(("rewards", "losses")),
            "mixture: Changed observes 'losses', which r does not measure; allowed: rewards, gradient_dots",
        ),
    ],
)
def test_a_mixture_that_will_not_do_is_named(mixture: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:
        check_mixture(mixture, ["rewards", "gradient_dots"], num_tasks=2, recipe="r")
    assert str(error.value) == message


BAD = [  # what is no mixture of two tasks, and what is said of it
    ((1.0,), "it is (1,) float64 on cpu"),
    ((0.5, 0.4), "it sums to 0.9, and its lowest is 0.4"),
    ((1.5, -0.5), "it sums to 1, and its lowest is -0.5"),
    ((float("nan"), 1.0), "it sums to nan, and its lowest is nan"),
    (torch.tensor([0.5, 0.5]), "it is (2,) float32 on cpu"),
    (torch.ones(1, 2).double() / 2, "it is (1, 2) float64 on cpu"),
    (torch.ones(2, dtype=torch.float64, device="meta"), "it is (2,) float64 on meta"),
    ([0.5, 0.5], "it is a list"),
]


@pytest.mark.parametrize(("p", "found"), BAD, ids=str)
def test_probabilities_that_are_none_are_refused(p: Any, found: str) -> None:
    """At the start and after an update."""
    needs = "probabilities() has to be (2,) float64 on the CPU, sum to 1 and have no value below 0"
    with pytest.raises(ValueError) as error:
        check_mixture(Fixed(p), (), num_tasks=2, recipe="r")
    assert str(error.value) == f"mixture: Fixed.{needs}; {found}"
    with pytest.raises(ValueError) as error:
        check_update(Learned(p), {}, num_tasks=2)
    assert str(error.value) == f"mixture: Learned.{needs}; {found}"


def test_an_update_that_will_do() -> None:
    check_update(Learned(), {}, num_tasks=2)
    check_update(Learned(), {"z": torch.tensor(1.0), "scores": torch.full((2,), torch.nan)}, num_tasks=2)


@pytest.mark.parametrize(
    ("logged", "message"),
    [
        (None, "has to return a dict of tensors to log, which may be empty, not None"),
        ({"z": 1.0}, "returned 'z', which is not a tensor of shape () or (2,): 1.0"),
        ({"z": torch.zeros(1)}, "returned 'z', which is not a tensor of shape () or (2,): tensor([0.])"),
        ({"step": torch.zeros(2)}, "returned 'step', which is logged already; give it another name"),
        ({"rewards": torch.zeros(2)}, "returned 'rewards', which is logged already; give it another name"),
    ],
    ids=str,
)
def test_what_an_update_may_not_log(logged: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:
        check_update(Learned(), logged, num_tasks=2)
    assert str(error.value) == f"mixture: Learned.update {message}"


def test_an_update_that_does_not_take_what_it_is_given() -> None:
    class Other(Fixed):
        observes = ("rewards",)

        def update(self, *, rewards: Tensor) -> dict[str, Tensor]:
            return {}

    with pytest.raises(ValueError) as error:
        check_mixture(Other(), ["rewards"], num_tasks=2, recipe="r")
    cannot = "mixture: Other.update cannot take task_tokens, rewards by name"
    assert str(error.value) == f"{cannot}: got an unexpected keyword argument 'task_tokens'"
