"""Stages: the shares before and after each boundary, what a resume keeps, and the errors of wrong arguments."""

from __future__ import annotations

import pytest
import torch

from adapt_recipes.mixture import Staged
from adapt_recipes.mixture.interface import check_mixture, check_update

NAMES = ["easy", "hard", "rare"]
FIRST, SECOND, THIRD = {"easy": 2, "hard": 1, "rare": 1}, {"easy": 0, "hard": 1, "rare": 1}, dict.fromkeys(NAMES, 1)


def make(stages, budget_tokens=1000):
    return Staged(task_names=NAMES, num_supervised_tokens=[100, 200, 300], budget_tokens=budget_tokens, stages=stages)


def stages(*shares):
    return [{"share": share, "weights": each} for share, each in zip(shares, (FIRST, SECOND, THIRD), strict=False)]


def spend(mixture, tokens):
    task_tokens = torch.tensor([tokens / 2, tokens / 4, tokens / 4], dtype=torch.float64)
    logged = mixture.update(task_tokens=task_tokens, train_losses=torch.full((3,), torch.nan, dtype=torch.float64))
    check_update(mixture, logged, num_tasks=3)
    return float(logged["stage"]), mixture.probabilities().tolist()


def test_switches_at_the_first_update_at_or_after_a_boundary() -> None:
    mixture = make(stages(0.1, 0.2, 0.7))
    assert mixture.probabilities().tolist() == [0.5, 0.25, 0.25], "what a plan shows"
    assert spend(mixture, 99) == (1, [0.5, 0.25, 0.25])
    assert spend(mixture, 100) == (2, [0.0, 0.5, 0.5])
    # .1 + .2 is not .3 in binary.
    assert spend(mixture, 299) == (2, [0.0, 0.5, 0.5])
    assert spend(mixture, 300) == (3, pytest.approx([1 / 3] * 3))
    assert spend(mixture, 1000)[0] == 3


def test_an_update_may_skip_a_stage() -> None:
    assert spend(make(stages(0.1, 0.2, 0.7)), 500)[0] == 3


def test_a_resume_continues_in_its_stage() -> None:
    mixture, resumed = make(stages(0.5, 0.5)), make(stages(0.5, 0.5))
    spend(mixture, 600)
    resumed.load_state_dict(mixture.state_dict())
    assert torch.equal(resumed.probabilities(), mixture.probabilities())
    assert resumed.probabilities().tolist() == [0.0, 0.5, 0.5]
    with pytest.raises(ValueError, match=r"^mixture: the state has \['rewards'\], and this mixture needs \['stage'\]$"):
        resumed.load_state_dict({"rewards": torch.zeros(3)})


def test_thirds_and_a_single_stage() -> None:
    assert make(stages(0.333, 0.333, 0.333), budget_tokens=300).ends == [100, 200]
    assert spend(make(stages(1.0)), 1000)[0] == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "mixture.stages must be a list of stages, each with share and weights, not []"),
        ({"share": 1}, "mixture.stages must be a list of stages, each with share and weights, not {'share': 1}"),
        ([0.5], "mixture.stages[0] must have the keys share and weights, not be 0.5"),
        ([{"shares": 1, "weights": FIRST}], "mixture.stages[0]: unknown key 'shares'; did you mean 'share'?"),
        ([{"share": 1}], "missing key 'mixture.stages[0].weights'"),
        (stages(0.5, 0.4), "mixture.stages: their shares of the budget must sum to 1, not 0.9"),
        (stages(0.5, 0.5, 0.5), "mixture.stages: their shares of the budget must sum to 1, not 1.5"),
        (stages(1.0, 0), "mixture.stages[1].share must be a finite number > 0, not 0"),
        (
            [{"share": 1, "weights": FIRST | {"hrd": 1}}],
            "mixture.stages[0].weights: 'hrd' is no task of this run; did you mean 'hard'?",
        ),
        (
            [{"share": 1, "weights": {"easy": 1, "hard": 1}}],
            "mixture.stages[0].weights lacks a weight for the task 'rare' (0 to leave it out)",
        ),
        (
            [{"share": 1, "weights": FIRST | {"hard": -1}}],
            "mixture.stages[0].weights['hard'] must be a finite number >= 0, not -1",
        ),
        (
            [{"share": 1, "weights": dict.fromkeys(NAMES, 0)}],
            "mixture.stages[0].weights: at least one weight must be above 0, and all are 0",
        ),
    ],
)
def test_wrong_stages(given, message) -> None:
    with pytest.raises(ValueError) as error:
        make(given)
    assert str(error.value) == message


def test_keeps_the_contract() -> None:
    check_mixture(make(stages(0.5, 0.5)), ["train_losses"], num_tasks=3, recipe="a recipe")
