"""Qwen 3: torchtune's Qwen 2 with heads normalized before RoPE, and without biases."""

from __future__ import annotations

from torch import nn
from torchtune.models.qwen2._component_builders import qwen2_mlp
from torchtune.models.qwen2._positional_embeddings import Qwen2RotaryPositionalEmbeddings
from torchtune.modules import MultiHeadAttention, RMSNorm, TiedLinear, TransformerDecoder, TransformerSelfAttentionLayer

from adapt_recipes.models.head_norm import NormedHeads


def qwen3_0_6b(*, max_seq_len: int) -> TransformerDecoder:
    """Qwen 3 0.6B.

    Args:
        max_seq_len: the longest input, in tokens. The RoPE cache has this length, so pass the training length.
    """
    return qwen3(
        vocab_size=151_936,
        num_layers=28,
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
        embed_dim=1024,
        intermediate_dim=3072,
        tie_word_embeddings=True,
        max_seq_len=max_seq_len,
    )


def qwen3(
    *,
    vocab_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    embed_dim: int,
    intermediate_dim: int,
    max_seq_len: int,
    tie_word_embeddings: bool,
    attn_dropout: float = 0.0,
    norm_eps: float = 1e-6,
    rope_base: float = 1_000_000.0,
) -> TransformerDecoder:
    """A Qwen 3 decoder (https://arxiv.org/abs/2505.09388).

    Rows of weights are laid out as in transformers: RoPE pairs the first half of a head with the second.

    Args:
        vocab_size, num_layers, num_heads, num_kv_heads, head_dim, embed_dim, intermediate_dim: sizes.
        max_seq_len: the longest input, in tokens; length of the RoPE cache.
        tie_word_embeddings: use the embeddings as the head.
        attn_dropout: of attention weights, in training.
        norm_eps: of all norms.
        rope_base: of RoPE.

    Raises:
        ValueError: sizes do not fit together.
    """
    rope = Qwen2RotaryPositionalEmbeddings(head_dim, max_seq_len, rope_base)
    layers = [
        TransformerSelfAttentionLayer(
            attn=MultiHeadAttention(
                embed_dim=embed_dim,
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                q_proj=_normed_heads(embed_dim, num_heads, head_dim, norm_eps),
                k_proj=_normed_heads(embed_dim, num_kv_heads, head_dim, norm_eps),
                v_proj=nn.Linear(embed_dim, num_kv_heads * head_dim, bias=False),
                output_proj=nn.Linear(num_heads * head_dim, embed_dim, bias=False),
                pos_embeddings=rope,
                max_seq_len=max_seq_len,
                attn_dropout=attn_dropout,
            ),
            mlp=qwen2_mlp(embed_dim, intermediate_dim),
            sa_norm=RMSNorm(embed_dim, eps=norm_eps),
            mlp_norm=RMSNorm(embed_dim, eps=norm_eps),
        )
        for _ in range(num_layers)
    ]

    # Embeddings, norm and head.
    embeddings = nn.Embedding(vocab_size, embed_dim)
    return TransformerDecoder(
        tok_embeddings=embeddings,
        layers=layers,
        max_seq_len=max_seq_len,
        num_heads=num_heads,
        head_dim=head_dim,
        norm=RMSNorm(embed_dim, eps=norm_eps),
        output=TiedLinear(embeddings) if tie_word_embeddings else nn.Linear(embed_dim, vocab_size, bias=False),
    )


def _normed_heads(embed_dim: int, num_heads: int, head_dim: int, norm_eps: float) -> NormedHeads:
    projection = nn.Linear(embed_dim, num_heads * head_dim, bias=False)
    return NormedHeads(projection, RMSNorm(head_dim, eps=norm_eps), head_dim=head_dim)
