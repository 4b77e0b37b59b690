"""Gemma 3's own: which layers look how far back, and with what rotations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity import LENGTH, PATTERN, VOCAB, WINDOW, build, tokens
from torchtune.models.gemma.rms_norm import GemmaRMSNorm
from torchtune.modules import TiedLinear

from adapt_recipes.models import gemma3_1b


def test_names_of_the_weights() -> None:
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
        "sa_scale.scale",
        "mlp_norm.scale",
        "mlp_scale.scale",
    }
    expected = {"tok_embeddings.weight", "norm.scale"} | {f"layers.{i}.{key}" for i in range(2) for key in layer}
    assert set(build("gemma3", num_layers=2).state_dict()) == expected


def test_1b_is_as_published() -> None:
    with torch.device("meta"):
        decoder = gemma3_1b(max_seq_len=1024)
    assert isinstance(decoder.output, TiedLinear) and decoder.output.tied_module is decoder.tok_embeddings
    assert {module.eps for module in decoder.modules() if isinstance(module, GemmaRMSNorm)} == {1e-6}
    attentions = [layer.attn for layer in decoder.layers]
    assert {(attention.num_heads, attention.num_kv_heads, attention.head_dim) for attention in attentions} == {
        (4, 1, 256)
    }
    windows = [getattr(attention, "sliding_window", None) for attention in attentions]
    bases = [attention.pos_embeddings.base for attention in attentions]
    for number in range(26):
        expected = (None, 1e6) if number in (5, 11, 17, 23) else (512, 1e4)
        assert (windows[number], bases[number]) == expected, number
    caches = {id(attention.pos_embeddings): attention.pos_embeddings.cache for attention in attentions}
    assert [len(cache) for cache in caches.values()] == [1024, 1024], "two for the whole model"


@torch.no_grad()
@pytest.mark.parametrize(("back", "seen"), [(1, True), (WINDOW - 1, True), (WINDOW, False), (WINDOW + 1, False)])
@pytest.mark.parametrize("pattern", [1, 2])
@pytest.mark.parametrize("packed", [False, True])
def test_how_far_back_one_layer_sees(back: int, seen: bool, pattern: int, packed: bool) -> None:
    """A token beyond the window has no influence at all on a local layer (pattern 2), and some on a global one."""
    decoder = build("gemma3", num_layers=1, sliding_window_pattern=pattern)
    rows = tokens()
    last = LENGTH - 1
    changed = rows.clone()
    changed[:, last - back] = (changed[:, last - back] + 1) % VOCAB
    mask = torch.ones(2, LENGTH, LENGTH, dtype=torch.bool).tril() if packed else None
    same = torch.equal(decoder(rows, mask=mask)[:, last], decoder(changed, mask=mask)[:, last])
    assert same != (seen or pattern == 1)


@pytest.mark.parametrize("length", [WINDOW, WINDOW + 1])
def test_rows_within_the_window_take_the_fast_causal_path(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    attention = F.scaled_dot_product_attention

    def recording(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append((kwargs["attn_mask"] is None, kwargs["is_causal"]))
        return attention(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recording)
    decoder = build("gemma3")
    decoder(tokens(length))
    fast = [length <= WINDOW or number % PATTERN == 0 for number in range(1, 8)]
    assert calls == [(is_fast, is_fast) for is_fast in fast]


@torch.no_grad()
def test_with_a_key_value_cache() -> None:
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
    changes: dict[str, Any] = {key: 0}
    with pytest.raises(ValueError, match=rf"^model\.{key}: 0 is not allowed; at least 1$"):
        build("gemma3", **changes)
