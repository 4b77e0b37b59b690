"""Generators go on where a saved state found them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from adapt_recipes.training.checkpoint import Checkpoints
from adapt_recipes.training.rng import rng_state, set_rng_state


def draw() -> list[Any]:
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3).tolist()]


def test_generators_go_on_where_they_were(tmp_path: Path) -> None:
    """Through a checkpoint, which takes none but plain types."""
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters())
    checkpoints = Checkpoints(tmp_path, keep=1, asynchronous=False)
    draw()  # an odd number of Gaussians: a second one waits inside Python's and numpy's generator
    checkpoints.save(1, model, optimizer, shared={}, own=rng_state())
    expected = [draw(), draw()]
    assert expected[0] != expected[1]
    saved = checkpoints.newest()
    assert saved is not None
    set_rng_state(saved.own[0])
    assert [draw(), draw()] == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_cuda_generator_goes_on_where_it_was() -> None:
    torch.rand(1, device="cuda")
    saved = rng_state()
    expected = torch.rand(3, device="cuda")
    set_rng_state(saved)
    assert torch.equal(torch.rand(3, device="cuda"), expected)
