"""Adapters: what is trained is what PEFT's files and the merged weights say, in every family."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import CASES, build, randomise, tokens
from safetensors.torch import load_file
from torch import nn
from torchtune.models.llama3 import lora_llama3
from torchtune.models.qwen2 import lora_qwen2
from torchtune.modules import TransformerDecoder
from torchtune.modules.peft import DoRALinear, LoRALinear, get_adapter_params
from transformers import AutoModelForCausalLM

from adapt_recipes.models import HuggingFaceCheckpointer, add_lora, huggingface_config, train_adapters_alone
from adapt_recipes.models.adapters import Adapters

ATTENTION = ["q_proj", "k_proj", "v_proj", "output_proj"]
TARGETS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
RANK, ALPHA = 3, 7.0


class Tokenizer:
    def save(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")


def write(name: str, folder: Path, *, dtype: torch.dtype = torch.float32) -> Any:
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CASES[name].config), attn_implementation="sdpa").eval()
    randomise(model, seed=3)
    model.to(dtype).save_pretrained(folder)
    return model


def with_lora(name: str, modules: Any = ATTENTION, *, mlp: bool = True) -> TransformerDecoder:
    arguments: dict[str, Any] = {"lora_attn_modules": modules, "apply_lora_to_mlp": mlp}
    return add_lora(build(name), **arguments, lora_rank=RANK, lora_alpha=ALPHA, lora_dropout=0.25)


def train(decoder: TransformerDecoder, checkpointer: HuggingFaceCheckpointer) -> Adapters:
    """As the recipes do; in the place of training, any values."""
    adapters = train_adapters_alone(decoder)
    assert adapters is not None
    checkpointer.check(decoder)
    weights = checkpointer.load() or {}
    decoder.load_state_dict(weights, strict=False)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    for key, weight in weights.items():
        assert torch.equal(decoder.state_dict()[key], weight.float()), "the base is frozen"
    decoder.eval()
    return adapters


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


@torch.no_grad()
def assert_same(decoder: TransformerDecoder, model: Any) -> None:
    torch.testing.assert_close(decoder(tokens()), model(tokens()).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_both_folders_compute_what_was_trained(tmp_path: Path, name: str) -> None:
    model = write(name, tmp_path / "base")
    decoder, checkpointer = with_lora(name), HuggingFaceCheckpointer(str(tmp_path / "base"))
    adapters = train(decoder, checkpointer)
    assert checkpointer.config is not None
    with torch.no_grad():
        assert (decoder(tokens()) - model(tokens()).logits).abs().max() > 0.5
    checkpointer.save(
        decoder.state_dict(),
        tmp_path / "run" / "model",
        config=checkpointer.config,
        tokenizer=Tokenizer(),
        adapters=adapters,
    )
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert_same(decoder, merged)
    add(model, tmp_path / "run" / "adapter")
    assert_same(decoder, model)
    for key, weight in model.state_dict().items():
        torch.testing.assert_close(weight, merged.state_dict()[key], rtol=0, atol=1e-6, msg=key)

    files = {path.parent.name: {file.name for file in path.parent.iterdir()} for path in (tmp_path / "run").glob("*/*")}
    assert not any("adapter" in file for file in files["model"]), "or transformers would add it to the merged weights"
    assert files["adapter"] == {"adapter_config.json", "adapter_model.safetensors"}
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert config == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(tmp_path / "base"),
        "target_modules": TARGETS,
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.25,
        "bias": "none",
        "inference_mode": True,
    }
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in load_file(
        tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    )
    modes = {path.stat().st_mode for path in (tmp_path / "run").glob("*/*")}
    assert len(modes) == 1


def some(builder: Any, **arguments: Any) -> TransformerDecoder:
    sizes = {"vocab_size": 67, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 48}
    adapters = {"lora_rank": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.25}
    return builder(**sizes, intermediate_dim=56, max_seq_len=40, norm_eps=1e-3, **adapters, **arguments)


@pytest.mark.parametrize(
    ("builder", "arguments", "targets"),
    [
        (lora_llama3, {"lora_attn_modules": ["q_proj"], "rope_base": 500}, ["q_proj"]),
        (
            lora_llama3,
            {"lora_attn_modules": ["k_proj"], "apply_lora_to_output": True, "rope_base": 500},
            ["k_proj", "lm_head"],
        ),
        (
            lora_qwen2,
            {"lora_attn_modules": ["q_proj", "k_proj"], "apply_lora_to_output": True, "rope_base": 500.0},
            ["k_proj", "lm_head", "q_proj"],
        ),
    ],
)
def test_torchtunes_own_builders_on_a_model_from_scratch(
    tmp_path: Path, builder: Any, arguments: dict[str, Any], targets: list[str]
) -> None:
    decoder, checkpointer = some(builder, **arguments), HuggingFaceCheckpointer(None)
    randomise(decoder)
    adapters = train(decoder, checkpointer)
    config = huggingface_config(decoder)
    whole = decoder.state_dict()
    checkpointer.save(whole, tmp_path / "model", config=config, tokenizer=Tokenizer(), adapters=adapters)
    assert_same(decoder, AutoModelForCausalLM.from_pretrained(tmp_path / "model"))
    bare = {key: torch.zeros_like(weight) if "lora_b" in key else weight for key, weight in whole.items()}
    checkpointer.save(bare, tmp_path / "bare" / "model", config=config, tokenizer=Tokenizer(), adapters=adapters)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "bare" / "model")
    add(base, tmp_path / "adapter")
    assert_same(decoder, base)
    adapter_config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert adapter_config["target_modules"] == targets and adapter_config["base_model_name_or_path"] is None


def test_a_bf16_base_stays_one_and_is_merged_in_fp32(tmp_path: Path) -> None:
    write("llama3", tmp_path / "base", dtype=torch.bfloat16)
    checkpointer = HuggingFaceCheckpointer(str(tmp_path / "base"))
    decoder = with_lora("llama3").to(torch.bfloat16)
    adapters = train(decoder, checkpointer)
    assert checkpointer.config is not None
    checkpointer.save(
        decoder.state_dict(),
        tmp_path / "run" / "model",
        config=checkpointer.config,
        tokenizer=Tokenizer(),
        adapters=adapters,
    )
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


def test_adapters_alone_are_trained() -> None:
    decoder = with_lora("qwen3", ["q_proj", "v_proj"], mlp=False)
    assert train_adapters_alone(decoder) == Adapters(rank=RANK, alpha=ALPHA, dropout=0.25)
    trained = {name for name, parameter in decoder.named_parameters() if parameter.requires_grad}
    assert trained == set(get_adapter_params(decoder)) and len(trained) == 2 * 2 * 2
    decoder(tokens()).sum().backward()
    assert trained == {name for name, parameter in decoder.named_parameters() if parameter.grad is not None}


def test_a_model_without_adapters_is_trained_whole() -> None:
    decoder = build("qwen3")
    assert train_adapters_alone(decoder) is None
    assert all(parameter.requires_grad for parameter in decoder.parameters())


def test_a_folder_has_to_fit_the_base(tmp_path: Path) -> None:
    write("qwen3", tmp_path)
    checkpointer = HuggingFaceCheckpointer(str(tmp_path))
    checkpointer.check(with_lora("qwen3"))
    message = r"model.layers.0.mlp.gate_proj.weight is \(56, 48\) in the folder and \(64, 48\) in the model"
    with pytest.raises(ValueError, match=message):
        wide = add_lora(
            build("qwen3", intermediate_dim=64),
            lora_attn_modules=["q_proj"],
            apply_lora_to_mlp=True,
            lora_rank=2,
            lora_alpha=4,
            lora_dropout=0.0,
        )
        checkpointer.check(wide)


def replaced(projection: nn.Module) -> TransformerDecoder:
    decoder = with_lora("llama3")
    decoder.layers[1].attn.q_proj = projection
    return decoder


@pytest.mark.parametrize(
    ("projection", "message"),
    [
        (
            DoRALinear(128, 128, rank=RANK, alpha=ALPHA),
            "model: its adapters are DoRALinear, which is not supported; allowed: LoRALinear",
        ),
        (
            LoRALinear(128, 128, rank=RANK, alpha=ALPHA, dropout=0.25, quantize_base=True),
            "model.quantize_base: true is not supported; allowed: false",
        ),
        (
            LoRALinear(48, 48, rank=4, alpha=ALPHA, dropout=0.25),
            "model: its adapters are not all alike: Adapters(rank=3, alpha=7.0, dropout=0.25), "
            "Adapters(rank=4, alpha=7.0, dropout=0.25)",
        ),
    ],
    ids=["dora", "quantised", "unlike"],
)
def test_adapters_that_cannot_be_saved_for_peft_are_refused(projection: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        train_adapters_alone(replaced(projection))
