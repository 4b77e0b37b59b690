"""A projection to heads, each of which is normalised before it is rotated."""

from __future__ import annotations

from torch import Tensor, nn


class NormedHeads(nn.Module):
    """A query or key projection and the norm of each head after it, in the place of the projection alone.

    Gemma 3 and Qwen 3 normalise before the rotation; torchtune's ``MultiHeadAttention(q_norm=, k_norm=)`` after it.
    With LoRA the projection is the adapted one, so that the norm sees its delta too.

    Args:
        projection: to the heads, side by side.
        norm: over the ``head_dim`` values of one head; every head has the same.
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
