"""The kinds of models as data, and how the weights of each are called and laid out in torchtune and in transformers."""

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
        names: Hugging Face's names of the weights -> torchtune's, ``{}`` for a layer's number.
        norm, activation, rotations: parts of the decoder, by class or as they are printed.
        settings: of ``config.json``, each with the values that the decoder computes with; the first is what
            transformers takes where a file is silent.
        silent: what transformers takes where a file is silent on other things, beside ``DEFAULTS``.
        neighbours: torchtune's rotations pair neighbouring rows of a head. Hugging Face's pair the first half of a head
            with the second, so the rows of queries and keys have to change places.
        scaled_embeddings: they are multiplied by the root of ``hidden_size``.
    """

    transformers_class: str
    names: Mapping[str, str]
    norm: type[nn.Module]
    activation: str
    rotations: tuple[type[nn.Module], ...]
    settings: dict[str, tuple[Any, ...]]
    silent: dict[str, Any] = field(default_factory=dict)
    neighbours: bool = False
    scaled_embeddings: bool = False


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

FAMILIES = {
    "llama": Family(  # Llama 2 and 3, SmolLM2, and whatever else says so
        transformers_class="LlamaForCausalLM",
        names=_LLAMA_NAMES,
        norm=RMSNorm,
        activation="SiLU()",
        rotations=(RotaryPositionalEmbeddings, Llama3ScaledRoPE),
        settings={"attention_bias": (False,), "mlp_bias": (False,), "hidden_act": ("silu",)},
        neighbours=True,
    ),
    "gemma": Family(
        transformers_class="GemmaForCausalLM",
        names=_LLAMA_NAMES,
        norm=GemmaRMSNorm,
        activation="GELU(approximate='tanh')",
        rotations=(RotaryPositionalEmbeddings,),
        settings={
            "attention_bias": (False,),
            "hidden_act": ("gelu_pytorch_tanh", "gelu"),  # the second in the oldest files, which mean the first
            "hidden_activation": ("gelu_pytorch_tanh",),
            "use_bidirectional_attention": (False,),
        },
        silent={"head_dim": 256, "num_key_value_heads": 16, "tie_word_embeddings": True},
        neighbours=True,
        scaled_embeddings=True,
    ),
    "gemma3_text": Family(
        transformers_class="Gemma3ForCausalLM",
        names=_LLAMA_NAMES | _NORMED_HEADS | _NORMS_AROUND_BLOCKS,
        norm=GemmaRMSNorm,
        activation="GELU(approximate='tanh')",
        rotations=(Qwen2RotaryPositionalEmbeddings,),
        settings={
            "attention_bias": (False,),
            "hidden_activation": ("gelu_pytorch_tanh",),
            "use_bidirectional_attention": (False,),
            "final_logit_softcapping": (None,),
            "attn_logit_softcapping": (None,),
        },
        silent={
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
    "qwen2": Family(  # Qwen 1.5 says so too
        transformers_class="Qwen2ForCausalLM",
        names=_QWEN2_NAMES,
        norm=RMSNorm,
        activation="SiLU()",
        rotations=(Qwen2RotaryPositionalEmbeddings,),
        settings={"hidden_act": ("silu",), "use_sliding_window": (False,)},
        silent={"num_key_value_heads": 32, "max_window_layers": 28},
    ),
    "qwen3": Family(
        transformers_class="Qwen3ForCausalLM",
        names=_LLAMA_NAMES | _NORMED_HEADS,
        norm=RMSNorm,
        activation="SiLU()",
        rotations=(Qwen2RotaryPositionalEmbeddings,),
        settings={"attention_bias": (False,), "hidden_act": ("silu",), "use_sliding_window": (False,)},
        silent={"head_dim": 128, "num_key_value_heads": 32, "max_window_layers": 28},
    ),
}


_LAYER = re.compile(r"\.(\d+)\.")


def of_any_layer(name: str) -> str:
    """A weight's name with ``{}`` for the layer's number."""
    return _LAYER.sub(".{}.", name)


def torchtune_name(family: Family, name: str) -> str | None:
    """Of a weight that has ``name`` in a Hugging Face folder; None: the family has no such weight."""
    return _renamed(name, family.names)


def huggingface_name(family: Family, key: str) -> str | None:
    """Of a weight that has ``key`` in a decoder; None: the family has no such weight."""
    return _renamed(key, {ours: theirs for theirs, ours in family.names.items()})


def is_adapter(key: str) -> bool:
    """Whether a decoder's weight is one of LoRA's."""
    return key.endswith((".lora_a.weight", ".lora_b.weight"))


def peft_name(family: Family, key: str) -> str:
    """What PEFT calls an adapter's weight that has ``key`` in a decoder."""
    projection, _, matrix = key.removesuffix(".weight").rpartition(".")
    name = huggingface_name(family, f"{projection}.weight")
    assert name is not None, key
    return f"base_model.model.{name.removesuffix('.weight')}.lora_{matrix[-1].upper()}.weight"


def to_torchtune(family: Family, key: str, weight: Tensor, *, head_dim: int) -> Tensor:
    """A folder's weight as a decoder has it under ``key``; the same memory unless rows change places."""
    return _regrouped(weight, 2, head_dim // 2) if _is_rotated(family, key) else weight


def to_huggingface(family: Family, key: str, weight: Tensor, *, head_dim: int) -> Tensor:
    """What ``to_torchtune`` was given; of a bias or an adapter's weight too."""
    return _regrouped(weight, head_dim // 2, 2) if _is_rotated(family, key) else weight


def _renamed(name: str, names: Mapping[str, str]) -> str | None:
    other, layer = names.get(of_any_layer(name)), _LAYER.search(name)
    return other.format(layer[1]) if other and layer else other


def _is_rotated(family: Family, key: str) -> bool:
    """Whether the rows of a weight are those of queries or keys, in another order than Hugging Face's."""
    return family.neighbours and (".q_proj." in key or ".k_proj." in key) and not key.endswith(".lora_a.weight")


def _regrouped(weight: Tensor, outer: int, inner: int) -> Tensor:
    """(heads * outer * inner, ...) -> (heads * inner * outer, ...)."""
    return weight.unflatten(0, (-1, outer, inner)).transpose(1, 2).flatten(0, 2)
