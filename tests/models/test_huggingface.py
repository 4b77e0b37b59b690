"""A Hugging Face folder of any family: what its config.json says, the same bits back, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import CASES, assert_same_logits, build, load, randomize, refused, save, tokens, write
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchtune.models.gemma2 import gemma2
from torchtune.models.llama2 import llama2
from torchtune.models.llama3_1 import llama3_1
from torchtune.models.phi3 import phi3
from torchtune.modules import TransformerDecoder
from transformers import AutoConfig, AutoModelForCausalLM

from adapt_recipes.files import NoSpaceLeft
from adapt_recipes.models import HuggingFaceCheckpointer, decoder_from_folder, huggingface_config
from adapt_recipes.models.architecture import Architecture, architecture_of_config, architecture_of_decoder

FAMILIES = {  # one case of each
    "llama": "llama3",
    "gemma": "gemma",
    "gemma3_text": "gemma3",
    "qwen2": "qwen1_5",
    "qwen3": "qwen3",
}


def stored(folder: Path) -> dict[str, Tensor]:
    return {key: weight for file in folder.glob("*.safetensors") for key, weight in load_file(file).items()}


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One of each case; no test may change them."""
    home = tmp_path_factory.mktemp("folders")
    for name in CASES:
        write(name, home / name)
    return {name: home / name for name in CASES}


@pytest.fixture
def changed(folders: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of a case's folder, with other settings in its config.json (None takes one out) and other weights."""

    def changed(name: str, changes: dict[str, Any], **weights: Any) -> Path:
        folder = shutil.copytree(folders[name], tmp_path / "changed", dirs_exist_ok=True)
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
        if weights:
            save_file(load_file(folder / "model.safetensors") | weights, folder / "model.safetensors", {"format": "pt"})
        return folder

    return changed


def refused_by_checkpointer(folder: Path, message: str) -> None:
    with refused(message) as caught:
        HuggingFaceCheckpointer(str(folder)).load()
    assert str(caught.value).startswith("checkpointer.checkpoint_dir: ")


# ---- the same function, and the same bits back


@pytest.mark.parametrize(("dtype", "max_shard_size"), [(torch.float32, "5GB"), (torch.bfloat16, "40KB")], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_there_and_back(tmp_path: Path, name: str, dtype: torch.dtype, max_shard_size: str) -> None:
    """That a loaded folder makes the function of transformers is shown in test_builders.py."""
    source, target = tmp_path / "source", tmp_path / "run" / "model"
    model = write(name, source, dtype=dtype, max_shard_size=max_shard_size)
    sharded = max_shard_size != "5GB"
    assert (source / "model.safetensors.index.json").exists() == sharded
    decoder = build(name)
    checkpointer = load(decoder, source)
    assert all(parameter.dtype == torch.float32 for parameter in decoder.parameters())
    save(decoder, target, checkpointer, max_shard_size=max_shard_size)
    before, after = stored(source), stored(target)
    assert before.keys() == after.keys()
    assert all(weight.dtype == dtype and same_bits(weight, before[key]) for key, weight in after.items())
    assert ("lm_head.weight" in after) == (not CASES[name].config.tie_word_embeddings)
    assert (target / "model.safetensors.index.json").exists() == sharded
    assert (target / "tokenizer.json").exists()
    assert json.loads((target / "config.json").read_text()) == checkpointer.config
    assert (target / "generation_config.json").read_text() == (source / "generation_config.json").read_text()
    assert [path.name for path in target.parent.iterdir()] == ["model"]
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(target, dtype=dtype)
        assert torch.equal(again(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize(
    ("config_ids", "generation", "end_ids", "config_after", "generation_after"),
    [
        pytest.param(1, {"eos_token_id": 1}, [3], [3, 1], {"eos_token_id": [3, 1]}, id="a base model"),
        pytest.param([1, 5], {"eos_token_id": [5, 1]}, [3], [3, 1, 5], {"eos_token_id": [3, 5, 1]}, id="lists"),
        pytest.param(1, {"eos_token_id": [3, 1]}, [3], [3, 1], {"eos_token_id": [3, 1]}, id="only one of them has it"),
        pytest.param(3, {"eos_token_id": [1, 3]}, [3], 3, {"eos_token_id": [1, 3]}, id="an instruct model"),
        pytest.param(3, {"eos_token_id": 3, "top_k": 5}, [], 3, {"eos_token_id": 3, "top_k": 5}, id="no end"),
        pytest.param(
            1,
            {"top_k": 5},
            [3],
            [3, 1],
            {"pad_token_id": 4, "eos_token_id": [3, 1], "top_k": 5},
            id="not in the second",
        ),
        pytest.param(1, None, [3], [3, 1], {"pad_token_id": 4, "eos_token_id": [3, 1]}, id="no second file"),
        pytest.param(3, None, [3], 3, {"pad_token_id": 4, "eos_token_id": 3}, id="no second file, nothing to add"),
        pytest.param(None, None, [3], 3, {"pad_token_id": 4, "eos_token_id": 3}, id="no ids"),
        pytest.param(1, None, [], 1, None, id="no end, no second file"),
    ],
)
def test_generation_stops_where_an_answer_ends(
    tmp_path: Path,
    changed: Any,
    config_ids: Any,
    generation: Any,
    end_ids: Any,
    config_after: Any,
    generation_after: Any,
) -> None:
    folder = changed("llama3", {"bos_token_id": None, "eos_token_id": config_ids, "pad_token_id": 4})
    file = folder / "generation_config.json"
    # Not as this project would format it: a copy shows.
    file.write_text(json.dumps(generation))
    if generation is None:
        file.unlink()
    decoder = build("llama3")
    checkpointer = load(decoder, folder)
    save(decoder, tmp_path / "model", checkpointer, end_ids=end_ids)
    assert json.loads((tmp_path / "model" / "config.json").read_text()) == checkpointer.config | {
        "eos_token_id": config_after
    }
    saved = tmp_path / "model" / file.name
    assert saved.exists() == (generation_after is not None)
    if generation_after is not None:
        assert json.loads(saved.read_text()) == generation_after
        eos = AutoModelForCausalLM.from_pretrained(tmp_path / "model").generation_config.eos_token_id
        assert eos == generation_after["eos_token_id"]
    if generation == generation_after and generation is not None:
        assert saved.read_bytes() == file.read_bytes()


def test_each_weight_keeps_its_own_dtype(folders: dict[str, Path], tmp_path: Path, changed: Any) -> None:
    weights = load_file(folders["qwen3"] / "model.safetensors")
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    mixed = {key: weight.to(dtypes[i % 3]) for i, (key, weight) in enumerate(weights.items())}
    decoder = build("qwen3")
    save(decoder, tmp_path / "model", load(decoder, changed("qwen3", {}, **mixed)))
    after = stored(tmp_path / "model")
    assert after.keys() == mixed.keys() and all(same_bits(after[key], weight) for key, weight in mixed.items())


def small(builder: Any, **sizes: Any) -> TransformerDecoder:
    sizes = {"vocab_size": 67, "num_layers": 1, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 32} | sizes
    decoder = builder(**sizes, intermediate_dim=56, max_seq_len=40).eval()
    randomize(decoder)
    return decoder


# Beside the cases, decoders of torchtune that are of the Llama family too.
SCRATCH: dict[str, tuple[str, Callable[[], TransformerDecoder]]] = {
    **{name: (name, lambda name=name: build(name)) for name in CASES},
    "plain llama3_2": ("llama3_2", lambda: build("llama3_2", scale_factor=1, tie_word_embeddings=False)),
    "llama2": ("llama3", lambda: small(llama2)),
    "llama3_1": ("llama3", lambda: small(llama3_1)),
}


@pytest.mark.parametrize("name", SCRATCH)
def test_a_model_from_scratch_is_saved_for_transformers(tmp_path: Path, name: str) -> None:
    case, make = SCRATCH[name]
    decoder, checkpointer = make(), HuggingFaceCheckpointer(None)
    assert checkpointer.load() is None and checkpointer.config is None
    ids: dict[str, Any] = {"bos_token_id": 2, "eos_token_id": [3, 5], "pad_token_id": 0} if name in CASES else {}
    save(decoder, tmp_path, checkpointer, config=huggingface_config(decoder, **ids))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(model) is type(AutoModelForCausalLM.from_config(CASES[case].config)) and model.dtype == torch.float32
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(model.config, key) == ids.get(key)
    assert_same_logits(decoder, model)
    again = make()
    load(again, tmp_path)
    assert all(same_bits(weight, again.state_dict()[key]) for key, weight in decoder.state_dict().items())
    model.save_pretrained(tmp_path / "again")  # in the newer layout
    load(again, tmp_path / "again")


@pytest.mark.parametrize(
    ("builder", "most_like"),
    [
        (phi3, "'llama', but its position embedding is a Phi3RotaryPositionalEmbeddings"),
        (gemma2, "'gemma', but its attention is a Gemma2Attention"),
    ],
)
def test_another_family_of_decoders_is_refused(builder: Any, most_like: str) -> None:
    decoder = small(builder, **({"head_dim": 8} if builder is gemma2 else {}))
    with refused(
        f"model: its architecture is none of llama, gemma, gemma3_text, qwen2, qwen3: it is most similar to {most_like}"
    ):
        huggingface_config(decoder)


# ---- a folder is there whole or not at all


def test_saving_again_replaces_the_folder(folders: dict[str, Path], tmp_path: Path) -> None:
    """And its files are all as readable as the first."""
    decoder = build("llama3")
    checkpointer = load(decoder, folders["llama3"])
    for size in ("20KB", "5GB"):
        save(decoder, tmp_path / "model", checkpointer, max_shard_size=size)
    assert sorted(path.name for path in (tmp_path / "model").glob("model*")) == ["model.safetensors"]
    assert len({path.stat().st_mode for path in (tmp_path / "model").iterdir()}) == 1


def test_a_full_disk_leaves_no_folder(folders: dict[str, Path], tmp_path: Path) -> None:
    class FullDisk:
        def save(self, folder: Path) -> None:
            raise OSError(28, os.strerror(28))

    decoder = build("llama3")
    checkpointer = load(decoder, folders["llama3"])
    with pytest.raises(NoSpaceLeft, match=r"^no space left while writing .*model$"):
        save(decoder, tmp_path / "model", checkpointer, tokenizer=FullDisk())
    # A genuine failure inside safetensors: the system allows files of 16 KiB. Python ignores the signal for it.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, limits[1]))
    try:
        with pytest.raises(NoSpaceLeft, match=r"^no space left while writing .*model$"):
            save(decoder, tmp_path / "model", checkpointer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not [*tmp_path.iterdir()]


# ---- what a config.json says

SIZES = {
    "vocab_size": 67,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
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
        ("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 4.0}, "max_position_embeddings": 64}),
        # The length outside takes precedence.
        ("llama", {"rope_scaling": {"rope_type": "llama3", **LLAMA3}, "original_max_position_embeddings": 32}),
        ("gemma3_text", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "sliding_window_pattern": 2}),
        ("gemma3_text", {"rope_scaling": {"rope_type": "linear", "factor": 8.0, "type": "linear"}}),
        ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0}, "max_position_embeddings": 64}),
        ("qwen3", {"rope_scaling": YARN, "rope_theta": 1e6, "max_position_embeddings": 256}),
        ("qwen3", {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}, "max_position_embeddings": 256}),
        ("qwen3", {"rope_parameters": YARN | {"beta_fast": 8, "truncate": False}, "max_position_embeddings": 256}),
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
def test_a_folder_in_the_older_layout(changed: Any, name: str, changes: dict[str, Any]) -> None:
    if name == "llama3_2":
        changes["rope_scaling"]["original_max_position_embeddings"] = 8192
    folder, decoder = changed(name, changes | {"rope_parameters": None}), build(name)
    load(decoder, folder)
    assert_same_logits(decoder, AutoModelForCausalLM.from_pretrained(folder))


@pytest.mark.parametrize(
    ("model_type", "settings", "message"),
    [
        (
            "gemma3",
            {},
            "model_type 'gemma3' with the image encoder is not supported; Gemma 3 1B has none and is 'gemma3_t",
        ),
        (
            "mistral",
            {},
            "config.json: model_type 'mistral' is not supported; allowed: llama, gemma, gemma3_text, qwen2, qwen3",
        ),
        ("gemma2", {}, "model_type 'gemma2' is not supported; did you mean 'gemma'?"),
        ("qwen3_moe", {}, "model_type 'qwen3_moe' is not supported; did you mean 'qwen3'?"),
        ("llama", {"attention_bias": True}, "attention_bias = True is not supported; allowed: False"),
        ("llama", {"mlp_bias": True}, "mlp_bias = True is not supported; allowed: False"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported; allowed: 'silu'"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "longrope"}},
            "rope_type = 'longrope' is not supported; allowed: 'default' or 'linear' or 'dynamic' or 'yarn'",
        ),
        ("llama", {"rope_scaling": {"rope_type": "dynamic"}}, "config.json has no 'factor'"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 0}}, "factor = 0 has to be a number above 0"),
        (
            "llama",
            {"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": "no"}, "max_position_embeddings": 8},
            "truncate = 'no' is not supported; allowed: True or False",
        ),
        ("llama", {"rope_scaling": {"rope_type": "llama3"}}, "config.json has no 'factor'"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "config.json has no 'low_freq_factor'"),
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
            {"rope_scaling": {"rope_type": "yarn"}},
            "rope_type = 'yarn' is not supported; allowed: 'default' or 'linear'",
        ),
        # transformers ignores these two, and other programs may not.
        (
            "gemma3_text",
            {"rope_scaling": {"type": "linear", "factor": 8.0}},
            "rope_scaling.type = 'linear' is not supported; allowed: 'default'",
        ),
        (
            "gemma3_text",
            {"rope_parameters": {"rope_type": "linear", "factor": 8.0}},
            "rope_parameters.rope_type = 'linear' is not supported; allowed: 'default'",
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
        (
            "qwen2",
            {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            "config.json has no 'original_max_position_embeddings'",
        ),
        ("qwen3", {"attention_bias": True}, "attention_bias = True is not supported"),
        ("qwen3", {"hidden_act": "relu"}, "hidden_act = 'relu' is not supported"),
        ("qwen3", {"rope_parameters": {"rope_type": "llama3", **LLAMA3}}, "rope_type = 'llama3' is not supported"),
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


@pytest.mark.parametrize("of_folder", FAMILIES)
def test_a_folder_of_another_family_is_refused(folders: dict[str, Path], of_folder: str) -> None:
    folder = folders[FAMILIES[of_folder]]
    checkpointer = HuggingFaceCheckpointer(str(folder))
    for of_model, name in FAMILIES.items():
        message = f"does not fit the model: its model_type is '{of_folder}', and the model's '{of_model}'"
        if of_folder == of_model:
            checkpointer.check(build(name))
        else:
            with refused(f"checkpointer.checkpoint_dir: {folder} {message}"):
                checkpointer.check(build(name))


@pytest.mark.parametrize("name", FAMILIES.values())
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


def test_weights_without_a_counterpart_are_counted(folders: dict[str, Path]) -> None:
    folder = folders["qwen3_untied"]
    checkpointer = HuggingFaceCheckpointer(str(folder))
    for changes, message in (
        ({"num_layers": 3}, "the folder lacks model.layers.2.self_attn.q_proj.weight and 10 more"),
        ({"num_layers": 1}, "the model has no model.layers.1.input_layernorm.weight and 10 more"),
        ({"tie_word_embeddings": True}, "the model has no lm_head.weight"),
        (
            {"vocab_size": 70, "num_layers": 1, "tie_word_embeddings": True},
            "model.embed_tokens.weight is (67, 48) in the folder and (70, 48) in the model; "
            "the model has no lm_head.weight and 11 more",
        ),
    ):
        with refused(f"checkpointer.checkpoint_dir: {folder} does not fit the model: {message}"):
            checkpointer.check(build("qwen3_untied", **changes))


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
            "rope_scaling is Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, "
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
    decoder = build(name)
    for same in ({}, {"rms_norm_eps": 1e-3 * (1 + 1e-8)}):  # the second as a float32 would have it
        HuggingFaceCheckpointer(str(changed(name, same))).check(decoder)
    folder = changed(name, changes)
    with refused(f"checkpointer.checkpoint_dir: {folder} does not fit the model: {message}"):
        HuggingFaceCheckpointer(str(folder)).check(decoder)


def test_layers_that_are_not_alike_are_refused() -> None:
    decoder = build("llama3")
    decoder.layers[1].sa_norm.eps = 1e-5
    with refused("model: rms_norm_eps is not the same in all layers: 0.001, 1e-05"):
        architecture_of_decoder(decoder)


def test_fields_of_an_architecture_are_all_compared() -> None:
    """A field that is added and forgotten in ``first_difference`` would let a folder through."""
    one = architecture_of_decoder(build("gemma3"))
    for name in Architecture.__dataclass_fields__:
        other = dataclasses.replace(one, **{name: -1})
        assert one.first_difference(other) == (name if name != "attention_dropout" else None)


# ---- damaged folders


@pytest.mark.parametrize("use", [HuggingFaceCheckpointer, lambda folder: decoder_from_folder(folder, 100)])
def test_a_folder_without_a_config_is_refused(tmp_path: Path, use: Any) -> None:
    with refused(f"there is no folder {tmp_path / 'nowhere'}"):
        use(str(tmp_path / "nowhere"))
    with refused(f"there is no {tmp_path / 'config.json'}"):
        use(str(tmp_path))
    for text, message in (("{", "is not JSON"), ("[]", "must contain a JSON object, not a list")):
        (tmp_path / "config.json").write_text(text)
        with refused(f"{tmp_path / 'config.json'} {message}"):
            use(str(tmp_path))


def test_a_damaged_generation_config_is_refused(changed: Any) -> None:
    folder = changed("llama3", {})
    (folder / "generation_config.json").write_text("{")
    refused_by_checkpointer(folder, "generation_config.json is not JSON")


def test_a_folder_without_weights_is_refused(changed: Any) -> None:
    folder = changed("llama3", {})
    (folder / "model.safetensors").unlink()
    neither = f"there is neither model.safetensors nor model.safetensors.index.json in {folder}"
    refused_by_checkpointer(folder, neither)
    (folder / "pytorch_model.bin").write_bytes(b"")
    refused_by_checkpointer(folder, f"{neither}; pytorch_model.bin is an old format")
    for text in ("{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'):
        (folder / "model.safetensors.index.json").write_text(text)
        refused_by_checkpointer(folder, "model.safetensors.index.json is not the index of a sharded model")


def test_damaged_shards_are_refused(tmp_path: Path) -> None:
    write("gemma3", tmp_path, max_shard_size="40KB")
    first, *_, another, last = sorted(tmp_path.glob("*.safetensors"))
    whole = last.read_bytes()
    for damaged in (b"", whole[: len(whole) // 10], whole[:-100], b"\xff" * 64):
        last.write_bytes(damaged)
        refused_by_checkpointer(tmp_path, f"{last} cannot be read as safetensors: ")
    shutil.copy(first, last)  # of another part of the model
    with refused(f"{tmp_path} does not fit the model: the folder lacks model."):
        HuggingFaceCheckpointer(str(tmp_path)).check(build("gemma3"))
    another.unlink()
    message = f"model.safetensors.index.json names {another.name}, but there is no such file in {tmp_path}"
    refused_by_checkpointer(tmp_path, message)


@pytest.mark.parametrize("sharded", [False, True])
def test_git_lfs_pointers_are_named(tmp_path: Path, sharded: bool) -> None:
    write("gemma3", tmp_path, max_shard_size="40KB" if sharded else "5GB")
    *_, last = sorted(tmp_path.glob("*.safetensors"))
    last.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614\nsize 12345\n")
    reason = f"{last} is a Git LFS pointer, not the file itself; run `git lfs pull` in {tmp_path}"
    refused_by_checkpointer(tmp_path, f"checkpointer.checkpoint_dir: {reason}")


# Of bitsandbytes and GPTQ, as far as it bears on the error.
QUANTIZATION = {"quant_method": "bitsandbytes", "load_in_4bit": True}
Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("name", "weight", "message"),
    [
        (f"{Q_PROJ}.weight", torch.ones(288, 1).to(torch.uint8), "is stored as U8, which cannot be trained"),
        (f"{Q_PROJ}.qweight", torch.ones(6, 48).to(torch.int32), "is stored as I32, which cannot be trained"),
        (f"{Q_PROJ}.weight_scale", torch.ones(48, 1), "of shape (48, 1) has no place in the model of its config.json"),
    ],
    ids=["bitsandbytes", "GPTQ", "FP8"],
)
def test_quantized_weights_are_refused(changed: Any, name: str, weight: Tensor, message: str) -> None:
    advice = "; its quantization_config says that they are quantized: use the folder of the model before that"
    for quantization in (QUANTIZATION, None):
        folder = changed("llama3", {"quantization_config": quantization}, **{name: weight})
        with refused(message) as caught:
            HuggingFaceCheckpointer(str(folder))
        assert str(caught.value).endswith(advice) == (quantization is not None)


def test_a_left_over_quantization_config_is_dropped(
    changed: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = changed("llama3", {"quantization_config": QUANTIZATION})
    capsys.readouterr()
    decoder = build("llama3")
    checkpointer = load(decoder, folder)
    where = f"checkpointer.checkpoint_dir: {folder}/config.json has a quantization_config"
    assert capsys.readouterr().err == f"warning: {where}, but its weights are plain; it is dropped\n"
    save(decoder, tmp_path / "model", checkpointer)
    assert "quantization_config" not in json.loads((tmp_path / "model" / "config.json").read_text())
    assert_same_logits(decoder, AutoModelForCausalLM.from_pretrained(tmp_path / "model"))


@pytest.mark.parametrize(("dtype", "name"), [(torch.float8_e4m3fn, "F8_E4M3"), (torch.uint8, "U8")], ids=str)
def test_weights_that_cannot_be_trained_are_refused(changed: Any, dtype: torch.dtype, name: str) -> None:
    folder = changed("llama3", {}, **{"model.norm.weight": torch.ones(48).to(dtype)})
    message = f"model.norm.weight is stored as {name}, which cannot be trained; allowed: F32, BF16, F16"
    refused_by_checkpointer(folder, message)


def test_weights_without_a_place_are_refused(changed: Any) -> None:
    name = "model.layers.0.self_attn.q_proj.bias"
    folder = changed("llama3", {}, **{name: torch.ones(48)})
    refused_by_checkpointer(folder, f"{name} of shape (48,) has no place in the model of its config.json")


def test_what_a_folder_may_hold_beside_its_weights(changed: Any, folders: dict[str, Path]) -> None:
    """Old folders hold what RoPE computes, some tied ones the head too, which has to be the embeddings."""
    folder = changed("llama3", {}, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    load(build("llama3"), folder)
    embeddings = load_file(folders["qwen3"] / "model.safetensors")["model.embed_tokens.weight"]
    load(build("qwen3"), changed("qwen3", {}, **{"lm_head.weight": embeddings.clone()}))
    folder = changed("qwen3", {}, **{"lm_head.weight": embeddings + 1})
    refused_by_checkpointer(folder, "lm_head.weight and model.embed_tokens.weight differ")


@pytest.mark.parametrize("name", ["llama3_2", "qwen1_5", "gemma3"])
def test_a_tied_folder_that_stores_only_the_head(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    """It loads as the whole one, and is saved with the embeddings, as transformers saves it."""
    folder = shutil.copytree(folders[name], tmp_path / "head")
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight").bfloat16()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    decoder = build(name)
    checkpointer = load(decoder, folder)
    assert_same_logits(decoder, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    save(decoder, tmp_path / "model", checkpointer)
    after = stored(tmp_path / "model")
    assert "lm_head.weight" not in after
    assert same_bits(after["model.embed_tokens.weight"], weights["lm_head.weight"])


def test_only_the_head_of_an_untied_folder(changed: Any) -> None:
    folder = changed("llama3", {})
    weights = load_file(folder / "model.safetensors")
    del weights["model.embed_tokens.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with refused("does not fit the model: the folder lacks model.embed_tokens.weight"):
        HuggingFaceCheckpointer(str(folder)).check(build("llama3"))
