"""Llama decoders of any size: Llama 2 and 3, SmolLM2, and others."""

from __future__ import annotations

from torch import nn
from torchtune.models.llama3_1._position_embeddings import Llama3ScaledRoPE
from torchtune.modules import (
    FeedForward,
    MultiHeadAttention,
    RMSNorm,
    RotaryPositionalEmbeddings,
    TiedLinear,
    TransformerDecoder,
    TransformerSelfAttentionLayer,
)

from adapt_recipes.models.architecture import Architecture
from adapt_recipes.models.rotations import Llama3Scaling, RotaryEmbeddings


def llama(a: Architecture, max_seq_len: int) -> TransformerDecoder:
    """A decoder with random weights. Unlike torchtune's ``llama3_2`` it has any ``head_dim`` and ``Llama3Scaling``.

    Args:
        a: its sizes and settings.
        max_seq_len: the longest input, in tokens; length of the RoPE cache.

    Raises:
        ValueError: sizes do not fit together.
    """
    dim, head_dim = a.hidden_size, a.head_dim

    # Position embeddings.
    rope: RotaryPositionalEmbeddings | Llama3ScaledRoPE
    if not isinstance(s := a.rope_scaling, Llama3Scaling):
        rope = RotaryPositionalEmbeddings(head_dim, max_seq_len, a.rope_theta)
    else:
        rope = Llama3ScaledRoPE(
            head_dim,
            max_seq_len,
            a.rope_theta,
            scale_factor=s.factor,
            low_freq_factor=s.low_freq_factor,
            high_freq_factor=s.high_freq_factor,
            old_context_len=s.original_max_position_embeddings,
        )

    # Layers.
    layers = [
        TransformerSelfAttentionLayer(
            attn=MultiHeadAttention(
                embed_dim=dim,
                num_heads=a.num_attention_heads,
                num_kv_heads=a.num_key_value_heads,
                head_dim=head_dim,
                q_proj=nn.Linear(dim, a.num_attention_heads * head_dim, bias=False),
                k_proj=nn.Linear(dim, a.num_key_value_heads * head_dim, bias=False),
                v_proj=nn.Linear(dim, a.num_key_value_heads * head_dim, bias=False),
                output_proj=nn.Linear(a.num_attention_heads * head_dim, dim, bias=False),
                pos_embeddings=RotaryEmbeddings(rope),
                max_seq_len=max_seq_len,
                attn_dropout=a.attention_dropout,
            ),
            mlp=FeedForward(
                gate_proj=nn.Linear(dim, a.intermediate_size, bias=False),
                down_proj=nn.Linear(a.intermediate_size, dim, bias=False),
                up_proj=nn.Linear(dim, a.intermediate_size, bias=False),
            ),
            sa_norm=RMSNorm(dim, eps=a.rms_norm_eps),
            mlp_norm=RMSNorm(dim, eps=a.rms_norm_eps),
        )
        for _ in range(a.num_hidden_layers)
    ]

    # Embeddings, norm and head.
    embeddings = nn.Embedding(a.vocab_size, dim)
    return TransformerDecoder(
        tok_embeddings=embeddings,
        layers=layers,
        max_seq_len=max_seq_len,
        num_heads=a.num_attention_heads,
        head_dim=head_dim,
        norm=RMSNorm(dim, eps=a.rms_norm_eps),
        output=TiedLinear(embeddings) if a.tie_word_embeddings else nn.Linear(dim, a.vocab_size, bias=False),
    )
