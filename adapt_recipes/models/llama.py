"""Decoders of the Llama kind, built from a Hugging Face folder's ``config.json``; and that file for a decoder."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

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
from adapt_recipes.models.rotations import Rotations


def llama_from_folder(path: str, max_seq_len: int) -> TransformerDecoder:
    """A decoder of the shape that a Hugging Face folder's ``config.json`` describes, with random weights.

    Args:
        path: a folder of ``model_type`` llama (Llama 2 and 3, SmolLM2, and whatever else says so).
        max_seq_len: the longest input, in tokens. The rotary cache is this long, so pass the training length.

    Raises:
        ValueError: no such folder, another kind of model, or something in it that this decoder cannot compute.
    """
    where = f"model.path: {Path(path) / 'config.json'}"
    config = read_config(path, key="model.path")
    longest = config.get("max_position_embeddings")
    if longest is not None and max_seq_len > longest:
        raise ValueError(f"{where}: max_seq_len {max_seq_len} is beyond the model's max_position_embeddings {longest}")
    architecture = LlamaArchitecture.from_config(config, where=where)
    try:
        return architecture.build(max_seq_len)
    except ValueError as error:  # torchtune's own, about sizes that do not go together
        raise ValueError(f"{where}: {error}") from None


def llama_config(
    decoder: TransformerDecoder,
    *,
    bos_token_id: int | None = None,
    eos_token_id: int | list[int] | None = None,
    pad_token_id: int | None = None,
) -> dict[str, Any]:
    """The ``config.json`` with which transformers computes what ``decoder`` does, for one that came from no folder.

    Args:
        decoder: of torchtune's Llama builders (``llama3_2`` and its elders) or of ``llama_from_folder``.
        bos_token_id, eos_token_id, pad_token_id: the tokenizer's; None: it has none.

    Raises:
        ValueError: a decoder that is not of the Llama kind.
    """
    return LlamaArchitecture.from_decoder(decoder).to_config() | {
        "max_position_embeddings": decoder.max_seq_len,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
    }


def read_config(folder: str | Path, *, key: str) -> dict[str, Any]:
    """A Hugging Face folder's ``config.json``; ``key`` is what names the folder in the user's config.

    Raises:
        ValueError: no folder, no file in it, or no JSON object in the file.
    """
    file = Path(folder) / "config.json"
    if not file.parent.is_dir():
        raise ValueError(f"{key}: there is no folder {file.parent}; `tune download` makes one of a model's name")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{key}: there is no {file}; is this a Hugging Face folder?") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{key}: {file} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{key}: {file} must hold a JSON object, not a {type(config).__name__}")
    return config


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretching of slow rotations, named as in ``config.json``."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class LlamaArchitecture:
    """What fixes the function that a Llama computes, its weights aside; named as in ``config.json``.

    ``rope_scaling`` None: plain rotations.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tie_word_embeddings: bool
    attention_dropout: float

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, where: str) -> LlamaArchitecture:
        """Reads both layouts: ``rope_theta`` and ``rope_scaling`` (transformers 4), or ``rope_parameters`` (5).

        Raises:
            ValueError: beginning with ``where``: another kind of model, or something that this decoder cannot compute.
        """
        model_type = str(config.get("model_type"))
        if model_type != "llama":
            raise ValueError(
                f"{where}: model_type '{model_type}' is not of the Llama kind{nearest(model_type, ['llama'])}"
            )
        for key, supported in {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}.items():
            if config.get(key, supported) != supported:
                raise ValueError(f"{where}: {key} = {config[key]!r} is not supported; allowed: {supported!r}")
        try:
            heads, hidden_size = config["num_attention_heads"], config["hidden_size"]
            rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
            return cls(
                vocab_size=config["vocab_size"],
                hidden_size=hidden_size,
                intermediate_size=config["intermediate_size"],
                num_hidden_layers=config["num_hidden_layers"],
                num_attention_heads=heads,
                num_key_value_heads=config.get("num_key_value_heads") or heads,
                head_dim=config.get("head_dim") or hidden_size // heads,
                # From here on what transformers takes where a file is silent.
                rms_norm_eps=config.get("rms_norm_eps", 1e-6),
                rope_theta=rope.get("rope_theta", config.get("rope_theta", 10_000.0)),
                rope_scaling=_rope_scaling(rope, config, where=where),
                tie_word_embeddings=config.get("tie_word_embeddings", False),
                attention_dropout=config.get("attention_dropout", 0.0),
            )
        except KeyError as error:
            raise ValueError(f"{where} has no {error}") from None

    @classmethod
    def from_decoder(cls, decoder: TransformerDecoder) -> LlamaArchitecture:
        """Reads it off the modules.

        Raises:
            ValueError: a decoder that is not of the Llama kind, naming what it has instead.
        """
        layer = decoder.layers[0]
        attention, mlp, rope = layer.attn, layer.mlp, layer.attn.pos_embeddings
        rope = rope.rope if isinstance(rope, Rotations) else rope
        scaling = None
        if isinstance(rope, Llama3ScaledRoPE):
            if rope.scale_factor != 1:
                scaling = RopeScaling(
                    rope.scale_factor, rope.low_freq_factor, rope.high_freq_factor, rope.old_context_len
                )
        elif not isinstance(rope, RotaryPositionalEmbeddings):
            raise ValueError(f"model: not of the Llama kind: its position embeddings are {type(rope).__name__}")
        for what, module, expected in (
            ("norm", decoder.norm, RMSNorm),
            ("activation", mlp.activation, nn.SiLU),
            ("norm before the attention", layer.sa_norm, RMSNorm),
            ("norm of the queries", attention.q_norm, type(None)),
            ("gate projection", mlp.w1, nn.Linear),
            ("query projection", attention.q_proj, nn.Linear),
        ):
            if not isinstance(module, expected) or getattr(module, "bias", None) is not None:
                raise ValueError(f"model: not of the Llama kind: its {what} is {module}")
        return cls(
            vocab_size=decoder.tok_embeddings.num_embeddings,
            hidden_size=decoder.tok_embeddings.embedding_dim,
            intermediate_size=mlp.w1.out_features,
            num_hidden_layers=len(decoder.layers),
            num_attention_heads=attention.num_heads,
            num_key_value_heads=attention.num_kv_heads,
            head_dim=attention.head_dim,
            rms_norm_eps=decoder.norm.eps,
            rope_theta=rope.base,
            rope_scaling=scaling,
            tie_word_embeddings=isinstance(decoder.output, TiedLinear),
            attention_dropout=attention.attn_dropout,
        )

    def to_config(self) -> dict[str, Any]:
        """In the older layout, which transformers 4 and 5 both read."""
        config = {field.name: getattr(self, field.name) for field in fields(self)}
        scaling = self.rope_scaling
        return config | {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "rope_scaling": scaling and {"rope_type": "llama3", **vars(scaling)},
            "torch_dtype": "float32",
        }

    def build(self, max_seq_len: int) -> TransformerDecoder:
        """A decoder with random weights. Unlike torchtune's ``llama3_2`` it takes any ``head_dim`` and rope scaling."""
        dim, head_dim = self.hidden_size, self.head_dim
        rope: RotaryPositionalEmbeddings | Llama3ScaledRoPE
        if self.rope_scaling is None:
            rope = RotaryPositionalEmbeddings(head_dim, max_seq_len, self.rope_theta)
        else:
            s = self.rope_scaling
            rope = Llama3ScaledRoPE(
                head_dim,
                max_seq_len,
                self.rope_theta,
                scale_factor=s.factor,
                low_freq_factor=s.low_freq_factor,
                high_freq_factor=s.high_freq_factor,
                old_context_len=s.original_max_position_embeddings,
            )
        layers = [
            TransformerSelfAttentionLayer(
                attn=MultiHeadAttention(
                    embed_dim=dim,
                    num_heads=self.num_attention_heads,
                    num_kv_heads=self.num_key_value_heads,
                    head_dim=head_dim,
                    q_proj=nn.Linear(dim, self.num_attention_heads * head_dim, bias=False),
                    k_proj=nn.Linear(dim, self.num_key_value_heads * head_dim, bias=False),
                    v_proj=nn.Linear(dim, self.num_key_value_heads * head_dim, bias=False),
                    output_proj=nn.Linear(self.num_attention_heads * head_dim, dim, bias=False),
                    pos_embeddings=Rotations(rope),
                    max_seq_len=max_seq_len,
                    attn_dropout=self.attention_dropout,
                ),
                mlp=FeedForward(
                    gate_proj=nn.Linear(dim, self.intermediate_size, bias=False),
                    down_proj=nn.Linear(self.intermediate_size, dim, bias=False),
                    up_proj=nn.Linear(dim, self.intermediate_size, bias=False),
                ),
                sa_norm=RMSNorm(dim, eps=self.rms_norm_eps),
                mlp_norm=RMSNorm(dim, eps=self.rms_norm_eps),
            )
            for _ in range(self.num_hidden_layers)
        ]
        embeddings = nn.Embedding(self.vocab_size, dim)
        return TransformerDecoder(
            tok_embeddings=embeddings,
            layers=layers,
            max_seq_len=max_seq_len,
            num_heads=self.num_attention_heads,
            head_dim=head_dim,
            norm=RMSNorm(dim, eps=self.rms_norm_eps),
            output=TiedLinear(embeddings) if self.tie_word_embeddings else nn.Linear(dim, self.vocab_size, bias=False),
        )

    def first_difference(self, other: LlamaArchitecture) -> str | None:
        """The first field in which the two compute differently, rounding and dropout aside; None: they agree."""
        for field in fields(self):
            if field.name == "attention_dropout":  # a choice of the training, not of the weights
                continue
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            rounded = isinstance(mine, float) and math.isclose(mine, theirs, rel_tol=1e-6)
            if mine != theirs and not rounded:
                return field.name
        return None


def _rope_scaling(rope: Mapping[str, Any], config: Mapping[str, Any], *, where: str) -> RopeScaling | None:
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        raise ValueError(
            f"{where}: rope_type '{rope_type}' is not supported{nearest(rope_type, ['default', 'llama3'])}"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"{where}: partial_rotary_factor = {rope['partial_rotary_factor']} is not supported; allowed: 1.0"
        )
    if rope_type == "default":
        return None
    scaling = RopeScaling(
        factor=rope["factor"],
        low_freq_factor=rope["low_freq_factor"],
        high_freq_factor=rope["high_freq_factor"],
        original_max_position_embeddings=rope.get("original_max_position_embeddings")
        or config["max_position_embeddings"],
    )
    return scaling if scaling.factor != 1 else None
