"""MoS's scorer: it starts as its prior, climbs what its form says, and continues from its state to the bit."""

from __future__ import annotations

import io
import math
import re
from random import Random
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from adapt_recipes.mixture import Scorer, proportional, temperature, uniform
from adapt_recipes.mixture.interface import check_mixture

NAN = math.nan
SIZES = st.lists(st.integers(0, 10**9), min_size=1, max_size=8).filter(any)


def make(sizes, kind=Scorer, **arguments):
    """A mixture; a scorer of the paper's form unless ``form`` is given."""
    names = [f"task {i}" for i in range(len(sizes))]
    if kind is Scorer:
        arguments = {"form": "paper"} | arguments
    return kind(task_names=names, num_supervised_tokens=sizes, budget_tokens=1000, **arguments)


def tensor(values):
    return torch.as_tensor(values, dtype=torch.float64)


def update(mixture, rewards):
    return mixture.update(task_tokens=torch.zeros(len(rewards)), rewards=tensor(rewards))


def saved_and_loaded(state):
    """Through a file, as a checkpoint does it."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# ---------------------------------------------------------------------------------------------------------- the start


@pytest.mark.parametrize(
    ("arguments", "same"),
    [({}, uniform), ({"prior": "uniform"}, uniform), ({"prior": "proportional"}, proportional)],
)
@settings(max_examples=30)
@given(SIZES.filter(all))
def test_starts_as_its_prior_to_the_last_bit(arguments, same, sizes) -> None:
    assert torch.equal(make(sizes, **arguments).probabilities(), make(sizes, kind=same).probabilities())


@settings(max_examples=30)
@given(SIZES, st.sampled_from([0.1, 1.0, 10.0, math.inf]), st.integers(0, 3))
def test_starts_as_the_tempered_prior_and_stays_with_a_learning_rate_of_0(sizes, tau, seed) -> None:
    mixture = make(sizes, prior="temperature", temperature=tau, seed=seed, learning_rate=0)
    expected = make(sizes, kind=temperature, temperature=tau).probabilities()
    assert torch.equal(mixture.probabilities(), expected)
    update(mixture, [1.0 + i for i in range(len(sizes))])
    assert torch.equal(mixture.probabilities(), expected)


@settings(max_examples=30)
@given(SIZES, st.floats(0.01, 0.9))
def test_with_any_floor_it_starts_at_the_prior(sizes, floor) -> None:
    mixture = make(sizes, prior="proportional", floor=floor)
    expected = make(sizes, kind=proportional).probabilities()
    torch.testing.assert_close(mixture.probabilities(), expected, rtol=0, atol=1e-15)


# ---------------------------------------------------------------------------------------------------- the mathematics


def written_out(sizes, parameters, floor):
    """p of the perceptron of four tensors, another way than the module's."""
    w1, b1, w2, b2 = parameters
    accessible = tensor(sizes) > 0
    scores = w2 @ torch.tanh(w1 @ accessible.double() + b1) + b2
    weights = tensor(sizes) * scores.exp()
    return (1 - floor) * weights / weights.sum() + floor * tensor(sizes) / tensor(sizes).sum()


@pytest.mark.parametrize("floor", [0.0, 0.2])
@pytest.mark.parametrize("form", ["paper", "policy_gradient"])
def test_an_update_is_the_gradient_that_its_form_says(form, floor) -> None:
    """Against autograd on another writing of p, with every weight away from its start and one task not accessible."""
    sizes, rewards, rate = [300, 100, 0, 50], [1.0, 0.3, NAN, 2.0], 0.3
    mixture = make(sizes, prior="proportional", form=form, floor=floor, learning_rate=rate, ema_decay=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in mixture.psi.parameters():
            parameter.uniform_(-0.5, 0.5, generator=generator)
    before = [parameter.detach().clone().requires_grad_() for parameter in mixture.psi.parameters()]
    p = written_out(sizes, before, floor)
    torch.testing.assert_close(mixture.probabilities(), p.detach(), rtol=0, atol=1e-14)

    there = [0, 1, 3]
    R = tensor(rewards)[there]
    objective = (R * p[there].log()).sum() if form == "paper" else (R * p[there]).sum()
    gradients = torch.autograd.grad(objective, before)
    assert all(gradient.abs().max() > 1e-3 for gradient in gradients), "no part of the step is trivially 0"
    update(mixture, rewards)
    for parameter, start, gradient in zip(mixture.psi.parameters(), before, gradients, strict=True):
        torch.testing.assert_close(parameter.detach(), (start + rate * gradient).detach(), rtol=0, atol=1e-13)


@pytest.mark.parametrize("rewards", [[0.55, 0.65, 0.75, 0.95], [-1.0, 3.0, 0.5, 20.0]])
def test_the_authors_form_is_their_loop(rewards) -> None:
    """A linear layer on 1, one Adam for the whole run, 200 steps per update, and rewards averaged from 1."""
    layer = torch.nn.Linear(1, len(rewards), bias=False, dtype=torch.float64)
    torch.nn.init.ones_(layer.weight)
    adam, averaged = torch.optim.Adam(layer.parameters(), lr=1e-4), torch.ones(len(rewards), dtype=torch.float64)
    mixture = make([1] * len(rewards), form="authors")
    for update_number in range(3):
        new = tensor(rewards) + 0.1 * update_number
        averaged = 0.9 * new + 0.1 * averaged
        for _ in range(200):
            adam.zero_grad()
            loss = -(averaged * torch.log_softmax(layer(torch.ones(1, dtype=torch.float64)), dim=0)).sum()
            loss.backward()
            adam.step()
        update(mixture, new)
        expected = torch.softmax(layer.weight[:, 0].detach(), dim=0)
        torch.testing.assert_close(mixture.probabilities(), expected, rtol=0, atol=1e-12)
        assert expected.std() > 0.003


@pytest.mark.slow
@settings(max_examples=2)
@given(st.lists(st.floats(0.6, 1.2), min_size=2, max_size=5), st.sampled_from([0.01, 100.0]))
def test_the_authors_form_ends_at_rewards_over_their_sum_at_a_speed_that_ignores_their_size(rewards, scale) -> None:
    """A score moves at most .02 per update."""
    mixture, scaled = (make([1] * len(rewards), form="authors", ema_decay=0) for _ in range(2))
    for _ in range(45):
        before = mixture.psi.z.detach().clone()
        update(mixture, rewards)
        update(scaled, [scale * reward for reward in rewards])
        assert (mixture.psi.z - before).abs().max() <= 0.0201
    expected = tensor(rewards) / sum(rewards)
    torch.testing.assert_close(mixture.probabilities(), expected, rtol=0, atol=1e-3)
    torch.testing.assert_close(scaled.probabilities(), expected, rtol=0, atol=1e-3)


REWARDS = st.lists(st.floats(0.5, 3), min_size=2, max_size=4)


@pytest.mark.slow
@settings(max_examples=5)
@given(REWARDS, st.integers(0, 3))
def test_the_papers_form_ends_at_rewards_over_their_sum(rewards, seed) -> None:
    """From another prior, and nothing moves there; a task without tokens has no part in it."""
    sizes = [10 * (i + 1) for i in range(len(rewards))] + [0]
    mixture = make(sizes, prior="proportional", learning_rate=0.1 / sum(rewards), seed=seed)
    for _ in range(300):
        update(mixture, [*rewards, 7.0])
    expected = torch.cat([tensor(rewards) / sum(rewards), tensor([0.0])])
    torch.testing.assert_close(mixture.probabilities(), expected, rtol=0, atol=1e-6)
    mixture = make([round(reward * 2**40) for reward in rewards], prior="proportional", learning_rate=1.0)
    start = mixture.probabilities()
    update(mixture, [round(reward * 2**40) / 2**40 for reward in rewards])
    torch.testing.assert_close(mixture.probabilities(), start, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rewards", [[1.0, 0.9, 1.2], [-2.0, -3.0, -1.0]])
def test_the_policy_gradient_ends_on_the_highest_reward(rewards) -> None:
    mixture = make([100, 50, 10], prior="proportional", form="policy_gradient", learning_rate=0.5)
    for _ in range(100):
        update(mixture, rewards)
    assert mixture.probabilities()[rewards.index(max(rewards))] > 0.9
    paper = make([100, 50, 10], prior="proportional", learning_rate=0.05)
    if min(rewards) > 0:
        for _ in range(100):
            update(paper, rewards)
        assert paper.probabilities().max() < 0.4, "the paper's form does not"


def test_the_first_step_is_as_long_as_documented() -> None:
    """Some 15 gamma (R_i - p_i sum R), seen from the scores."""
    rate, rewards = 1e-4, [1.0, 2.0, 3.0]
    mixture = make([1, 1, 1], learning_rate=rate)
    update(mixture, rewards)
    scores = mixture.probabilities().log()
    steps = (scores - scores.mean()) / (rate * (tensor(rewards) - 2.0)).where(tensor([1, 0, 1]) > 0, math.inf)
    assert 13 < steps[0] < 19
    assert 13 < steps[2] < 19


@given(rewards=st.lists(st.floats(0.1, 10.0), min_size=2, max_size=8), factor=st.sampled_from([0.8, 1.25]))
@settings(max_examples=40, deadline=None)
def test_a_rate_that_overshoots_is_warned_of(rewards, factor) -> None:
    """Near the fixed point, where the bound is exact, what is missing shrinks below it and grows above it."""
    p = tensor(rewards) / sum(rewards)
    hidden = make([1] * len(rewards)).psi[:2](torch.ones(len(rewards), dtype=torch.float64)).detach()
    values, vectors = torch.linalg.eigh(torch.diag(p) - torch.outer(p, p))
    rate = factor * 2 / float((1 + hidden.square().sum()) * sum(rewards) * values[-1])
    mixture = make([1] * len(rewards), learning_rate=rate, ema_decay=0)
    with torch.no_grad():
        mixture.psi[2].bias.copy_(p.log() + 1e-6 * vectors[:, -1])
    missing = [(mixture.probabilities() - p).norm()]
    with mock.patch("adapt_recipes.mixture.scorer.warn") as warn:
        for _ in range(6):
            update(mixture, rewards)
            missing.append((mixture.probabilities() - p).norm())
    assert (missing[-1] > missing[0]) == (factor > 1) == warn.called
    assert warn.call_count <= 1


@pytest.mark.parametrize("arguments", [{"optimizer": "adam"}, {"form": "policy_gradient"}, {"learning_rate": 0.0}])
def test_no_warning_where_there_is_no_such_bound(arguments, capsys) -> None:
    update(make([1, 1, 1], **{"learning_rate": 1.0} | arguments), [50.0, 60.0, 1.0])
    update(make([1, 1, 1], learning_rate=1.0), [0.0, 0.0, 0.0])
    assert capsys.readouterr().err == ""


# -------------------------------------------------------------------------------------------------------- the rewards


def test_rewards_are_averaged_with_most_weight_on_the_new() -> None:
    mixture = make([1, 1, 1], ema_decay=0.1)
    update(mixture, [1.0, 2.0, NAN])
    logged = update(mixture, [3.0, NAN, NAN])
    torch.testing.assert_close(logged["averaged_rewards"], tensor([0.9 * 3 + 0.1 * 1, 2.0, NAN]), equal_nan=True)
    mixture = make([1, 1, 1], ema_decay=0)
    update(mixture, [1.0, 2.0, 5.0])
    assert update(mixture, [3.0, NAN, 4.0])["averaged_rewards"].tolist() == [3.0, 2.0, 4.0]


def test_a_task_that_was_not_measured_keeps_its_reward_in_the_update() -> None:
    missing, measured = make([1, 2, 3]), make([1, 2, 3])
    for mixture in (missing, measured):
        update(mixture, [1.0, 2.0, 3.0])
    update(missing, [2.0, NAN, 1.0])
    update(measured, [2.0, 2.0, 1.0])
    torch.testing.assert_close(missing.probabilities(), measured.probabilities(), rtol=0, atol=1e-15)


@pytest.mark.parametrize("form", ["authors", "paper", "policy_gradient"])
@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_a_task_never_measured_takes_no_part(form, floor) -> None:
    """The others move as they would alone, and its own weights stay."""
    rate = {} if form == "authors" else {"learning_rate": 0.05}
    mixture = make([100, 100, 50], prior="proportional", form=form, floor=floor, ema_decay=0, **rate)
    before = mixture.probabilities()
    update(mixture, [NAN] * 3)
    assert torch.equal(mixture.probabilities(), before)
    for _ in range(30 if form == "authors" and floor else 80):
        update(mixture, [3.0, 1.0, NAN])
    if form == "authors":
        assert mixture.psi.z[2] == 0
    else:
        output = mixture.psi[2]
        assert (output.weight[2] == 0).all() and output.bias[2] == 0
    p = mixture.probabilities()
    assert p[0] > 1.3 * p[1]
    if form != "policy_gradient" and floor == 0:
        torch.testing.assert_close(p[0], 3 * p[1], rtol=1e-6 if form == "paper" else 2e-3, atol=0)


@pytest.mark.parametrize(
    ("arguments", "rewards", "message"),
    [
        (
            {},
            [1.0, -0.25, NAN],
            "mixture.form: paper needs rewards >= 0 (authors and policy_gradient do not), and that of task 'task 1' is "
            "-0.25",
        ),
        ({}, [1.0, math.inf, NAN], "mixture: the reward of task 'task 1' is inf; rewards have to be finite"),
        ({"form": "policy_gradient"}, [-math.inf, 1.0, NAN], "mixture: the reward of task 'task 0' is -inf"),
    ],
)
def test_rewards_that_cannot_be_used_are_named_and_change_nothing(arguments, rewards, message) -> None:
    mixture = make([1, 1, 0], **arguments)
    update(mixture, [1.0, 0.5, -1.0])  # of a task that is not accessible, anything
    before = mixture.probabilities()
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        update(mixture, rewards)
    assert "\n" not in str(error.value)
    assert torch.equal(mixture.probabilities(), before)
    assert mixture.averaged_rewards[:2].tolist() == [1.0, 0.5]


# ------------------------------------------------------------------------------------------------------ what it keeps


OPTIONS = st.fixed_dictionaries(
    {
        "prior": st.sampled_from(["uniform", "proportional"]),
        "form": st.sampled_from(["paper", "policy_gradient"]),
        "optimizer": st.sampled_from(["sgd", "adam"]),
        "learning_rate": st.sampled_from([1e-4, 0.01, 0.3]),
        "ema_decay": st.sampled_from([0.1, 0.5, 0.0]),
        "floor": st.sampled_from([0.0, 0.05, 0.5]),
    }
)
# Its 200 steps per update take longer.
AUTHORS = {"prior": "proportional", "form": "authors", "ema_decay": 0.1, "floor": 0.05}
ONE_CASE = ([3, 0, 2, 5], [[1.0, NAN, 2.0, 0.0], [0.5, 1.0, NAN, 1.0]])
UPDATES = st.integers(1, 6).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(0, 5), min_size=n, max_size=n).filter(any),
        st.lists(st.lists(st.one_of(st.floats(0, 3), st.just(NAN)), min_size=n, max_size=n), min_size=1, max_size=4),
    )
)


@settings(max_examples=30)
@given(UPDATES, OPTIONS)
@example(ONE_CASE, AUTHORS)
def test_always_a_mixture_above_the_floor_and_the_state_carries_everything(case, options) -> None:
    sizes, updates = case
    mixture, resumed = make(sizes, **options), make(sizes, **options)
    accessible, prior = tensor(sizes) > 0, mixture.probabilities()
    for rewards in updates:
        update(mixture, rewards)
        update(resumed, rewards)
        state, resumed = saved_and_loaded(resumed.state_dict()), make(sizes, **options, seed=9)
        resumed.load_state_dict(state)
        p = mixture.probabilities()
        assert abs(p.sum() - 1) < 1e-12
        assert (p[~accessible] == 0).all()
        assert (p >= options["floor"] * prior * (1 - 1e-12)).all()
        assert torch.equal(resumed.probabilities(), p)


@pytest.mark.parametrize(
    "arguments",
    [{"optimizer": "sgd", "learning_rate": 0.1}, {"optimizer": "adam", "learning_rate": 0.1}, {"form": "authors"}],
)
def test_a_state_neither_follows_nor_is_followed(arguments) -> None:
    """What is saved stays as it was while the run goes on, and so does what was loaded."""
    first, second = (make([3, 2, 1], **arguments) for _ in range(2))
    update(first, [1.0, 2.0, 3.0])
    state = first.state_dict()
    kept = saved_and_loaded(state)
    second.load_state_dict(state)
    for mixture in (first, second):
        for _ in range(3):
            update(mixture, [3.0, 1.0, 0.5])
    again = make([3, 2, 1], **arguments)
    again.load_state_dict(kept)
    expected = again.probabilities()
    again.load_state_dict(state)
    assert torch.equal(again.probabilities(), expected)
    for _ in range(3):
        update(again, [3.0, 1.0, 0.5])
    assert torch.equal(again.probabilities(), first.probabilities())
    assert torch.equal(again.probabilities(), second.probabilities())


@settings(max_examples=30)
@given(UPDATES, OPTIONS, st.randoms(use_true_random=False))
@example(ONE_CASE, AUTHORS, Random(0))
def test_the_order_of_the_tasks_does_not_matter(case, options, random) -> None:
    """Also where some are not accessible: all tasks start with the same weights into the hidden layer."""
    sizes, updates = case
    order = list(range(len(sizes)))
    random.shuffle(order)
    options = options if options["form"] == "authors" else {**options, "learning_rate": 0.01}
    mixture, permuted = make(sizes, **options), make([sizes[i] for i in order], **options)
    for rewards in updates:
        update(mixture, rewards)
        update(permuted, [rewards[i] for i in order])
    torch.testing.assert_close(permuted.probabilities(), mixture.probabilities()[order], rtol=0, atol=1e-6)


def test_the_seed_alone_decides_and_the_global_generator_is_left_alone() -> None:
    def learned(seed):
        mixture = make([3, 2, 1], seed=seed, learning_rate=0.1)
        for _ in range(3):
            update(mixture, [1.0, 2.0, 3.0])
        return mixture.probabilities()

    torch.manual_seed(0)
    before = torch.get_rng_state()
    one = learned(7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(learned(7), one)
    assert not torch.equal(learned(8), one)


def test_keeps_the_contract() -> None:
    check_mixture(make([1, 0, 2]), ["rewards"], num_tasks=3, recipe="a recipe")


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prior": "proportionl"}, "mixture.prior: 'proportionl'; did you mean 'proportional'?"),
        ({"prior": None}, "mixture.prior: None; allowed: uniform, proportional, temperature, a weight for each task"),
        ({"prior": "temperature"}, "missing key 'mixture.temperature', for mixture.prior: temperature; a number > 0"),
        ({"prior": "temperature", "temperature": 0}, "mixture.temperature must be a number > 0, not 0"),
        ({"temperature": 10}, "mixture.temperature is for mixture.prior: temperature, not for uniform"),
        ({"form": "policy-gradient"}, "mixture.form: 'policy-gradient'; did you mean 'policy_gradient'?"),
        ({"optimizer": "adamw"}, "mixture.optimizer: 'adamw'; did you mean 'adam'?"),
        (
            {"form": "authors", "learning_rate": 1e-4},
            "mixture.learning_rate is for form: paper and policy_gradient; form: authors takes 200 steps of adam with "
            "0.0001 per update",
        ),
        (
            {"form": "authors", "optimizer": "adam"},
            "mixture.optimizer is for form: paper and policy_gradient; form: authors takes 200 steps of adam with "
            "0.0001 per update",
        ),
        ({"learning_rate": -1e-4}, "mixture.learning_rate must be a finite number >= 0, not -0.0001"),
        ({"ema_decay": -0.1}, "mixture.ema_decay must be a finite number >= 0 and < 1, not -0.1"),
        ({"ema_decay": 1.0}, "mixture.ema_decay must be a finite number >= 0 and < 1, not 1.0"),
        ({"floor": 1}, "mixture.floor must be a finite number >= 0 and < 1, not 1"),
        ({"seed": 0.5}, "mixture.seed must be a whole number, not 0.5"),
    ],
)
def test_arguments_out_of_range_are_named_in_one_line(arguments, message) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message) + "$"):
        make([1, 2], **arguments)


def test_state_of_another_mixture_is_refused() -> None:
    mixture = make([1, 1, 1])
    with pytest.raises(ValueError, match="the state is of 4 tasks, this run has 3"):
        mixture.load_state_dict(make([1] * 4).state_dict())
    with pytest.raises(ValueError, match=r"mixture: the state has \['logits'\]"):
        mixture.load_state_dict({"logits": torch.zeros(3)})
