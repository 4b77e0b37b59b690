"""The model as all other modules use it: token ids and labels in, one loss per supervised token out."""

from __future__ import annotations

import contextlib
from itertools import chain
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint
from torchtune.modules import TransformerDecoder

from adapt_recipes.data.examples import IGNORE_INDEX
from adapt_recipes.data.packing import PackedRows, pack_rows, supervised_lengths
from adapt_recipes.models.packed_attention import attend_over_packed_rows


def check_decoder(decoder: TransformerDecoder, *, max_seq_len: int, max_token: int) -> None:
    """Refuses a model that cannot read the data.

    Args:
        decoder: the return value of its builder.
        max_seq_len: rendered tokens of the longest example.
        max_token: the highest token id in the data. (Some tokenizers have higher ids, which no text contains.)

    Raises:
        ValueError: it is not torchtune's decoder, it is too short, or it has no embedding for a token.
    """
    if not isinstance(decoder, TransformerDecoder):
        raise ValueError(
            f"model._component_: returns a {type(decoder).__name__}; a recipe needs torchtune's TransformerDecoder"
        )
    if decoder.max_seq_len < max_seq_len:
        raise ValueError(f"model.max_seq_len: {decoder.max_seq_len} is less than max_seq_len, {max_seq_len}")
    if (rows := decoder.tok_embeddings.weight.shape[0]) <= max_token:
        raise ValueError(f"model.vocab_size: {rows} is too small: the highest token id in the data is {max_token}")


class TokenLosses(nn.Module):
    """Cross-entropies of a decoder at the supervised positions only.

    Few tokens of instruction data are supervised (3.6 % in Natural Instructions). The final norm and the head, which
    with a large vocabulary costs as much as many layers, are computed at those positions only. The whole computation is
    in this module's ``forward``, because FSDP2 gathers the root's weights (embeddings, norm, head) only there.

    Padding is not computed, what follows the last label of a row neither, and a beginning that neighboring rows share
    is computed once (``adapt_recipes/data/packing.py``). With dropout the rows share its masks there too.

    Args:
        decoder: the model, optionally compiled and with activation checkpointing.
        compute_dtype: of matrix products, by autocast; weights, residual stream and losses stay in fp32. None: the
            dtype of the weights.
        loss_chunk_tokens: compute the losses of this many positions at a time, and their logits again in the backward
            pass, so that only these logits are in memory; None: all at once.
        activation_offloading: keep the checkpointed activations in host memory.
    """

    def __init__(
        self,
        decoder: TransformerDecoder,
        *,
        compute_dtype: torch.dtype | None = None,
        loss_chunk_tokens: int | None = None,
        activation_offloading: bool = False,
    ) -> None:
        super().__init__()
        self.decoder = decoder
        attend_over_packed_rows(decoder)
        self.compute_dtype = compute_dtype
        self.loss_chunk_tokens = loss_chunk_tokens
        self.activation_offloading = activation_offloading
        # Of the last micro-batch, (rows, length).
        self.last_shape = (0, 0)

    @property
    def device(self) -> torch.device:
        """The device of the computation. FSDP2 may keep parameters in host memory, but not buffers."""
        return next(chain(self.buffers(), self.parameters())).device

    def autocast(self) -> torch.autocast:
        """A context in which products are computed in ``compute_dtype``. ``forward`` enters it by itself.

        Around several forward passes it caches the casts of the weights, so the weights must not change in it. Backward
        passes may run in it, each in the dtypes of its forward pass.
        """
        # FSDP2 gathers the weights again in each forward pass: a cached cast of the last one would get no gradients.
        cached = not isinstance(self, FSDPModule)
        enabled = self.compute_dtype is not None
        return torch.autocast(self.device.type, self.compute_dtype, enabled=enabled, cache_enabled=cached)

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor,
        output: Literal["losses", "scores", "logits", "hidden_states"] = "losses",
        rows: PackedRows | None = None,
    ) -> Tensor:
        """The loss of each supervised token, its scores, or the logits or hidden states they are computed from.

        Args:
            tokens: (batch, length) int64, padded on the right with any token.
            labels: (batch, length) int64, ``labels[:, t]`` is the token that follows ``tokens[:, t]``; ``IGNORE_INDEX``
                at positions that are not supervised.
            output: what to return.
            rows: of ``tokens``; None: found here, from their values.

        Returns:
            ``losses``: (num_supervised,) fp32 cross-entropies in nats, row by row. Without a supervised position it is
            empty but still part of the graph: the backward pass of its sum gives zero gradients, so that every process
            can run one. ``scores``: (num_supervised, 2) fp32, the same losses, and 1 where the label is the arg max of
            the logits, else 0. ``logits``: (num_supervised, vocab_size) fp32. ``hidden_states``: (batch, length, dim),
            the output of the final norm, as in transformers.
        """
        decoder = self.decoder
        assert tokens.shape[1] <= decoder.max_seq_len, "longer than the model's max_seq_len"
        self.last_shape = (tokens.shape[0], tokens.shape[1])
        supervised = labels != IGNORE_INDEX
        if rows is None:
            whole = torch.full(tokens.shape[:1], tokens.shape[1])
            rows = pack_rows(tokens, whole if output == "hidden_states" else supervised_lengths(labels))
        offloading: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if self.activation_offloading:
            offloading = torch.autograd.graph.save_on_cpu(pin_memory=tokens.is_cuda)
        with self.autocast():
            hidden = decoder.tok_embeddings(rows.tokens.unsqueeze(0))
            with offloading:
                for layer in decoder.layers:
                    hidden = layer(hidden, mask=rows, input_pos=rows.positions.unsqueeze(0))
            if output == "hidden_states":
                return decoder.norm(hidden[0])[rows.index]
            hidden = decoder.norm(hidden[0, rows.index[supervised]])
            if output == "logits":
                return decoder.output(hidden).float()
            score = self._scores if output == "scores" else self._losses
            if self.loss_chunk_tokens is None:
                return score(hidden, labels[supervised])
            chunks = zip(*(each.split(self.loss_chunk_tokens) for each in (hidden, labels[supervised])), strict=True)
            return torch.cat([checkpoint(score, *chunk, use_reentrant=False) for chunk in chunks])

    def _losses(self, hidden: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.decoder.output(hidden).float(), labels, reduction="none")

    def _scores(self, hidden: Tensor, labels: Tensor) -> Tensor:
        logits = self.decoder.output(hidden).float()
        losses = F.cross_entropy(logits, labels, reduction="none")
        return torch.stack([losses, (logits.argmax(-1) == labels).float()], dim=1)
