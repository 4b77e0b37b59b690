"""A Hugging Face folder of the Llama kind: the same function here and in transformers, the same bits there and back."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchtune.models.gemma2 import gemma2
from torchtune.models.llama2 import llama2
from torchtune.models.llama3 import llama3
from torchtune.models.llama3_1 import llama3_1
from torchtune.models.llama3_2 import llama3_2
from torchtune.models.phi3 import phi3
from torchtune.modules import TransformerDecoder
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from adapt_recipes.models import HuggingFaceCheckpointer, huggingface_config, llama_from_folder
from adapt_recipes.training.checkpoint import NoSpaceLeft

ORIGINAL_LENGTH = 32  # what the rotations of the scaled models are stretched from: their rows here are longer
SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": ORIGINAL_LENGTH,
}
SIZES: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-4,
    "rope_theta": 500.0,
    "tie_word_embeddings": False,
}
OLD_SCALED: dict[str, Any] = {"rope_scaling": SCALING}
NEW_SCALED = {"rope_theta": None, "rope_parameters": {"rope_theta": 500.0, **SCALING}}
NEW_PLAIN = {"rope_theta": None, "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}}


class Tokenizer:
    """As much of a tokenizer as a checkpointer needs."""

    def save(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Norms too: at their default of 1 they hide what is wrong around them."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        mean, std = (1.0, 0.3) if parameter.ndim == 1 else (0.0, 0.1)
        torch.nn.init.normal_(parameter, mean=mean, std=std, generator=generator)


def make_folder(
    folder: Path, *, dtype: torch.dtype = torch.float32, max_shard_size: str = "5GB", **changes: Any
) -> tuple[Path, LlamaForCausalLM]:
    """transformers' own folder, with ``config.json`` written in exactly the layout that ``changes`` ask for."""
    sizes = {key: value for key, value in {**SIZES, **changes}.items() if value is not None}
    model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    randomise(model)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    write_config(folder, **sizes)
    return folder, model


def write_config(folder: Path, **config: Any) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))


def load(folder: Path, max_seq_len: int = 100) -> tuple[TransformerDecoder, HuggingFaceCheckpointer]:
    decoder = llama_from_folder(str(folder), max_seq_len)
    checkpointer = HuggingFaceCheckpointer(str(folder))
    checkpointer.check(decoder)
    loaded = checkpointer.load()
    assert loaded is not None
    decoder.load_state_dict(loaded)
    return decoder.eval(), checkpointer


def tokens(length: int = 100) -> Tensor:
    return torch.randint(SIZES["vocab_size"], (2, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def assert_same_logits(decoder: TransformerDecoder, model: Any, length: int = 100) -> None:
    expected = model(tokens(length)).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(decoder(tokens(length)), expected, rtol=0, atol=1e-5)


# ---- the same function


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": None},  # as in Llama 1: as many as heads
        {"num_key_value_heads": 1},
        {"head_dim": 16},  # not hidden_size / heads
        {"head_dim": 8, "tie_word_embeddings": True},
        {"rope_theta": None, "rms_norm_eps": None},  # what transformers takes then
        NEW_PLAIN,
        OLD_SCALED,
        NEW_SCALED,
        {**OLD_SCALED, "tie_word_embeddings": True, "head_dim": 12},
        {"rope_scaling": {"type": "default"}},
    ],
    ids=str,
)
def test_logits_equal_transformers(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder, model = make_folder(tmp_path, **changes)
    decoder, _ = load(folder)
    assert_same_logits(decoder, model)


def test_scaled_rotations_matter_here(tmp_path: Path) -> None:
    """Else the parity of the scaled models would say nothing."""
    plain, _ = load(make_folder(tmp_path / "plain")[0])
    scaled, _ = load(make_folder(tmp_path / "scaled", **OLD_SCALED)[0])
    assert (plain(tokens()) - scaled(tokens())).abs().max() > 1e-2


def test_torchtunes_rotations_are_plain_at_scale_factor_one() -> None:
    scaled = llama3_2(
        vocab_size=8, num_layers=1, num_heads=1, num_kv_heads=1, embed_dim=64, max_seq_len=512, scale_factor=1
    )
    plain = llama3(
        vocab_size=8, num_layers=1, num_heads=1, num_kv_heads=1, embed_dim=64, max_seq_len=512, rope_base=500_000
    )
    caches = [decoder.layers[0].attn.pos_embeddings.cache for decoder in (scaled, plain)]
    torch.testing.assert_close(*caches, rtol=0, atol=1e-6)


# ---- there and back


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
def test_round_trip_is_exact(tmp_path: Path, dtype: torch.dtype, tied: bool, max_shard_size: str) -> None:
    source, _ = make_folder(
        tmp_path / "source", dtype=dtype, max_shard_size=max_shard_size, tie_word_embeddings=tied, **OLD_SCALED
    )
    sharded = max_shard_size != "5GB"
    assert (source / "model.safetensors.index.json").exists() == sharded
    decoder, checkpointer = load(source)
    assert all(parameter.dtype == torch.float32 for parameter in decoder.parameters())
    target = tmp_path / "run" / "model"
    assert checkpointer.config is not None
    checkpointer.save(
        decoder.state_dict(), target, config=checkpointer.config, tokenizer=Tokenizer(), max_shard_size=max_shard_size
    )

    before, after = (
        {key: weight for file in folder.glob("*.safetensors") for key, weight in load_file(file).items()}
        for folder in (source, target)
    )
    assert before.keys() == after.keys() and ("lm_head.weight" in after) == (not tied)
    for key, weight in after.items():
        assert weight.dtype == dtype and torch.equal(weight, before[key]), key
    assert (target / "model.safetensors.index.json").exists() == sharded
    assert (target / "tokenizer.json").exists()
    assert json.loads((target / "config.json").read_text()) == checkpointer.config
    assert (target / "generation_config.json").read_text() == (source / "generation_config.json").read_text()
    assert [path.name for path in target.parent.iterdir()] == ["model"]
    logits = []
    for folder in (source, target):
        with torch.no_grad():
            logits.append(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)(tokens()).logits)
    assert torch.equal(*logits)
    again, _ = load(target)
    assert all(torch.equal(weight, again.state_dict()[key]) for key, weight in decoder.state_dict().items())


def test_saved_weights_are_as_readable_as_the_rest(tmp_path: Path) -> None:
    decoder, checkpointer = load(make_folder(tmp_path / "source")[0])
    assert checkpointer.config is not None
    checkpointer.save(decoder.state_dict(), tmp_path / "model", config=checkpointer.config, tokenizer=Tokenizer())
    modes = {path.stat().st_mode for path in (tmp_path / "model").iterdir()}
    assert len(modes) == 1


def test_saving_again_replaces_the_folder(tmp_path: Path) -> None:
    decoder, checkpointer = load(make_folder(tmp_path / "source")[0])
    assert checkpointer.config is not None
    for size in ("20KB", "5GB"):
        checkpointer.save(
            decoder.state_dict(),
            tmp_path / "model",
            config=checkpointer.config,
            tokenizer=Tokenizer(),
            max_shard_size=size,
        )
    assert sorted(path.name for path in (tmp_path / "model").glob("model*")) == ["model.safetensors"]


def test_a_full_disk_leaves_no_folder(tmp_path: Path) -> None:
    class FullDisk:
        def save(self, folder: Path) -> None:
            raise OSError(28, os.strerror(28))

    decoder, checkpointer = load(make_folder(tmp_path / "source")[0])
    assert checkpointer.config is not None
    with pytest.raises(NoSpaceLeft, match=r"^no space left while writing .*model$"):
        checkpointer.save(decoder.state_dict(), tmp_path / "model", config=checkpointer.config, tokenizer=FullDisk())
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_weights_that_the_system_will_not_write_leave_no_folder(tmp_path: Path) -> None:
    """A genuine failure inside safetensors: the system allows files of 16 KiB."""
    source, _ = make_folder(tmp_path / "source")
    program = f"""
import resource, signal
from pathlib import Path
from adapt_recipes.models import HuggingFaceCheckpointer, llama_from_folder
from adapt_recipes.training.checkpoint import NoSpaceLeft
decoder, checkpointer = llama_from_folder({str(source)!r}, 8), HuggingFaceCheckpointer({str(source)!r})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, 1 << 14))
try:
    target = Path({str(tmp_path / "model")!r})
    checkpointer.save(decoder.state_dict(), target, config=checkpointer.config, tokenizer=None)
except NoSpaceLeft as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout == f"no space left while writing {tmp_path / 'model'}\n", done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


# ---- from scratch


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scale_factor", [1, 32])
def test_a_model_from_scratch_is_saved_for_transformers(tmp_path: Path, tied: bool, scale_factor: int) -> None:
    decoder = llama3_2(
        vocab_size=67,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        embed_dim=32,
        max_seq_len=100,
        intermediate_dim=40,
        rope_base=5_000,
        norm_eps=1e-4,
        scale_factor=scale_factor,
        tie_word_embeddings=tied,
    ).eval()
    randomise(decoder)
    checkpointer = HuggingFaceCheckpointer(None)
    assert checkpointer.load() is None and checkpointer.config is None
    config = huggingface_config(decoder, eos_token_id=3)
    checkpointer.save(decoder.state_dict(), tmp_path / "model", config=config, tokenizer=Tokenizer())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.dtype == torch.float32
    assert (model.config.bos_token_id, model.config.eos_token_id) == (None, 3)
    assert_same_logits(decoder, model)
    again, _ = load(tmp_path / "model")
    torch.testing.assert_close(again(tokens()), decoder(tokens()), rtol=0, atol=1e-5)  # rotations differ by rounding
    assert_same_logits(again, model)


@pytest.mark.parametrize("builder", [llama2, llama3, llama3_1])
def test_torchtunes_elder_llamas_are_known_too(tmp_path: Path, builder: Any) -> None:
    decoder = builder(vocab_size=67, num_layers=1, num_heads=4, num_kv_heads=2, embed_dim=32, max_seq_len=100).eval()
    randomise(decoder)
    HuggingFaceCheckpointer(None).save(
        decoder.state_dict(), tmp_path / "model", config=huggingface_config(decoder), tokenizer=Tokenizer()
    )
    assert_same_logits(decoder, AutoModelForCausalLM.from_pretrained(tmp_path / "model"))


@pytest.mark.parametrize(
    ("builder", "most_like"),
    [
        (phi3, "'llama', but its rotation is a Phi3RotaryPositionalEmbeddings"),
        (gemma2, "'gemma', but its attention is a Gemma2Attention"),
    ],
)
def test_another_kind_of_decoder_is_refused(builder: Any, most_like: str) -> None:
    sizes: dict[str, Any] = {"vocab_size": 8, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "embed_dim": 8}
    extra = {"head_dim": 4} if builder is gemma2 else {}
    decoder = builder(**sizes, **extra, intermediate_dim=8, max_seq_len=8)
    with refused(f"model: it is of none of the kinds llama, gemma, gemma3_text, qwen2, qwen3: most like {most_like}"):
        huggingface_config(decoder)


# ---- what is refused


def refused(message: str) -> Any:
    """A ValueError of one line that holds ``message``."""
    return pytest.raises(ValueError, match=rf"^[^\n]*{re.escape(message)}[^\n]*\Z")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen3"}, "config.json: model_type 'qwen3' is not of the Llama kind; allowed: llama"),
        ({"model_type": "llama4"}, "model_type 'llama4' is not of the Llama kind; did you mean 'llama'?"),
        ({"attention_bias": True}, "config.json: attention_bias = True is not supported; allowed: False"),
        ({"mlp_bias": True}, "config.json: mlp_bias = True is not supported; allowed: False"),
        ({"hidden_act": "gelu"}, "config.json: hidden_act = 'gelu' is not supported; allowed: 'silu'"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            "rope_type = 'yarn' is not supported; allowed: 'default' or 'llama3'",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_type = 'linear' is not supported"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5 is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "config.json has no 'low_freq_factor'"),
        ({"num_key_value_heads": 3}, "config.json: num_heads (4) must be divisible by num_kv_heads (3)"),
        ({"max_position_embeddings": 64}, "max_seq_len 100 is beyond the model's max_position_embeddings 64"),
    ],
    ids=str,
)
def test_models_that_cannot_be_built_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_config(tmp_path, **{**SIZES, **changes})
    with refused(message) as caught:
        llama_from_folder(str(tmp_path), 100)
    assert str(caught.value).startswith(f"model.path: {tmp_path}")


def test_a_config_that_lacks_a_size_is_refused(tmp_path: Path) -> None:
    write_config(tmp_path, **{key: value for key, value in SIZES.items() if key != "hidden_size"})
    with refused("config.json has no 'hidden_size'"):
        llama_from_folder(str(tmp_path), 100)


@pytest.mark.parametrize("use", [HuggingFaceCheckpointer, lambda folder: llama_from_folder(folder, 100)])
def test_folders_without_a_config_are_refused(tmp_path: Path, use: Any) -> None:
    with refused(f"there is no folder {tmp_path / 'nowhere'}"):
        use(str(tmp_path / "nowhere"))
    with refused(f"there is no {tmp_path / 'config.json'}"):
        use(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with refused(f"{tmp_path / 'config.json'} is not JSON"):
        use(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with refused(f"{tmp_path / 'config.json'} must hold a JSON object, not a list"):
        use(str(tmp_path))


def refused_by_checkpointer(folder: Path, message: str) -> None:
    with refused(message) as caught:
        HuggingFaceCheckpointer(str(folder)).load()
    assert str(caught.value).startswith("checkpointer.checkpoint_dir: ")


def test_another_family_is_refused_by_the_checkpointer_too(tmp_path: Path) -> None:
    write_config(tmp_path, **{**SIZES, "model_type": "mistral"})
    refused_by_checkpointer(
        tmp_path,
        "config.json: model_type 'mistral' is not supported; allowed: llama, gemma, gemma3_text, qwen2, qwen3",
    )


def test_folders_without_weights_are_refused(tmp_path: Path) -> None:
    write_config(tmp_path, **SIZES)
    neither = f"there is neither model.safetensors nor model.safetensors.index.json in {tmp_path}"
    refused_by_checkpointer(tmp_path, neither)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    refused_by_checkpointer(tmp_path, f"{neither}; its pytorch_model.bin is the old format")


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    folder, _ = make_folder(tmp_path)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for damaged in (b"", b"version https://git-lfs.github.com/spec/v1\n", whole[: len(whole) // 2], b"\xff" * 64):
        weights.write_bytes(damaged)
        refused_by_checkpointer(folder, "model.safetensors cannot be read as safetensors: ")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_a_damaged_index_is_refused(tmp_path: Path, text: str) -> None:
    write_config(tmp_path, **SIZES)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    refused_by_checkpointer(tmp_path, "model.safetensors.index.json is not the index of a sharded model")


def test_an_index_that_names_a_missing_file_is_refused(tmp_path: Path) -> None:
    folder, _ = make_folder(tmp_path, max_shard_size="20KB")
    lost = sorted(folder.glob("model-*.safetensors"))[1]
    lost.unlink()
    refused_by_checkpointer(
        folder, f"model.safetensors.index.json names {lost.name}, and there is no such file in {folder}"
    )


def rewrite(folder: Path, changes: dict[str, Tensor | None]) -> None:
    weights = load_file(folder / "model.safetensors")
    weights = {key: weight.clone() for key, weight in weights.items() if changes.get(key, weight) is not None}
    weights |= {key: weight for key, weight in changes.items() if weight is not None}
    save_file(weights, folder / "model.safetensors")


def test_weights_that_cannot_be_trained_are_refused(tmp_path: Path) -> None:
    folder, _ = make_folder(tmp_path)
    rewrite(folder, {"model.norm.weight": torch.ones(32, dtype=torch.uint8)})
    refused_by_checkpointer(
        folder, "model.norm.weight is stored as U8, which cannot be trained; allowed: F32, BF16, F16"
    )


def test_weights_without_a_place_are_refused(tmp_path: Path) -> None:
    folder, _ = make_folder(tmp_path)
    name = "model.layers.0.self_attn.q_proj.bias"
    rewrite(folder, {name: torch.ones(32)})
    refused_by_checkpointer(folder, f"{name} of shape (32,) has no place in the model of its config.json")
    name = "model.layers.0.self_attn.q_proj.weight"
    rewrite(folder, {"model.layers.0.self_attn.q_proj.bias": None, name: torch.ones(31, 32)})
    with refused(f"{name} is (31, 32) in the folder and (32, 32) in the model"):
        load(folder)


def test_the_rotations_in_an_old_folder_are_left_out(tmp_path: Path) -> None:
    folder, model = make_folder(tmp_path)
    rewrite(folder, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    decoder, _ = load(folder)
    assert_same_logits(decoder, model)


def test_a_tied_folder_that_holds_the_head_too(tmp_path: Path) -> None:
    folder, model = make_folder(tmp_path, tie_word_embeddings=True)
    embeddings = load_file(folder / "model.safetensors")["model.embed_tokens.weight"].clone()
    rewrite(folder, {"lm_head.weight": embeddings.clone()})
    decoder, _ = load(folder)
    assert_same_logits(decoder, model)
    rewrite(folder, {"lm_head.weight": embeddings + 1})
    refused_by_checkpointer(folder, "lm_head.weight and model.embed_tokens.weight differ")


def test_a_folder_that_does_not_fit_the_model_is_refused_by_the_names_in_it(tmp_path: Path) -> None:
    folder, _ = make_folder(tmp_path)
    checkpointer = HuggingFaceCheckpointer(str(folder))

    def built(**changes: Any) -> TransformerDecoder:
        sizes: dict[str, Any] = {
            "vocab_size": 67,
            "num_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 2,
            "embed_dim": 32,
            "max_seq_len": 16,
            "intermediate_dim": 56,
            "rope_base": 500,
            "norm_eps": 1e-4,
            "scale_factor": 1,
            "tie_word_embeddings": False,
        }
        return llama3_2(**{**sizes, **changes})

    checkpointer.check(built())
    for changes, message in (
        (
            {"intermediate_dim": 64},
            "model.layers.0.mlp.gate_proj.weight is (56, 32) in the folder and (64, 32) in the model",
        ),
        ({"vocab_size": 70}, "model.embed_tokens.weight is (67, 32) in the folder and (70, 32) in the model"),
        ({"num_layers": 3}, "the folder lacks model.layers.2.self_attn.q_proj.weight and 8 more"),
        ({"num_layers": 1}, "the model has no model.layers.1.input_layernorm.weight and 8 more"),
        ({"tie_word_embeddings": True}, "the model has no lm_head.weight"),
    ):
        with refused(f"checkpointer.checkpoint_dir: {folder} does not fit the model: {message}"):
            checkpointer.check(built(**changes))


def test_weights_that_fit_another_function_are_refused(tmp_path: Path) -> None:
    folder, _ = make_folder(tmp_path)
    checkpointer = HuggingFaceCheckpointer(str(folder))
    right: dict[str, Any] = {
        "vocab_size": 67,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "embed_dim": 32,
        "max_seq_len": 16,
        "intermediate_dim": 56,
        "rope_base": 500,
        "norm_eps": 1e-4 * (1 + 1e-8),  # as a float32 would have it
        "scale_factor": 1,
        "tie_word_embeddings": False,
    }
    checkpointer.check(llama3_2(**right))
    for changes, message in (
        ({"rope_base": 10_000}, "rope_theta is 500.0 in its config.json and 10000 in the model"),
        ({"norm_eps": 1e-5}, "rms_norm_eps is 0.0001 in its config.json and 1e-05 in the model"),
        ({"num_heads": 8, "num_kv_heads": 4}, "num_attention_heads is 4 in its config.json and 8 in the model"),
        ({"scale_factor": 32}, "rope_scaling is None in its config.json and RopeScaling(factor=32, "),
    ):
        with refused(f"checkpointer.checkpoint_dir: {folder} does not fit the model: {message}"):
            checkpointer.check(llama3_2(**{**right, **changes}))
