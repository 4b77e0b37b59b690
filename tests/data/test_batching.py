"""Micro-batches: nothing lost, within bounds, little padding."""

from __future__ import annotations

from itertools import combinations

import torch
from hypothesis import given
from hypothesis import strategies as st

from adapt_recipes.data import IGNORE_INDEX, Example, micro_batches
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
