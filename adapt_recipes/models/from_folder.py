"""Decoders with the sizes in a Hugging Face folder's ``config.json``, for every supported family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torchtune.models.gemma import gemma
from torchtune.models.qwen2 import qwen2
from torchtune.modules import TransformerDecoder

from adapt_recipes.models.architecture import (
    Architecture,
    architecture_of_config,
    architecture_of_decoder,
    check_length,
    read_config,
)
from adapt_recipes.models.families import FAMILIES
from adapt_recipes.models.gemma3 import gemma3
from adapt_recipes.models.llama import llama
from adapt_recipes.models.qwen3 import qwen3
from adapt_recipes.models.rotations import LinearScaling, RotaryEmbeddings, ScaledQwen2RoPE, ScaledRoPE, YarnScaling


def decoder_from_folder(path: str, max_seq_len: int) -> TransformerDecoder:
    """A decoder with random weights that computes the function that a folder's ``config.json`` describes.

    Args:
        path: a folder whose ``model_type`` is one of ``FAMILIES``, of any size: Llama 2 and 3, SmolLM2, Gemma, Gemma 3
            (text), Qwen 1.5, 2 and 3. RoPE is scaled as its ``rope_scaling`` or ``rope_parameters`` say, if
            ``Family.rope_types`` has the ``rope_type``.
        max_seq_len: the longest input, in tokens. The RoPE cache has this length, so pass the training length.

    Raises:
        ValueError: there is no such folder, its ``model_type`` is another, a setting in it is not supported, or
            ``max_seq_len`` is longer than the model is made for.
    """
    where = f"path: {Path(path) / 'config.json'}"
    config = read_config(path, key="path")
    asked = architecture_of_config(config, where=where)
    check_length(config, max_seq_len, where=where)
    try:
        decoder = _build(asked, max_seq_len)
    except ValueError as error:
        # The builder's, about sizes that do not fit together.
        raise ValueError(f"{where}: {error}") from None
    _scale_rope(decoder, asked, max_seq_len)
    built = architecture_of_decoder(decoder)
    if (name := asked.first_difference(built)) is not None:
        theirs, ours = getattr(asked, name), getattr(built, name)
        raise ValueError(f"{where}: {name} = {theirs!r} is not supported for {asked.model_type}; allowed: {ours!r}")
    return decoder


def _build(a: Architecture, max_seq_len: int) -> TransformerDecoder:
    """A decoder of the family, up to settings that its builder has no argument for."""
    if a.model_type == "llama":
        return llama(a, max_seq_len)
    sizes: dict[str, Any] = {
        "vocab_size": a.vocab_size,
        "num_layers": a.num_hidden_layers,
        "num_heads": a.num_attention_heads,
        "num_kv_heads": a.num_key_value_heads,
        "embed_dim": a.hidden_size,
        "intermediate_dim": a.intermediate_size,
        "max_seq_len": max_seq_len,
        "attn_dropout": a.attention_dropout,
        "norm_eps": a.rms_norm_eps,
    }
    # None where all layers have full attention, or none has.
    bases = {"rope_base": a.rope_theta, "local_rope_base": a.rope_local_base_freq}
    sizes |= {name: base for name, base in bases.items() if base is not None}
    match a.model_type:
        case "gemma":
            return gemma(**sizes, head_dim=a.head_dim)
        case "gemma3_text":
            every = a.full_attention_layers[0] + 1 if a.full_attention_layers else a.num_hidden_layers + 1
            return gemma3(
                **sizes,
                head_dim=a.head_dim,
                sliding_window=a.sliding_window or 1,
                sliding_window_pattern=every,
            )
        case "qwen2":
            return qwen2(**sizes, tie_word_embeddings=a.tie_word_embeddings)
        case "qwen3":
            return qwen3(**sizes, head_dim=a.head_dim, tie_word_embeddings=a.tie_word_embeddings)
        case _:
            raise AssertionError(a.model_type)


def _scale_rope(decoder: TransformerDecoder, a: Architecture, max_seq_len: int) -> None:
    """Replaces RoPE in the layers with full attention, because no builder of torchtune has these scalings."""
    if not isinstance(a.rope_scaling, LinearScaling | YarnScaling):
        return
    assert a.rope_theta is not None
    sizes = a.head_dim, max_seq_len, a.rope_theta, a.rope_scaling
    interleaved = FAMILIES[a.model_type].interleaved_rope
    rope = RotaryEmbeddings(ScaledRoPE(*sizes)) if interleaved else ScaledQwen2RoPE(*sizes)
    for number in a.full_attention_layers:
        decoder.layers[number].attn.pos_embeddings = rope
