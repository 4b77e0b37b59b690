"""Micro-batches: nothing lost, within bounds, as few and as equal as possible, also on several processes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import example as on
from hypothesis import given
from hypothesis import strategies as st

from adapt_recipes.data import IGNORE_INDEX, Example, MicroBatch, micro_batches
from adapt_recipes.data.packing import pack_rows, shared_with_previous, supervised_lengths


def example(length: int, first: int = 1) -> Example:
    tokens = torch.arange(first, first + length)
    labels = torch.where(tokens % 2 == 0, tokens + 1, IGNORE_INDEX)
    # Its last position is supervised, as that of most examples.
    labels[-1] = tokens[-1] + 1
    return Example(tokens, labels)


def computed(batch: MicroBatch) -> int:
    """The tokens that the model computes of it."""
    return len(pack_rows(batch.tokens, supervised_lengths(batch.labels)).tokens)


def cost(batch: MicroBatch) -> int:
    """What is bounded: a token that is shared with the row before counts as an eighth."""
    lengths = supervised_lengths(batch.labels).numpy()
    shared = shared_with_previous(batch.tokens.numpy(), lengths)
    return int((lengths - shared + shared // 8).sum())


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(50, 400))
def test_every_example_is_there_once_and_unchanged(lengths: list[int], max_tokens: int) -> None:
    examples = [example(length, first=1 + 100 * i) for i, length in enumerate(lengths)]
    seen = []
    for batch in micro_batches(examples, [i % 7 for i in range(len(lengths))], max_tokens=max_tokens):
        assert computed(batch) == batch.computed_tokens <= max_tokens
        assert batch.num_tokens == sum(lengths[row] for row in batch.rows)
        assert batch.num_supervised_tokens == int((batch.labels != IGNORE_INDEX).sum()) == len(batch.supervised_tasks)
        for k, row in enumerate(batch.rows.tolist()):
            seen.append(row)
            length = lengths[row]
            assert batch.tasks[k] == row % 7
            assert torch.equal(batch.tokens[k, :length], examples[row].tokens)
            assert torch.equal(batch.labels[k, :length], examples[row].labels)
            assert (batch.tokens[k, length:] == 0).all() and (batch.labels[k, length:] == IGNORE_INDEX).all()
    assert sorted(seen) == list(range(len(lengths)))


# Rows of few different tokens, so that many begin alike.
ALIKE = st.lists(st.lists(st.integers(1, 2), min_size=1, max_size=9), min_size=1, max_size=8)


def supervised_at_the_end(row: list[int]) -> Example:
    labels = torch.full((len(row),), IGNORE_INDEX)
    labels[-1] = 1
    return Example(torch.tensor(row), labels)


@given(ALIKE, st.integers(9, 30), st.integers(1, 3))
def test_no_way_to_cut_the_sorted_list_needs_fewer_or_smaller_parts(
    rows: list[list[int]], max_tokens: int, world_size: int
) -> None:
    examples = [supervised_at_the_end(row) for row in sorted(rows)]

    def size(part: Sequence[Example]) -> int:
        (batch,) = micro_batches(part, [0] * len(part), max_tokens=10**6)
        return cost(batch)

    def largest(cuts: tuple[int, ...]) -> int:
        edges = [0, *cuts, len(rows)]
        return max(size(examples[a:b]) for a, b in pairwise(edges))

    each = [
        micro_batches(examples, [0] * len(rows), max_tokens=max_tokens, rank=r, world_size=world_size)
        for r in range(world_size)
    ]
    found = max(cost(batch) for batches in each for batch in batches if batch.rows[0] >= 0)
    most_parts = len(each[0]) * world_size
    ways = {n: [largest(cuts) for cuts in combinations(range(1, len(rows)), n - 1)] for n in range(1, len(rows) + 1)}
    assert found == min(min(of) for n, of in ways.items() if n <= most_parts), "as equal as possible"
    fewer = [min(of) for n, of in ways.items() if n <= most_parts - world_size]
    assert all(largest > max_tokens for largest in fewer), "as few as possible"


def test_beginnings_that_examples_share_are_computed_once() -> None:
    examples = [supervised_at_the_end([*range(10, 20), last]) for last in (1, 2, 3)]
    (batch,) = micro_batches(examples, [0, 1, 0], max_tokens=100)
    assert (batch.num_tokens, batch.computed_tokens) == (33, 13)
    # In two micro-batches each computes it.
    batches = micro_batches(examples, [0, 1, 0], max_tokens=13)
    assert [batch.computed_tokens for batch in batches] == [12, 11]


def test_one_too_long_is_computed_alone() -> None:
    batches = micro_batches([example(3), example(90, 100), example(3, 200)], [0, 1, 2], max_tokens=20)
    assert [tuple(batch.tokens.shape) for batch in batches] == [(1, 90), (1, 3), (1, 3)], "the longest first"
    batches = micro_batches([example(3), example(3, 200), example(90, 300)], [0, 1, 2], max_tokens=20)
    assert [tuple(batch.tokens.shape) for batch in batches] == [(1, 90), (2, 3)]


def test_no_examples_no_batches() -> None:
    assert micro_batches([], [], max_tokens=10) == []


def test_tasks_of_supervised_tokens_are_in_the_order_of_the_losses() -> None:
    (batch,) = micro_batches([example(4), example(4)], [5, 6], max_tokens=100)
    assert batch.supervised_tasks.tolist() == [5, 5, 6, 6]


# ------------------------------------------------------------------------------------------------- several processes


def deal(lengths: list[int], *, max_tokens: int, world_size: int) -> tuple[list[Example], list[list[MicroBatch]]]:
    """The examples, and every process's micro-batches."""
    examples = [example(length, first=1 + 100 * i) for i, length in enumerate(lengths)]
    tasks = [i % 7 for i in range(len(lengths))]
    each = [
        micro_batches(examples, tasks, max_tokens=max_tokens, rank=r, world_size=world_size) for r in range(world_size)
    ]
    return examples, each


MANY = st.lists(st.integers(1, 60), max_size=50)


@given(MANY, st.integers(1, 300), st.integers(2, 6))
@on([10] * 5, 300, 4)  # too few rows to fill all parts
@on([40, 30, 20], 300, 2)
@on([60, 1, 1, 1, 1], 20, 3)  # one too long for a forward, beside short ones
def test_every_example_is_on_one_process_and_all_work_alike(
    lengths: list[int], max_tokens: int, world_size: int
) -> None:
    examples, each = deal(lengths, max_tokens=max_tokens, world_size=world_size)
    seen: list[int] = []
    for batches in each:
        assert len(batches) == len(each[0]), "as many forwards and backwards"
        for batch in batches:
            assert computed(batch) <= max_tokens or len(batch.rows) == 1
            assert batch.tokens.shape == batch.labels.shape and len(batch.tokens) == len(batch.tasks) == len(
                batch.lengths
            )
            for k, row in enumerate(batch.rows.tolist()):
                if row < 0:
                    assert batch.tokens.shape == (1, 1) and (batch.labels == IGNORE_INDEX).all()
                    continue
                seen.append(row)
                length = int(batch.lengths[k])
                assert torch.equal(batch.tokens[k, :length], examples[row].tokens)
                assert torch.equal(batch.labels[k, :length], examples[row].labels)
                assert (batch.labels[k, length:] == IGNORE_INDEX).all() and batch.tasks[k] == row % 7
    assert sorted(seen) == list(range(len(lengths)))


@given(MANY, st.integers(60, 300), st.integers(2, 6))
def test_every_process_books_what_all_have_read(lengths: list[int], max_tokens: int, world_size: int) -> None:
    """The ledger of every process is that of the run: its micro-batches know what the others compute."""
    examples, each = deal(lengths, max_tokens=max_tokens, world_size=world_size)
    for batches in each:
        assert sum(batch.num_tokens for batch in batches) == sum(lengths)
        assert sum(batch.computed_tokens for batch in batches) == sum(
            computed(batch) for all_of in each for batch in all_of
        )
        supervised = sum(int((labels != IGNORE_INDEX).sum()) for _, labels in examples)
        assert sum(batch.num_supervised_tokens for batch in batches) == supervised
    assert sum(len(batch.supervised_tasks) for batches in each for batch in batches) == supervised if lengths else True


@given(MANY, st.integers(1, 300), st.integers(2, 6))
def test_no_process_computes_more_than_another_by_more_than_in_one_round(
    lengths: list[int], max_tokens: int, world_size: int
) -> None:
    """What one has more in a round, the others have more in the next."""
    _, each = deal(lengths, max_tokens=max_tokens, world_size=world_size)
    work = [[computed(batch) for batch in batches] for batches in each]
    totals, rounds = list(map(sum, work)), list(zip(*work, strict=True))
    assert max(totals) - min(totals) <= max((max(each) - min(each) for each in rounds), default=0)


def test_a_dummy_is_of_a_task_that_is_computed() -> None:
    """So that a probe which needs no other task can leave the forward out on all processes."""
    examples, tasks = [example(9), example(8, 100), example(7, 200)], [4, 5, 6]
    each = [micro_batches(examples, tasks, max_tokens=9, rank=rank, world_size=2) for rank in range(2)]
    assert [[batch.rows.tolist() for batch in batches] for batches in each] == [[[0], [-1]], [[1], [2]]]
    assert each[0][1].tasks.tolist() == [6]


def test_more_processes_than_examples() -> None:
    _, each = deal([5], max_tokens=10, world_size=4)
    assert [[batch.rows.tolist() for batch in batches] for batches in each] == [[[0]], [[-1]], [[-1]], [[-1]]]


def test_nothing_is_dealt_to_several_processes() -> None:
    assert deal([], max_tokens=10, world_size=3)[1] == [[], [], []]


def test_too_few_rows_to_fill_all_are_computed_at_once() -> None:
    _, each = deal([10] * 5, max_tokens=100, world_size=4)
    assert [[len(batch.rows) for batch in batches] for batches in each] == [[2], [2], [1], [1]]


def test_long_rows_alone_and_short_rows_together() -> None:
    """Equal tokens, not equal numbers of examples."""
    _, each = deal([48] + [4] * 12, max_tokens=100, world_size=2)
    assert sorted(len(batches[0].rows) for batches in each) == [1, 12]


@pytest.mark.parametrize("world_size", [2, 8])
def test_many_processes_take_nearly_their_share_of_the_time(world_size: int) -> None:
    """The tokens of each forward's slowest process, beside a fair share of what one process computes."""
    generator = torch.Generator().manual_seed(0)
    lengths = (torch.randn(256, generator=generator) * 0.8 + 5).exp().clamp(20, 1024).int().tolist()
    (alone,) = deal(lengths, max_tokens=4096, world_size=1)[1]
    _, each = deal(lengths, max_tokens=4096, world_size=world_size)
    slowest = sum(max(computed(batch) for batch in forward) for forward in zip(*each, strict=True))
    assert slowest < 1.1 * sum(map(computed, alone)) / world_size
