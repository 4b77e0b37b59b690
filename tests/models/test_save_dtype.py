"""The dtype of saved weights, and a decoder that is rounded as it was saved: it is the decoder of the saved folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import group
import pytest
import torch
from parity import CASES, Tokenizer, build, load, save, tokens, write
from safetensors.torch import load_file
from test_huggingface import FAMILIES, same_bits, stored
from test_lora import ADAPTERS, adapted, randomize_adapters
from tiers import slow_but
from torch import Tensor
from torchtune.modules import TransformerDecoder
from torchtune.modules.peft import get_adapter_params
from transformers import AutoModelForCausalLM

from adapt_recipes.models import HuggingFaceCheckpointer, TokenLosses, train_adapters_alone, with_lora
from adapt_recipes.training.process_group import process_group
from adapt_recipes.training.sharding import load_weights, on_meta, shard, to_local

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@torch.no_grad()
def train(decoder: TransformerDecoder) -> None:
    """In the place of training: every weight that trains changes by less than half of bf16's distances, or more."""
    generator = torch.Generator().manual_seed(7)
    for parameter in decoder.parameters():
        if parameter.requires_grad:
            parameter.mul_(1 + 0.01 * torch.randn(parameter.shape, generator=generator))


# ---- what is written


@pytest.mark.parametrize("base", slow_but([torch.bfloat16], DTYPES.values()), ids=str)
@pytest.mark.parametrize("save_dtype", slow_but(["stored", "fp16"], ["stored", *DTYPES]))
def test_all_weights_have_the_dtype(tmp_path: Path, save_dtype: Any, base: torch.dtype) -> None:
    """Of what was trained in fp32, rounded once; transformers loads the folder in it."""
    write("qwen3", tmp_path / "base", dtype=base)
    decoder = build("qwen3")
    load(decoder, tmp_path / "base")
    train(decoder)
    for name, dtype in (("model", save_dtype), ("exact", "fp32")):
        save(decoder, tmp_path / name, HuggingFaceCheckpointer(str(tmp_path / "base"), dtype))
    dtype = DTYPES.get(save_dtype, base)
    exact, saved = stored(tmp_path / "exact"), stored(tmp_path / "model")
    assert exact.keys() == saved.keys()
    assert all(same_bits(weight, exact[name].to(dtype)) for name, weight in saved.items())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto").dtype == dtype


def test_without_a_folder(tmp_path: Path) -> None:
    decoder = build("llama3")
    for save_dtype in ("stored", *DTYPES):
        save(decoder, tmp_path / save_dtype, HuggingFaceCheckpointer(None, save_dtype))  # type: ignore[arg-type]
        dtype = DTYPES.get(save_dtype, torch.float32)
        assert {weight.dtype for weight in stored(tmp_path / save_dtype).values()} == {dtype}
        assert AutoModelForCausalLM.from_pretrained(tmp_path / save_dtype, dtype="auto").dtype == dtype


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"dtype": "float32"}, {"dtype": "bfloat16"}),
        ({"torch_dtype": "float32"}, {"torch_dtype": "bfloat16"}),
        ({"dtype": None, "torch_dtype": "float16"}, {"dtype": "bfloat16", "torch_dtype": "bfloat16"}),
        ({}, {"torch_dtype": "bfloat16"}),
    ],
    ids=str,
)
def test_the_key_of_config_json_is_that_of_the_folder(
    tmp_path: Path, before: dict[str, Any], after: dict[str, Any]
) -> None:
    """Of transformers 4 or 5. Nothing else in it changes, and with ``stored`` nothing at all."""
    write("llama3", tmp_path / "base")
    file = tmp_path / "base" / "config.json"
    rest = {key: value for key, value in json.loads(file.read_text()).items() if "dtype" not in key}
    file.write_text(json.dumps(rest | before))
    decoder = build("llama3")
    for save_dtype, expected in (("bf16", after), ("stored", before)):
        save(decoder, tmp_path / "model", HuggingFaceCheckpointer(str(tmp_path / "base"), save_dtype))  # type: ignore[arg-type]
        assert json.loads((tmp_path / "model" / "config.json").read_text()) == rest | expected
    save(decoder, tmp_path / "model", HuggingFaceCheckpointer(str(tmp_path / "base"), "bf16"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto").dtype == torch.bfloat16


# ---- the decoder that is rounded


def assert_is_the_folder(decoder: TransformerDecoder, folder: Path, again: TransformerDecoder) -> None:
    """Bit for bit: its weights, and what it computes with adapters, which have no effect."""
    load(again, folder)
    loaded, rounded = again.state_dict(), decoder.state_dict()
    assert all(same_bits(rounded[key], weight) for key, weight in loaded.items())
    assert not any(weight.any() for key, weight in rounded.items() if key.endswith("lora_b.weight"))
    with torch.no_grad():
        assert torch.equal(decoder.eval()(tokens()), again.eval()(tokens()))


@pytest.mark.parametrize("dtype", slow_but([torch.float32], [torch.float32, torch.bfloat16]), ids=str)
@pytest.mark.parametrize("save_dtype", slow_but(["stored"], ["stored", *DTYPES]))
@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "adapters"])
@pytest.mark.parametrize("name", slow_but(["llama3", "gemma3"], FAMILIES.values()))
def test_it_is_the_decoder_of_the_saved_folder(
    tmp_path: Path, name: str, lora: bool, save_dtype: Any, dtype: torch.dtype
) -> None:
    """Of each family, after training in fp32 or bf16, from a base in bf16."""
    write(name, tmp_path / "base", dtype=torch.bfloat16)
    decoder = adapted(name, dtype) if lora else build(name, dtype)
    load(decoder, tmp_path / "base")
    adapters = train_adapters_alone(decoder)
    if lora:
        randomize_adapters(decoder)
    train(decoder)
    checkpointer = HuggingFaceCheckpointer(str(tmp_path / "base"), save_dtype)
    save(decoder, tmp_path / "run" / "model", checkpointer, adapters=adapters)
    before = {key: weight.clone() for key, weight in decoder.state_dict().items()}

    changed = checkpointer.round_as_saved(decoder, adapters=adapters)
    assert_is_the_folder(decoder, tmp_path / "run" / "model", build(name, dtype))
    assert changed == any(not torch.equal(weight, before[key]) for key, weight in decoder.state_dict().items())
    if not lora and save_dtype == "fp32":
        assert not changed
    if lora or (dtype == torch.float32 and save_dtype != "fp32"):
        assert changed
    assert not checkpointer.round_as_saved(decoder, adapters=adapters), "a second time there is nothing to round"


@pytest.mark.parametrize("b", [0.0, 1e-12])
def test_an_adapter_that_rounding_loses_is_a_change(tmp_path: Path, b: float) -> None:
    """The base in bf16 is saved as it was: the adapter is gone, if there was one."""
    write("qwen3", tmp_path / "base", dtype=torch.bfloat16)
    decoder = adapted("qwen3")
    checkpointer = load(decoder, tmp_path / "base")
    adapters = train_adapters_alone(decoder)
    randomize_adapters(decoder)
    with torch.no_grad():
        for key, parameter in get_adapter_params(decoder).items():
            if key.endswith("lora_b.weight"):
                parameter.fill_(b)
    before = {key: weight.clone() for key, weight in decoder.state_dict().items() if "lora" not in key}
    assert checkpointer.round_as_saved(decoder, adapters=adapters) == (b > 0)
    after = decoder.state_dict()
    assert all(torch.equal(after[key], weight) for key, weight in before.items())


# ---- on two processes

MODELS: dict[str, Callable[[], TransformerDecoder]] = {
    "all weights": lambda: CASES["gemma3"].build(**CASES["gemma3"].sizes),
    "adapters": lambda: with_lora(CASES["llama3_2"].build(**CASES["llama3_2"].sizes), **ADAPTERS),
}
OF = {"all weights": "gemma3", "adapters": "llama3_2"}


def round_together(folder: Path) -> dict[str, Any]:
    """Save, then round. Only the last process changes a weight: the others have to know it."""
    results: dict[str, Any] = {}
    with process_group("cpu", batch_size=2):
        for model, make in MODELS.items():
            base = folder.parent / "bases" / model
            checkpointer = HuggingFaceCheckpointer(str(base))
            with on_meta():
                decoder = make()
            adapters = train_adapters_alone(decoder)
            shard(TokenLosses(decoder), decoder.layers, device=torch.device("cpu"))
            weights = checkpointer.load()
            assert weights is not None
            load_weights(decoder, weights, seed=0)
            same = checkpointer.round_as_saved(decoder, adapters=adapters)
            with torch.no_grad():
                for key, parameter in decoder.state_dict().items():
                    if key.endswith("lora_b.weight") or key == "tok_embeddings.weight":
                        to_local(parameter)[-1] += 0.001 * torch.distributed.get_rank()
            checkpointer.save(
                decoder.state_dict(),
                folder / model / "model",
                config=checkpointer.config or {},
                tokenizer=Tokenizer(),
                adapters=adapters,
            )
            changed = checkpointer.round_as_saved(decoder, adapters=adapters)
            shards = {key: to_local(weight).clone() for key, weight in decoder.state_dict().items()}
            results[model] = (same, changed, shards)
    return results


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("group")
    for model, name in OF.items():
        write(name, home / "bases" / model, dtype=torch.bfloat16)
    return home


@pytest.mark.slow
def test_each_process_rounds_its_rows(home: Path) -> None:
    ended = group.run((round_together,), home)["round_together"]
    assert [each.status for each in ended] == [0, 0], ended[0].err + ended[1].err
    for model in MODELS:
        expected = HuggingFaceCheckpointer(str(home / "round_together" / model / "model")).load()
        assert expected is not None
        results = [each.result[model] for each in ended]
        assert [result[:2] for result in results] == [(False, True)] * 2
        for key, weight in expected.items():
            whole = torch.cat([shards[key] for _, _, shards in results])
            assert torch.equal(whole, weight.float()), key
        assert not any(shards[key].any() for _, _, shards in results for key in shards if key.endswith("lora_b.weight"))
        original: dict[str, Tensor] = load_file(home / "bases" / model / "model.safetensors")
        assert any(
            not torch.equal(weight, original[name])
            for name, weight in load_file(home / "round_together" / model / "model" / "model.safetensors").items()
        )
