"""The six models at a tiny size, here and in transformers, with the same random weights; one case for each family."""

from __future__ import annotations

import copy
import re
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torchtune.models.gemma import gemma
from torchtune.models.llama3 import llama3
from torchtune.models.llama3_2 import llama3_2
from torchtune.models.qwen2 import qwen2
from torchtune.modules import TransformerDecoder
from torchtune.modules.peft import get_adapter_params
from torchtune.training import set_default_dtype
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models.gemma import GemmaConfig
from transformers.models.gemma3 import Gemma3TextConfig
from transformers.models.llama import LlamaConfig
from transformers.models.qwen2 import Qwen2Config
from transformers.models.qwen3 import Qwen3Config

from adapt_recipes.models import HuggingFaceCheckpointer, huggingface_config
from adapt_recipes.models.gemma3 import gemma3
from adapt_recipes.models.qwen3 import qwen3

VOCAB, LENGTH = 67, 40
WINDOW, PATTERN = 6, 3  # of Gemma 3: rows of LENGTH go far beyond the window, its 7 layers through two whole patterns
EPS = 1e-3  # so large that a norm with another shows


class Case(NamedTuple):
    """A model as either side builds it."""

    build: Callable[..., TransformerDecoder]
    sizes: dict[str, Any]
    config: PretrainedConfig


def _case(
    build: Callable[..., TransformerDecoder],
    config: type[PretrainedConfig],
    ours: dict[str, Any] | None = None,
    theirs: dict[str, Any] | None = None,
    *,
    layers: int = 2,
    head_dim: int | None = None,
    rope_base: float = 500.0,
) -> Case:
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "num_layers": layers,
        "num_heads": 4,
        "num_kv_heads": 2,
        "embed_dim": 48,
        "intermediate_dim": 56,
        "max_seq_len": LENGTH,
        "norm_eps": EPS,
        "rope_base": rope_base,
    }
    same: dict[str, Any] = {
        "vocab_size": VOCAB,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_size": 48,
        "intermediate_size": 56,
        "max_position_embeddings": 128,
        "rms_norm_eps": EPS,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_base},
        "pad_token_id": None,
    }
    if head_dim is not None:
        sizes["head_dim"] = same["head_dim"] = head_dim
    return Case(build, sizes | (ours or {}), config(**(same | (theirs or {}))))


TIED = {"tie_word_embeddings": True}
CASES = {
    "llama3_2": _case(
        llama3_2,
        LlamaConfig,
        {"scale_factor": 32} | TIED,
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500_000.0,
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            "max_position_embeddings": 131_072,
            **TIED,
        },
        rope_base=500_000.0,
    ),
    "llama3": _case(llama3, LlamaConfig),
    "gemma": _case(gemma, GemmaConfig, head_dim=16),
    "gemma3": _case(
        gemma3,
        Gemma3TextConfig,
        {"local_rope_base": 20.0, "sliding_window": WINDOW, "sliding_window_pattern": PATTERN},
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 500.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
            },
            "sliding_window": WINDOW,
            "layer_types": ["full_attention" if i % PATTERN == 0 else "sliding_attention" for i in range(1, 8)],
            "query_pre_attn_scalar": 16,
        },
        layers=7,
        head_dim=16,
    ),
    "qwen3": _case(qwen3, Qwen3Config, TIED, TIED, head_dim=16),
    "qwen3_untied": _case(qwen3, Qwen3Config, {"tie_word_embeddings": False}, head_dim=16),
    "qwen1_5": _case(qwen2, Qwen2Config, TIED, TIED),
}


class Tokenizer:
    """As much of a tokenizer as a checkpointer needs."""

    def save(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")


def randomize(model: nn.Module, *, seed: int = 0) -> None:
    """Norms and biases too: at their defaults of 1 and 0 they hide what is wrong around them."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        center = parameter.detach().mean().round() if parameter.ndim == 1 and "bias" not in name else 0.0
        std = 0.3 if parameter.ndim == 1 else 0.15
        with torch.no_grad():
            parameter.copy_(center + std * torch.randn(parameter.shape, generator=generator))


def build(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> TransformerDecoder:
    """Our decoder, with random weights."""
    with set_default_dtype(dtype):
        decoder = CASES[name].build(**(CASES[name].sizes | changes)).eval()
    randomize(decoder)
    return decoder


def transformers_model(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> Any:
    """The model of transformers, with random weights."""
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="sdpa", dtype=dtype).eval()
    randomize(model)
    return model


def write(name: str, folder: Path, *, dtype: torch.dtype = torch.float32, max_shard_size: str = "5GB") -> Any:
    """A folder written by transformers; returns its model."""
    model = transformers_model(CASES[name].config, dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


def load(decoder: TransformerDecoder, folder: Path) -> HuggingFaceCheckpointer:
    """Reads a folder into a decoder, as a recipe does at its start."""
    checkpointer = HuggingFaceCheckpointer(str(folder))
    checkpointer.check(decoder)
    weights = checkpointer.load()
    assert weights is not None
    keys = decoder.load_state_dict(weights, strict=False)
    assert not keys.unexpected_keys and set(keys.missing_keys) == set(get_adapter_params(decoder))
    return checkpointer


def save(decoder: TransformerDecoder, folder: Path, checkpointer: HuggingFaceCheckpointer, **arguments: Any) -> None:
    """Writes a folder, as a recipe does at its end."""
    arguments = {"config": checkpointer.config or huggingface_config(decoder), "tokenizer": Tokenizer()} | arguments
    checkpointer.save(decoder.state_dict(), folder, **arguments)


def make_pair(name: str, dtype: torch.dtype = torch.float32) -> tuple[TransformerDecoder, Any]:
    """Our decoder and the model of transformers with the same weights, through a folder that transformers writes."""
    decoder = build(name, dtype)
    with tempfile.TemporaryDirectory() as folder:
        model = write(name, Path(folder), dtype=dtype)
        load(decoder, Path(folder))
    return decoder, model


# The same two models for all tests, none of which may change them.
pair = cache(make_pair)


def tokens(length: int = LENGTH, *, rows: int = 2, seed: int = 1) -> Tensor:
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def assert_same_logits(decoder: TransformerDecoder, model: Any, length: int = LENGTH) -> None:
    expected = model(tokens(length)).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(decoder(tokens(length)), expected, rtol=0, atol=2e-5)


def refused(message: str) -> Any:
    """A ValueError of one line that holds ``message``."""
    return pytest.raises(ValueError, match=rf"^[^\n]*{re.escape(message)}[^\n]*\Z")
