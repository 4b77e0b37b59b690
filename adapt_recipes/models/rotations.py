"""Rotary position embeddings (RoPE) as products of complex numbers, and those that are scaled for longer inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torchtune.models.llama3_1._position_embeddings import Llama3ScaledRoPE
from torchtune.models.qwen2._positional_embeddings import Qwen2RotaryPositionalEmbeddings
from torchtune.modules import RotaryPositionalEmbeddings

# ---- scaling, with the names of ``config.json``


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's scaling of low frequencies, which torchtune's ``Llama3ScaledRoPE`` computes."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class LinearScaling:
    """Position interpolation: every frequency is divided by ``factor`` (https://arxiv.org/abs/2306.15595)."""

    factor: float
    attention_factor: ClassVar[float] = 1.0

    def scaled(self, theta: Tensor, base: float) -> Tensor:
        """The frequencies of all pairs, (head_dim / 2,), from those without scaling."""
        return theta / self.factor


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (https://arxiv.org/abs/2309.00071), as in transformers' ``_compute_yarn_parameters``.

    Pairs that rotate more than ``beta_fast`` times over the original length keep their frequency; those that rotate
    less than ``beta_slow`` times are interpolated, as in ``LinearScaling``; in between it is a linear mixture.

    Attributes:
        attention_factor: queries and keys are multiplied by it.
        truncate: round the numbers of the first and last pair of the mixture to whole ones.
    """

    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    beta_fast: float
    beta_slow: float
    truncate: bool

    def scaled(self, theta: Tensor, base: float) -> Tensor:
        """The frequencies of all pairs, (head_dim / 2,), from those without scaling."""
        head_dim, length = 2 * len(theta), self.original_max_position_embeddings
        # Numbers of the pairs that rotate beta times over the original length.
        low, high = (
            head_dim * math.log(length / (beta * 2 * math.pi)) / (2 * math.log(base))
            for beta in (self.beta_fast, self.beta_slow)
        )
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        # theta' = (1 - gamma) * theta / factor + gamma * theta, with the ramp 1 - gamma over the numbers of the pairs.
        ramp = (torch.arange(len(theta), device=theta.device).float() - low) / (high - low or 0.001)
        ramp = ramp.clamp(0, 1)
        return theta / self.factor * ramp + theta * (1 - ramp)


class _Scaled(nn.Module):
    """What is added to a RoPE module of torchtune: its frequencies and its cache are scaled."""

    dim: int
    max_seq_len: int
    base: float
    theta: Tensor
    cache: Tensor

    def __init__(self, dim: int, max_seq_len: int, base: float, scaling: LinearScaling | YarnScaling) -> None:
        # Before torchtune's, which calls ``rope_init``.
        self.scaling = scaling
        super().__init__(dim, max_seq_len, base)

    def rope_init(self) -> None:
        """Computes the buffers; called again after a model was built on the meta device."""
        super().rope_init()  # type: ignore[misc]
        self.theta = self.scaling.scaled(self.theta, self.base)
        self.build_rope_cache(self.max_seq_len)  # type: ignore[operator]
        self.cache *= self.scaling.attention_factor


class ScaledRoPE(_Scaled, RotaryPositionalEmbeddings):
    """torchtune's RoPE of neighboring components, scaled."""


class ScaledQwen2RoPE(_Scaled, Qwen2RotaryPositionalEmbeddings):
    """torchtune's RoPE of the two halves of a head, scaled."""


# ---- products of complex numbers


class RotaryEmbeddings(nn.Module):
    """Computes torchtune's RoPE in a quarter of the time (forward and backward, eager, CPU).

    A pair of neighboring components is a complex number, and its rotation a complex factor. One product replaces four
    products, two sums, and the slicing and stacking around them, each of which reads and writes memory.

    Args:
        rope: torchtune's module, which has the angles: ``rope.cache``, (max_seq_len, head_dim / 2, 2), cosines and
            sines. Code that initializes a model on the meta device calls its ``rope_init``.
    """

    def __init__(self, rope: RotaryPositionalEmbeddings | Llama3ScaledRoPE) -> None:
        super().__init__()
        self.rope = rope

    def forward(self, x: Tensor, *, input_pos: Tensor | None = None) -> Tensor:
        """Rotates queries or keys.

        Args:
            x: (batch, length, num_heads, head_dim).
            input_pos: (batch, length) positions; None: 0, 1, 2, ...

        Returns:
            A tensor of the shape and dtype of ``x``, computed in fp32.
        """
        factors = torch.view_as_complex(self.rope.cache.float())
        factors = factors[: x.shape[1]] if input_pos is None else factors[input_pos]
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * factors.unsqueeze(-2)).flatten(-2).type_as(x)
