"""The settings that must agree, besides names and shapes of weights, for two models to compute the same function."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import nn
from torchtune.models.gemma.gemma_norm_embedding import GemmaNormEmbeddings
from torchtune.models.llama3_1._position_embeddings import Llama3ScaledRoPE
from torchtune.modules import MultiHeadAttention, TiedLinear, TransformerDecoder

from adapt_recipes.errors import nearest
from adapt_recipes.models.families import DEFAULTS, FAMILIES, Family, is_adapter, of_any_layer
from adapt_recipes.models.gemma3 import SlidingWindowAttention
from adapt_recipes.models.rotations import (
    LinearScaling,
    Llama3Scaling,
    RotaryEmbeddings,
    ScaledQwen2RoPE,
    ScaledRoPE,
    YarnScaling,
)

RopeScaling = Llama3Scaling | LinearScaling | YarnScaling
# By their ``rope_type`` in ``config.json``. ``dynamic`` is none of them: see ``check_length``.
_SCALINGS: dict[str, type[RopeScaling]] = {"llama3": Llama3Scaling, "linear": LinearScaling, "yarn": YarnScaling}


@dataclass(frozen=True)
class Architecture:
    """Everything but the weights that determines the function of a decoder; named as in ``config.json``.

    Attributes:
        full_attention_layers: numbers of the layers with full causal attention. In the other layers a token attends to
            ``sliding_window`` tokens, itself included. (In ``config.json``: ``layer_types``.)
        sliding_window: None: all layers have full attention.
        rope_theta: RoPE base in the layers with full attention; None: there are none.
        rope_local_base_freq: RoPE base in the other layers; None: there are none.
        rope_scaling: in the layers with full attention; None: RoPE without scaling.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    full_attention_layers: tuple[int, ...]
    sliding_window: int | None
    rope_theta: float | None
    rope_local_base_freq: float | None
    rope_scaling: RopeScaling | None
    tie_word_embeddings: bool
    attention_dropout: float

    def first_difference(self, other: Architecture) -> str | None:
        """The first field that differs, up to rounding and ignoring dropout, which training may choose; None: none."""
        for name in (field.name for field in fields(self)):
            mine, theirs = getattr(self, name), getattr(other, name)
            rounded = isinstance(mine, float) and theirs is not None and math.isclose(mine, theirs, rel_tol=1e-6)
            if mine != theirs and not rounded and name != "attention_dropout":
                return name
        return None


# ---- from and to config.json


def read_config(folder: str | Path, *, key: str, name: str = "config.json") -> dict[str, Any]:
    """A file of settings in a Hugging Face folder; ``key`` is the key of the user's config that names the folder.

    Raises:
        ValueError: the folder or the file does not exist, or the file is not a JSON object.
    """
    file = Path(folder) / name
    if not file.parent.is_dir():
        advice = "`tune download MODEL --output-dir FOLDER` creates one"
        raise ValueError(f"{key}: there is no folder {file.parent}; {advice}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{key}: there is no {file}; is this a Hugging Face folder?") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{key}: {file} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{key}: {file} must contain a JSON object, not a {type(config).__name__}")
    return config


def architecture_of_config(config: Mapping[str, Any], *, where: str) -> Architecture:
    """Reads a ``config.json`` of either layout: ``rope_theta`` and ``rope_scaling``, or ``rope_parameters``.

    The first is that of transformers 4, the second that of transformers 5.

    Args:
        config: a folder's ``config.json``.
        where: prefix of an error.

    Raises:
        ValueError: the model type is unknown, a setting is not supported, or a number is invalid or missing.
    """
    model_type = str(config.get("model_type"))
    if model_type == "gemma3":
        hint = "with the image encoder is not supported; Gemma 3 1B has none and is 'gemma3_text'"
        raise ValueError(f"{where}: model_type 'gemma3' {hint}")
    if model_type not in FAMILIES:
        raise ValueError(f"{where}: model_type '{model_type}' is not supported{nearest(model_type, FAMILIES)}")
    family = FAMILIES[model_type]
    config = {**DEFAULTS, **family.defaults, **config}
    given = _flat({key: value for key, value in config.items() if value is not None}, where=where)
    settings = _Settings(given, where)
    number = settings.number

    # Settings whose defaults depend on others.
    num_layers, heads = number("num_hidden_layers", int), number("num_attention_heads", int)
    settings.values = {"num_key_value_heads": heads, "head_dim": number("hidden_size", int) // heads, **given}
    if "sliding_window_pattern" in given:
        number("sliding_window_pattern", int)
    full_layers = _full_attention_layers(given, num_layers, where=where)
    windowed = len(full_layers) < num_layers
    # Of no effect without windowed layers.
    if not windowed:
        settings.values["use_sliding_window"] = False

    _check_supported(settings, family)
    return Architecture(
        model_type=model_type,
        vocab_size=number("vocab_size", int),
        hidden_size=number("hidden_size", int),
        intermediate_size=number("intermediate_size", int),
        num_hidden_layers=num_layers,
        num_attention_heads=heads,
        num_key_value_heads=number("num_key_value_heads", int),
        head_dim=number("head_dim", int),
        rms_norm_eps=number("rms_norm_eps"),
        full_attention_layers=full_layers,
        sliding_window=number("sliding_window", int) if windowed else None,
        rope_theta=number("rope_theta") if full_layers else None,
        rope_local_base_freq=number("rope_local_base_freq") if windowed else None,
        rope_scaling=_rope_scaling(settings) if full_layers else None,
        tie_word_embeddings=settings.values.get("tie_word_embeddings", False),
        attention_dropout=settings.values.get("attention_dropout", 0.0),
    )


def is_dynamic(config: Mapping[str, Any]) -> bool:
    """Whether the RoPE of a ``config.json`` depends on the length of the input; see ``check_length``."""
    return _flat(dict(config), where="")["rope_type"] == "dynamic"


def check_length(config: Mapping[str, Any], max_seq_len: int, *, where: str) -> None:
    """Refuses inputs that are longer than the model of a ``config.json`` is made for.

    With ``linear`` and ``yarn``, ``max_position_embeddings`` may be the length before scaling, as vLLM reads it.

    With ``dynamic``, RoPE is not scaled up to ``max_position_embeddings``. Beyond, transformers computes all angles
    from the longest row of a batch, so the loss of an example would depend on the others in its batch: we refuse it.

    Raises:
        ValueError: ``max_seq_len`` is too long, or the length is missing or invalid.
    """
    given = _flat(dict(config), where=where)
    settings, rope_type = _Settings(given, where), given["rope_type"]
    if given.get("max_position_embeddings") is None and rope_type != "dynamic":
        return
    longest = settings.number("max_position_embeddings", int)
    limit = f"the model's max_position_embeddings {longest}"
    if rope_type == "dynamic":
        limit += ", beyond which the angles of 'dynamic' RoPE depend on the longest row of a batch"
    if rope_type in ("linear", "yarn"):
        before = longest if rope_type == "linear" else settings.number("original_max_position_embeddings", int)
        longest = max(longest, int(settings.number("factor") * before))
        limit = f"the {longest} tokens of the model's {rope_type} rope_scaling"
    if max_seq_len > longest:
        raise ValueError(f"{where}: max_seq_len {max_seq_len} exceeds {limit}")


@dataclass
class _Settings:
    """The settings of a ``config.json``, checked as they are read; errors begin with ``where``."""

    values: dict[str, Any]
    where: str

    def number(self, key: str, kind: type[int] | type[float] = float) -> Any:
        """A number above 0."""
        if (value := self.values.get(key)) is None:
            raise ValueError(f"{self.where} has no '{key}'")
        if isinstance(value, bool) or not isinstance(value, (int, kind)) or not 0 < value < math.inf:
            raise ValueError(f"{self.where}: {key} = {value!r} has to be a {'whole ' * (kind is int)}number above 0")
        return value

    def allow(self, key: str, *allowed: Any) -> None:
        """Refuses a value that is not allowed; the first one is the default."""
        if (value := self.values.get(key, allowed[0])) not in allowed:
            choice = " or ".join(map(repr, allowed))
            raise ValueError(f"{self.where}: {key} = {value!r} is not supported; allowed: {choice}")


def _check_supported(settings: _Settings, family: Family) -> None:
    """Refuses settings that the decoders of a family cannot compute."""
    for key, values in family.settings.items():
        settings.allow(key, *values)
    settings.allow("rope_type", *family.rope_types)
    settings.allow("rope_parameters.sliding_attention.rope_type", "default")
    # transformers ignores both where there are two kinds of layers.
    if "rope_local_base_freq" in family.defaults:
        settings.allow("rope_parameters.rope_type", "default")
        settings.allow("rope_scaling.type", "default")
    settings.allow("partial_rotary_factor", 1.0)
    settings.allow("tie_word_embeddings", False, True)
    # torchtune's attention divides scores by the square root of head_dim.
    if "query_pre_attn_scalar" in family.defaults:
        settings.allow("query_pre_attn_scalar", settings.values["head_dim"])


def _rope_scaling(settings: _Settings) -> RopeScaling | None:
    """The scaling of RoPE; None: there is none, or it changes nothing."""
    number, rope_type = settings.number, settings.values["rope_type"]
    if rope_type == "dynamic":
        number("factor")
    kind = _SCALINGS.get(rope_type)
    if kind is None:
        return None
    if kind is not YarnScaling:
        scaling = kind(**{field.name: number(field.name) for field in fields(kind)})
        return scaling if scaling.factor != 1 else None

    # The defaults of transformers.
    values = settings.values = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True, **settings.values}
    settings.allow("truncate", True, False)
    factor = number("factor")
    attention_factor = _attention_factor(factor, 1.0)
    if "attention_factor" in values:
        attention_factor = number("attention_factor")
    elif "mscale" in values and "mscale_all_dim" in values:
        numerator, denominator = (_attention_factor(factor, number(key)) for key in ("mscale", "mscale_all_dim"))
        attention_factor = numerator / denominator
    return YarnScaling(
        factor=factor,
        original_max_position_embeddings=number("original_max_position_embeddings", int),
        attention_factor=attention_factor,
        beta_fast=number("beta_fast"),
        beta_slow=number("beta_slow"),
        truncate=values["truncate"],
    )


def _attention_factor(factor: float, mscale: float) -> float:
    # sqrt(1 / t) = 0.1 ln(factor) + 1 of YaRN; its square divides the temperature of the softmax.
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


def _flat(known: dict[str, Any], *, where: str) -> dict[str, Any]:
    """Moves the settings of RoPE to the top level, as in the layout of transformers 4."""

    def mapping(within: Mapping[str, Any], key: str) -> dict[str, Any]:
        value = within.get(key)
        if not isinstance(value, dict | None):
            raise ValueError(f"{where}: {key} = {value!r} has to be a JSON object")
        return {name: setting for name, setting in (value or {}).items() if setting is not None}

    # Either of all layers, or one mapping for each type of layer.
    parameters = mapping(known, "rope_parameters")
    local = mapping(parameters, "sliding_attention")
    full, scaling = mapping(parameters, "full_attention"), mapping(known, "rope_scaling")
    rope = (full | scaling) or parameters
    original = "original_max_position_embeddings"
    return {
        **known,
        **rope,
        # As in transformers, that of the top level takes precedence.
        original: known.get(original, rope.get(original, known.get("max_position_embeddings"))),
        "rope_type": rope.get("rope_type", rope.get("type", "default")),
        "rope_parameters.rope_type": parameters.get("rope_type", "default"),
        "rope_scaling.type": "default" if "rope_type" in scaling else scaling.get("type", "default"),
        "rope_local_base_freq": local.get("rope_theta", known.get("rope_local_base_freq")),
        "rope_parameters.sliding_attention.rope_type": local.get("rope_type", "default"),
    }


def _full_attention_layers(known: Mapping[str, Any], num_layers: int, *, where: str) -> tuple[int, ...]:
    kinds = ("full_attention", "sliding_attention")
    if (types := known.get("layer_types")) is not None:
        if not isinstance(types, list) or len(types) != num_layers or any(kind not in kinds for kind in types):
            allowed = " or ".join(map(repr, kinds))
            raise ValueError(f"{where}: layer_types has to name {allowed} for each of the {num_layers} layers")
        return tuple(i for i, kind in enumerate(types) if kind == "full_attention")
    if pattern := known.get("sliding_window_pattern"):
        return tuple(range(pattern - 1, num_layers, pattern))
    first_windowed = known.get("max_window_layers", num_layers) if known.get("use_sliding_window") else num_layers
    return tuple(range(min(first_windowed, num_layers)))


def huggingface_config(
    decoder: TransformerDecoder,
    *,
    bos_token_id: int | None = None,
    eos_token_id: int | list[int] | None = None,
    pad_token_id: int | None = None,
) -> dict[str, Any]:
    """A ``config.json`` with which transformers computes the same as ``decoder``, for one that came from no folder.

    It has the layout of transformers 4, which transformers 5 reads too.

    Args:
        decoder: of one of the ``FAMILIES``, with or without adapters.
        bos_token_id, eos_token_id, pad_token_id: of the tokenizer; None: it has none.

    Raises:
        ValueError: the decoder is of none of the ``FAMILIES``.
    """
    architecture = architecture_of_decoder(decoder)
    family = FAMILIES[architecture.model_type]
    config = {key: value for key, value in vars(architecture).items() if value is not None}
    full_layers = config.pop("full_attention_layers")
    if "sliding_window_pattern" in family.defaults:
        kinds = ["full_attention" if i in full_layers else "sliding_attention" for i in range(len(decoder.layers))]
        config |= {"layer_types": kinds, "query_pre_attn_scalar": architecture.head_dim}
    if (scaling := architecture.rope_scaling) is not None:
        rope_type = next(name for name, kind in _SCALINGS.items() if isinstance(scaling, kind))
        config["rope_scaling"] = {"rope_type": rope_type, **vars(scaling)}
    return config | {
        **{key: values[0] for key, values in family.settings.items()},
        "architectures": [family.transformers_class],
        "max_position_embeddings": decoder.max_seq_len,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
        "torch_dtype": "float32",
    }


# ---- from a decoder


def architecture_of_decoder(decoder: TransformerDecoder) -> Architecture:
    """Reads the architecture from the modules of a decoder.

    Raises:
        ValueError: the decoder is of none of the ``FAMILIES``; it names the most similar one and a difference.
    """
    # The most similar family, which has to fit.
    keys = {of_any_layer(key) for key in decoder.state_dict() if not is_adapter(key)}
    misfits = {model_type: _misfits(decoder, keys, family) for model_type, family in FAMILIES.items()}
    model_type = min(misfits, key=lambda model_type: len(misfits[model_type]))
    if misfits[model_type]:
        reason = f"it is most similar to '{model_type}', but {misfits[model_type][0]}"
        raise ValueError(f"model: its architecture is none of {', '.join(FAMILIES)}: {reason}")

    # Attention, position embeddings and norms.
    attentions = [layer.attn for layer in decoder.layers]
    local = [attention for attention in attentions if isinstance(attention, SlidingWindowAttention)]
    others = [attention for attention in attentions if not isinstance(attention, SlidingWindowAttention)]
    norms = [module for module in decoder.modules() if isinstance(module, FAMILIES[model_type].norm)]
    return Architecture(
        model_type=model_type,
        vocab_size=decoder.tok_embeddings.num_embeddings,
        hidden_size=decoder.tok_embeddings.embedding_dim,
        intermediate_size=decoder.layers[0].mlp.w1.weight.shape[0],
        num_hidden_layers=len(decoder.layers),
        num_attention_heads=attentions[0].num_heads,
        num_key_value_heads=attentions[0].num_kv_heads,
        head_dim=attentions[0].head_dim,
        rms_norm_eps=_one("rms_norm_eps", [norm.eps for norm in norms]),
        full_attention_layers=tuple(i for i, attention in enumerate(attentions) if attention in others),
        sliding_window=_one("sliding_window", [attention.sliding_window for attention in local]),
        rope_theta=_one("rope_theta", [_rope(attention).base for attention in others]),
        rope_local_base_freq=_one("rope_local_base_freq", [_rope(attention).base for attention in local]),
        rope_scaling=_one("rope_scaling", [_scaling_of(_rope(attention)) for attention in others]),
        tie_word_embeddings=isinstance(decoder.output, TiedLinear),
        attention_dropout=attentions[0].attn_dropout,
    )


def _misfits(decoder: TransformerDecoder, keys: set[str], family: Family) -> list[str]:
    """The ways in which a decoder, whose weights have these names in any layer, differs from the family."""
    layer = decoder.layers[0]
    parts = {
        "attention": (layer.attn, MultiHeadAttention),
        "position embedding": (_rope(layer.attn), family.rope),
        "norm": (decoder.norm, family.norm),
    }
    wrong = [
        f"its {what} is a {type(part).__name__}" for what, (part, kind) in parts.items() if not isinstance(part, kind)
    ]
    if repr(layer.mlp.activation) != family.activation:
        wrong.append(f"its activation is {layer.mlp.activation}")
    if isinstance(decoder.tok_embeddings, GemmaNormEmbeddings) != family.scaled_embeddings:
        wrong.append(f"its embedding is a {type(decoder.tok_embeddings).__name__}")
    names = set(family.names.values()) - ({"output.weight"} if isinstance(decoder.output, TiedLinear) else set())
    wrong += [f"it has no {name}" for name in sorted(names - keys)]
    wrong += [f"it has {key}" for key in sorted(keys - names)]
    return wrong


def _rope(attention: MultiHeadAttention) -> nn.Module:
    """torchtune's module of the position embeddings."""
    embeddings = attention.pos_embeddings
    return embeddings.rope if isinstance(embeddings, RotaryEmbeddings) else embeddings


def _scaling_of(rope: nn.Module) -> RopeScaling | None:
    if isinstance(rope, Llama3ScaledRoPE):
        scaling = Llama3Scaling(rope.scale_factor, rope.low_freq_factor, rope.high_freq_factor, rope.old_context_len)
        return scaling if scaling.factor != 1 else None
    return rope.scaling if isinstance(rope, ScaledRoPE | ScaledQwen2RoPE) else None


def _one(name: str, values: Sequence[Any]) -> Any:
    """The value of all layers, which has to be the same; None: there are no such layers."""
    if len(set(values)) > 1:
        raise ValueError(f"model: {name} is not the same in all layers: {', '.join(sorted(map(str, set(values))))}")
    return values[0] if values else None
