"""Difficulty levels inside each task: what decides them, what is drawn of each, and what moves their shares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import VOCAB, batched, tiny_model
from torch import Tensor

from adapt_recipes.budget import Ledger
from adapt_recipes.data import Draw, Example, Examples, MicroBatch, Task, TokenSampler, random_indices
from adapt_recipes.data.sampler import Sampling
from adapt_recipes.mixture import Scorer
from adapt_recipes.signals import Levels, LevelsConfig, Probe, passes
from adapt_recipes.signals.levels import level_sizes


def task(name: str, lengths: Sequence[int]) -> Task:
    """A task whose examples have so many supervised tokens, after a prompt of one token."""
    supervised = torch.cat([torch.tensor([False] + [True] * length) for length in lengths])
    offsets = torch.tensor([0, *(length + 1 for length in lengths)]).cumsum(0)
    tokens = torch.randint(VOCAB, (len(supervised),), generator=torch.Generator().manual_seed(len(name)))
    examples = Examples.in_memory(tokens.int(), supervised, offsets, torch.arange(len(lengths)))
    return Task(name, examples, None)


def cut(
    tasks: Sequence[Task], base_losses: Sequence[Tensor], *, seed: int = 3, sampling: Sampling = "tokens", **config: Any
) -> Levels:
    """Levels by base losses that are given, not measured."""
    levels = Levels(tasks, LevelsConfig(**config), seed=seed, sampling=sampling)
    losses = iter(base_losses)

    def measured(base: Any, *arguments: Any, **named: Any) -> None:
        base.values = next(losses).double()

    probe: Any = SimpleNamespace(ledger=SimpleNamespace(probe=lambda batches: None), model=None)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("adapt_recipes.signals.levels.BaseLosses.measure", measured)
        levels.measure(probe, lambda examples: [], cache_dir=Path(), tokens="answer")
    return levels


def indices(levels: Levels, number: int) -> list[list[int]]:
    """The examples of each level of a task."""
    return [each.tolist() for each in levels._actors[number].indices]


def shares(levels: Levels, number: int) -> Tensor:
    return levels._actors[number].shares


def with_losses(levels: Levels, higher: Sequence[Sequence[float]]) -> Any:
    """A probe of a model whose losses are above the base model's by an amount of each level."""
    given = [
        actor.base_losses[part[random_indices(level, levels.config.examples, seed=3, update=0)]].double() + more
        for actor, amounts in zip(levels._actors, higher, strict=True)
        for part, level, more in zip(actor.indices, actor.levels, amounts, strict=True)
    ]
    return SimpleNamespace(example_losses=lambda batches, tokens: torch.cat(given))


def update(levels: Levels, higher: Sequence[Sequence[float]]) -> dict[str, Tensor]:
    return levels.update(with_losses(levels, higher), lambda examples: [], 0, tokens="answer")


# ---- which examples a level has


@given(st.lists(st.integers(0, 5), min_size=1, max_size=20), st.integers(2, 6))
def test_base_losses_decide_the_levels(losses: list[int], number: int) -> None:
    """In equal numbers, and none has an example that is easier than one of the level before."""
    parts = indices(cut([task("a", [1] * len(losses))], [torch.tensor(losses)], number=number), 0)
    assert sorted(sum(parts, [])) == list(range(len(losses)))
    assert [losses[i] for part in parts for i in part] == sorted(losses)
    sizes = [len(part) for part in parts]
    assert len(parts) == min(number, len(losses)) and max(sizes) - min(sizes) <= 1
    assert sizes == level_sizes(len(losses), number)


def test_they_are_the_base_models_and_counted_as_read(tmp_path: Path) -> None:
    """Measured, or read from the cache."""
    model, tasks = tiny_model(), [task("a", [1, 3, 2, 5, 4, 2, 1]), task("bb", [2, 2, 6])]
    for _ in range(2):
        probe = Probe(model, ledger := Ledger(100, 2), tasks)
        levels = Levels(tasks, LevelsConfig(number=2), seed=3, sampling="tokens")
        levels.measure(probe, batched, cache_dir=tmp_path, tokens="answer")
        for number, each in enumerate(tasks):
            losses = [
                float(passes.example_losses(model, batched([(0, each.train.example(i))])))
                for i in range(len(each.train))
            ]
            easier, harder = indices(levels, number)
            assert max(losses[i] for i in easier) < min(losses[i] for i in harder)
        assert ledger.probe_tokens == 18 + 10 and ledger.probe_total_tokens == 18 + 10


# ---- what is drawn of each


def drawn(levels: Levels, tasks: Sequence[Task], p: Tensor, *, number: int, sampling: Sampling) -> list[Draw]:
    sampler = TokenSampler(tasks, seed=3, sampling=sampling, next_example=levels.draw)
    return [draw for _ in range(number) for draw in sampler.draw(p, max_examples=7, max_tokens=10**9)]


def by_level(levels: Levels, draws: Sequence[Draw], number: int, *, of: str) -> Tensor:
    """(num_levels,): tokens or examples drawn of each level of a task."""
    parts = indices(levels, number)
    counts = torch.zeros(len(parts), dtype=torch.float64)
    for draw in draws:
        if draw.task == number:
            level = next(k for k, part in enumerate(parts) if draw.example_index in part)
            counts[level] += draw.num_supervised_tokens if of == "tokens" else 1
    return counts


TASKS = [task("a", [1, 9, 2, 3, 8, 2, 5, 4, 7, 1, 1]), task("bb", [2] * 9), task("ccc", [4, 1])]
LOSSES = [torch.arange(11) % 4, torch.arange(9), torch.tensor([2, 1])]
LAST_IS_HARD = [[-1.0, -1.0, 1.0], [0.0, 0.0, 2.0], [0.0, 0.5]]


def test_a_level_has_its_share_of_the_tasks_tokens_to_within_an_example() -> None:
    """Before an update and after one, whatever the share of the task."""
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    for num_updates in (0, 3):
        levels = cut(TASKS, LOSSES)
        for _ in range(num_updates):
            update(levels, LAST_IS_HARD)
        draws = drawn(levels, TASKS, p, number=300, sampling="tokens")
        total = sum(draw.num_supervised_tokens for draw in draws)
        for number, each in enumerate(TASKS):
            tokens, longest = by_level(levels, draws, number, of="tokens"), int(each.train.num_supervised.max())
            assert abs(float(tokens.sum()) - p[number] * total) <= 9
            assert (tokens - shares(levels, number) * tokens.sum()).abs().max() <= longest
            prior = torch.stack([part.train.num_supervised.sum() for part in levels._actors[number].levels]).double()
            assert (num_updates == 0) == torch.allclose(shares(levels, number), prior / prior.sum())


@pytest.mark.parametrize("sampling", ["example", "dataset"])
def test_levels_are_drawn_at_random_where_tasks_are(sampling: Sampling) -> None:
    """With the chances p."""
    levels = cut(TASKS, LOSSES, sampling=sampling)
    draws = drawn(levels, TASKS, torch.full((3,), 1 / 3, dtype=torch.float64), number=600, sampling=sampling)
    for number in range(3):
        counts = by_level(levels, draws, number, of="examples")
        expected = shares(levels, number) * counts.sum()
        chi_square = float(((counts - expected) ** 2 / expected).sum())
        # Of at most 2 degrees of freedom: more in 1 of 1000 runs.
        assert chi_square < 13.8


def test_the_choice_of_a_level_does_not_depend_on_that_of_the_task() -> None:
    """The first example of a run is of any task and level, and so are the first of a level in two tasks."""
    tasks = [task("a", [2] * 9), task("bb", [2] * 9)]
    p, pairs, firsts = torch.full((2,), 0.5, dtype=torch.float64), set(), set()
    for seed in range(40):
        levels = cut(tasks, [torch.arange(9), torch.arange(9)], seed=seed, sampling="example")
        sampler = TokenSampler(tasks, seed=seed, sampling="example", next_example=levels.draw)
        (draw,) = sampler.draw(p, max_examples=1, max_tokens=10**9)
        pairs.add((draw.task, draw.example_index // 3))
        levels = cut(tasks, [torch.arange(9), torch.arange(9)], seed=seed, sampling="example")
        firsts.add(tuple(levels.draw(number)[0] // 3 for number in range(2)))
    assert len(pairs) == 6 and len(firsts) == 9


def test_every_example_of_a_level_once_before_any_twice() -> None:
    levels = cut(TASKS, LOSSES)
    first: set[tuple[int, int]] = set()
    for draw in drawn(levels, TASKS, torch.full((3,), 1 / 3, dtype=torch.float64), number=40, sampling="tokens"):
        key = (draw.task, draw.example_index)
        assert draw.first_time == (key not in first)
        first.add(key)
    assert len(first) == 22


# ---- what moves the shares


def test_equal_rewards_leave_equal_levels_at_their_prior() -> None:
    """However much has been learned."""
    tasks = [task("a", [2] * 9), task("bb", [3] * 6)]
    levels = cut(tasks, [torch.arange(9), torch.arange(6)])
    for _ in range(3):
        logged = update(levels, [[-0.7] * 3, [0.4] * 3])
    for k in (1, 2, 3):
        torch.testing.assert_close(logged[f"level_{k}_rewards"], torch.ones(2, dtype=torch.float64))
        assert (logged[f"level_{k}_probabilities"] - 1 / 3).abs().max() < 1e-6


def test_a_level_that_stays_hard_gets_more() -> None:
    """At every update; a task with none is left where it was."""
    tasks = [task("a", [2] * 9), task("bb", [3] * 6)]
    levels = cut(tasks, [torch.arange(9), torch.arange(6)])
    had = [1 / 3]
    for _ in range(6):
        logged = update(levels, [[-math.log(2), -math.log(2), math.log(2)], [0.0] * 3])
        had.append(float(logged["level_3_probabilities"][0]))
    rewards = torch.stack([logged[f"level_{k}_rewards"][0] for k in (1, 2, 3)])
    torch.testing.assert_close(rewards, torch.tensor([0.5, 0.5, 2.0], dtype=torch.float64))
    assert all(now > before + 0.003 for before, now in pairwise(had))
    assert (shares(levels, 1) - 1 / 3).abs().max() < 1e-6


def test_rewards_are_ratios_of_perplexities_of_random_examples_of_each_level(tmp_path: Path) -> None:
    """By hand, and the shares are those of a scorer of MoS's authors. A task without such a level has NaN."""
    tasks = [task("a", [1, 3, 2, 5, 4, 2, 1, 2]), task("bb", [6])]
    base, now = tiny_model(), tiny_model(seed=1)
    levels = Levels(tasks, LevelsConfig(number=2, examples=3), seed=3, sampling="tokens")
    levels.measure(Probe(base, Ledger(100, 2), tasks), batched, cache_dir=tmp_path, tokens="all")
    sizes = [int(level.train.num_supervised.sum()) for level in levels._actors[0].levels]
    read: list[list[tuple[int, Example]]] = []

    def batches_of(examples: Sequence[tuple[int, Example]]) -> list[MicroBatch]:
        read.append(list(examples))
        return batched(examples)

    scorer = Scorer(task_names=["1", "2"], num_supervised_tokens=sizes, budget_tokens=0, prior="proportional")
    ledger = Ledger(100, 2)
    for number in range(3):
        logged = levels.update(Probe(now, ledger, tasks), batches_of, number, tokens="all")
        ratios = [
            math.exp(
                float(passes.example_losses(now, batched([(0, example)]), tokens="all"))
                - float(passes.example_losses(base, batched([(0, example)]), tokens="all"))
            )
            for _, example in read[-1]
        ]
        assert [i for i, _ in read[-1]] == [0] * 6 + [1]
        easier, harder = sum(ratios[:3]) / 3, sum(ratios[3:6]) / 3
        expected = torch.tensor([easier, harder], dtype=torch.float64) / ((easier + harder) / 2)
        measured = torch.stack([logged["level_1_rewards"][0], logged["level_2_rewards"][0]])
        torch.testing.assert_close(measured, expected, rtol=1e-5, atol=0)
        scorer.update(task_tokens=torch.zeros(2), rewards=measured)
        p = torch.stack([logged["level_1_probabilities"][0], logged["level_2_probabilities"][0]])
        torch.testing.assert_close(p, scorer.probabilities(), rtol=0, atol=0)
        assert (float(logged["level_1_rewards"][1]), float(logged["level_1_probabilities"][1])) == (1.0, 1.0)
        assert logged["level_2_rewards"][1].isnan() and logged["level_2_probabilities"][1].isnan()
    assert ledger.probe_tokens == sum(int((e.labels >= 0).sum()) for each in read for _, e in each)
    chosen = [{tuple(example.tokens.tolist()) for _, example in each[:3]} for each in read]
    assert len({frozenset(each) for each in chosen}) > 1, "other examples at every update"


def test_a_state_continues_as_it_would_have(tmp_path: Path) -> None:
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    levels = cut(TASKS, LOSSES)
    drawn(levels, TASKS, p, number=5, sampling="tokens")
    update(levels, LAST_IS_HARD)
    torch.save(levels.state_dict(), tmp_path / "state.pt")
    resumed = Levels(TASKS, LevelsConfig(), seed=3, sampling="tokens")
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for _ in range(3):
        ahead = [drawn(each, TASKS, p, number=9, sampling="tokens") for each in (levels, resumed)]
        assert ahead[0] == ahead[1]
        logged = [update(each, LAST_IS_HARD) for each in (levels, resumed)]
        torch.testing.assert_close(logged[0], logged[1], rtol=0, atol=0, equal_nan=True)
