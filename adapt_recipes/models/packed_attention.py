"""Attention over packed rows, in torchtune's attention modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchtune.modules import MultiHeadAttention, TransformerDecoder

from adapt_recipes.data.packing import PackedRows


def attend_over_packed_rows(decoder: TransformerDecoder) -> None:
    """Makes a decoder's layers accept ``PackedRows`` as their ``mask``; with any other mask they compute as before."""
    for module in decoder.modules():
        if isinstance(module, MultiHeadAttention):
            module._attention_call = _over_rows(module._attention_call)


def _over_rows(dense: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(q: Tensor, k: Tensor, v: Tensor, *, mask: Any, dropout_p: float, is_causal: bool) -> Tensor:
        if isinstance(mask, PackedRows):
            return packed_attention(q, k, v, mask, dropout_p=dropout_p)
        return dense(q, k, v, mask=mask, dropout_p=dropout_p, is_causal=is_causal)

    return call


# Compiled for one layout of rows it would be compiled again for the next.
@torch.compiler.disable
def packed_attention(q: Tensor, k: Tensor, v: Tensor, rows: PackedRows, *, dropout_p: float = 0.0) -> Tensor:
    """Causal attention of each token to the tokens before it in its row.

    Args:
        q, k, v: (1, num_heads, num_computed, head_dim).
        rows: which token belongs to which rows.
        dropout_p: of attention weights.

    Returns:
        (1, num_heads, num_computed, head_dim).
    """
    q, k, v = q[0], k[0], v[0]
    if rows.paths is not None:
        k, v = k.index_select(1, rows.paths), v.index_select(1, rows.paths)
    own, whole = [group.rows * group.own for group in rows.groups], [group.rows * group.length for group in rows.groups]
    outputs = []
    for group, *parts in zip(rows.groups, q.split(own, 1), k.split(whole, 1), v.split(whole, 1), strict=True):
        # (num_heads, rows * n, head_dim) -> (rows, num_heads, n, head_dim)
        query, key, value = (part.unflatten(1, (group.rows, -1)).transpose(0, 1) for part in parts)
        mask = rows.mask(group, q.dtype)
        output = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout_p, is_causal=mask is None
        )
        outputs.append(output.transpose(0, 1).flatten(1, 2))
    return torch.cat(outputs, 1).unsqueeze(0)
