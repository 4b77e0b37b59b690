"""Rows without their padding, and with each beginning that rows share only once.

Examples of a task often begin with the same tokens: the template, and the task's definition. Under causal attention the
hidden states of a beginning do not depend on what follows, so they are the same in all rows, and gradients of all rows
add up in them. Exact, not an approximation. (Ours; neither paper says how batches are computed.)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from adapt_recipes.data.examples import IGNORE_INDEX


class Group(NamedTuple):
    """Rows of the same length that have the same number of own tokens: one attention kernel computes them together.

    Attributes:
        begin, end: their own tokens are ``tokens[begin:end]``, row by row.
        path: (rows, length) int64, where each token of each row is computed.
    """

    begin: int
    end: int
    path: Tensor

    @property
    def is_contiguous(self) -> bool:
        """Whether all tokens of the rows are their own."""
        return self.path.numel() == self.end - self.begin


@dataclass(frozen=True)
class PackedRows:
    """Which tokens of a micro-batch are computed.

    Attributes:
        tokens: (num_computed,) int64.
        positions: (num_computed,) int64, of each in its row.
        index: (batch, length) int64, where each position of each row is computed; 0 for padding.
        groups: the rows, in the order of their own tokens.
        window: number of tokens to which a token attends, itself included; None: to all before it.
    """

    tokens: Tensor
    positions: Tensor
    index: Tensor
    groups: tuple[Group, ...]
    window: int | None = None

    def with_window(self, window: int) -> PackedRows:
        """The same rows under attention to a sliding window."""
        return replace(self, window=window)

    def mask(self, group: Group, dtype: torch.dtype) -> Tensor | None:
        """(own, length): 0 where an own token of a row attends, else -inf. None: own tokens alone, causal attention."""
        length = group.path.shape[1]
        own = (group.end - group.begin) // len(group.path)
        if own == length and (self.window is None or length <= self.window):
            return None
        attends = torch.ones(own, length, dtype=torch.bool, device=self.tokens.device).tril(length - own)
        if self.window is not None:
            attends = attends.triu(length - own + 1 - self.window)
        return torch.zeros(own, length, dtype=dtype, device=attends.device).masked_fill(~attends, -torch.inf)


def supervised_lengths(labels: Tensor) -> Tensor:
    """(batch,) int64: the positions of each row up to its last label; later ones change no loss. At least 1."""
    places = torch.arange(1, labels.shape[1] + 1)
    return ((labels.cpu() != IGNORE_INDEX) * places).amax(1).clamp(min=1)


def shared_with_previous(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """(batch,) int64: how many leading tokens each row shares with the row before it; 0 for the first.

    Args:
        tokens: (batch, length) int64, padded on the right.
        lengths: (batch,) int64, tokens of each row.
    """
    differ = tokens[1:] != tokens[:-1]
    same = np.where(differ.any(1), differ.argmax(1), tokens.shape[1])
    return np.append([0], np.minimum(same, np.minimum(lengths[1:], lengths[:-1])))


def pack_rows(tokens: Tensor, lengths: Tensor) -> PackedRows:
    """Finds what has to be computed of rows. Rows that begin alike share it if they are neighbors.

    Args:
        tokens: (batch, length) int64, padded on the right.
        lengths: (batch,) int64, tokens of each row, at least 1.

    Returns:
        Tensors on the device of ``tokens``.
    """
    rows, sizes = tokens.cpu().numpy(), lengths.cpu().numpy()
    shared = shared_with_previous(rows, sizes)
    own = sizes - shared

    # Own tokens are laid out by group, so that those of a group are one slice.
    shapes, group_of = np.unique(np.stack([own, sizes], 1), axis=0, return_inverse=True)
    order = np.argsort(group_of.ravel(), kind="stable")
    starts = np.empty_like(own)
    starts[order] = np.cumsum(own[order]) - own[order]
    index = np.zeros_like(rows)
    for i, (start, prefix, size) in enumerate(zip(starts, shared, sizes, strict=True)):
        index[i, :prefix] = index[i - 1, :prefix]
        index[i, prefix:size] = np.arange(start, start + size - prefix)

    # A shared token is written once for each of its rows, with the same values.
    real = np.arange(rows.shape[1]) < sizes[:, None]
    flat, positions = np.zeros((2, own.sum()), dtype=np.int64)
    flat[index[real]] = rows[real]
    positions[index[real]] = real.nonzero()[1]

    groups, begin, device = [], 0, tokens.device
    for number, (own_size, size) in enumerate(shapes):
        members = (group_of.ravel() == number).nonzero()[0]
        # A row that is the beginning of the row before it has no token of its own.
        if own_size:
            end = begin + len(members) * int(own_size)
            groups.append(Group(begin, end, torch.from_numpy(index[members, :size]).to(device)))
            begin = end
    flat_tokens, flat_positions, all_rows = (torch.from_numpy(each).to(device) for each in (flat, positions, index))
    return PackedRows(flat_tokens, flat_positions, all_rows, tuple(groups))
