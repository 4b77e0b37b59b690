"""Adapters start as nothing, alone are trained, are what PEFT's files and the merged weights say, in each family."""

from __future__ import annotations

import copy
import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import CASES, assert_same_logits, build, load, randomize, refused, save, tokens, write
from safetensors.torch import load_file
from torch import nn
from torchtune.models.llama3 import lora_llama3
from torchtune.models.llama3_2 import lora_llama3_2_1b
from torchtune.models.qwen2 import lora_qwen2
from torchtune.modules import TransformerDecoder
from torchtune.modules.peft import DoRALinear, LoRALinear, get_adapter_params
from transformers import AutoModelForCausalLM

from adapt_recipes.models import (
    HuggingFaceCheckpointer,
    TokenLosses,
    train_adapters_alone,
    with_lora,
)
from adapt_recipes.models.adapters import Adapters

RANK, ALPHA, DROPOUT = 3, 7.0, 0.25
ATTENTION: Any = ["q_proj", "k_proj", "v_proj", "output_proj"]
ADAPTERS: dict[str, Any] = {
    "lora_attn_modules": ATTENTION,
    "apply_lora_to_mlp": True,
    "lora_rank": RANK,
    "lora_alpha": ALPHA,
    "lora_dropout": DROPOUT,
}
FAMILIES = ["gemma3", "qwen3", "qwen1_5", "llama3_2"]


def adapted(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> TransformerDecoder:
    """``build(name)`` with adapters as they are at first."""
    return with_lora(build(name, dtype), **ADAPTERS | changes)


@torch.no_grad()
def randomize_adapters(decoder: TransformerDecoder) -> None:
    generator = torch.Generator().manual_seed(4)
    for parameter in get_adapter_params(decoder).values():
        parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


# ---- what is adapted and trained


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_at_first_the_model_is_its_base(name: str) -> None:
    """Biases too, and adapters have the dtype of the weights."""
    for dtype, atol in ((torch.float32, 1e-6), (torch.bfloat16, 0.0)):
        decoder, base = adapted(name, dtype).eval(), build(name, dtype)
        assert {parameter.dtype for parameter in decoder.parameters()} == {dtype}
        torch.testing.assert_close(decoder(tokens()), base(tokens()), rtol=0, atol=atol)
    layers = [module for module in decoder.modules() if isinstance(module, LoRALinear)]
    assert all(module.use_bias == (module.bias is not None) for module in layers)


@pytest.mark.parametrize("name", FAMILIES)
def test_which_layers_are_adapted(name: str) -> None:
    adapters = get_adapter_params(adapted(name, lora_attn_modules=["q_proj", "v_proj"], apply_lora_to_mlp=False))
    query = "q_proj.projection" if name.startswith(("gemma3", "qwen3")) else "q_proj"
    layers = range(CASES[name].sizes["num_layers"])
    assert set(adapters) == {
        f"layers.{layer}.attn.{place}.lora_{part}.weight"
        for layer in layers
        for place in (query, "v_proj")
        for part in "ab"
    }
    only_mlp = get_adapter_params(adapted(name, lora_attn_modules=[]))
    assert {key.split(".", 2)[2] for key in only_mlp} == {
        f"mlp.w{i}.lora_{part}.weight" for i in (1, 2, 3) for part in "ab"
    }


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_adapters_alone_are_trained(name: str, compute_dtype: torch.dtype | None) -> None:
    decoder = adapted(name)
    randomize_adapters(decoder)
    assert train_adapters_alone(decoder) == Adapters(rank=RANK, alpha=ALPHA, dropout=DROPOUT)
    rows, adapters = tokens(), get_adapter_params(decoder)
    TokenLosses(decoder, compute_dtype=compute_dtype)(rows, rows.roll(-1, 1)).mean().backward()
    for key, parameter in decoder.named_parameters():
        assert parameter.requires_grad == (key in adapters), key
        assert (parameter.grad is not None and parameter.grad.any().item()) == (key in adapters), key


def test_a_model_without_adapters_is_trained_whole() -> None:
    decoder = build("qwen3")
    assert train_adapters_alone(decoder) is None
    assert all(parameter.requires_grad for parameter in decoder.parameters())


@torch.no_grad()
@pytest.mark.parametrize("dropout", ["lora_dropout", "attn_dropout"])
@pytest.mark.parametrize("name", ["gemma3", "qwen3"])
def test_dropout_acts_in_training_only(name: str, dropout: str) -> None:
    rates = {"lora_dropout": 0.0, "attn_dropout": 0.0, dropout: 0.5}
    decoder = build(name, attn_dropout=rates["attn_dropout"])
    decoder = with_lora(decoder, **ADAPTERS | {"lora_dropout": rates["lora_dropout"]}).eval()
    randomize_adapters(decoder)
    assert torch.equal(decoder(tokens()), decoder(tokens()))
    decoder.train()
    assert not torch.equal(decoder(tokens()), decoder(tokens()))


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_built_on_the_meta_device(name: str) -> None:
    """As by the recipes of torchtune: adapters are initialized, rotary caches computed, weights loaded."""
    with torch.device("meta"):
        decoder = with_lora(CASES[name].build(**CASES[name].sizes), **ADAPTERS).eval()
    decoder.to_empty(device="cpu")
    for module in decoder.modules():
        if hasattr(module, "rope_init"):
            module.rope_init()
        if hasattr(module, "initialize_parameters"):
            module.to_empty(device="cpu")
            module.initialize_parameters()
    decoder.load_state_dict(build(name).state_dict(), strict=False)
    torch.testing.assert_close(decoder(tokens()), build(name)(tokens()), rtol=0, atol=1e-6)


def test_arguments_and_defaults_are_those_of_torchtune() -> None:
    ours, theirs = inspect.signature(with_lora).parameters, inspect.signature(lora_llama3_2_1b).parameters
    for name in list(ours)[1:]:
        assert ours[name].default == theirs[name].default, name
    for changes, settings, a_layer in (
        (ADAPTERS, (RANK, ALPHA, DROPOUT), 7),
        ({"lora_attn_modules": ["k_proj"]}, (8, 16, 0.0), 1),
    ):
        layers = [module for module in with_lora(build("qwen3"), **changes).modules() if isinstance(module, LoRALinear)]
        assert len(layers) == a_layer * CASES["qwen3"].sizes["num_layers"]
        assert {(module.rank, module.alpha, getattr(module.dropout, "p", 0.0)) for module in layers} == {settings}


# ---- what is saved


def train(decoder: TransformerDecoder, folder: Path) -> tuple[HuggingFaceCheckpointer, Adapters]:
    """As the recipes do; in the place of training, any values."""
    adapters = train_adapters_alone(decoder)
    assert adapters is not None
    checkpointer = load(decoder, folder)
    randomize_adapters(decoder)
    return checkpointer, adapters


@torch.no_grad()
def add(model: nn.Module, folder: Path) -> None:
    """What PEFT computes of its two files, to every projection that they name: W + alpha / r B A."""
    config = json.loads((folder / "adapter_config.json").read_text())
    weights = load_file(folder / "adapter_model.safetensors")
    used = set()
    for name, module in model.named_modules():
        if name.split(".")[-1] in config["target_modules"]:
            a, b = (f"base_model.model.{name}.lora_{matrix}.weight" for matrix in "AB")
            assert isinstance(module, nn.Linear) and weights[a].shape[0] == weights[b].shape[1] == config["r"]
            module.weight += config["lora_alpha"] / config["r"] * weights[b] @ weights[a]
            used |= {a, b}
    assert used == weights.keys()


@pytest.mark.parametrize("name", CASES)
def test_both_folders_compute_what_was_trained(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write(name, tmp_path / "base")
    decoder = adapted(name)
    monkeypatch.chdir(tmp_path)
    checkpointer, adapters = train(decoder.eval(), Path("base"))
    with torch.no_grad():
        assert (decoder(tokens()) - model(tokens()).logits).abs().max() > 0.5
    save(decoder, tmp_path / "run" / "model", checkpointer, adapters=adapters)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert_same_logits(decoder, merged)
    add(model, tmp_path / "run" / "adapter")
    assert_same_logits(decoder, model)
    for key, weight in model.state_dict().items():
        torch.testing.assert_close(weight, merged.state_dict()[key], rtol=0, atol=1e-6, msg=key)

    files = {path.parent.name: {file.name for file in path.parent.iterdir()} for path in (tmp_path / "run").glob("*/*")}
    assert not any("adapter" in file for file in files["model"]), "or transformers would add it to the merged weights"
    assert files["adapter"] == {"adapter_config.json", "adapter_model.safetensors"}
    assert json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text()) == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(tmp_path / "base"),
        "target_modules": ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": DROPOUT,
        "bias": "none",
        "inference_mode": True,
    }
    modes = {path.stat().st_mode for path in (tmp_path / "run").glob("*/*")}
    assert len(modes) == 1


@pytest.mark.parametrize(
    ("builder", "arguments", "targets"),
    [
        (lora_llama3, {"lora_attn_modules": ["k_proj"], "rope_base": 500}, ["k_proj", "lm_head"]),
        (lora_qwen2, {"lora_attn_modules": ["q_proj"], "rope_base": 500.0}, ["lm_head", "q_proj"]),
    ],
)
def test_builders_of_torchtune_on_a_model_from_scratch(
    tmp_path: Path, builder: Any, arguments: dict[str, Any], targets: list[str]
) -> None:
    sizes = {"vocab_size": 67, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 48}
    sizes |= {"intermediate_dim": 56, "max_seq_len": 40, "lora_rank": RANK, "lora_alpha": ALPHA}
    decoder = builder(**sizes, **arguments, norm_eps=1e-3, apply_lora_to_output=True).eval()
    randomize(decoder)
    adapters = train_adapters_alone(decoder)
    randomize_adapters(decoder)
    save(decoder, tmp_path / "model", HuggingFaceCheckpointer(None), adapters=adapters)
    assert_same_logits(decoder, AutoModelForCausalLM.from_pretrained(tmp_path / "model"))
    bare = copy.deepcopy(decoder)
    for key, parameter in get_adapter_params(bare).items():
        parameter.data.mul_("lora_b" not in key)
    save(bare, tmp_path / "bare" / "model", HuggingFaceCheckpointer(None), adapters=adapters)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "bare" / "model")
    add(base, tmp_path / "adapter")
    assert_same_logits(decoder, base)
    adapter_config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert adapter_config["target_modules"] == targets and adapter_config["base_model_name_or_path"] is None


def test_a_bf16_base_stays_one_and_is_merged_in_fp32(tmp_path: Path) -> None:
    write("llama3", tmp_path / "base", dtype=torch.bfloat16)
    decoder = adapted("llama3", torch.bfloat16)
    checkpointer, adapters = train(decoder, tmp_path / "base")
    save(decoder, tmp_path / "run" / "model", checkpointer, adapters=adapters)
    base, after = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "base", tmp_path / "run" / "model")
    )
    adapter = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert {weight.dtype for weight in (after | adapter).values()} == {torch.bfloat16}
    for key, weight in base.items():
        a, b = (adapter.get(f"base_model.model.{key.removesuffix('weight')}lora_{matrix}.weight") for matrix in "AB")
        if a is not None and b is not None:
            weight = (weight.float() + ALPHA / RANK * (b.float() @ a.float())).bfloat16()
        assert torch.equal(weight, after[key]), key


# ---- what is refused


def test_a_folder_has_to_fit_the_base(tmp_path: Path) -> None:
    write("qwen3", tmp_path)
    checkpointer = HuggingFaceCheckpointer(str(tmp_path))
    message = r"model.layers.0.mlp.gate_proj.weight is \(56, 48\) in the folder and \(64, 48\) in the model"
    with pytest.raises(ValueError, match=message):
        checkpointer.check(with_lora(build("qwen3", intermediate_dim=64), **ADAPTERS))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_attn_modules": ["q_proj", "o_proj"]}, "lora_attn_modules: there is no 'o_proj'; allowed: q_proj, k"),
        ({"lora_attn_modules": [], "apply_lora_to_mlp": False}, "lora_attn_modules: is empty"),
        ({"lora_rank": 0}, "lora_rank: 0 is not allowed; at least 1"),
    ],
    ids=str,
)
def test_adapters_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with refused(message):
        adapted("qwen3", **changes)


@pytest.mark.parametrize(
    ("projection", "message"),
    [
        (
            DoRALinear(128, 128, rank=RANK, alpha=ALPHA),
            "model: its adapters are DoRALinear, which is not supported; allowed: LoRALinear",
        ),
        (
            LoRALinear(128, 128, rank=RANK, alpha=ALPHA, dropout=DROPOUT, quantize_base=True),
            "model.quantize_base: true is not supported; allowed: false",
        ),
        (
            LoRALinear(48, 48, rank=4, alpha=ALPHA, dropout=DROPOUT),
            "model: its adapters are not all alike: Adapters(rank=3, alpha=7.0, dropout=0.25), "
            "Adapters(rank=4, alpha=7.0, dropout=0.25)",
        ),
    ],
    ids=["dora", "quantized", "unlike"],
)
def test_adapters_that_cannot_be_saved_for_peft_are_refused(projection: nn.Module, message: str) -> None:
    decoder = adapted("llama3")
    decoder.layers[1].attn.q_proj = projection
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        train_adapters_alone(decoder)
