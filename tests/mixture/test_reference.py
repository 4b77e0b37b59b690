"""References: given losses, first losses, and the asymptote of a curve, on exact curves and noisy ones."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapt_recipes.mixture.reference import MAX_LOSSES, MIN_LOSSES, Reference, lowest_asymptote

NAN = math.nan
NAMES = ["Summarization", "Question Answering"]


def make(reference, names=("a", "b"), budget_tokens=1000):
    return Reference(reference, task_names=list(names), budget_tokens=budget_tokens)


def tensor(values):
    return torch.as_tensor(values, dtype=torch.float64)


def observed(reference, losses, tokens):
    """The excess of losses that the reference may be made of."""
    reference.observe(losses, tokens)
    return reference.excess(losses)


SPEEDS = make("asymptote", names=["a"], budget_tokens=1).speeds  # per budget of one task


def curve(a, b, speed, span, num_losses=24, noise=0.0, seed=0):
    """Losses a + b exp(-speed n) at n from 0 to ``span``, unevenly spaced."""
    tokens = span * torch.linspace(0, 1, num_losses, dtype=torch.float64) ** 1.3
    generator = torch.Generator().manual_seed(seed)
    error = noise * torch.randn(num_losses, generator=generator, dtype=torch.float64)
    return tokens, a + b * torch.exp(-speed * tokens) + error


# ------------------------------------------------------------------------------------------------------- the asymptote


@pytest.mark.parametrize(("a", "b"), [(0.0, 2.7), (0.5, 2.0), (2.0, 0.7)])
@pytest.mark.parametrize(("speed", "span"), [(3, 1.0), (10, 0.3), (10, 1.0), (30, 0.3), (100, 0.1), (100, 1.0)])
def test_exact_curves(a, b, speed, span) -> None:
    """Where the curve has covered three times its own length, to 1 % of its fall and 0.015 nats."""
    found = lowest_asymptote(*curve(a, b, speed, span), SPEEDS)
    assert a - 0.015 - 0.01 * b < found < a + 0.01 * b


@pytest.mark.parametrize(("speed", "span", "num_losses"), [(5, 1.0, MIN_LOSSES), (10, 0.5, 12), (3, 1.0, 20)])
def test_it_is_the_lowest_asymptote_within_two_standard_deviations(speed, span, num_losses) -> None:
    """Against trying every a: the sum of squares, least over b and c, exceeds the least of all by 4 sigma^2 at most."""
    tokens, losses = curve(1.0, 1.5, speed, span, num_losses, noise=0.05)
    x = torch.exp(-SPEEDS[:, None] * tokens)

    def least(a):
        b = (x * (losses - a)).sum(1) / x.square().sum(1)
        return (a + b[:, None] * x - losses).square().sum(1).min()

    asymptotes = torch.arange(0.7, float(losses.max()), 1e-3, dtype=torch.float64)
    squares = torch.stack([least(a) for a in asymptotes])
    sigma = math.sqrt(squares.min() / (num_losses - 3))
    expected = asymptotes[squares <= squares.min() + 4 * sigma**2].min()
    assert 0.75 < expected < losses.min() - 0.01, "neither at the edge of what was tried nor at the lowest loss"
    assert lowest_asymptote(tokens, losses, SPEEDS) == pytest.approx(float(expected), abs=1.5e-3)


@pytest.mark.parametrize(("a", "b", "speed"), [(0.5, 2.0, 3), (0.5, 2.0, 10), (2.7, 0.0, 1), (1.0, 1.0, 30)])
@pytest.mark.parametrize("span", [0.1, 0.3, 1.0])
def test_noisy_curves_are_seldom_overestimated(a, b, speed, span) -> None:
    """It is what the curve does not rule out: a bound on the low side, in at least 90 of 100 runs."""
    found = [lowest_asymptote(*curve(a, b, speed, span, noise=0.03, seed=seed), SPEEDS) for seed in range(40)]
    assert sum(float(value) <= a + 0.015 for value in found) >= 36


def test_standing_still_counts_only_with_tokens() -> None:
    """Flat, noisy losses: over a hundredth of a fair share they may yet fall to 0, over a whole one they may not."""
    found = []
    for span in (0.01, 0.3, 1.0):
        seeds = [lowest_asymptote(*curve(2.7, 0, 1, span, noise=0.03, seed=seed), SPEEDS) for seed in range(9)]
        found.append(float(torch.stack(seeds).median()))
    short, middle, long = found
    assert short == 0
    assert 1.0 < middle < long
    assert 2.3 < long < 2.7
    assert lowest_asymptote(torch.zeros(20, dtype=torch.float64), tensor([2.7] * 20), SPEEDS) == 0, "no token at all"


def test_tokens_count_in_fair_shares() -> None:
    """Of the budget: the same tokens are many in a small one and few in a large one."""
    small, large = make("asymptote", budget_tokens=200), make("asymptote", budget_tokens=2_000_000)
    for tokens in torch.linspace(0, 100, 20, dtype=torch.float64):
        for reference in (small, large):
            observed(reference, tensor([2.7, 2.7]), tokens.repeat(2))
    assert (small.losses > 2.6).all()
    assert (large.losses == 0).all()


def test_a_straight_fall_may_go_on_to_0() -> None:
    tokens = torch.linspace(0, 0.2, 20, dtype=torch.float64)
    assert lowest_asymptote(tokens, 3 - 5 * tokens, SPEEDS) < 0.1


def test_what_rose_again_is_counted_from_its_lowest() -> None:
    tokens = torch.linspace(0, 1, 20, dtype=torch.float64)
    losses = 0.5 + 2 * tokens
    assert lowest_asymptote(tokens, losses, SPEEDS) <= 0.5


def test_few_losses_rule_nothing_out() -> None:
    tokens, losses = curve(2.0, 0.7, 30, 1.0, num_losses=MIN_LOSSES)
    assert lowest_asymptote(tokens[:-1], losses[:-1], SPEEDS) == 0
    assert lowest_asymptote(tokens, losses, SPEEDS) > 1.9


@settings(max_examples=50)
@given(
    st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 1e6)), min_size=1, max_size=MAX_LOSSES),
    st.sampled_from([1, 1000, 10**9]),
)
def test_always_between_0_and_the_lowest_loss(points, budget) -> None:
    steps, losses = zip(*points, strict=True)
    found = lowest_asymptote(tensor(steps).cumsum(0), tensor(losses), SPEEDS / budget)
    assert 0 <= found <= min(losses)


def test_each_task_is_judged_by_its_own_tokens_and_its_last_losses() -> None:
    """Task a is noise; task b is measured every third time only; of a long run the window counts."""
    reference = make("asymptote", budget_tokens=2000)
    tokens = torch.zeros(2, dtype=torch.float64)
    measured = 0
    for i in range(3 * MAX_LOSSES):
        tokens = tokens + tensor([20.0, 7.0])
        losses = tensor([2.7, 0.4 + 2 * math.exp(-0.02 * float(tokens[1])) if i % 3 == 0 else NAN])
        measured += i % 3 == 0
        excess = observed(reference, losses, tokens)
        assert torch.equal(excess.isnan(), losses.isnan())
        if i == 3:
            torch.testing.assert_close(excess, losses)  # nothing ruled out yet
    assert reference.losses[0] == pytest.approx(2.7, abs=0.02)
    assert reference.losses[1] == pytest.approx(0.4, abs=0.02)
    assert (~reference.curve_losses.isnan()).sum(0).tolist() == [MAX_LOSSES, min(measured, MAX_LOSSES)]
    assert reference.curve_tokens[-1].tolist() == [3 * MAX_LOSSES * 20.0, (3 * MAX_LOSSES - 2) * 7.0]
    assert (reference.curve_tokens.diff(dim=0) > 0).all()


@pytest.mark.parametrize("reference", [None, {"a": 0.5, "b": 1.0}, "initial", "asymptote"])
def test_the_state_carries_everything(reference) -> None:
    straight, resumed = make(reference), make(reference)
    tokens, losses = curve(0.5, 2.0, 0.01, 500.0, num_losses=2 * MAX_LOSSES, noise=0.02)
    for n, loss in zip(tokens, losses, strict=True):
        state, resumed = resumed.state_dict(), make(reference)
        resumed.load_state_dict(state)
        signals = torch.stack([loss, loss / 2]), torch.stack([n, 2 * n])
        assert torch.equal(observed(resumed, *signals), observed(straight, *signals))
    assert torch.equal(resumed.losses, straight.losses)


def test_given_losses_that_changed_since_are_refused() -> None:
    state = make({"a": 0.5, "b": 1.0}).state_dict()
    with pytest.raises(ValueError, match="^resume: mixture.reference: the loss given for the task 'b' changed since"):
        make({"a": 0.5, "b": 1.5}).load_state_dict(state)


# ---------------------------------------------------------------------------------------------------------- the others


def test_first_losses_and_none() -> None:
    tokens = torch.zeros(2)
    reference = make("initial")
    assert observed(reference, tensor([2.0, NAN]), tokens).nan_to_num(-9).tolist() == [0.0, -9.0]
    assert observed(reference, tensor([1.5, 3.0]), tokens).tolist() == [-0.5, 0.0]
    resumed = make("initial")
    resumed.load_state_dict(reference.state_dict())
    assert observed(resumed, tensor([1.0, 1.0]), tokens).tolist() == [-1.0, -2.0]
    assert observed(make(None), tensor([2.0, 3.0]), tokens).tolist() == [2.0, 3.0]
    assert make(None).state_dict() == {}


def test_given_losses_may_be_those_of_more_tasks(tmp_path) -> None:
    given = {"b": 1, "other": 7.0, "a": 0.25}
    file = tmp_path / "losses.json"
    file.write_text(json.dumps(given))
    for reference in (given, str(file)):
        excess = observed(make(reference), tensor([1.0, 0.5]), torch.zeros(2))
        assert excess.tolist() == [0.75, -0.5]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"Sumarization": 1, "Question Answering": 2}',
            "has no loss for the task 'Summarization'; did you mean 'Sumarization'?",
        ),
        ("{}", "has no loss for the task 'Summarization'; none is allowed here"),
        ('{"Summarization": null, "Question Answering": 2}', "FILE['Summarization'] must be a finite number, not None"),
        ('{"Summarization": NaN, "Question Answering": 2}', "FILE['Summarization'] must be a finite number, not nan"),
        ("[1, 2]", "must map each task's name to a loss, not be list"),
        ('{"Summarization": 1,\n}', "cannot be read: "),
        (None, "is no file; allowed: initial, asymptote"),
    ],
)
def test_a_file_that_will_not_do_is_named(content, message, tmp_path) -> None:
    file = tmp_path / "losses.json"
    if content is not None:
        file.write_text(content)
    start = f"mixture.reference: {file}"
    expected = message.replace("FILE", start) if message.startswith("FILE") else f"{start} {message}"
    with pytest.raises(ValueError, match="^" + re.escape(expected)) as error:
        make(str(file), names=NAMES)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"Summarization": 1}, "mixture.reference has no loss for the task 'Question Answering'; allowed: Summariz"),
        ({NAMES[0]: 1, NAMES[1]: "2"}, "mixture.reference['Question Answering'] must be a finite number, not '2'"),
        (3.5, "mixture.reference must map each task's name to a loss, not be float"),
    ],
)
def test_given_losses_that_will_not_do_are_named(given, message) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)) as error:
        make(given, names=NAMES)
    assert "\n" not in str(error.value)
