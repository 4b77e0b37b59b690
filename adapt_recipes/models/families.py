"""The supported model families as data: names and layout of their weights in torchtune and in transformers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torchtune.models import convert_weights
from torchtune.models.gemma.rms_norm import GemmaRMSNorm
from torchtune.models.llama3_1._position_embeddings import Llama3ScaledRoPE
from torchtune.models.qwen2 import _convert_weights as qwen2_weights
from torchtune.models.qwen2._positional_embeddings import Qwen2RotaryPositionalEmbeddings
from torchtune.modules import RMSNorm, RotaryPositionalEmbeddings


@dataclass(frozen=True)
class Family:
    """One ``model_type`` of ``config.json``.

    Attributes:
        transformers_class: for ``architectures``.
        names: Hugging Face's names of the weights -> torchtune's, with ``{}`` for the number of a layer.
        norm, activation, rope: parts of the decoder, by class or as printed.
        rope_types: the supported ones of ``config.json``, in the layers with full attention; the first is the default.
        settings: of ``config.json``, each with the values that the decoder supports; the first is the default of
            transformers.
        defaults: of transformers, for other keys of ``config.json``, besides ``DEFAULTS``.
        interleaved_rope: torchtune's RoPE pairs neighboring rows of a head. Hugging Face's pairs the first half of a
            head with the second, so the rows of queries and keys are permuted.
        scaled_embeddings: embeddings are multiplied by the square root of ``hidden_size``.
    """

    transformers_class: str
    names: Mapping[str, str]
    norm: type[nn.Module]
    activation: str
    rope: tuple[type[nn.Module], ...]
    rope_types: tuple[str, ...]
    settings: dict[str, tuple[Any, ...]]
    defaults: dict[str, Any] = field(default_factory=dict)
    interleaved_rope: bool = False
    scaled_embeddings: bool = False


# Of transformers, in every family.
DEFAULTS = {"rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "tie_word_embeddings": False, "attention_dropout": 0.0}

_LLAMA_NAMES = {theirs: ours for theirs, ours in convert_weights._FROM_HF.items() if ours is not None}
_QWEN2_NAMES = {theirs: ours for theirs, ours in qwen2_weights._FROM_HF.items() if ours is not None}
_NORMED_HEADS = {
    "model.layers.{}.self_attn.q_proj.weight": "layers.{}.attn.q_proj.projection.weight",
    "model.layers.{}.self_attn.q_norm.weight": "layers.{}.attn.q_proj.norm.scale",
    "model.layers.{}.self_attn.k_proj.weight": "layers.{}.attn.k_proj.projection.weight",
    "model.layers.{}.self_attn.k_norm.weight": "layers.{}.attn.k_proj.norm.scale",
}
_NORMS_AROUND_BLOCKS = {
    "model.layers.{}.post_attention_layernorm.weight": "layers.{}.sa_scale.scale",
    "model.layers.{}.pre_feedforward_layernorm.weight": "layers.{}.mlp_norm.scale",
    "model.layers.{}.post_feedforward_layernorm.weight": "layers.{}.mlp_scale.scale",
}

_SCALED_ROPE = ("default", "linear", "dynamic", "yarn")

FAMILIES = {
    # Llama 2 and 3, SmolLM2, and any folder with this model_type.
    "llama": Family(
        transformers_class="LlamaForCausalLM",
        names=_LLAMA_NAMES,
        norm=RMSNorm,
        activation="SiLU()",
        rope=(RotaryPositionalEmbeddings, Llama3ScaledRoPE),
        rope_types=(*_SCALED_ROPE, "llama3"),
        settings={"attention_bias": (False,), "mlp_bias": (False,), "hidden_act": ("silu",)},
        interleaved_rope=True,
    ),
    "gemma": Family(
        transformers_class="GemmaForCausalLM",
        names=_LLAMA_NAMES,
        norm=GemmaRMSNorm,
        activation="GELU(approximate='tanh')",
        rope=(RotaryPositionalEmbeddings,),
        rope_types=("default",),
        settings={
            "attention_bias": (False,),
            # "gelu" in the oldest files, which mean the other.
            "hidden_act": ("gelu_pytorch_tanh", "gelu"),
            "hidden_activation": ("gelu_pytorch_tanh",),
            "use_bidirectional_attention": (False,),
        },
        defaults={"head_dim": 256, "num_key_value_heads": 16, "tie_word_embeddings": True},
        interleaved_rope=True,
        scaled_embeddings=True,
    ),
    "gemma3_text": Family(
        transformers_class="Gemma3ForCausalLM",
        names=_LLAMA_NAMES | _NORMED_HEADS | _NORMS_AROUND_BLOCKS,
        norm=GemmaRMSNorm,
        activation="GELU(approximate='tanh')",
        rope=(Qwen2RotaryPositionalEmbeddings,),
        rope_types=("default", "linear"),
        settings={
            "attention_bias": (False,),
            "hidden_activation": ("gelu_pytorch_tanh",),
            "use_bidirectional_attention": (False,),
            "final_logit_softcapping": (None,),
            "attn_logit_softcapping": (None,),
        },
        defaults={
            "head_dim": 256,
            "num_key_value_heads": 4,
            "query_pre_attn_scalar": 256,
            "tie_word_embeddings": True,
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
            "sliding_window": 4096,
            "sliding_window_pattern": 6,
        },
        scaled_embeddings=True,
    ),
    # Qwen 1.5 and 2.
    "qwen2": Family(
        transformers_class="Qwen2ForCausalLM",
        names=_QWEN2_NAMES,
        norm=RMSNorm,
        activation="SiLU()",
        rope=(Qwen2RotaryPositionalEmbeddings,),
        rope_types=_SCALED_ROPE,
        settings={"hidden_act": ("silu",), "use_sliding_window": (False,)},
        defaults={"num_key_value_heads": 32, "max_window_layers": 28},
    ),
    "qwen3": Family(
        transformers_class="Qwen3ForCausalLM",
        names=_LLAMA_NAMES | _NORMED_HEADS,
        norm=RMSNorm,
        activation="SiLU()",
        rope=(Qwen2RotaryPositionalEmbeddings,),
        rope_types=_SCALED_ROPE,
        settings={"attention_bias": (False,), "hidden_act": ("silu",), "use_sliding_window": (False,)},
        defaults={"head_dim": 128, "num_key_value_heads": 32, "max_window_layers": 28},
    ),
}


_LAYER = re.compile(r"\.(\d+)\.")


def of_any_layer(name: str) -> str:
    """A weight's name with ``{}`` for the number of the layer."""
    return _LAYER.sub(".{}.", name)


def torchtune_name(family: Family, name: str) -> str | None:
    """torchtune's name of a weight of a Hugging Face folder; None: the family has no such weight."""
    return _renamed(name, family.names)


def huggingface_name(family: Family, key: str) -> str | None:
    """Hugging Face's name of a weight of a decoder; None: the family has no such weight."""
    return _renamed(key, {ours: theirs for theirs, ours in family.names.items()})


def is_adapter(key: str) -> bool:
    """Whether a weight of a decoder belongs to a LoRA adapter."""
    return key.endswith((".lora_a.weight", ".lora_b.weight"))


def peft_name(family: Family, key: str) -> str:
    """PEFT's name of an adapter's weight."""
    projection, _, matrix = key.removesuffix(".weight").rpartition(".")
    name = huggingface_name(family, f"{projection}.weight")
    assert name is not None, key
    return f"base_model.model.{name.removesuffix('.weight')}.lora_{matrix[-1].upper()}.weight"


def to_torchtune(family: Family, key: str, weight: Tensor, *, head_dim: int) -> Tensor:
    """Converts a weight of a Hugging Face folder to a decoder's layout; without a copy unless rows are permuted."""
    return _regrouped(weight, 2, head_dim // 2) if _is_permuted(family, key) else weight


def to_huggingface(family: Family, key: str, weight: Tensor, *, head_dim: int) -> Tensor:
    """The inverse of ``to_torchtune``, also for a bias and for the weights of an adapter."""
    return _regrouped(weight, head_dim // 2, 2) if _is_permuted(family, key) else weight


def _renamed(name: str, names: Mapping[str, str]) -> str | None:
    other, layer = names.get(of_any_layer(name)), _LAYER.search(name)
    return other.format(layer[1]) if other and layer else other


def _is_permuted(family: Family, key: str) -> bool:
    """Whether a weight computes queries or keys and has its rows in another order than Hugging Face's."""
    return family.interleaved_rope and (".q_proj." in key or ".k_proj." in key) and not key.endswith(".lora_a.weight")


def _regrouped(weight: Tensor, outer: int, inner: int) -> Tensor:
    """(heads * outer * inner, ...) -> (heads * inner * outer, ...)."""
    return weight.unflatten(0, (-1, outer, inner)).transpose(1, 2).flatten(0, 2)
