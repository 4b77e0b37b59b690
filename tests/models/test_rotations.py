"""Rotations as complex products are torchtune's rotations."""

from __future__ import annotations

import pytest
import torch
from torchtune.models.llama3_1._position_embeddings import Llama3ScaledRoPE
from torchtune.modules import RotaryPositionalEmbeddings

from adapt_recipes.models.rotations import Rotations

LENGTH, HEAD_DIM = 24, 16


@pytest.mark.parametrize("kind", [RotaryPositionalEmbeddings, Llama3ScaledRoPE])
@pytest.mark.parametrize("positions", [None, "packed", "one row for all"])
def test_values_and_gradients_are_torchtunes(kind: type, positions: str | None) -> None:
    rope = kind(HEAD_DIM, 2 * LENGTH, base=500)
    input_pos = {
        None: None,
        "packed": torch.stack([torch.arange(LENGTH), torch.arange(LENGTH) % 10 + 20]),
        "one row for all": torch.arange(LENGTH)[None] + 3,
    }[positions]
    x = torch.randn(2, LENGTH, 3, HEAD_DIM, requires_grad=True)
    upstream = torch.randn_like(x)
    results = []
    for module in (rope, Rotations(rope)):
        rotated = module(x, input_pos=input_pos)
        (gradient,) = torch.autograd.grad(rotated, x, upstream)
        results.append((rotated, gradient))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-6)
    assert not torch.allclose(results[0][0], x), "they do rotate"


def test_half_precision_is_rotated_in_fp32_and_rounded_once() -> None:
    rope = RotaryPositionalEmbeddings(HEAD_DIM, LENGTH)
    x = torch.randn(1, LENGTH, 2, HEAD_DIM).bfloat16()
    rotated = Rotations(rope)(x)
    assert rotated.dtype == torch.bfloat16
    assert torch.equal(rotated, Rotations(rope)(x.float()).bfloat16())
