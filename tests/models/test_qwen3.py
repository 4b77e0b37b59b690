"""Qwen 3's own: heads that are normalised before they are rotated."""

from __future__ import annotations

import pytest
import torch
from parity import build
from torch import nn
from torchtune.models.gemma.rms_norm import GemmaRMSNorm
from torchtune.modules import RMSNorm, TiedLinear

from adapt_recipes.models import qwen3_0_6b
from adapt_recipes.models.head_norm import NormedHeads


@pytest.mark.parametrize("tied", [True, False])
def test_names_of_the_weights(tied: bool) -> None:
    layer = {
        "attn.q_proj.projection.weight",
        "attn.q_proj.norm.scale",
        "attn.k_proj.projection.weight",
        "attn.k_proj.norm.scale",
        "attn.v_proj.weight",
        "attn.output_proj.weight",
        "mlp.w1.weight",
        "mlp.w2.weight",
        "mlp.w3.weight",
        "sa_norm.scale",
        "mlp_norm.scale",
    }
    expected = {"tok_embeddings.weight", "norm.scale"} | {f"layers.{i}.{key}" for i in range(2) for key in layer}
    decoder = build("qwen3", tie_word_embeddings=tied)
    assert set(decoder.state_dict()) == expected | (set() if tied else {"output.weight"})


def test_0_6b_is_as_published() -> None:
    with torch.device("meta"):
        decoder = qwen3_0_6b(max_seq_len=1024)
    assert isinstance(decoder.output, TiedLinear) and decoder.output.tied_module is decoder.tok_embeddings
    assert {module.eps for module in decoder.modules() if isinstance(module, RMSNorm)} == {1e-6}
    for attention in (layer.attn for layer in decoder.layers):
        assert (attention.num_heads, attention.num_kv_heads, attention.head_dim) == (16, 8, 128)
        assert attention.pos_embeddings is decoder.layers[0].attn.pos_embeddings
    rope = decoder.layers[0].attn.pos_embeddings
    assert rope.base == 1e6 and len(rope.cache) == 1024


@pytest.mark.parametrize("norm_class", [RMSNorm, GemmaRMSNorm])
def test_a_head_norm_computes_in_fp32_under_autocast(norm_class: type[nn.Module]) -> None:
    """A head is normalised by itself; what the norm computes is rounded once, to the projection's dtype."""
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
