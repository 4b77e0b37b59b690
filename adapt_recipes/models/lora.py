"""LoRA for any decoder built from torchtune's modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from torchtune.modules import TransformerDecoder
from torchtune.modules.peft import LORA_ATTN_MODULES, LoRALinear

from adapt_recipes.models.head_norm import NormedHeads


def with_lora(
    decoder: TransformerDecoder,
    *,
    lora_attn_modules: Sequence[LORA_ATTN_MODULES],
    apply_lora_to_mlp: bool = False,
    lora_rank: int = 8,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
) -> TransformerDecoder:
    """Adds adapters to linear projections of a decoder, to the same ones in every layer; the head has none.

    Arguments and defaults are those of torchtune's LoRA builders.

    Args:
        decoder: changed in place; its weights are kept.
        lora_attn_modules: which projections of the attention.
        apply_lora_to_mlp: the three projections of the MLP as well.
        lora_rank: of the adapters.
        lora_alpha: the output of an adapter is scaled by ``lora_alpha / lora_rank``.
        lora_dropout: of the input of an adapter.

    Returns:
        The same decoder.

    Raises:
        ValueError: a projection is unknown, none is given, or the rank is below 1.
    """
    # Arguments.
    for name in lora_attn_modules:
        if name not in (allowed := get_args(LORA_ATTN_MODULES)):
            raise ValueError(f"lora_attn_modules: there is no '{name}'; allowed: {', '.join(allowed)}")
    if not lora_attn_modules and not apply_lora_to_mlp:
        raise ValueError("lora_attn_modules: is empty, and apply_lora_to_mlp is false: nothing would be trained")
    if lora_rank < 1:
        raise ValueError(f"lora_rank: {lora_rank} is not allowed; at least 1")

    # Replace each linear layer by one with an adapter and the same weights.
    for layer in decoder.layers:
        places = [(layer.attn, name) for name in lora_attn_modules]
        if apply_lora_to_mlp:
            places += [(layer.mlp, name) for name in ("w1", "w2", "w3")]
        for parent, name in places:
            if isinstance(getattr(parent, name), NormedHeads):
                parent, name = getattr(parent, name), "projection"
            linear = getattr(parent, name)
            adapted = LoRALinear(
                linear.in_features,
                linear.out_features,
                rank=lora_rank,
                alpha=lora_alpha,
                dropout=lora_dropout,
                use_bias=linear.bias is not None,
            ).to(linear.weight)
            adapted.weight, adapted.bias = linear.weight, linear.bias
            setattr(parent, name, adapted)
    return decoder
