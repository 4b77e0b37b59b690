"""Static mixtures: their shares, and the errors of wrong arguments."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adapt_recipes.mixture import fixed_weights, proportional, uniform
from adapt_recipes.mixture import temperature as tempered

NAMES = ["Summarization", "Question Answering", "Title Generation"]
COMMON = {"task_names": NAMES, "num_supervised_tokens": torch.tensor([600, 300, 100]), "budget_tokens": 1000}
SIZES = st.lists(st.integers(0, 10**12), min_size=1, max_size=30).filter(any)


def sized(kind, sizes, **arguments):
    names = [f"task {i}" for i in range(len(sizes))]
    return kind(task_names=names, num_supervised_tokens=sizes, budget_tokens=1, **arguments)


def is_one_line(error) -> bool:
    return "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("mixture", "expected"),
    [
        (uniform(**COMMON), [1 / 3, 1 / 3, 1 / 3]),
        (proportional(**COMMON), [0.6, 0.3, 0.1]),
        (tempered(**COMMON, temperature=2), [math.sqrt(x) / (math.sqrt(6) + math.sqrt(3) + 1) for x in (6, 3, 1)]),
        (fixed_weights(**COMMON, weights={NAMES[1]: 3, NAMES[0]: 1, NAMES[2]: 0}), [0.25, 0.75, 0.0]),
    ],
    ids=lambda x: type(x).__name__,
)
def test_shares(mixture, expected) -> None:
    probabilities = mixture.probabilities()
    assert probabilities.dtype == torch.float64
    torch.testing.assert_close(probabilities, torch.tensor(expected, dtype=torch.float64), rtol=1e-15, atol=1e-16)


@pytest.mark.parametrize(
    "mixture",
    [
        uniform(**COMMON),
        proportional(**COMMON),
        tempered(**COMMON, temperature=10.0),
        fixed_weights(**COMMON, weights=dict.fromkeys(NAMES, 1)),
    ],
    ids=lambda x: type(x).__name__,
)
def test_nothing_changes_a_static_mixture(mixture) -> None:
    before = mixture.probabilities()
    assert mixture.observes == ()
    assert mixture.update(task_tokens=torch.tensor([5.0, 0.0, 0.0])) == {}
    mixture.load_state_dict(mixture.state_dict())
    mixture.probabilities().zero_()  # what is handed out is a copy
    assert mixture.state_dict() == {}
    assert torch.equal(mixture.probabilities(), before)


@given(SIZES, st.floats(0.01, 1e6))
def test_every_temperature_gives_a_mixture_ordered_by_size(sizes, temperature) -> None:
    p = sized(tempered, sizes, temperature=temperature).probabilities()
    assert abs(p.sum() - 1) < 1e-12
    assert (p >= 0).all()
    assert (p[torch.tensor(sizes) == 0] == 0).all(), "an empty task can give nothing"
    order = torch.tensor(sizes, dtype=torch.float64).argsort()
    assert (p[order].diff() >= 0).all()


@given(SIZES)
def test_temperature_runs_from_proportional_to_uniform(sizes) -> None:
    assert torch.equal(
        sized(tempered, sizes, temperature=1).probabilities(), sized(proportional, sizes).probabilities()
    )
    if all(sizes):
        hottest = sized(tempered, sizes, temperature=math.inf).probabilities()
        assert torch.equal(hottest, sized(uniform, sizes).probabilities())


@pytest.mark.parametrize("temperature", [0, -1, math.nan, "hot", True, None])
def test_temperature_out_of_range(temperature) -> None:
    with pytest.raises(ValueError, match=r"mixture\.temperature must be a number > 0, not ") as error:
        tempered(**COMMON, temperature=temperature)
    assert is_one_line(error)


@given(st.lists(st.floats(0, 1e308), min_size=1, max_size=20).filter(any))
def test_fixed_weights_are_normalised(weights) -> None:
    names = [f"task {i}" for i in range(len(weights))]
    p = sized(fixed_weights, [1] * len(weights), weights=dict(zip(names, weights, strict=True))).probabilities()
    assert p.isfinite().all()
    assert abs(p.sum() - 1) < 1e-12
    assert (p[torch.tensor(weights, dtype=torch.float64) == 0] == 0).all()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            {"Sumarization": 1, NAMES[1]: 1, NAMES[2]: 1},
            "mixture.weights: 'Sumarization' is no task of this run; did you mean 'Summarization'?",
        ),
        ({NAMES[0]: 1, NAMES[2]: 1}, "mixture.weights lacks a weight for the task 'Question Answering'"),
        ({**dict.fromkeys(NAMES, 1), "x\ny": 1}, "mixture.weights: 'x\\ny' is no task of this run; allowed: Summ"),
        ({NAMES[0]: -0.5, NAMES[1]: 1, NAMES[2]: 1}, "mixture.weights['Summarization'] must be a finite number >= 0"),
        ({NAMES[0]: math.inf, NAMES[1]: 1, NAMES[2]: 1}, "mixture.weights['Summarization'] must be a finite number"),
        ({NAMES[0]: "1", NAMES[1]: 1, NAMES[2]: 1}, "mixture.weights['Summarization'] must be a finite number"),
        (dict.fromkeys(NAMES, 0), "mixture.weights: at least one weight must be above 0"),
        ([1, 2, 3], "mixture.weights must map each task's name to a weight, not [1, 2, 3]"),
    ],
)
def test_wrong_weights_are_named(weights, message) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        fixed_weights(**COMMON, weights=weights)
    assert is_one_line(error)
