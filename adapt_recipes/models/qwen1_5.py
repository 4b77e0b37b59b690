"""Qwen 1.5 0.5B, built by torchtune's builder of Qwen 2."""

from __future__ import annotations

from torchtune.models.qwen2 import qwen2
from torchtune.modules import TransformerDecoder


def qwen1_5_0_5b(*, max_seq_len: int) -> TransformerDecoder:
    """Qwen 1.5 0.5B.

    Args:
        max_seq_len: the longest input, in tokens. The RoPE cache has this length, so pass the training length.
    """
    return qwen2(
        vocab_size=151_936,
        num_layers=24,
        num_heads=16,
        num_kv_heads=16,
        embed_dim=1024,
        intermediate_dim=2816,
        max_seq_len=max_seq_len,
        norm_eps=1e-6,
        rope_base=1_000_000.0,
        tie_word_embeddings=True,
    )
