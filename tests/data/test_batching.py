"""Micro-batches: nothing lost, within bounds, little padding, and the same work for every process."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import example as on
from hypothesis import given
from hypothesis import strategies as st

from adapt_recipes.data import IGNORE_INDEX, Example, MicroBatch, micro_batches
from adapt_recipes.data.batching import FORWARD_OVERHEAD_TOKENS


def example(length: int, first: int = 1) -> Example:
    tokens = torch.arange(first, first + length)
    return Example(tokens, torch.where(tokens % 2 == 0, tokens + 1, IGNORE_INDEX))


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(50, 400))
def test_every_example_is_there_once_and_unchanged(lengths: list[int], max_tokens: int) -> None:
    examples = [example(length, first=1 + 100 * i) for i, length in enumerate(lengths)]
    seen = []
    for batch in micro_batches(examples, [i % 7 for i in range(len(lengths))], max_tokens=max_tokens):
        assert batch.tokens.numel() <= max_tokens
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


@given(st.lists(st.integers(1, 60), min_size=1, max_size=9), st.integers(60, 200))
def test_no_way_to_cut_the_sorted_list_computes_less(lengths: list[int], max_tokens: int) -> None:
    def cost(cuts: tuple[int, ...]) -> float:
        edges = [0, *cuts, len(lengths)]
        pieces = [sorted(lengths, reverse=True)[a:b] for a, b in zip(edges, edges[1:], strict=False)]
        if any(len(piece) * piece[0] > max_tokens for piece in pieces):
            return float("inf")
        return sum(len(piece) * piece[0] + FORWARD_OVERHEAD_TOKENS for piece in pieces)

    inner = range(1, len(lengths))
    best = min(cost(cuts) for n in range(len(lengths)) for cuts in combinations(inner, n))
    batches = micro_batches([example(length) for length in lengths], [0] * len(lengths), max_tokens=max_tokens)
    assert sum(batch.tokens.numel() + FORWARD_OVERHEAD_TOKENS for batch in batches) == best


def test_one_too_long_is_computed_alone() -> None:
    batches = micro_batches([example(3), example(90), example(3)], [0, 1, 2], max_tokens=20)
    assert [tuple(batch.tokens.shape) for batch in batches] == [(1, 90), (2, 3)], "the longest first"


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


def computed(batches: list[MicroBatch]) -> int:
    return sum(batch.tokens.numel() for batch in batches)


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
            assert batch.tokens.numel() <= max_tokens or len(batch.rows) == 1
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
    work = [computed(batches) for batches in each]
    assert max(work) - min(work) <= max(lengths, default=0)


@given(MANY, st.integers(60, 300), st.integers(2, 6))
def test_every_process_books_what_all_have_read(lengths: list[int], max_tokens: int, world_size: int) -> None:
    """The ledger of every process is that of the run: its micro-batches know what the others compute."""
    examples, each = deal(lengths, max_tokens=max_tokens, world_size=world_size)
    for batches in each:
        assert sum(batch.num_tokens for batch in batches) == sum(lengths)
        assert sum(batch.computed_tokens for batch in batches) == sum(map(computed, each))
        supervised = sum(int((labels != IGNORE_INDEX).sum()) for _, labels in examples)
        assert sum(batch.num_supervised_tokens for batch in batches) == supervised
    assert sum(len(batch.supervised_tasks) for batches in each for batch in batches) == supervised if lengths else True


@given(MANY, st.integers(1, 300), st.integers(2, 6))
def test_processes_do_not_wait_for_each_other_long(lengths: list[int], max_tokens: int, world_size: int) -> None:
    """All compute a forward at the same time: in each, none has more to do than its share and one more example."""
    _, each = deal(lengths, max_tokens=max_tokens, world_size=world_size)
    for forward in zip(*each, strict=True):
        work = [batch.tokens.numel() for batch in forward]
        assert max(work) - min(work) <= max(int(batch.lengths.max()) for batch in forward)


def test_a_dummy_is_of_a_task_that_is_computed() -> None:
    """So that a probe which needs no other task can leave the forward out on all processes."""
    examples, tasks = [example(9), example(8), example(7)], [4, 5, 6]
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
    assert [[len(batch.rows) for batch in batches] for batches in each] == [[2], [1], [1], [1]]


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
    slowest = sum(max(batch.tokens.numel() for batch in forward) for forward in zip(*each, strict=True))
    assert slowest < 1.1 * computed(alone) / world_size
