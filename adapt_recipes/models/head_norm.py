"""A projection to heads that normalizes each head before RoPE."""

from __future__ import annotations

from torch import Tensor, nn


class NormedHeads(nn.Module):
    """A query or key projection followed by a norm over each head; it replaces the projection.

    Gemma 3 and Qwen 3 normalize before RoPE, torchtune's ``MultiHeadAttention(q_norm=, k_norm=)`` after it. With LoRA
    the projection is the one with the adapter, so that its output is normalized too.

    Args:
        projection: to all heads, concatenated.
        norm: over the ``head_dim`` values of a head; the same for every head.
        head_dim: of a head.
    """

    def __init__(self, projection: nn.Module, norm: nn.Module, *, head_dim: int) -> None:
        super().__init__()
        self.projection = projection
        self.norm = norm
        self.head_dim = head_dim

    def forward(self, x: Tensor) -> Tensor:
        """(..., embed_dim) -> (..., heads * head_dim), in the dtype of the projection's output."""
        return self.norm(self.projection(x).unflatten(-1, (-1, self.head_dim))).flatten(-2)
