"""The floating-point operations that training needs per real token, for the share of a device's peak.

    6 x body parameters + 6 x head parameters x supervised share
    + sum over layers: 12 x heads x head_dim x mean number of attended tokens

A product of a token with a weight takes 2 operations, and twice as many in the backward pass. In a layer a token has a
score with each token that it attends to, and takes the weighted sum of their values: 2 x 2 operations per head and
dimension, and again twice as many backward. It attends to itself and to those before it in its example, on average to
half of it, and in a local layer of Gemma 3 at most to the sliding window.

Not counted: what an implementation does besides (padding, masked scores, the head at other positions, recomputed
layers), embeddings, RoPE, norms, activations, softmax, and the optimizer. Body parameters are the layers' matrices.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def flops_per_token(
    decoder: Any,  # torchtune's TransformerDecoder
    *,
    supervised_share: float,  # of the real tokens
    lengths: Tensor,  # (num_examples,) int64, real tokens
) -> float:
    """The formula of this module, for examples that are trained on equally often."""
    body = sum(p.numel() for p in decoder.layers.parameters() if p.ndim == 2)
    # A head that is tied to the embeddings has the same number.
    head = decoder.tok_embeddings.weight.numel()
    attention = 0.0
    for layer in (layer.attn for layer in decoder.layers):
        attended = mean_attended(lengths, getattr(layer, "sliding_window", None))
        attention += 12 * layer.num_heads * layer.head_dim * attended
    return 6 * body + 6 * head * supervised_share + attention


def mean_attended(lengths: Tensor, window: int | None) -> float:
    """The mean over all tokens of the number of tokens that each attends to, itself included."""
    inside = lengths if window is None else lengths.clamp(max=window)
    return float((inside * (inside + 1) / 2 + (lengths - inside) * inside).sum() / lengths.sum())
