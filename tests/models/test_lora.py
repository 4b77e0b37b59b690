"""Adapters start as nothing, and are at any time what torchtune merges into the weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from parity import CASES, build, tokens
from torchtune.modules import TransformerDecoder
from torchtune.modules.peft import LoRALinear, get_adapter_params, get_merged_lora_ckpt, set_trainable_params

from adapt_recipes.models import (
    TokenLosses,
    add_lora,
    gemma3_1b,
    lora_gemma3,
    lora_gemma3_1b,
    lora_qwen1_5_0_5b,
    lora_qwen3,
    lora_qwen3_0_6b,
    qwen1_5_0_5b,
    qwen3_0_6b,
)

RANK, ALPHA = 3, 5.0
ATTENTION: Any = ["q_proj", "k_proj", "v_proj", "output_proj"]
ADAPTERS: dict[str, Any] = {
    "lora_attn_modules": ATTENTION,
    "apply_lora_to_mlp": True,
    "lora_rank": RANK,
    "lora_alpha": ALPHA,
    "lora_dropout": 0.0,
}
NAMES = ["gemma3", "qwen3", "qwen1_5", "llama3_2"]


def make(name: str, **changes: Any) -> TransformerDecoder:
    """The LoRA form with the weights of ``build(name)``, and random adapters."""
    adapters, sizes = ADAPTERS | changes, CASES[name].sizes
    if name == "gemma3":
        decoder = lora_gemma3(**sizes, **adapters)
    elif name == "qwen3":
        decoder = lora_qwen3(**sizes, **adapters)
    else:
        decoder = add_lora(CASES[name].build(**sizes), **adapters)
    lacking = decoder.load_state_dict(build(name).state_dict(), strict=False)
    assert not lacking.unexpected_keys and set(lacking.missing_keys) == set(get_adapter_params(decoder))
    return decoder.eval()


def randomise_adapters(decoder: TransformerDecoder) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in get_adapter_params(decoder).values():
            parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_at_first_the_model_is_its_base(name: str) -> None:
    torch.testing.assert_close(make(name)(tokens()), build(name)(tokens()), rtol=0, atol=1e-6)


def test_adapters_leave_the_weights_that_they_are_put_beside() -> None:
    decoder = build("qwen1_5")  # with biases
    expected = copy.deepcopy(decoder.state_dict())
    add_lora(decoder, **ADAPTERS)
    assert all(torch.equal(decoder.state_dict()[key], weight) for key, weight in expected.items())
    adapted = [module for module in decoder.modules() if isinstance(module, LoRALinear)]
    assert all(module.use_bias == (module.bias is not None) for module in adapted)


@torch.no_grad()
def test_adapters_are_of_the_dtype_of_the_weights() -> None:
    decoder = add_lora(build("gemma3", torch.bfloat16), **ADAPTERS)
    assert {parameter.dtype for parameter in decoder.parameters()} == {torch.bfloat16}
    assert torch.equal(decoder(tokens()), build("gemma3", torch.bfloat16)(tokens()))


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_adapters_equal_merged_weights(name: str) -> None:
    """For queries and keys too, whose norm comes after the delta."""
    decoder, base = make(name), build(name)
    randomise_adapters(decoder)
    logits = decoder(tokens())
    assert (logits - base(tokens())).abs().max() > 0.1
    merged = get_merged_lora_ckpt(copy.deepcopy(decoder.state_dict()), rank=RANK, alpha=ALPHA)
    base.load_state_dict(merged)
    torch.testing.assert_close(logits, base(tokens()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_only_adapters_are_trained(name: str, compute_dtype: torch.dtype | None) -> None:
    decoder = make(name)
    randomise_adapters(decoder)
    adapters = get_adapter_params(decoder)
    set_trainable_params(decoder, adapters)
    rows = tokens()
    TokenLosses(decoder, compute_dtype=compute_dtype)(rows, rows.roll(-1, 1)).mean().backward()
    for key, parameter in decoder.named_parameters():
        assert (parameter.grad is not None and parameter.grad.any().item()) == (key in adapters), key


@pytest.mark.parametrize("name", NAMES)
def test_which_layers_are_adapted(name: str) -> None:
    adapters = get_adapter_params(make(name, lora_attn_modules=["q_proj", "v_proj"], apply_lora_to_mlp=False))
    query = "q_proj.projection" if name in ("gemma3", "qwen3") else "q_proj"
    layers = range(CASES[name].sizes["num_layers"])
    assert set(adapters) == {
        f"layers.{layer}.attn.{place}.lora_{part}.weight"
        for layer in layers
        for place in (query, "v_proj")
        for part in "ab"
    }
    only_mlp = get_adapter_params(make(name, lora_attn_modules=[]))
    assert {key.split(".", 2)[2] for key in only_mlp} == {
        f"mlp.w{i}.lora_{part}.weight" for i in (1, 2, 3) for part in "ab"
    }


@torch.no_grad()
@pytest.mark.parametrize("dropout", ["lora_dropout", "attn_dropout"])
@pytest.mark.parametrize(("name", "builder"), [("gemma3", lora_gemma3), ("qwen3", lora_qwen3)])
def test_dropout_acts_in_training_only(name: str, builder: Any, dropout: str) -> None:
    decoder = builder(**CASES[name].sizes | ADAPTERS | {dropout: 0.5}).eval()
    randomise_adapters(decoder)
    assert torch.equal(decoder(tokens()), decoder(tokens()))
    decoder.train()
    assert not torch.equal(decoder(tokens()), decoder(tokens()))


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_built_on_the_meta_device(name: str) -> None:
    """As torchtune's recipes do: adapters are initialised, rotations computed, weights loaded."""
    with torch.device("meta"):
        decoder = add_lora(CASES[name].build(**CASES[name].sizes), **ADAPTERS).eval()
    decoder.to_empty(device="cpu")
    for module in decoder.modules():
        if hasattr(module, "rope_init"):
            module.rope_init()
        if hasattr(module, "initialize_parameters"):
            module.to_empty(device="cpu")
            module.initialize_parameters()
    decoder.load_state_dict(build(name).state_dict(), strict=False)
    torch.testing.assert_close(decoder(tokens()), build(name)(tokens()), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("builder", "base"),
    [(lora_gemma3_1b, gemma3_1b), (lora_qwen3_0_6b, qwen3_0_6b), (lora_qwen1_5_0_5b, qwen1_5_0_5b)],
)
def test_named_sizes(builder: Any, base: Any) -> None:
    with torch.device("meta"):
        expected = base(max_seq_len=64)
        decoder = builder(ATTENTION, True, max_seq_len=64, lora_rank=4, lora_alpha=2, lora_dropout=0.1)
        default = builder(["k_proj"], max_seq_len=64)
    adapters = get_adapter_params(decoder)
    shapes = {key: weight.shape for key, weight in decoder.state_dict().items() if key not in adapters}
    assert shapes == {key: weight.shape for key, weight in expected.state_dict().items()}
    for built, settings, a_layer in ((decoder, (4, 2, 0.1), 7), (default, (8, 16, 0.0), 1)):
        adapted = [module for module in built.modules() if isinstance(module, LoRALinear)]
        assert len(adapted) == a_layer * len(expected.layers)
        assert {(module.rank, module.alpha, getattr(module.dropout, "p", 0.0)) for module in adapted} == {settings}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_attn_modules": ["q_proj", "o_proj"]}, "lora_attn_modules: there is no 'o_proj'; allowed: q_proj, k"),
        ({"lora_attn_modules": [], "apply_lora_to_mlp": False}, "lora_attn_modules: is empty"),
        ({"lora_rank": 0}, "lora_rank: 0 is not allowed; at least 1"),
    ],
    ids=str,
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        make("qwen3", **changes)
    assert str(caught.value).startswith(f"model.{message}") and "\n" not in str(caught.value)
