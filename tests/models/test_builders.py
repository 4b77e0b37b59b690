"""The decoders compute what transformers computes, and go on doing so whatever training does to them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity import (
    CASES,
    LENGTH,
    PATTERN,
    VOCAB,
    WINDOW,
    assert_same_logits,
    build,
    load,
    make_pair,
    pair,
    randomize,
    refused,
    tokens,
    write,
)
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torchtune.models.gemma import gemma_2b
from torchtune.models.gemma.rms_norm import GemmaRMSNorm
from torchtune.models.llama3 import llama3_8b
from torchtune.models.llama3_1._position_embeddings import Llama3ScaledRoPE
from torchtune.models.llama3_2 import llama3_2_1b
from torchtune.modules import (
    RMSNorm,
    RotaryPositionalEmbeddings,
    TiedLinear,
    TransformerDecoder,
    TransformerSelfAttentionLayer,
)
from torchtune.modules.attention_utils import create_block_causal_mask
from torchtune.training import compile_model, load_from_full_model_state_dict, set_activation_checkpointing
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from adapt_recipes.data.examples import IGNORE_INDEX
from adapt_recipes.models import (
    HuggingFaceCheckpointer,
    TokenLosses,
    decoder_from_folder,
    gemma3_1b,
    huggingface_config,
    qwen1_5_0_5b,
    qwen3_0_6b,
)
from adapt_recipes.models.architecture import architecture_of_config, architecture_of_decoder
from adapt_recipes.models.head_norm import NormedHeads
from adapt_recipes.models.rotations import RotaryEmbeddings

OURS = ["gemma3", "qwen3", "qwen1_5"]  # what this project builds, not torchtune


def supervised(rows: Tensor) -> Tensor:
    """Labels: what follows, at a third of the positions."""
    labels = rows.roll(-1, dims=1)
    ignored = torch.rand(rows.shape, generator=torch.Generator().manual_seed(2)) > 1 / 3
    ignored[:, -1] = True
    return labels.masked_fill(ignored, IGNORE_INDEX)


def gradients(decoder: TransformerDecoder, compute_dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    rows = tokens()
    TokenLosses(decoder, compute_dtype=compute_dtype)(rows, supervised(rows)).mean().backward()
    assert all(parameter.grad is not None for parameter in decoder.parameters())
    return {name: parameter.grad for name, parameter in decoder.named_parameters() if parameter.grad is not None}


# ---- the same function as in transformers


@pytest.mark.parametrize("name", CASES)
def test_logits(name: str) -> None:
    for length in (1, WINDOW, WINDOW + 1, LENGTH):
        assert_same_logits(*pair(name), length)


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_two_documents_in_a_row_are_as_each_alone(name: str) -> None:
    decoder, model = pair(name)
    lengths = torch.tensor([LENGTH - 2 * WINDOW - 1, 2 * WINDOW + 1])  # both longer than the window
    documents = [tokens(int(length), rows=1, seed=index) for index, length in enumerate(lengths)]
    packed = decoder(
        torch.cat(documents, dim=1),
        mask=create_block_causal_mask([lengths]),
        input_pos=torch.cat([torch.arange(int(length)) for length in lengths])[None],
    )
    expected = torch.cat([model(document).logits for document in documents], dim=1)
    torch.testing.assert_close(packed, expected, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_logits_in_bf16(name: str) -> None:
    """Gemma 3 to the bit. The others round once less than transformers, where it rounds before a norm's weights."""
    decoder, model = pair(name, torch.bfloat16)
    assert {weight.dtype for weight in decoder.state_dict().values()} == {torch.bfloat16}
    ours, theirs = decoder(tokens()), model(tokens()).logits.float()
    if name == "gemma3":
        assert torch.equal(ours, theirs)
    exact = build(name)
    exact.load_state_dict(decoder.state_dict())
    errors = [(logits - exact(tokens())).square().mean().sqrt() for logits in (ours, theirs)]
    assert 0 < errors[0] < 1.2 * errors[1] < 0.05
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.2)


@pytest.mark.parametrize("name", CASES)
def test_gradients(name: str, tmp_path: Path) -> None:
    """Of the losses at supervised positions only. A folder gives the gradients of transformers our names."""
    decoder, model = make_pair(name)
    ours = gradients(decoder)
    rows = tokens()
    logits = model(rows).logits
    F.cross_entropy(logits.flatten(0, 1), supervised(rows).flatten(), ignore_index=IGNORE_INDEX).backward()
    for parameter in model.parameters():
        parameter.data = parameter.grad
    model.save_pretrained(tmp_path)
    theirs = HuggingFaceCheckpointer(str(tmp_path)).load()
    assert theirs is not None and ours.keys() == theirs.keys()
    for key, gradient in ours.items():
        assert (gradient - theirs[key]).norm() < 1e-4 * theirs[key].norm(), key


# What the folders of the six models say, as far as it bears on the function.
HUB: dict[str, tuple[Callable[[], TransformerDecoder], dict[str, Any]]] = {
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
        lambda: gemma3_1b(max_seq_len=64),
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
        lambda: qwen3_0_6b(max_seq_len=64),
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
        lambda: qwen1_5_0_5b(max_seq_len=64),
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
    """Also after they are saved. Ours have a rotary cache of the training's length for each base, and no more."""
    builder, config = HUB[name]
    with torch.device("meta"):
        decoder = builder()
    hub = architecture_of_config(config, where="")
    assert hub.first_difference(architecture_of_decoder(decoder)) is None
    written = architecture_of_config(huggingface_config(decoder), where="")
    assert hub.first_difference(written) is None
    if isinstance(decoder.output, TiedLinear):
        assert decoder.output.tied_module is decoder.tok_embeddings
    ours = name.startswith(tuple(OURS))
    assert decoder.max_seq_len == (64 if ours else config["max_position_embeddings"])
    if ours:
        ropes = {layer.attn.pos_embeddings for layer in decoder.layers}
        assert [len(rope.cache) for rope in ropes] == [64] * (2 if name == "gemma3_1b" else 1)


# ---- a decoder built from a folder of the Llama kind

SCALED = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": LENGTH // 3,  # rows are longer than what RoPE is stretched from
}
LLAMA: dict[str, Any] = {
    "vocab_size": VOCAB,
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


def write_llama_config(folder: Path, **changes: Any) -> dict[str, Any]:
    """``config.json`` in exactly this layout; None takes a setting out."""
    config = {key: value for key, value in (LLAMA | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
    return config


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": None},  # as in Llama 1: as many as heads
        {"num_key_value_heads": 1},
        {"head_dim": 16},  # not hidden_size / heads
        {"rope_theta": None, "rms_norm_eps": None},  # the defaults of transformers
        {"rope_theta": None, "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}},
        {"rope_theta": None, "rope_parameters": {"rope_theta": 500.0, **SCALED}},
        {"rope_scaling": SCALED, "tie_word_embeddings": True, "head_dim": 12},
        {"rope_scaling": {"type": "default"}},
    ],
    ids=str,
)
def test_a_llama_from_a_folder(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = LlamaForCausalLM(LlamaConfig(**write_llama_config(tmp_path, **changes))).eval()
    randomize(model)
    model.save_pretrained(tmp_path)
    write_llama_config(tmp_path, **changes)  # not the newest layout, in which transformers writes it
    decoder = decoder_from_folder(str(tmp_path), LENGTH).eval()
    load(decoder, tmp_path)
    assert_same_logits(decoder, model)


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_each_family_from_a_folder(tmp_path: Path, name: str) -> None:
    model = write(name, tmp_path)
    decoder = decoder_from_folder(str(tmp_path), LENGTH).eval()
    load(decoder, tmp_path)
    assert_same_logits(decoder, model)
    assert architecture_of_decoder(decoder) == architecture_of_decoder(build(name))


# As on the hub, and parameters by transformers.
OTHER_SIZES: dict[str, dict[str, Any]] = {
    "gemma-3-270m": {
        "model_type": "gemma3_text",
        "vocab_size": 262_144,
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_hidden_layers": 18,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 512,
        "layer_types": [*["sliding_attention"] * 5, "full_attention"] * 3,
        "max_position_embeddings": 32_768,
    },
    "Qwen3-1.7B": {
        "model_type": "qwen3",
        "vocab_size": 151_936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rope_theta": 1_000_000,
        "tie_word_embeddings": True,
        "max_position_embeddings": 40_960,
    },
}


@pytest.mark.parametrize("name", OTHER_SIZES)
def test_sizes_that_have_no_builder_of_their_own(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(OTHER_SIZES[name]))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
        decoder = decoder_from_folder(str(tmp_path), 1024)
    ours, theirs = (sum(parameter.numel() for parameter in each.parameters()) for each in (decoder, model))
    assert ours == theirs
    assert architecture_of_decoder(decoder) == architecture_of_config(OTHER_SIZES[name], where="config.json")


@torch.no_grad()
def test_scaled_rope_matters_here(tmp_path: Path) -> None:
    """Else equal logits of the scaled models would say little."""
    decoders = [build("llama3_2"), build("llama3_2", scale_factor=1)]
    for scaling in (SCALED, None):
        write_llama_config(tmp_path, rope_scaling=scaling)
        decoders.append(decoder_from_folder(str(tmp_path), LENGTH).eval())
        randomize(decoders[-1])
    logits = [decoder(tokens()) for decoder in decoders]
    assert (logits[0] - logits[1]).abs().max() > 1e-2 and (logits[2] - logits[3]).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama4"}, "config.json: model_type 'llama4' is not supported; did you mean 'llama'?"),
        ({"model_type": "qwen2", "head_dim": 16}, "config.json: head_dim = 16 is not supported for qwen2; allowed: 8"),
        (
            {"model_type": "gemma", "head_dim": 8, "tie_word_embeddings": False},
            "config.json: tie_word_embeddings = False is not supported for gemma; allowed: True",
        ),
        (
            {
                "model_type": "gemma3_text",
                "head_dim": 8,
                "query_pre_attn_scalar": 8,
                "tie_word_embeddings": True,
                "layer_types": ["full_attention", "sliding_attention"],
            },
            "config.json: full_attention_layers = (0,) is not supported for gemma3_text; allowed: (0, 1)",
        ),
        ({"attention_bias": True}, "config.json: attention_bias = True is not supported; allowed: False"),
        ({"hidden_size": None}, "config.json has no 'hidden_size'"),
        ({"num_key_value_heads": 3}, "config.json: num_heads (4) must be divisible by num_kv_heads (3)"),
        ({"max_position_embeddings": 39}, "max_seq_len 40 exceeds the model's max_position_embeddings 39"),
    ],
    ids=str,
)
def test_a_folder_that_cannot_be_built_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_llama_config(tmp_path, **changes)
    with refused(message) as caught:
        decoder_from_folder(str(tmp_path), LENGTH)
    assert str(caught.value).startswith(f"path: {tmp_path}")


# ---- RoPE, and heads that are normalized before it


@pytest.mark.parametrize("kind", [RotaryPositionalEmbeddings, Llama3ScaledRoPE])
@pytest.mark.parametrize("positions", [None, "packed", "one row for all"])
def test_values_and_gradients_of_rope_are_those_of_torchtune(kind: type, positions: str | None) -> None:
    rope = kind(16, 48, base=500)
    input_pos = {
        None: None,
        "packed": torch.stack([torch.arange(24), torch.arange(24) % 10 + 20]),
        "one row for all": torch.arange(24)[None] + 3,
    }[positions]
    x = torch.randn(2, 24, 3, 16, requires_grad=True)
    upstream = torch.randn_like(x)
    results = []
    for module in (rope, RotaryEmbeddings(rope)):
        rotated = module(x, input_pos=input_pos)
        (gradient,) = torch.autograd.grad(rotated, x, upstream)
        results.append((rotated, gradient))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-6)
    assert not torch.allclose(results[0][0], x), "RoPE changes something"


def test_rope_in_half_precision_computes_in_fp32_and_rounds_once() -> None:
    rope, x = RotaryEmbeddings(RotaryPositionalEmbeddings(16, 24)), torch.randn(1, 24, 2, 16).bfloat16()
    assert rope(x).dtype == torch.bfloat16
    assert torch.equal(rope(x), rope(x.float()).bfloat16())


@pytest.mark.parametrize("norm_class", [RMSNorm, GemmaRMSNorm])
def test_a_head_norm_computes_in_fp32_under_autocast(norm_class: type[nn.Module]) -> None:
    """Each head has its own norm, whose output is rounded once, to the dtype of the projection."""
    torch.manual_seed(0)
    norm = norm_class(8, eps=1e-6)
    nn.init.normal_(norm.scale)
    heads = NormedHeads(nn.Linear(16, 24, bias=False), norm, head_dim=8)
    x = torch.randn(2, 5, 16)
    with torch.autocast("cpu", torch.bfloat16):
        projected, normed = heads.projection(x), heads(x)
    exact = projected.double().unflatten(-1, (3, 8))
    weight = norm.scale.double() + (1 if norm_class is GemmaRMSNorm else 0)
    exact = exact * (exact.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight
    assert normed.dtype == torch.bfloat16
    assert torch.equal(normed, exact.flatten(-2).to(torch.bfloat16))


# ---- the sliding window of Gemma 3


@torch.no_grad()
@pytest.mark.parametrize("pattern", [1, 2])
@pytest.mark.parametrize("packed", [False, True])
def test_how_far_back_one_layer_sees(pattern: int, packed: bool) -> None:
    """A token beyond the window has no influence at all on a local layer (pattern 2), and some on a global one."""
    decoder = build("gemma3", num_layers=1, sliding_window_pattern=pattern)
    mask = torch.ones(2, LENGTH, LENGTH, dtype=torch.bool).tril() if packed else None
    rows, last = tokens(), LENGTH - 1
    logits = decoder(rows, mask=mask)[:, last]
    for back in (1, WINDOW - 1, WINDOW, WINDOW + 1):
        changed = rows.clone()
        changed[:, last - back] = (changed[:, last - back] + 1) % VOCAB
        same = torch.equal(logits, decoder(changed, mask=mask)[:, last])
        assert same == (pattern == 2 and back >= WINDOW), back


@pytest.mark.parametrize("length", [WINDOW, WINDOW + 1])
def test_rows_within_the_window_take_the_fast_causal_path(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    attention = F.scaled_dot_product_attention

    def recording(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append((kwargs["attn_mask"] is None, kwargs["is_causal"]))
        return attention(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recording)
    build("gemma3")(tokens(length))
    fast = [length <= WINDOW or number % PATTERN == 0 for number in range(1, 8)]
    assert calls == [(is_fast, is_fast) for is_fast in fast]


@torch.no_grad()
def test_a_window_with_a_key_value_cache() -> None:
    decoder = build("gemma3")
    rows = tokens(3 * WINDOW)
    expected = decoder(rows)
    decoder.setup_caches(batch_size=2, dtype=torch.float32, decoder_max_seq_len=LENGTH)
    causal = torch.ones(2, LENGTH, LENGTH, dtype=torch.bool).tril()
    ends = [WINDOW + 2, WINDOW + 3, WINDOW + 4, 2 * WINDOW + 1, 3 * WINDOW]
    logits = []
    for start, end in zip([0, *ends], ends, strict=False):
        positions = torch.arange(start, end).expand(2, -1)
        logits.append(decoder(rows[:, start:end], mask=causal[:, start:end], input_pos=positions))
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=0, atol=1e-5)


def test_a_mask_that_cannot_be_narrowed_is_refused() -> None:
    decoder = build("gemma3")
    with pytest.raises(ValueError, match=r"^a sliding window needs a boolean mask tensor, not .*torch\.float32$"):
        decoder(tokens(), mask=torch.zeros(2, LENGTH, LENGTH))
    with pytest.raises(ValueError, match=r"^a sliding window needs a boolean mask tensor, not BlockMask$"):
        decoder(tokens(), mask=type("BlockMask", (), {})())


@pytest.mark.parametrize("key", ["sliding_window", "sliding_window_pattern"])
def test_a_window_of_nothing_is_refused(key: str) -> None:
    with refused(f"model.{key}: 0 is not allowed; at least 1"):
        build("gemma3", **{key: 0})


# ---- what training does to a decoder


@pytest.mark.parametrize("name", OURS)
def test_activation_checkpointing_under_autocast(name: str) -> None:
    """In fp32 it is part of ``test_under_fsdp2_as_torchtune_sets_it_up``."""
    expected = gradients(build(name), torch.bfloat16)
    decoder = build(name)
    set_activation_checkpointing(decoder, auto_wrap_policy={TransformerSelfAttentionLayer})
    for key, gradient in gradients(decoder, torch.bfloat16).items():
        assert torch.equal(gradient, expected[key.replace("_checkpoint_wrapped_module.", "")]), key


def compile_from_scratch(decoder: TransformerDecoder) -> None:
    torch._dynamo.reset()  # else layers of other tests count towards the limit, beyond which nothing is compiled
    counters.clear()
    compile_model(decoder, verbose=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*OURS, "llama3_2"])
def test_compiled(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_COMPILE_BACKEND", "aot_eager")  # traces forward and backward; needs no C++ compiler
    changes: dict[str, Any] = {"num_layers": 2, "sliding_window_pattern": 2} if name == "gemma3" else {"num_layers": 2}
    expected = gradients(build(name, **changes))
    decoder = build(name, **changes)
    compile_from_scratch(decoder)
    torch.testing.assert_close(gradients(decoder), expected, rtol=1e-4, atol=1e-6)
    # Around attention, which is not compiled, a layer has four parts; both kinds of layer of Gemma 3 share one.
    assert counters["stats"]["unique_graphs"] == (7 if name == "gemma3" else 4), "for each kind of layer"
    reasons = list(counters["graph_break"])
    assert reasons and all("packed_attention" in reason for reason in reasons), reasons


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.skipif(not shutil.which("g++"), reason="there is no C++ compiler (g++), which inductor needs on the CPU")
def test_compiled_to_machine_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One layer, forward only: a compilation takes its time."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    decoder = build("gemma3", num_layers=1)
    expected = decoder(tokens())
    compile_from_scratch(decoder)
    torch.testing.assert_close(decoder(tokens()), expected, rtol=0, atol=1e-5)
    assert counters["inductor"] and counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.parametrize("name", OURS)
def test_bf16_compute_keeps_the_residual_stream_and_the_gradients_in_fp32(name: str) -> None:
    decoder, rows = build(name), tokens()
    with torch.autocast("cpu", torch.bfloat16):
        hidden = decoder.tok_embeddings(rows)
        for layer in decoder.layers:
            projected = layer.attn.q_proj(layer.sa_norm(hidden))
            hidden = layer(hidden)
            assert (projected.dtype, hidden.dtype) == (torch.bfloat16, torch.float32)
    exact = gradients(build(name))
    for key, gradient in gradients(decoder, torch.bfloat16).items():
        assert gradient.dtype == torch.float32
        assert 0 < (gradient - exact[key]).norm() < 0.1 * exact[key].norm(), key


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OURS)
def test_built_on_the_meta_device(name: str, dtype: torch.dtype) -> None:
    expected = build(name, dtype)
    with torch.device("meta"):
        decoder = CASES[name].build(**CASES[name].sizes).to(dtype).eval()
    decoder.to_empty(device="cpu")
    for module in decoder.modules():
        for buffer in module.buffers(recurse=False):
            buffer.fill_(torch.nan)  # what is left there may be anything
        if hasattr(module, "rope_init"):
            module.rope_init()
    decoder.load_state_dict(expected.state_dict())
    assert torch.equal(decoder(tokens()), expected(tokens()))


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("name", OURS)
def test_under_fsdp2_as_torchtune_sets_it_up(name: str) -> None:
    plain = build(name)
    expected = gradients(plain)
    with torch.device("meta"):
        decoder = CASES[name].build(**CASES[name].sizes)
    model = TokenLosses(decoder)
    set_activation_checkpointing(decoder, auto_wrap_policy={TransformerSelfAttentionLayer})
    mesh = init_device_mesh("cpu", (1,))
    for layer in decoder.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for module in decoder.modules():
        if hasattr(module, "rope_init"):
            module.rope_init()
    load_from_full_model_state_dict(decoder, plain.state_dict(), torch.device("cpu"), strict=True)
    rows = tokens()
    model(rows, supervised(rows)).mean().backward()
    for key, parameter in decoder.named_parameters():
        gradient: Any = parameter.grad
        assert torch.equal(gradient.full_tensor(), expected[key.replace("_checkpoint_wrapped_module.", "")]), key
