"""Gemma 3: torchtune's Gemma with normalized heads, norms before and after each block, and mostly local attention."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchtune.models.gemma._component_builders import gemma_mlp
from torchtune.models.gemma.gemma_norm_embedding import GemmaNormEmbeddings
from torchtune.models.gemma.rms_norm import GemmaRMSNorm
from torchtune.models.qwen2._positional_embeddings import Qwen2RotaryPositionalEmbeddings
from torchtune.modules import MultiHeadAttention, TiedLinear, TransformerDecoder, TransformerSelfAttentionLayer

from adapt_recipes.data.packing import PackedRows
from adapt_recipes.models.head_norm import NormedHeads


def gemma3_1b(*, max_seq_len: int) -> TransformerDecoder:
    """Gemma 3 1B, the text model.

    Args:
        max_seq_len: the longest input, in tokens. The RoPE caches have this length, so pass the training length.
    """
    return gemma3(
        vocab_size=262_144,
        num_layers=26,
        num_heads=4,
        num_kv_heads=1,
        head_dim=256,
        embed_dim=1152,
        intermediate_dim=6912,
        sliding_window=512,
        sliding_window_pattern=6,
        max_seq_len=max_seq_len,
    )


def gemma3(
    *,
    vocab_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    embed_dim: int,
    intermediate_dim: int,
    max_seq_len: int,
    sliding_window: int,
    sliding_window_pattern: int,
    attn_dropout: float = 0.0,
    norm_eps: float = 1e-6,
    rope_base: float = 1_000_000.0,
    local_rope_base: float = 10_000.0,
) -> TransformerDecoder:
    """A Gemma 3 decoder with its head tied to the embeddings (https://arxiv.org/abs/2503.19786).

    Rows of weights are laid out as in transformers: RoPE pairs the first half of a head with the second. Gemma 3 4B and
    larger also scale RoPE in global layers, which ``decoder_from_folder`` adds; 27B scales attention scores
    differently, which is not supported.

    Args:
        vocab_size, num_layers, num_heads, num_kv_heads, embed_dim, intermediate_dim: sizes.
        head_dim: of a head; attention scores are divided by its square root.
        max_seq_len: the longest input, in tokens; length of the RoPE caches.
        sliding_window: number of tokens to which a token of a local layer attends, itself included.
        sliding_window_pattern: a layer is global if its number, counted from 1, is a multiple of this.
        attn_dropout: of attention weights, in training.
        norm_eps: of all norms.
        rope_base: in global layers.
        local_rope_base: in local layers.

    Raises:
        ValueError: a window or a pattern is below 1, or sizes do not fit together.
    """
    for key, value in {"sliding_window": sliding_window, "sliding_window_pattern": sliding_window_pattern}.items():
        if value < 1:
            raise ValueError(f"model.{key}: {value} is not allowed; at least 1")

    # Layers, global and local.
    rope = Qwen2RotaryPositionalEmbeddings(head_dim, max_seq_len, rope_base)
    local_rope = Qwen2RotaryPositionalEmbeddings(head_dim, max_seq_len, local_rope_base)
    layers = []
    for number in range(1, num_layers + 1):
        is_global = number % sliding_window_pattern == 0
        kind = MultiHeadAttention if is_global else partial(SlidingWindowAttention, sliding_window=sliding_window)
        attention = kind(
            embed_dim=embed_dim,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            q_proj=_normed_heads(embed_dim, num_heads, head_dim, norm_eps),
            k_proj=_normed_heads(embed_dim, num_kv_heads, head_dim, norm_eps),
            v_proj=nn.Linear(embed_dim, num_kv_heads * head_dim, bias=False),
            output_proj=nn.Linear(num_heads * head_dim, embed_dim, bias=False),
            pos_embeddings=rope if is_global else local_rope,
            max_seq_len=max_seq_len,
            attn_dropout=attn_dropout,
        )
        layers.append(
            TransformerSelfAttentionLayer(
                attn=attention,
                mlp=gemma_mlp(embed_dim, intermediate_dim),
                sa_norm=GemmaRMSNorm(embed_dim, eps=norm_eps),
                mlp_norm=GemmaRMSNorm(embed_dim, eps=norm_eps),
                sa_scale=GemmaRMSNorm(embed_dim, eps=norm_eps),
                mlp_scale=GemmaRMSNorm(embed_dim, eps=norm_eps),
            )
        )

    # Embeddings, norm and the tied head.
    embeddings = GemmaNormEmbeddings(vocab_size, embed_dim)
    return TransformerDecoder(
        tok_embeddings=embeddings,
        layers=layers,
        max_seq_len=max_seq_len,
        num_heads=num_heads,
        head_dim=head_dim,
        norm=GemmaRMSNorm(embed_dim, eps=norm_eps),
        output=TiedLinear(embeddings),
    )


class SlidingWindowAttention(MultiHeadAttention):
    """torchtune's attention in which a token attends only to the last ``sliding_window`` tokens, itself included.

    Rows no longer than the window need no mask and use the fast causal kernel.
    """

    def __init__(self, *, sliding_window: int, **attention: Any) -> None:
        super().__init__(**attention)
        self.sliding_window = sliding_window

    def forward(
        self, x: Tensor, y: Tensor | None = None, *, mask: Tensor | None = None, input_pos: Tensor | None = None
    ) -> Tensor:
        """As in torchtune. A given ``mask`` (packed rows, key-value cache) is restricted to the window.

        The window counts positions in the row. Within a document of a packed row these are the same as ``input_pos``.

        Raises:
            ValueError: the mask is not a boolean tensor, such as that of flex attention.
        """
        length, window = x.shape[1], self.sliding_window
        if isinstance(mask, PackedRows):
            return super().forward(x, y, mask=mask.with_window(window), input_pos=input_pos)
        if mask is None and length > window:
            mask = torch.ones(1, length, length, dtype=torch.bool, device=x.device).tril()
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                raise ValueError(
                    f"a sliding window needs a boolean mask tensor, not {getattr(mask, 'dtype', type(mask).__name__)}"
                )
            cached = self.kv_cache.size if self.kv_cache is not None and self.cache_enabled else 0
            mask = mask.triu(cached + 1 - window)
        return super().forward(x, y, mask=mask, input_pos=input_pos)


def _normed_heads(embed_dim: int, num_heads: int, head_dim: int, norm_eps: float) -> NormedHeads:
    projection = nn.Linear(embed_dim, num_heads * head_dim, bias=False)
    return NormedHeads(projection, GemmaRMSNorm(head_dim, eps=norm_eps), head_dim=head_dim)
