"""RoPE that is scaled for longer inputs: the same frequencies and logits as in transformers, also of saved folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import LENGTH, VOCAB, load, randomize, refused, save, tokens
from torchtune.models.llama2 import llama2
from torchtune.modules import TransformerDecoder
from torchtune.modules.attention_utils import create_block_causal_mask
from torchtune.training import set_default_dtype
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama import LlamaConfig

from adapt_recipes.models import HuggingFaceCheckpointer, decoder_from_folder, huggingface_config
from adapt_recipes.models.architecture import architecture_of_config, architecture_of_decoder
from adapt_recipes.models.rotations import LinearScaling, ScaledQwen2RoPE, ScaledRoPE, YarnScaling

ORIGINAL = LENGTH // 4
LINEAR: dict[str, Any] = {"rope_type": "linear", "factor": 4.0}
DYNAMIC: dict[str, Any] = {"rope_type": "dynamic", "factor": 4.0}
YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
# Some pairs are not scaled, some are mixed, and some interpolated.
MIXED = YARN | {"factor": 3.3, "beta_fast": 1.5, "beta_slow": 0.1, "mscale": 1.0, "mscale_all_dim": 0.5}
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": LENGTH,
    "rms_norm_eps": 1e-3,
    "rope_theta": 500.0,
    "tie_word_embeddings": True,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma3_text": {
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 6,
        "sliding_window_pattern": 2,
        "rope_local_base_freq": 20.0,
    },
}
CASES = [(family, scaling) for family in ("llama", "qwen2", "qwen3") for scaling in (LINEAR, DYNAMIC, YARN, MIXED)]
CASES += [("llama", {"type": "linear", "factor": 4.0}), ("gemma3_text", LINEAR)]


def write_config(folder: Path, family: str, scaling: dict[str, Any] | None, **changes: Any) -> None:
    """In the layout of transformers 4, as in the folders of the hub."""
    config = {"model_type": family, **SIZES, **FAMILIES[family], "rope_scaling": scaling, **changes}
    (folder / "config.json").write_text(json.dumps(config))


def write(folder: Path, family: str, scaling: dict[str, Any] | None, **changes: Any) -> Any:
    """A folder with random weights; returns the model of transformers."""
    write_config(folder, family, scaling, **changes)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).eval()
    randomize(model)
    model.save_pretrained(folder)
    write_config(folder, family, scaling, **changes)
    return model


@torch.no_grad()
def assert_same_logits(decoder: TransformerDecoder, model: Any) -> None:
    """On rows of any length, and on two documents in a row."""
    for length in (1, ORIGINAL, ORIGINAL + 1, LENGTH):
        expected = model(tokens(length)).logits
        assert expected.std() > 0.5
        torch.testing.assert_close(decoder(tokens(length)), expected, rtol=0, atol=1e-5)
    documents = [tokens(length, rows=1, seed=length) for length in (ORIGINAL + 3, LENGTH - ORIGINAL - 3)]
    packed = decoder(
        torch.cat(documents, dim=1),
        mask=create_block_causal_mask([torch.tensor([document.shape[1] for document in documents])]),
        input_pos=torch.cat([torch.arange(document.shape[1]) for document in documents])[None],
    )
    expected = torch.cat([model(document).logits for document in documents], dim=1)
    torch.testing.assert_close(packed, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("family", "scaling"), CASES, ids=str)
def test_logits_there_and_back(tmp_path: Path, family: str, scaling: dict[str, Any]) -> None:
    """Of a folder of either layout, of what is saved of it, and of what is saved of the decoder alone."""
    model = write(tmp_path, family, scaling)
    decoder = decoder_from_folder(str(tmp_path), LENGTH).eval()
    checkpointer = load(decoder, tmp_path)
    assert_same_logits(decoder, model)

    save(decoder, tmp_path / "saved", checkpointer)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)
    again.save_pretrained(tmp_path / "newer layout")
    newer = json.loads((tmp_path / "newer layout" / "config.json").read_text())
    assert "rope_scaling" not in newer
    assert architecture_of_config(newer, where="") == architecture_of_decoder(decoder)

    save(decoder, tmp_path / "from scratch", checkpointer, config=huggingface_config(decoder))
    assert_same_logits(decoder, AutoModelForCausalLM.from_pretrained(tmp_path / "from scratch"))


@torch.no_grad()
@pytest.mark.parametrize(("family", "scaling"), CASES, ids=str)
def test_scaling_matters_here(tmp_path: Path, family: str, scaling: dict[str, Any]) -> None:
    """Else equal logits would say little. Except ``dynamic``, which is RoPE without scaling up to this length."""
    logits = []
    for each in (None, scaling):
        write_config(tmp_path, family, each)
        decoder = decoder_from_folder(str(tmp_path), LENGTH).eval()
        randomize(decoder)
        logits.append(decoder(tokens()))
    assert torch.equal(*logits) if scaling is DYNAMIC else (logits[0] - logits[1]).abs().max() > 1e-2


@settings(deadline=None, max_examples=300)
@given(
    half=st.integers(2, 64),
    theta=st.floats(2, 1e7),
    factor=st.floats(0.5, 64),
    original=st.integers(2, 100_000),
    betas=st.tuples(st.floats(0.1, 64), st.floats(0.1, 64)),
    truncate=st.booleans(),
    optional=st.sampled_from([{}, {"attention_factor": 0.7}, {"mscale": 0.7, "mscale_all_dim": 1.3}, {"mscale": 2.0}]),
)
def test_frequencies_of_yarn_are_those_of_transformers(
    half: int,
    theta: float,
    factor: float,
    original: int,
    betas: tuple[float, float],
    truncate: bool,
    optional: dict[str, float],
) -> None:
    config = {
        **SIZES,
        "head_dim": 2 * half,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": theta,
            "factor": factor,
            "original_max_position_embeddings": original,
            "beta_fast": betas[0],
            "beta_slow": betas[1],
            "truncate": truncate,
            **optional,
        },
    }
    expected, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](LlamaConfig(**config), torch.device("cpu"))
    scaling = architecture_of_config({"model_type": "llama", **config}, where="").rope_scaling
    assert isinstance(scaling, YarnScaling)
    assert scaling.attention_factor == pytest.approx(attention_factor, rel=1e-12)
    # 3e-7 is two units in the last place.
    for kind in (ScaledRoPE, ScaledQwen2RoPE):
        torch.testing.assert_close(kind(2 * half, 2, theta, scaling).theta, expected, rtol=3e-7, atol=0)


@pytest.mark.parametrize("kind", [ScaledRoPE, ScaledQwen2RoPE])
@pytest.mark.parametrize("scaling", [LinearScaling(3.0), YarnScaling(4.0, 16, 1.2, 8.0, 0.5, True)], ids=str)
def test_a_cache_built_on_the_meta_device(kind: Any, scaling: Any) -> None:
    """As on the CPU, however often it is built, and in a model of any dtype."""
    expected = kind(16, LENGTH, 500.0, scaling)
    with set_default_dtype(torch.bfloat16):
        assert torch.equal(kind(16, LENGTH, 500.0, scaling).cache, expected.cache)
    with torch.device("meta"):
        rope = kind(16, LENGTH, 500.0, scaling)
    rope.to_empty(device="cpu")
    rope.cache.fill_(torch.nan)
    for _ in range(2):
        rope.rope_init()
        assert torch.equal(rope.cache, expected.cache) and torch.equal(rope.theta, expected.theta)


# ---- the longest input


@pytest.mark.parametrize(
    ("scaling", "changes", "longest", "limit"),
    [
        (None, {}, LENGTH, "the model's max_position_embeddings 40"),
        (LINEAR, {}, 4 * LENGTH, "the 160 tokens of the model's linear rope_scaling"),
        (YARN, {}, LENGTH, "the 40 tokens of the model's yarn rope_scaling"),
        (YARN, {"max_position_embeddings": 100}, 100, "the 100 tokens of the model's yarn rope_scaling"),
        # As in the cards of Qwen 2.5, which let users add the scaling and nothing else.
        ({"type": "yarn", "factor": 4.0}, {}, 4 * LENGTH, "the 160 tokens of the model's yarn rope_scaling"),
        (
            DYNAMIC,
            {},
            LENGTH,
            "the model's max_position_embeddings 40, beyond which the angles of 'dynamic' RoPE depend on the longest",
        ),
    ],
    ids=str,
)
def test_a_length_beyond_the_scaling_is_refused(
    tmp_path: Path, scaling: dict[str, Any] | None, changes: dict[str, Any], longest: int, limit: str
) -> None:
    write_config(tmp_path, "llama", scaling, **changes)
    assert decoder_from_folder(str(tmp_path), longest).max_seq_len == longest
    with refused(f"path: {tmp_path / 'config.json'}: max_seq_len {longest + 1} exceeds {limit}"):
        decoder_from_folder(str(tmp_path), longest + 1)


def test_dynamic_needs_its_length(tmp_path: Path) -> None:
    write_config(tmp_path, "llama", DYNAMIC, max_position_embeddings=None)
    with refused("config.json has no 'max_position_embeddings'"):
        decoder_from_folder(str(tmp_path), 8)


@torch.no_grad()
def test_why_dynamic_is_refused_beyond_its_length(tmp_path: Path) -> None:
    """In transformers the logits of a text depend on what follows it, and even on what the model has read before."""
    model, row = write(tmp_path, "llama", DYNAMIC), tokens(LENGTH + 20, rows=1)
    first = model(row[:, :LENGTH]).logits
    followed = model(row).logits[:, :LENGTH]
    assert (followed - first).abs().max() > 1e-2
    # Not bit for bit: on some CPUs the rounding of a matrix product depends on its number of rows.
    torch.testing.assert_close(model(row[:, :LENGTH]).logits, followed, rtol=0, atol=1e-5)


def test_a_builder_of_torchtune_on_a_dynamic_folder(tmp_path: Path) -> None:
    """It computes the same as far as the folder's length, and is refused if it is longer."""
    model = write(tmp_path, "llama", DYNAMIC, num_key_value_heads=4, rope_theta=10_000.0)
    sizes = {"vocab_size": VOCAB, "num_layers": 4, "num_heads": 4, "num_kv_heads": 4, "embed_dim": 48}
    sizes |= {"intermediate_dim": 56, "norm_eps": 1e-3}
    decoder = llama2(**sizes, max_seq_len=LENGTH).eval()
    load(decoder, tmp_path)
    assert_same_logits(decoder, model)
    with refused(f"does not fit the model: max_seq_len {LENGTH + 1} exceeds the model's max_position_embeddings 40, "):
        HuggingFaceCheckpointer(str(tmp_path)).check(llama2(**sizes, max_seq_len=LENGTH + 1))


@pytest.mark.parametrize("scaling", [LINEAR, YARN], ids=str)
def test_a_builder_without_the_scaling_is_refused(tmp_path: Path, scaling: dict[str, Any]) -> None:
    write(tmp_path, "llama", scaling)
    plain = tmp_path / "plain"
    plain.mkdir()
    write_config(plain, "llama", None)
    with refused("does not fit the model: rope_scaling is ") as caught:
        HuggingFaceCheckpointer(str(tmp_path)).check(decoder_from_folder(str(plain), LENGTH))
    assert "Scaling(factor=4.0" in str(caught.value) and str(caught.value).endswith("and None in the model")
