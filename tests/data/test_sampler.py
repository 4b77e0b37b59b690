"""The token-true sampler: shares, order, budget and state."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from adapt_recipes import data as tasks_data
from adapt_recipes.budget import Ledger
from adapt_recipes.data import (
    IGNORE_INDEX,
    Draw,
    Examples,
    Task,
    TokenSampler,
    count_tokens,
    random_examples,
    validation_examples,
)
from adapt_recipes.data.sampler import Sampling
from adapt_recipes.steps import expected_steps


def task(name: str, lengths: list[int]) -> Task:
    """A task whose examples have as many supervised tokens as ``lengths`` says, after a prompt of one token."""
    supervised = torch.cat([torch.tensor([False] + [True] * length) for length in lengths])
    offsets = torch.tensor([0] + [length + 1 for length in lengths]).cumsum(0)
    tokens = torch.arange(len(supervised), dtype=torch.int32)
    examples = Examples.in_memory(tokens, supervised, offsets, torch.arange(len(lengths)))
    return Task(name, train=examples, validation=examples)


task_lists = st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=20), min_size=1, max_size=6)


def mixture(draw: st.DrawFn, num_tasks: int) -> Tensor:
    weights = draw(st.lists(st.integers(0, 9), min_size=num_tasks, max_size=num_tasks).filter(any))
    p = torch.tensor(weights, dtype=torch.float64)
    return p / p.sum()


@settings(deadline=None)
@given(st.data(), task_lists)
def test_every_share_is_within_an_example_of_p_at_every_moment(data: st.DataObject, lengths: list[list[int]]) -> None:
    sampler = TokenSampler([task(str(i), each) for i, each in enumerate(lengths)], seed=0)
    longest = max(map(max, lengths))
    owed = torch.zeros(len(lengths), dtype=torch.float64)  # what each task should have had, p changing all the time
    had = torch.zeros(len(lengths), dtype=torch.float64)
    for _ in range(8):
        p = data.draw(st.composite(lambda draw: mixture(draw, len(lengths)))())
        for draw in sampler.draw(p, max_examples=5, max_tokens=10**9):
            assert p[draw.task] > 0
            owed += p * draw.num_supervised_tokens
            had[draw.task] += draw.num_supervised_tokens
        # A task may fall behind while p drifts towards it, but never gets ahead by more than one example.
        assert (had - owed).max() <= longest


def test_shares_are_of_tokens_not_of_examples() -> None:
    """Mean lengths of 2 and 200: within 1 % of p, where drawing examples by p is wrong by 48 % (total variation)."""
    sampler = TokenSampler([task("short", [1, 2, 3] * 50), task("long", [150, 200, 250] * 50)], seed=1)
    p = torch.tensor([0.5, 0.5], dtype=torch.float64)
    had = torch.zeros(2)
    for _ in range(300):
        for draw in sampler.draw(p, max_examples=16, max_tokens=10**9):
            had[draw.task] += draw.num_supervised_tokens
    assert abs(float(had[0] / had.sum()) - 0.5) < 0.01


def test_ties_go_to_the_first_task() -> None:
    sampler = TokenSampler([task("a", [1] * 9), task("b", [1] * 9), task("c", [1] * 9)], seed=0)
    p = torch.full((3,), 1 / 3, dtype=torch.float64)
    assert [draw.task for draw in sampler.draw(p, max_examples=3, max_tokens=99)] == [0, 1, 2]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(0, 3))
def test_every_example_once_before_any_twice(lengths: list[int], seed: int) -> None:
    sampler = TokenSampler([task("a", lengths)], seed=seed)
    p = torch.ones(1, dtype=torch.float64)
    passes = [sampler.draw(p, max_examples=len(lengths), max_tokens=10**9) for _ in range(3)]
    for draws in passes:
        assert sorted(draw.example_index for draw in draws) == list(range(len(lengths)))
    assert [all(draw.first_time for draw in draws) for draws in passes] == [True, False, False]


def test_the_order_depends_on_seed_name_and_pass_alone() -> None:
    def order(name: str, seed: int, others: int, num: int = 20) -> list[int]:
        tasks = [task(f"other {i}", [3] * 7) for i in range(others)] + [task(name, [2] * 20)]
        p = torch.full((others + 1,), 1 / (others + 1), dtype=torch.float64)
        draws = TokenSampler(tasks, seed=seed).draw(p, max_examples=num * (others + 3), max_tokens=10**9)
        return [draw.example_index for draw in draws if draw.task == others][:num]

    assert order("a", 0, 0) == order("a", 0, 3)
    assert order("a", 0, 0) != order("b", 0, 0)
    assert order("a", 0, 0) != order("a", 1, 0)
    assert order("a", 0, 0, num=40)[20:] != order("a", 0, 0)


@given(st.data(), task_lists, st.integers(1, 200))
def test_the_budget_ends_within_an_example(data: st.DataObject, lengths: list[list[int]], budget: int) -> None:
    sampler = TokenSampler([task(str(i), each) for i, each in enumerate(lengths)], seed=0)
    p = data.draw(st.composite(lambda draw: mixture(draw, len(lengths)))())
    left = budget
    while left:
        draws = sampler.draw(p, max_examples=3, max_tokens=left)
        for draw in draws:
            counted = int((sampler.example(draw).labels != IGNORE_INDEX).sum())
            assert counted == draw.num_supervised_tokens >= 1
            left -= counted
        assert len(draws) == 3 or left == 0
    assert left == 0


def test_a_cut_example_keeps_its_first_labels() -> None:
    sampler = TokenSampler([task("a", [5])], seed=0)
    (draw,) = sampler.draw(torch.ones(1, dtype=torch.float64), max_examples=1, max_tokens=2)
    assert sampler.example(draw).labels.tolist() == [1, 2] + [IGNORE_INDEX] * 3
    assert sampler.example(draw).tokens.tolist() == [0, 1, 2, 3, 4]


@given(st.data(), task_lists, st.integers(0, 12))
def test_the_state_goes_on_where_it_was(data: st.DataObject, lengths: list[list[int]], before: int) -> None:
    tasks = [task(str(i), each) for i, each in enumerate(lengths)]
    p = data.draw(st.composite(lambda draw: mixture(draw, len(lengths)))())
    sampler, resumed = TokenSampler(tasks, seed=3), TokenSampler(tasks, seed=3)
    for _ in range(before):
        sampler.draw(p, max_examples=3, max_tokens=10**9)
    resumed.load_state_dict(sampler.state_dict())
    assert sampler.draw(p, max_examples=30, max_tokens=10**9) == resumed.draw(p, max_examples=30, max_tokens=10**9)


def test_a_state_is_a_copy() -> None:
    sampler = TokenSampler([task("a", [1] * 9)], seed=0)
    state = sampler.state_dict()
    sampler.draw(torch.ones(1, dtype=torch.float64), max_examples=3, max_tokens=9)
    assert state["num_drawn"].tolist() == [0]


def test_probe_examples() -> None:
    tasks = [task("a", [1] * 50), Task("b", task("b", [2] * 4).train, validation=None)]
    rows = random_examples(tasks, 8, seed=0, update=0)
    assert [i for i, _ in rows] == [0] * 8 + [1] * 4, "all of them where there are fewer"
    firsts = [int(example.tokens[0]) for _, example in rows]
    assert len(set(firsts[:8])) == 8
    assert firsts == [int(example.tokens[0]) for _, example in random_examples(tasks, 8, seed=0, update=0)]
    assert firsts != [int(example.tokens[0]) for _, example in random_examples(tasks, 8, seed=0, update=1)]
    assert firsts != [int(example.tokens[0]) for _, example in random_examples(tasks, 8, seed=1, update=0)]
    assert [i for i, _ in validation_examples(tasks)] == [0] * 50
    assert [i for i, _ in validation_examples(tasks, 3)] == [0] * 3


def test_the_test_split_is_all_of_it() -> None:
    tasks = [task("a", [1] * 5), replace(task("b", [2] * 4), test=task("c", [3, 1]).train), task("d", [1])]
    rows = tasks_data.test_examples(tasks)
    assert [i for i, _ in rows] == [1, 1]
    assert [int((example.labels != IGNORE_INDEX).sum()) for _, example in rows] == [3, 1]
    assert tasks_data.test_examples(tasks[::2]) == []


def test_the_pool_is_the_same_at_every_update() -> None:
    tasks = [task("a", [1] * 50), task("b", [2] * 4)]

    def firsts(seed: int, update: int | None) -> list[int]:
        return [int(example.tokens[0]) for _, example in random_examples(tasks, 8, seed=seed, update=update)]

    pool = firsts(0, None)
    assert len(pool) == 12 and len(set(pool[:8])) == 8
    assert pool == firsts(0, None) != firsts(1, None)
    assert pool not in [firsts(0, update) for update in range(5)]


# ------------------------------------------------------------------------------------------- steps of so many tokens


class Spent(NamedTuple):
    """The steps of a run whose mixture changes at each of them, as far as sampler and ledger go."""

    steps: list[list[Draw]]
    totals: list[int]  # supervised tokens after each step


def spend(data: st.DataObject, tasks: list[Task], *, batch_tokens: int, budget: int) -> Spent:
    sampler, ledger, spent = TokenSampler(tasks, seed=0), Ledger(budget, len(tasks)), Spent([], [])
    while ledger.left:
        p = data.draw(st.composite(lambda draw: mixture(draw, len(tasks)))())
        target = ledger.step_target(batch_tokens)
        draws = sampler.draw(p, target_tokens=target, max_tokens=ledger.left)
        ledger.spend(count_tokens(draws, len(tasks)), unique=0, batches=[])
        spent.steps.append(draws)
        spent.totals.append(ledger.supervised_tokens)
    return spent


@settings(deadline=None)
@given(st.data(), task_lists, st.integers(1, 60), st.integers(1, 400))
def test_k_steps_spend_k_times_batch_tokens(
    data: st.DataObject, lengths: list[list[int]], batch_tokens: int, budget: int
) -> None:
    """And less than an example more; at least one example each, of which the budget's last alone is cut."""
    tasks = [task(str(i), each) for i, each in enumerate(lengths)]
    spent = spend(data, tasks, batch_tokens=batch_tokens, budget=budget)
    longest = max(map(max, lengths))
    for k, (draws, total) in enumerate(zip(spent.steps, spent.totals, strict=True), start=1):
        before = total - sum(draw.num_supervised_tokens for draw in draws)
        assert len(draws) == 1 or total - draws[-1].num_supervised_tokens < k * batch_tokens, "no example too many"
        assert total == budget or total >= k * batch_tokens, "nor one too few"
        assert before < budget and (longest > batch_tokens or total < k * batch_tokens + longest)
    whole = [lengths[draw.task][draw.example_index] for draws in spent.steps for draw in draws]
    counted = [draw.num_supervised_tokens for draws in spent.steps for draw in draws]
    assert counted[:-1] == whole[:-1] and counted[-1] <= whole[-1] and sum(counted) == budget


@settings(deadline=None)
@given(st.data(), task_lists, st.integers(1, 60), st.integers(1, 400))
def test_every_mixture_makes_the_same_steps(
    data: st.DataObject, lengths: list[list[int]], batch_tokens: int, budget: int
) -> None:
    tasks = [task(str(i), each) for i, each in enumerate(lengths)]
    config: Any = SimpleNamespace(batch_size=None, batch_tokens=batch_tokens, sampling="tokens")
    p = torch.full((len(tasks),), 1 / len(tasks), dtype=torch.float64)
    expected = expected_steps(tasks, p, Ledger(budget, len(tasks)), config)
    num_steps = len(spend(data, tasks, batch_tokens=batch_tokens, budget=budget).steps)
    most, last = -(-budget // batch_tokens), (budget - 1) % batch_tokens + 1
    assert expected.exact == (most == 1 or max(map(max, lengths)) <= last)
    assert num_steps <= most
    if expected.exact:
        assert num_steps == expected.number == most
    elif max(map(max, lengths)) <= batch_tokens:
        assert most - 1 <= num_steps, "the last one alone may be needless"


@given(st.data(), task_lists, st.integers(1, 60))
def test_the_size_of_steps_changes_no_draw(data: st.DataObject, lengths: list[list[int]], batch_tokens: int) -> None:
    """None is drawn twice, and none is lost, where a step ends."""
    tasks = [task(str(i), each) for i, each in enumerate(lengths)]
    p = data.draw(st.composite(lambda draw: mixture(draw, len(lengths)))())
    sampler, ledger, draws = TokenSampler(tasks, seed=0), Ledger(200, len(tasks)), []
    while ledger.left:
        draws.append(sampler.draw(p, target_tokens=ledger.step_target(batch_tokens), max_tokens=ledger.left))
        ledger.spend(count_tokens(draws[-1], len(tasks)), unique=0, batches=[])
    expected = TokenSampler(tasks, seed=0).draw(p, max_examples=10**6, max_tokens=200)
    assert [draw for step in draws for draw in step] == expected


def test_a_step_needs_a_size() -> None:
    """A recipe of before ``batch_tokens`` that is given it does not spend its budget in one step."""
    with pytest.raises(ValueError, match=r"^batch_tokens: the recipe has to give it to TokenSampler\.draw"):
        TokenSampler([task("a", [1])], seed=0).draw(torch.ones(1, dtype=torch.float64), max_tokens=9)


# -------------------------------------------------------------------------------------------------- a cap on epochs


class Capped:
    """A run as far as sampler and ledger go: a budget that the caps allow."""

    def __init__(self, data: st.DataObject, lengths: list[list[int]], sampling: Sampling = "tokens") -> None:
        self.lengths = lengths
        self.max_epochs = data.draw(st.one_of(st.integers(1, 3), st.floats(0.4, 3)))
        self.sampler = TokenSampler(
            [task(str(i), each) for i, each in enumerate(lengths)],
            seed=0,
            max_epochs=self.max_epochs,
            sampling=sampling,
        )
        caps = self.sampler.caps(0)
        assert caps is not None
        assume(caps.any())
        total = int(caps.sum())
        self.ledger = Ledger(data.draw(st.one_of(st.just(total), st.integers(1, total))), len(lengths), caps=caps)
        assert torch.equal(caps, self.sampler.caps(self.ledger.budget_tokens))

    def step(self, p: Tensor, *, max_examples: int) -> list[Draw]:
        draws = self.sampler.draw(p, max_examples=max_examples, max_tokens=self.ledger.left)
        self.ledger.spend(count_tokens(draws, len(self.lengths)), unique=0, batches=[])
        return draws


@settings(deadline=None)
@given(st.data(), task_lists, st.sampled_from(["tokens", "example", "dataset"]))
def test_no_task_is_drawn_beyond_its_cap(data: st.DataObject, lengths: list[list[int]], sampling: Sampling) -> None:
    """Whatever p does, the budget is spent to the token all the same, and in whole examples but for the last one."""
    run = Capped(data, lengths, sampling)
    draws: list[Draw] = []
    while run.ledger.left > 0:
        p = run.ledger.capped(data.draw(st.composite(lambda draw: mixture(draw, len(lengths)))()))
        draws += run.step(p, max_examples=data.draw(st.integers(1, 9)))
    assert run.ledger.supervised_tokens == run.ledger.budget_tokens
    for i, each in enumerate(lengths):
        assert run.ledger.task_tokens[i] <= run.max_epochs * sum(each)
    whole = [draw.num_supervised_tokens == lengths[draw.task][draw.example_index] for draw in draws]
    assert all(whole[:-1])


@settings(deadline=None)
@given(st.data(), task_lists, st.integers(1, 16))
def test_a_capped_task_is_spread_over_the_whole_budget(
    data: st.DataObject, lengths: list[list[int]], max_examples: int
) -> None:
    """It reaches its cap at the end, to within an example, and is never further ahead on the way there."""
    run = Capped(data, lengths)
    ledger, longest = run.ledger, max(map(max, lengths))
    p = data.draw(st.composite(lambda draw: mixture(draw, len(lengths)))())
    first = ledger.capped(p)
    while ledger.left > 0:
        run.step(ledger.capped(p), max_examples=max_examples)
        assert (ledger.task_tokens - first * ledger.supervised_tokens).max() <= 2 * longest
    assert ledger.caps is not None
    capped = (first - ledger.caps.double() / ledger.budget_tokens).abs() < 1e-12
    assert ((ledger.caps - ledger.task_tokens)[capped] <= longest).all()


@pytest.mark.parametrize(
    ("max_epochs", "caps"), [(0.1, 0), (0.5, 4), (0.7, 4), (1, 8), (1.5, 12), (1.999, 14), (2, 16)]
)
def test_a_cap_is_of_as_many_whole_examples_as_fit(max_epochs: float, caps: int) -> None:
    found = TokenSampler([task("a", [2] * 4)], seed=0, max_epochs=max_epochs).caps(0)
    assert found is not None and found.tolist() == [caps]


@given(st.data(), task_lists)
def test_a_cap_out_of_reach_changes_no_draw(data: st.DataObject, lengths: list[list[int]]) -> None:
    budget = data.draw(st.integers(1, 200))
    tasks = [task(str(i), each) for i, each in enumerate(lengths)]
    p = data.draw(st.composite(lambda draw: mixture(draw, len(lengths)))())
    free, limited = TokenSampler(tasks, seed=0), TokenSampler(tasks, seed=0, max_epochs=1000)
    assert free.caps(budget) is None
    expected = free.draw(p, max_examples=10**6, max_tokens=budget)
    assert limited.draw(p, max_examples=10**6, max_tokens=budget) == expected


@settings(deadline=None)
@given(st.data(), task_lists)
def test_a_budget_above_all_caps_is_refused(data: st.DataObject, lengths: list[list[int]]) -> None:
    """With the smallest number of epochs, in hundredths, that is enough."""
    tasks = [task(str(i), each) for i, each in enumerate(lengths)]
    max_epochs = data.draw(st.one_of(st.integers(1, 3), st.floats(0.1, 3)))
    sampler = TokenSampler(tasks, seed=0, max_epochs=max_epochs)
    most = int(sampler.caps(0).sum())  # type: ignore[union-attr]
    sampler.caps(most)
    budget = data.draw(st.integers(most + 1, most + 500))
    with pytest.raises(ValueError) as error:
        sampler.caps(budget)
    said = re.fullmatch(
        r"tasks\.max_epochs_per_task: (\S+) epochs of all tasks are (\d+) supervised tokens, fewer than the budget of "
        r"(\d+); set (\S+) or more, or lower the budget",
        str(error.value),
    )
    assert said and [int(said[2]), int(said[3])] == [most, budget]
    enough = float(said[4])
    TokenSampler(tasks, seed=0, max_epochs=enough).caps(budget)
    with pytest.raises(ValueError):
        TokenSampler(tasks, seed=0, max_epochs=round(enough - 0.01, 2)).caps(budget)


# --------------------------------------------------------------------------------------- tasks that are drawn at random


def drawn_tasks(p: Tensor, sampling: Sampling, *, seed: int, num_steps: int, max_examples: int) -> list[list[Draw]]:
    sampler = TokenSampler([task(str(i), [1, 5, 2]) for i in range(len(p))], seed=seed, sampling=sampling)
    return [sampler.draw(p, max_examples=max_examples, max_tokens=10**9) for _ in range(num_steps)]


@pytest.mark.parametrize("sampling", ["example", "dataset"])
def test_tasks_are_drawn_as_often_as_the_mixture_says(sampling: Sampling) -> None:
    """Within four standard deviations, in pairs of draws too; the draws are the same every time."""
    p, size, number = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05], dtype=torch.float64), 4, 4000
    num_steps = number if sampling == "dataset" else number // size

    def drawn(seed: int) -> Tensor:
        """(number, num_tasks), one-hot: of every example, or of every step, all of whose examples are of one task."""
        steps = drawn_tasks(p, sampling, seed=seed, num_steps=num_steps, max_examples=size)
        assert steps == drawn_tasks(p, sampling, seed=seed, num_steps=num_steps, max_examples=size)
        if sampling == "dataset":
            assert all(len({draw.task for draw in step}) == 1 for step in steps)
            steps = [step[:1] for step in steps]
        of_draw = torch.tensor([draw.task for step in steps for draw in step])
        return torch.nn.functional.one_hot(of_draw, len(p)).double()

    one, other = drawn(0), drawn(1)
    assert ((one.mean(0) - p).abs() <= 4 * (p * (1 - p) / number).sqrt()).all()
    pairs, expected = one[:-1].T @ one[1:] / (number - 1), torch.outer(p, p)
    assert ((pairs - expected).abs() <= 4 * (expected / number).sqrt()).all(), "a draw says nothing about the next"
    same = float((one * other).sum(1).mean())
    assert same == pytest.approx(float(p.square().sum()), abs=4 * (0.25 / number) ** 0.5), "nor a seed about another"


@pytest.mark.parametrize("sampling", ["example", "dataset"])
def test_each_example_comes_once_before_any_comes_twice(sampling: Sampling) -> None:
    p = torch.tensor([0.7, 0.3], dtype=torch.float64)
    draws = [draw for step in drawn_tasks(p, sampling, seed=0, num_steps=60, max_examples=4) for draw in step]
    for i in range(2):
        of_task = [draw.example_index for draw in draws if draw.task == i]
        assert len(of_task) > 9 and all(sorted(of_task[k : k + 3]) == [0, 1, 2] for k in range(0, len(of_task) - 2, 3))


@pytest.mark.parametrize("num_tasks", [1, 3])
def test_drawing_leaves_torchs_generator_alone(num_tasks: int) -> None:
    before = torch.get_rng_state()
    for sampling in ("tokens", "example", "dataset"):
        sampler = TokenSampler([task(str(i), [1] * 5) for i in range(num_tasks)], seed=0, sampling=sampling)
        sampler.draw(torch.full((num_tasks,), 1 / num_tasks, dtype=torch.float64), max_examples=9, max_tokens=9)
    assert torch.equal(before, torch.get_rng_state())
