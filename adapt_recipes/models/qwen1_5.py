"""Qwen 1.5 0.5B, built by torchtune's builder of Qwen 2."""

from __future__ import annotations

from torchtune.models.qwen2 import qwen2
from torchtune.modules import TransformerDecoder
from torchtune.modules.peft import LORA_ATTN_MODULES

from adapt_recipes.models.lora import add_lora


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


def lora_qwen1_5_0_5b(
    lora_attn_modules: list[LORA_ATTN_MODULES],
    apply_lora_to_mlp: bool = False,
    *,
    max_seq_len: int,
    lora_rank: int = 8,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
) -> TransformerDecoder:
    """Qwen 1.5 0.5B with adapters; the arguments are those of ``qwen1_5_0_5b`` and ``add_lora``."""
    return add_lora(
        qwen1_5_0_5b(max_seq_len=max_seq_len),
        lora_attn_modules=lora_attn_modules,
        apply_lora_to_mlp=apply_lora_to_mlp,
        lora_rank=lora_rank,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
    )
