"""Trains LoRA adapters alone (https://arxiv.org/abs/2106.09685), and merges them into the weights at the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torchtune.modules.peft import LoRALinear, get_adapter_params, set_trainable_params


@dataclass(frozen=True)
class Adapters:
    """The settings that all adapters in a decoder share. The output of an adapter is scaled by ``alpha / rank``."""

    rank: int
    alpha: float
    dropout: float


def train_adapters_alone(decoder: nn.Module) -> Adapters | None:
    """Freezes all weights but the adapters. A decoder without adapters is left unchanged, so all its weights train.

    Returns:
        The settings of the adapters; None: there are none.

    Raises:
        ValueError: the adapters cannot be saved for PEFT.
    """
    parameters = get_adapter_params(decoder)
    if not parameters:
        return None
    found = set()
    for module in decoder.modules():
        if hasattr(module, "adapter_params"):
            if not isinstance(module, LoRALinear):
                kind = type(module).__name__
                raise ValueError(f"model: its adapters are {kind}, which is not supported; allowed: LoRALinear")
            if module._quantize_base:
                raise ValueError("model.quantize_base: true is not supported; allowed: false")
            found.add(Adapters(module.rank, module.alpha, getattr(module.dropout, "p", 0.0)))
    if len(found) > 1:
        raise ValueError(f"model: its adapters are not all alike: {', '.join(sorted(map(str, found)))}")
    set_trainable_params(decoder, parameters)
    return found.pop()


def merged(key: str, state_dict: Mapping[str, Tensor], adapters: Adapters | None) -> Tensor:
    """A weight of a decoder with its adapter merged into it, in fp32; a weight without an adapter is unchanged.

    Args:
        key: of the weight.
        state_dict: the decoder's.
        adapters: the decoder's.
    """
    weight, projection = state_dict[key], key.removesuffix(".weight")
    if (a := state_dict.get(f"{projection}.lora_a.weight")) is None:
        return weight
    assert adapters is not None
    b = state_dict[f"{projection}.lora_b.weight"]
    return weight.float() + adapters.alpha / adapters.rank * (b.float() @ a.float())
