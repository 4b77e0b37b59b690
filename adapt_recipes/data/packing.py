"""Rows without their padding, and with each beginning that rows share only once.

Examples of a task often begin with the same tokens: the template, and the task's definition. Under causal attention the
hidden states of a beginning do not depend on what follows, so they are the same in all rows, and gradients of all rows
add up in them. Exact, not an approximation. (Ours; neither paper says how batches are computed.)
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from adapt_recipes.data.examples import IGNORE_INDEX

# Shorter beginnings are computed in each row. Attention of the tokens behind a shared one needs a mask, and the kernel
# then computes all pairs of tokens, not only those that a causal row needs: for half of a row or more it costs nothing.
MIN_SHARED = 1 / 8  # of the row


class Group(NamedTuple):
    """Rows of the same length with the same number of own tokens: one attention kernel computes them together.

    Attributes:
        rows: their number.
        own: tokens of each row that are computed for it, its last ones.
        length: tokens of each row, own and shared.
    """

    rows: int
    own: int
    length: int


@dataclass(frozen=True)
class PackedRows:
    """Which tokens of a micro-batch are computed.

    Attributes:
        tokens: (num_computed,) int64, the own tokens of the rows of each group in turn.
        positions: (num_computed,) int64, of each in its row.
        index: (batch, length) int64, where each position of each row is computed; 0 for padding.
        groups: of the rows that have own tokens.
        paths: (sum of rows * length of the groups,) int64, where all tokens of the rows of each group are computed;
            None: each row has all of its tokens for itself, so that this would be 0, 1, 2, ...
        window: number of tokens to which a token attends, itself included; None: to all before it.
        masks: those that exist, so that all layers share them.
    """

    tokens: Tensor
    positions: Tensor
    index: Tensor
    groups: tuple[Group, ...]
    paths: Tensor | None = None
    window: int | None = None
    masks: dict[tuple[object, ...], Tensor] = field(default_factory=dict)

    def with_window(self, window: int) -> PackedRows:
        """The same rows under attention to a sliding window."""
        return replace(self, window=window)

    def mask(self, group: Group, dtype: torch.dtype) -> Tensor | None:
        """(own, length): 0 where an own token of a row attends, else -inf. None: causal, all tokens are own."""
        _, own, length = group
        if own == length and (self.window is None or length <= self.window):
            return None
        key = own, length, self.window, dtype
        if key not in self.masks:
            attends = torch.ones(own, length, dtype=torch.bool, device=self.tokens.device).tril(length - own)
            if self.window is not None:
                attends = attends.triu(length - own + 1 - self.window)
            mask = torch.zeros(own, length, dtype=dtype, device=attends.device)
            self.masks[key] = mask.masked_fill(~attends, -torch.inf)
        return self.masks[key]


def supervised_lengths(labels: Tensor) -> Tensor:
    """(batch,) int64: the positions of each row up to its last label; later ones change no loss. At least 1."""
    places = torch.arange(1, labels.shape[1] + 1)
    return ((labels.cpu() != IGNORE_INDEX) * places).amax(1).clamp(min=1)


def shared_with_previous(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """(batch,) int64: how many leading tokens each row shares with the row before it, or 0 if they are few.

    Args:
        tokens: (batch, length) int64, padded on the right.
        lengths: (batch,) int64, tokens of each row.
    """
    differ = tokens[1:] != tokens[:-1]
    same = np.where(differ.any(1), differ.argmax(1), tokens.shape[1])
    shared = np.append([0], np.minimum(same, np.minimum(lengths[1:], lengths[:-1])))
    return np.where(shared >= MIN_SHARED * lengths, shared, 0)


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

    # Own tokens are laid out by group. (A row that is the beginning of the one before it has none, and no group.)
    shapes, group_of = np.unique(np.stack([own, sizes], 1), axis=0, return_inverse=True)
    order = np.argsort(group_of.ravel(), kind="stable")
    starts = np.empty_like(own)
    starts[order] = np.cumsum(own[order]) - own[order]
    index = np.zeros_like(rows)
    for i, (start, prefix, size) in enumerate(zip(starts, shared, sizes, strict=True)):
        index[i, :prefix] = index[i - 1, :prefix]
        index[i, prefix:size] = np.arange(start, start + size - prefix)
    counts = np.bincount(group_of.ravel())
    groups = tuple(Group(int(n), int(o), int(s)) for n, (o, s) in zip(counts, shapes, strict=True) if o)
    paths = np.concatenate([index[i, : sizes[i]] for i in order if own[i]])

    # A shared token is written once for each of its rows, with the same values.
    real = np.arange(rows.shape[1]) < sizes[:, None]
    flat, positions = np.zeros((2, own.sum()), dtype=np.int64)
    flat[index[real]] = rows[real]
    positions[index[real]] = real.nonzero()[1]
    as_tensors = (torch.from_numpy(each).to(tokens.device) for each in (flat, positions, index, paths))
    flat_tokens, flat_positions, all_rows, all_paths = as_tensors
    return PackedRows(flat_tokens, flat_positions, all_rows, groups, all_paths if shared.any() else None)
