"""Llama decoders, built from a Hugging Face folder's ``config.json``."""

from __future__ import annotations

from pathlib import Path

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

from adapt_recipes.errors import nearest
from adapt_recipes.models.architecture import Architecture, architecture_of_config, read_config
from adapt_recipes.models.rotations import RotaryEmbeddings


def llama_from_folder(path: str, max_seq_len: int) -> TransformerDecoder:
    """A decoder with the sizes in a Hugging Face folder's ``config.json``, with random weights.

    Args:
        path: a folder with ``model_type`` llama (Llama 2 and 3, SmolLM2, and others).
        max_seq_len: the longest input, in tokens. The RoPE cache has this length, so pass the training length.

    Raises:
        ValueError: there is no such folder, its ``model_type`` is another, or a setting in it is not supported.
    """
    where = f"model.path: {Path(path) / 'config.json'}"
    config = read_config(path, key="model.path")
    if (model_type := str(config.get("model_type"))) != "llama":
        raise ValueError(f"{where}: model_type '{model_type}' is not supported here{nearest(model_type, ['llama'])}")
    longest = config.get("max_position_embeddings")
    if longest is not None and max_seq_len > longest:
        raise ValueError(f"{where}: max_seq_len {max_seq_len} exceeds the model's max_position_embeddings {longest}")
    architecture = architecture_of_config(config, where=where)
    try:
        return _build(architecture, max_seq_len)
    except ValueError as error:
        # torchtune's, about sizes that do not fit together.
        raise ValueError(f"{where}: {error}") from None


def _build(a: Architecture, max_seq_len: int) -> TransformerDecoder:
    """A decoder with random weights. Unlike torchtune's ``llama3_2`` it has any ``head_dim`` and RoPE scaling."""
    dim, head_dim = a.hidden_size, a.head_dim

    # Position embeddings.
    rope: RotaryPositionalEmbeddings | Llama3ScaledRoPE
    if a.rope_scaling is None:
        rope = RotaryPositionalEmbeddings(head_dim, max_seq_len, a.rope_theta)
    else:
        s = a.rope_scaling
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
