"""Qwen 1.5 0.5B is torchtune's Qwen 2 with the published sizes."""

from __future__ import annotations

import torch
from torchtune.models.qwen2 import lora_qwen2
from torchtune.modules import RMSNorm, TiedLinear

from adapt_recipes.models import lora_qwen1_5_0_5b, qwen1_5_0_5b


def test_0_5b_is_as_published() -> None:
    with torch.device("meta"):
        decoder = qwen1_5_0_5b(max_seq_len=1024)
    assert isinstance(decoder.output, TiedLinear) and decoder.output.tied_module is decoder.tok_embeddings
    assert {module.eps for module in decoder.modules() if isinstance(module, RMSNorm)} == {1e-6}
    for attention in (layer.attn for layer in decoder.layers):
        assert (attention.num_heads, attention.num_kv_heads, attention.head_dim) == (16, 16, 64)
        assert attention.q_proj.bias is not None and attention.output_proj.bias is None
    rope = decoder.layers[0].attn.pos_embeddings
    assert rope.base == 1e6 and len(rope.cache) == 1024


def test_its_lora_form_has_the_weights_of_torchtunes() -> None:
    with torch.device("meta"):
        ours = lora_qwen1_5_0_5b(["q_proj", "output_proj"], True, max_seq_len=64, lora_rank=4)
        theirs = lora_qwen2(
            ["q_proj", "output_proj"],
            True,
            vocab_size=151_936,
            num_layers=24,
            num_heads=16,
            num_kv_heads=16,
            embed_dim=1024,
            intermediate_dim=2816,
            max_seq_len=64,
            tie_word_embeddings=True,
            lora_rank=4,
            lora_alpha=16,
        )
    expected = {key: weight.shape for key, weight in theirs.state_dict().items()}
    assert {key: weight.shape for key, weight in ours.state_dict().items()} == expected
