"""The model as everything in this project sees it: token ids and labels in, one loss a supervised token out."""

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


def check_decoder(decoder: TransformerDecoder, *, max_seq_len: int, max_token: int) -> None:
    """Refuse a model that cannot read the data.

    Args:
        decoder: as its builder returned it.
        max_seq_len: rendered tokens of the longest example.
        max_token: the highest token id there is in the data. Some tokenizers have ids that no text gives.

    Raises:
        ValueError: it is no decoder of torchtune's, too short, or has no embedding for a token.
    """
    if not isinstance(decoder, TransformerDecoder):
        raise ValueError(
            f"model._component_: gives a {type(decoder).__name__}; a recipe needs torchtune's TransformerDecoder"
        )
    if decoder.max_seq_len < max_seq_len:
        raise ValueError(f"model.max_seq_len: {decoder.max_seq_len} is less than max_seq_len, {max_seq_len}")
    if (rows := decoder.tok_embeddings.weight.shape[0]) <= max_token:
        raise ValueError(f"model.vocab_size: {rows} is too few: the tokenizer gives this data token {max_token}")


class TokenLosses(nn.Module):
    """Cross-entropies of a decoder at the supervised positions, and at no other.

    Few tokens of instruction data are supervised (3.6 % in Natural Instructions), so the final norm and the head, which
    with a large vocabulary cost as much as many layers, see those positions only. The whole computation stands in this
    module's ``forward``, because under FSDP2 the root's weights (embeddings, norm, head) are whole only in there.

    Rows are padded on the right and there is no mask: causal attention keeps what follows a token out of its state.

    Args:
        decoder: the model, compiled and with activation checkpointing if so wished.
        compute_dtype: what matrix products are computed in, by autocast, while weights, residual stream and losses keep
            their fp32; None: as the weights are.
        loss_chunk_tokens: losses of so many positions at a time, whose logits are dropped and computed again in the
            backward, so that no more of them are held; None: all at once.
        activation_offloading: what a checkpointed decoder keeps for the backward is kept in host memory.
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
        self.compute_dtype = compute_dtype
        self.loss_chunk_tokens = loss_chunk_tokens
        self.activation_offloading = activation_offloading

    @property
    def device(self) -> torch.device:
        """Where it computes: FSDP2 may keep parameters in host memory, but no buffers."""
        return next(chain(self.buffers(), self.parameters())).device

    def autocast(self) -> torch.autocast:
        """Context in which products are computed in ``compute_dtype``. ``forward`` enters it by itself.

        Around several forwards it keeps the weights' casts from the first to the last, so the weights must not change
        in it. Backwards may run in it, each by the forward's own dtypes.
        """
        # FSDP2 gathers the weights anew in each forward: a cast kept from the one before has no way to their gradients.
        kept = not isinstance(self, FSDPModule)
        enabled = self.compute_dtype is not None
        return torch.autocast(self.device.type, self.compute_dtype, enabled=enabled, cache_enabled=kept)

    def forward(
        self, tokens: Tensor, labels: Tensor, output: Literal["losses", "logits", "hidden_states"] = "losses"
    ) -> Tensor:
        """Loss of each supervised token, or what it is made of.

        Args:
            tokens: (batch, length) int64, padded on the right with any token.
            labels: (batch, length) int64, ``labels[:, t]`` is what follows ``tokens[:, t]``; ``IGNORE_INDEX`` where the
                position is not supervised.
            output: what to return.

        Returns:
            ``losses``: (num_supervised,) fp32 cross-entropies in nats, rows one after the other. Where nothing is
            supervised it is empty and still part of the graph: the backward of its sum gives zero gradients, so that
            each of several processes can run it. ``logits``: (num_supervised, vocab_size) fp32. ``hidden_states``:
            (batch, length, dim), those of the top layer behind the final norm, as transformers calls them.
        """
        decoder = self.decoder
        assert tokens.shape[1] <= decoder.max_seq_len, "longer than the model's max_seq_len"
        supervised = labels != IGNORE_INDEX
        offloading: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if self.activation_offloading:
            offloading = torch.autograd.graph.save_on_cpu(pin_memory=tokens.is_cuda)
        with self.autocast():
            hidden = decoder.tok_embeddings(tokens)
            with offloading:
                for layer in decoder.layers:
                    hidden = layer(hidden)
            if output == "hidden_states":
                return decoder.norm(hidden)
            hidden = decoder.norm(hidden[supervised])
            if output == "logits":
                return decoder.output(hidden).float()
            if self.loss_chunk_tokens is None:
                return self._losses(hidden, labels[supervised])
            chunks = zip(*(each.split(self.loss_chunk_tokens) for each in (hidden, labels[supervised])), strict=True)
            return torch.cat([checkpoint(self._losses, *chunk, use_reentrant=False) for chunk in chunks])

    def _losses(self, hidden: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.decoder.output(hidden).float(), labels, reduction="none")
