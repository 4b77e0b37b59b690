"""A Hugging Face folder of any kind: the same function as in transformers, the same bits back, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import CASES, build, randomise, tokens
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchtune.models.gemma import gemma_2b
from torchtune.models.llama3 import llama3_8b
from torchtune.models.llama3_2 import llama3_2_1b
from torchtune.modules import TransformerDecoder
from transformers import AutoConfig, AutoModelForCausalLM

from adapt_recipes.models import (
    HuggingFaceCheckpointer,
    gemma3_1b,
    huggingface_config,
    qwen1_5_0_5b,
    qwen3_0_6b,
)
from adapt_recipes.models.architecture import Architecture, architecture_of_config, architecture_of_decoder

KINDS = {  # one case of each
    "llama": "llama3",
    "gemma": "gemma",
    "gemma3_text": "gemma3",
    "qwen2": "qwen1_5",
    "qwen3": "qwen3",
}


class Tokenizer:
    """As much of a tokenizer as a checkpointer needs."""

    def save(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")


def write(name: str, folder: Path, *, dtype: torch.dtype = torch.float32, max_shard_size: str = "5GB") -> Any:
    """transformers' own folder; returns its model."""
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CASES[name].config), attn_implementation="sdpa").eval()
    randomise(model)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return model


def load(name: str, folder: Path) -> tuple[TransformerDecoder, HuggingFaceCheckpointer]:
    decoder, checkpointer = build(name), HuggingFaceCheckpointer(str(folder))
    checkpointer.check(decoder)
    weights = checkpointer.load()
    assert weights is not None
    decoder.load_state_dict(weights)
    return decoder, checkpointer


@torch.no_grad()
def logits(folder: Path, dtype: torch.dtype = torch.float32) -> Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)(tokens()).logits


def stored(folder: Path) -> dict[str, Tensor]:
    return {key: weight for file in folder.glob("*.safetensors") for key, weight in load_file(file).items()}


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of each case; to be left as they are."""
    home = tmp_path_factory.mktemp("folders")
    for name in CASES:
        write(name, home / name)
    return {name: home / name for name in CASES}


@pytest.fixture
def changed(folders: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of a case's folder with other settings in its config.json; None takes one out."""

    def changed(name: str, changes: dict[str, Any]) -> Path:
        folder = shutil.copytree(folders[name], tmp_path / "changed", dirs_exist_ok=True)
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
        return folder

    return changed


def refused(message: str) -> Any:
    """A ValueError of one line that holds ``message``."""
    return pytest.raises(ValueError, match=rf"^[^\n]*{re.escape(message)}[^\n]*\Z")


# ---- the same function, and the same bits back


@pytest.mark.parametrize(("dtype", "max_shard_size"), [(torch.float32, "5GB"), (torch.bfloat16, "40KB")], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_there_and_back(tmp_path: Path, name: str, dtype: torch.dtype, max_shard_size: str) -> None:
    source, target = tmp_path / "source", tmp_path / "model"
    write(name, source, dtype=dtype, max_shard_size=max_shard_size)
    assert len(list(source.glob("*.safetensors"))) > 1 or dtype == torch.float32
    decoder, checkpointer = load(name, source)
    expected = logits(source)
    assert expected.std() > 0.5
    with torch.no_grad():
        torch.testing.assert_close(decoder(tokens()), expected, rtol=0, atol=1e-5)

    config = checkpointer.config
    assert config is not None
    checkpointer.save(decoder.state_dict(), target, config=config, tokenizer=Tokenizer(), max_shard_size=max_shard_size)
    before, after = stored(source), stored(target)
    assert before.keys() == after.keys()
    assert all(weight.dtype == dtype and same_bits(weight, before[key]) for key, weight in after.items())
    assert ("lm_head.weight" in after) == (not CASES[name].config.tie_word_embeddings)
    assert (target / "model.safetensors.index.json").exists() == (max_shard_size != "5GB")
    assert json.loads((target / "config.json").read_text()) == config
    assert torch.equal(logits(source, dtype), logits(target, dtype))


def test_each_weight_keeps_its_own_dtype(tmp_path: Path) -> None:
    write("qwen3", tmp_path / "source")
    weights = load_file(tmp_path / "source" / "model.safetensors")
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    mixed = {key: weight.to(dtypes[i % 3]) for i, (key, weight) in enumerate(weights.items())}
    save_file(mixed, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    decoder, checkpointer = load("qwen3", tmp_path / "source")
    config = checkpointer.config
    assert config is not None
    checkpointer.save(decoder.state_dict(), tmp_path / "model", config=config, tokenizer=Tokenizer())
    after = stored(tmp_path / "model")
    assert after.keys() == mixed.keys() and all(same_bits(after[key], weight) for key, weight in mixed.items())


@pytest.mark.parametrize("name", CASES)
def test_a_model_from_scratch_is_saved_for_transformers(tmp_path: Path, name: str) -> None:
    decoder = build(name)
    config = huggingface_config(decoder, bos_token_id=2, eos_token_id=[3, 5], pad_token_id=0)
    HuggingFaceCheckpointer(None).save(decoder.state_dict(), tmp_path, config=config, tokenizer=Tokenizer())
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(model) is type(AutoModelForCausalLM.from_config(CASES[name].config)) and model.dtype == torch.float32
    ids = model.config
    assert (ids.bos_token_id, ids.eos_token_id, ids.pad_token_id) == (2, [3, 5], 0)
    with torch.no_grad():
        torch.testing.assert_close(decoder(tokens()), model(tokens()).logits, rtol=0, atol=1e-5)
    again, _ = load(name, tmp_path)
    assert all(same_bits(weight, again.state_dict()[key]) for key, weight in decoder.state_dict().items())
    (tmp_path / "again").mkdir()
    model.save_pretrained(tmp_path / "again")  # in the newer layout
    load(name, tmp_path / "again")


# ---- what a config.json says

SIZES = {
    "vocab_size": 67,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
FULL, LOCAL = {"rope_type": "default", "rope_theta": 3e4}, {"rope_type": "default", "rope_theta": 300.0}


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("llama", {}),
        ("llama", {"num_key_value_heads": None, "head_dim": None}),
        ("llama", {"head_dim": 10, "num_key_value_heads": 2, "rms_norm_eps": 1e-5}),
        ("llama", {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}),
        ("llama", {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3}}),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}}),
        ("llama", {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default"}}),
        ("llama", {"use_sliding_window": True, "layer_types": None}),  # of no meaning in this kind
        ("gemma", {}),
        ("gemma", {"hidden_act": "gelu", "hidden_activation": None, "rope_theta": 2e4, "num_key_value_heads": 1}),
        ("gemma", {"hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": False}),
        ("gemma3_text", {}),
        ("gemma3_text", {"num_hidden_layers": 13, "sliding_window_pattern": 4, "sliding_window": 5}),
        ("gemma3_text", {"sliding_window_pattern": 1, "rope_theta": 3e4, "rope_scaling": None}),
        ("gemma3_text", {"sliding_window_pattern": 2, "rope_theta": 3e4, "rope_local_base_freq": 300}),
        ("gemma3_text", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}),
        ("gemma3_text", {"layer_types": ["full_attention"] * 3, "sliding_window_pattern": 2}),
        ("gemma3_text", {"sliding_window_pattern": 2, "rope_parameters": {"full_attention": FULL}}),
        ("gemma3_text", {"sliding_window_pattern": 2, "rope_parameters": {"sliding_attention": LOCAL}}),
        ("gemma3_text", {"sliding_window_pattern": 2, "rope_parameters": {"full_attention": None}, "rope_theta": 9e3}),
        ("gemma3_text", {"head_dim": 64, "query_pre_attn_scalar": 64, "tie_word_embeddings": False}),
        ("qwen2", {}),
        ("qwen2", {"num_key_value_heads": None, "rope_theta": 1e6, "tie_word_embeddings": True}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 1}),
        ("qwen3", {}),
        ("qwen3", {"rope_theta": 1e6, "rope_scaling": None, "sliding_window": None, "head_dim": 16}),
        ("qwen3", {"use_sliding_window": True, "layer_types": ["full_attention"] * 3, "max_window_layers": 1}),
    ],
    ids=str,
)
def test_it_is_read_as_transformers_reads_it(model_type: str, settings: dict[str, Any]) -> None:
    """Which writes down all that it has understood, in the newest layout. Also where the file is silent."""
    config = SIZES | settings
    expanded = AutoConfig.for_model(model_type, **copy.deepcopy(config)).to_dict()
    raw = {"model_type": model_type, **config}
    assert architecture_of_config(raw, where="") == architecture_of_config(expanded, where="")
    assert "rope_theta" not in expanded and "rope_scaling" not in expanded


HUB = {  # what the folders of the six models say, as far as it bears on the function
    "llama3_2_1b": (
        llama3_2_1b,
        {
            "model_type": "llama",
            "attention_bias": False,
            "head_dim": 64,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "num_attention_heads": 32,
            "num_hidden_layers": 16,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 32.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
            "vocab_size": 128256,
        },
    ),
    "llama3_8b": (
        llama3_8b,
        {
            "model_type": "llama",
            "attention_bias": False,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 8192,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_scaling": None,
            "rope_theta": 500000.0,
            "tie_word_embeddings": False,
            "vocab_size": 128256,
        },
    ),
    "gemma_2b": (
        gemma_2b,
        {
            "model_type": "gemma",
            "attention_bias": False,
            "head_dim": 256,
            "hidden_act": "gelu",
            "hidden_activation": None,
            "hidden_size": 2048,
            "intermediate_size": 16384,
            "max_position_embeddings": 8192,
            "num_attention_heads": 8,
            "num_hidden_layers": 18,
            "num_key_value_heads": 1,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "vocab_size": 256000,
        },
    ),
    "gemma3_1b": (
        lambda: gemma3_1b(max_seq_len=8),
        {
            "model_type": "gemma3_text",
            "attention_bias": False,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size": 1152,
            "intermediate_size": 6912,
            "max_position_embeddings": 32768,
            "num_attention_heads": 4,
            "num_hidden_layers": 26,
            "num_key_value_heads": 1,
            "query_pre_attn_scalar": 256,
            "rms_norm_eps": 1e-06,
            "rope_local_base_freq": 10000,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": 512,
            "sliding_window_pattern": 6,
            "vocab_size": 262144,
        },
    ),
    "qwen3_0_6b": (
        lambda: qwen3_0_6b(max_seq_len=8),
        {
            "model_type": "qwen3",
            "attention_bias": False,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "max_position_embeddings": 40960,
            "max_window_layers": 28,
            "num_attention_heads": 16,
            "num_hidden_layers": 28,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
    ),
    "qwen1_5_0_5b": (
        lambda: qwen1_5_0_5b(max_seq_len=8),
        {
            "model_type": "qwen2",
            "hidden_act": "silu",
            "hidden_size": 1024,
            "intermediate_size": 2816,
            "max_position_embeddings": 32768,
            "max_window_layers": 21,
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "num_key_value_heads": 16,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "sliding_window": 32768,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
    ),
}


@pytest.mark.parametrize("name", HUB)
def test_the_six_models_are_those_of_the_hub(name: str) -> None:
    builder, config = HUB[name]
    with torch.device("meta"):
        decoder = builder()
    hub = architecture_of_config(config, where="")
    assert hub.first_difference(architecture_of_decoder(decoder)) is None
    written = architecture_of_config(huggingface_config(decoder), where="")
    assert hub.first_difference(written) is None


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama3_2", {"rope_theta": 500_000.0, "rope_scaling": LLAMA3 | {"rope_type": "llama3", "factor": 32.0}}),
        ("gemma", {"rope_theta": 500, "hidden_act": "gelu", "tie_word_embeddings": None}),
        (
            "gemma3",
            {"rope_theta": 500, "rope_local_base_freq": 20, "tie_word_embeddings": None}
            | {"layer_types": None, "sliding_window_pattern": 3},
        ),
        ("qwen1_5", {"rope_theta": 500, "layer_types": None}),
        ("qwen3", {"rope_theta": 500, "layer_types": None, "use_sliding_window": True}),
    ],
)
@torch.no_grad()
def test_a_folder_in_the_older_layout(changed: Any, name: str, changes: dict[str, Any]) -> None:
    if name == "llama3_2":
        changes["rope_scaling"]["original_max_position_embeddings"] = 8192
    folder = changed(name, changes | {"rope_parameters": None})
    decoder, _ = load(name, folder)
    torch.testing.assert_close(decoder(tokens()), logits(folder), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("model_type", "settings", "message"),
    [
        (
            "gemma3",
            {},
            "model_type 'gemma3' with the image encoder is not supported; Gemma 3 1B has none and is 'gemma3_t",
        ),
        ("gemma2", {}, "model_type 'gemma2' is not supported; did you mean 'gemma'?"),
        ("qwen3_moe", {}, "model_type 'qwen3_moe' is not supported; did you mean 'qwen3'?"),
        ("llama", {"attention_bias": True}, "attention_bias = True is not supported; allowed: False"),
        ("llama", {"mlp_bias": True}, "mlp_bias = True is not supported; allowed: False"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported; allowed: 'silu'"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "dynamic"}},
            "rope_type = 'dynamic' is not supported; allowed: 'default'",
        ),
        ("llama", {"rope_scaling": {"rope_type": "llama3"}}, "config.json has no 'factor'"),
        ("llama", {"rope_scaling": "llama3"}, "rope_scaling = 'llama3' has to be a JSON object"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported; allowed: 1.0"),
        ("llama", {"tie_word_embeddings": "no"}, "tie_word_embeddings = 'no' is not supported; allowed: False or True"),
        ("llama", {"hidden_size": "48"}, "hidden_size = '48' has to be a whole number above 0"),
        ("llama", {"vocab_size": None}, "config.json has no 'vocab_size'"),
        ("llama", {"num_attention_heads": 0}, "num_attention_heads = 0 has to be a whole number above 0"),
        ("llama", {"num_hidden_layers": 2.5}, "num_hidden_layers = 2.5 has to be a whole number above 0"),
        ("llama", {"rms_norm_eps": "1e-5"}, "rms_norm_eps = '1e-5' has to be a number above 0"),
        ("llama", {"rope_theta": True}, "rope_theta = True has to be a number above 0"),
        ("gemma", {"attention_bias": True}, "attention_bias = True is not supported"),
        (
            "gemma",
            {"hidden_act": "silu"},
            "hidden_act = 'silu' is not supported; allowed: 'gelu_pytorch_tanh' or 'gelu'",
        ),
        (
            "gemma",
            {"hidden_activation": "gelu"},
            "hidden_activation = 'gelu' is not supported; allowed: 'gelu_pytorch_tanh'",
        ),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True is not supported"),
        ("gemma", {"rope_scaling": {"type": "linear"}}, "rope_type = 'linear' is not supported; allowed: 'default'"),
        ("gemma3_text", {"attention_bias": True}, "attention_bias = True is not supported"),
        ("gemma3_text", {"hidden_activation": "gelu"}, "hidden_activation = 'gelu' is not supported"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True is not supported"),
        (
            "gemma3_text",
            {"final_logit_softcapping": 30.0},
            "final_logit_softcapping = 30.0 is not supported; allowed: None",
        ),
        (
            "gemma3_text",
            {"attn_logit_softcapping": 50.0},
            "attn_logit_softcapping = 50.0 is not supported; allowed: None",
        ),
        ("gemma3_text", {"query_pre_attn_scalar": 168}, "query_pre_attn_scalar = 168 is not supported; allowed: 256"),
        ("gemma3_text", {"head_dim": 64}, "query_pre_attn_scalar = 256 is not supported; allowed: 64"),
        (
            "gemma3_text",
            {"rope_scaling": {"rope_type": "linear"}},
            "rope_type = 'linear' is not supported; allowed: 'default'",
        ),
        (
            "gemma3_text",
            {"rope_parameters": {"sliding_attention": {"rope_type": "yarn"}}},
            "rope_parameters.sliding_attention.rope_type = 'yarn' is not supported; allowed: 'default'",
        ),
        ("gemma3_text", {"sliding_window_pattern": 0}, "sliding_window_pattern = 0 has to be a whole number above 0"),
        (
            "gemma3_text",
            {"layer_types": ["full_attention"]},
            "layer_types has to name 'full_attention' or 'sliding_attention' for each of the 3 layers",
        ),
        ("gemma3_text", {"layer_types": ["full_attention", "chunked_attention", []]}, "layer_types has to name"),
        ("qwen2", {"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        (
            "qwen2",
            {"use_sliding_window": True, "max_window_layers": 2},
            "use_sliding_window = True is not supported; allowed: False",
        ),
        ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type = 'yarn' is not supported"),
        ("qwen3", {"attention_bias": True}, "attention_bias = True is not supported"),
        ("qwen3", {"hidden_act": "relu"}, "hidden_act = 'relu' is not supported"),
        ("qwen3", {"rope_parameters": {"rope_type": "yarn"}}, "rope_type = 'yarn' is not supported"),
        (
            "qwen3",
            {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
            "use_sliding_window = True is not supported; allowed: False",
        ),
    ],
    ids=str,
)
def test_what_no_decoder_here_computes_is_refused(
    tmp_path: Path, model_type: str, settings: dict[str, Any], message: str
) -> None:
    config = {"model_type": model_type, **SIZES, **settings}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with refused(message) as caught:
        HuggingFaceCheckpointer(str(tmp_path))
    assert str(caught.value).startswith(f"checkpointer.checkpoint_dir: {tmp_path}/config.json")


# ---- a folder that does not fit the model


@pytest.mark.parametrize("folder_kind", KINDS)
@pytest.mark.parametrize("model_kind", KINDS)
def test_a_folder_of_another_kind_is_refused(folders: dict[str, Path], folder_kind: str, model_kind: str) -> None:
    folder = folders[KINDS[folder_kind]]
    checkpointer, decoder = HuggingFaceCheckpointer(str(folder)), build(KINDS[model_kind])
    if folder_kind == model_kind:
        checkpointer.check(decoder)
        return
    message = f"does not fit the model: it is of the kind '{folder_kind}', and the model is '{model_kind}'"
    with refused(f"checkpointer.checkpoint_dir: {folder} {message}"):
        checkpointer.check(decoder)


@pytest.mark.parametrize("name", KINDS.values())
def test_every_weight_has_to_be_there_and_of_the_right_shape(changed: Any, name: str) -> None:
    """The error gives the first one's name in the folder, and both shapes."""
    folder, decoder = changed(name, {}), build(name)
    weights = load_file(folder / "model.safetensors")
    for key in [key for key in weights if ".layers." not in key or ".layers.1." in key]:
        others = {other: weight for other, weight in weights.items() if other != key}
        good, bad = tuple(weights[key].shape), (weights[key].shape[0] + 16, *weights[key].shape[1:])
        for wrong, message in (
            (others, f"the folder lacks {key}"),
            (others | {key: torch.zeros(bad)}, f"{key} is {bad} in the folder and {good} in the model"),
        ):
            save_file(wrong, folder / "model.safetensors")
            with refused(f"checkpointer.checkpoint_dir: {folder} does not fit the model: {message}"):
                HuggingFaceCheckpointer(str(folder)).check(decoder)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama3", {"rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-05 in its config.json and 0.001 in the model"),
        ("llama3", {"num_attention_heads": 2}, "num_attention_heads is 2 in its config.json and 4 in the model"),
        ("llama3", {"num_key_value_heads": 1}, "num_key_value_heads is 1 in its config.json and 2 in the model"),
        ("llama3", {"head_dim": 24}, "head_dim is 24 in its config.json and 12 in the model"),
        (
            "llama3",
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, **LLAMA3}},
            "rope_scaling is RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, "
            "original_max_position_embeddings=64) in its config.json and None in the model",
        ),
        (
            "gemma",
            {"rope_parameters": {"rope_theta": 1e4}},
            "rope_theta is 10000.0 in its config.json and 500.0 in the",
        ),
        ("gemma3", {"sliding_window": 7}, "sliding_window is 7 in its config.json and 6 in the model"),
        (
            "gemma3",
            {"layer_types": None},
            "full_attention_layers is (5,) in its config.json and (2, 5) in the model",
        ),
        (
            "gemma3",
            {"layer_types": ["full_attention"] * 7},
            "full_attention_layers is (0, 1, 2, 3, 4, 5, 6) in its config.json and (2, 5) in the model",
        ),
        (
            "gemma3",
            {"rope_parameters": {"full_attention": {"rope_theta": 500.0}, "sliding_attention": {"rope_theta": 21}}},
            "rope_local_base_freq is 21 in its config.json and 20.0 in the model",
        ),
        (
            "gemma3",
            {"rope_parameters": {"full_attention": {"rope_theta": 20.0}, "sliding_attention": {"rope_theta": 20.0}}},
            "rope_theta is 20.0 in its config.json and 500.0 in the model",
        ),
        ("gemma3", {"tie_word_embeddings": False}, "tie_word_embeddings is False in its config.json and True in the"),
        ("qwen3", {"head_dim": 8}, "head_dim is 8 in its config.json and 16 in the model"),
        ("qwen1_5", {"num_attention_heads": 8}, "num_attention_heads is 8 in its config.json and 4 in the model"),
    ],
    ids=str,
)
def test_weights_that_fit_another_function_are_refused(
    changed: Any, name: str, changes: dict[str, Any], message: str
) -> None:
    """The weights are those of the model, and the config.json is another's."""
    folder, decoder = changed(name, {}), build(name)
    HuggingFaceCheckpointer(str(folder)).check(decoder)
    folder = changed(name, changes)
    with refused(f"checkpointer.checkpoint_dir: {folder} does not fit the model: {message}"):
        HuggingFaceCheckpointer(str(folder)).check(decoder)


def test_layers_that_are_not_alike_are_refused() -> None:
    decoder = build("llama3")
    decoder.layers[1].sa_norm.eps = 1e-5
    with refused("model: rms_norm_eps is not the same in all layers: 1e-05, 0.001"):
        architecture_of_decoder(decoder)


# ---- damaged folders


@pytest.fixture
def sharded(tmp_path: Path) -> Iterator[Path]:
    write("gemma3", tmp_path / "sharded", max_shard_size="40KB")
    yield tmp_path / "sharded"


def test_a_missing_shard_is_refused(sharded: Path) -> None:
    lost = sorted(sharded.glob("*.safetensors"))[2]
    lost.unlink()
    with refused(f"model.safetensors.index.json names {lost.name}, and there is no such file in {sharded}"):
        HuggingFaceCheckpointer(str(sharded))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.9])
def test_a_shard_cut_short_is_refused(sharded: Path, share: float) -> None:
    last = sorted(sharded.glob("*.safetensors"))[-1]
    content = last.read_bytes()
    last.write_bytes(content[: int(share * len(content))])
    with refused(f"checkpointer.checkpoint_dir: {last} cannot be read as safetensors: "):
        HuggingFaceCheckpointer(str(sharded))


def test_a_shard_of_another_model_is_refused(sharded: Path, tmp_path: Path) -> None:
    first, last = (sorted(sharded.glob("*.safetensors"))[i] for i in (0, -1))
    shutil.copy(first, last)
    with refused(f"{sharded} does not fit the model: the folder lacks model."):
        HuggingFaceCheckpointer(str(sharded)).check(build("gemma3"))


def test_quantised_weights_are_refused(changed: Any) -> None:
    folder = changed("qwen3", {})
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(weights | {name: weights[name].to(torch.float8_e4m3fn)}, folder / "model.safetensors")
    with refused(f"{name} is stored as F8_E4M3, which cannot be trained; allowed: F32, BF16, F16"):
        HuggingFaceCheckpointer(str(folder))


def test_fields_of_an_architecture_are_all_compared() -> None:
    """A field that is added and forgotten in ``first_difference`` would let a folder through."""
    one = architecture_of_decoder(build("gemma3"))
    for name in Architecture.__dataclass_fields__:
        other = dataclasses.replace(one, **{name: -1})
        assert one.first_difference(other) == (name if name != "attention_dropout" else None)
