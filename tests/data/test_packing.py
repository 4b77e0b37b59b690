"""Packed rows: every real token has its place once, and what rows share is what is the same in them."""

from __future__ import annotations

import torch
from hypothesis import example as on
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils.rnn import pad_sequence

from adapt_recipes.data.examples import IGNORE_INDEX
from adapt_recipes.data.packing import MIN_SHARED, PackedRows, pack_rows, supervised_lengths

# Of few different tokens, so that many rows begin alike.
ROWS = st.lists(st.lists(st.integers(1, 2), min_size=1, max_size=12), min_size=1, max_size=10)


def packed(rows: list[list[int]]) -> PackedRows:
    tokens = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    return pack_rows(tokens, torch.tensor([len(row) for row in rows]))


@given(ROWS)
@on([[1, 2, 1], [1, 2, 1]])  # the same twice
@on([[1, 2, 1], [1, 2]])  # one is the beginning of the other
@on([[1]])
def test_a_row_is_read_along_its_path(rows: list[list[int]]) -> None:
    it = packed(rows)
    for index, row in zip(it.index, rows, strict=True):
        path = index[: len(row)]
        assert it.tokens[path].tolist() == row and it.positions[path].tolist() == list(range(len(row)))
        assert not index[len(row) :].any()
    assert len(it.tokens) == len(it.positions) == sum(group.rows * group.own for group in it.groups)


@given(ROWS)
def test_only_equal_beginnings_share_a_place_and_in_sorted_rows_all_long_ones_do(rows: list[list[int]]) -> None:
    rows = sorted(rows)
    it = packed(rows)
    for (left, here), (right, there) in zip(enumerate(it.index), enumerate(it.index[1:], 1), strict=False):
        same = [a == b for a, b in zip(rows[left], rows[right], strict=False)]
        common = (same + [False]).index(False)
        shared = int((here[: len(same)] == there[: len(same)]).sum())
        assert shared == (common if common >= MIN_SHARED * len(rows[right]) else 0)


@given(ROWS)
def test_the_own_tokens_of_each_group_attend_to_the_whole_of_their_rows(rows: list[list[int]]) -> None:
    it = packed(rows)
    paths = torch.arange(len(it.tokens)) if it.paths is None else it.paths
    seen, own_begin, path_begin = [], 0, 0
    for group in it.groups:
        whole = paths[path_begin : path_begin + group.rows * group.length].view(group.rows, group.length)
        own = torch.arange(own_begin, own_begin + group.rows * group.own).view(group.rows, group.own)
        assert torch.equal(whole[:, group.length - group.own :], own), "the last ones of the row"
        seen += whole.tolist()
        own_begin, path_begin = own_begin + own.numel(), path_begin + whole.numel()
    assert path_begin == len(paths) and own_begin == len(it.tokens)
    every = [index[: len(row)].tolist() for index, row in zip(it.index, rows, strict=True)]
    # Missing are rows that others contain whole.
    assert all(path in every for path in seen)
    assert all(path in seen or any(path == longer[: len(path)] for longer in seen) for path in every)


@given(st.integers(1, 9), st.integers(0, 9), st.none() | st.integers(1, 12))
def test_a_mask_lets_a_token_attend_to_those_before_it_in_its_window(own: int, shared: int, window: int | None) -> None:
    first, second = [1] * shared + [2] * own, [1] * shared + [3] * own
    it = packed([first, second])
    it = it if window is None else it.with_window(window)
    for group in it.groups:
        mask = it.mask(group, torch.float64)
        _, own_size, length = group
        expected = torch.tensor(
            [[0 <= i - j < (window or length) for j in range(length)] for i in range(length - own_size, length)]
        )
        if mask is None:
            causal = torch.ones(length, length, dtype=torch.bool).tril()
            assert own_size == length and torch.equal(expected, causal)
        else:
            assert torch.equal(mask == 0, expected) and torch.equal(mask == -torch.inf, ~expected)
            assert it.mask(group, torch.float64) is mask, "one for all layers"


def test_the_length_of_a_row_ends_at_its_last_label() -> None:
    none = IGNORE_INDEX
    labels = torch.tensor([[none, 5, none, 7, none], [none] * 5, [3, none, none, none, none]])
    assert supervised_lengths(labels).tolist() == [4, 1, 1]
