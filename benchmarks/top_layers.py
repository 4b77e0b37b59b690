"""A decoder of which only the top layers are trained, with what the layers below compute kept on disk.

    model._component_=benchmarks.top_layers.decoder model.trained_layers=6 model.cache_dir=runs/hidden

It makes comparisons on a CPU affordable: the frozen layers compute each example once, for all runs of a comparison, and
a step costs what the trained layers cost. Embeddings, final norm and head are frozen too. Without PyTorch's compile.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchtune.modules import TransformerDecoder

from adapt_recipes.data.packing import PackedRows
from adapt_recipes.models import decoder_from_folder


def decoder(path: str, max_seq_len: int, trained_layers: int, cache_dir: str) -> TransformerDecoder:
    """A folder's decoder whose lower layers are frozen and computed once for each row.

    Args:
        path: a Hugging Face folder.
        max_seq_len: the longest input, in tokens.
        trained_layers: how many layers are trained, counted from the last.
        cache_dir: of the hidden states, (length, embed_dim) fp32 for each row; may be shared by runs of one model with
            the same ``trained_layers``, also at the same time.
    """
    built = decoder_from_folder(path, max_seq_len)
    num_frozen = len(built.layers) - trained_layers
    assert 0 < num_frozen < len(built.layers), f"trained_layers: {trained_layers} of {len(built.layers)}"
    built.requires_grad_(False)
    built.layers[num_frozen:].requires_grad_(True)
    frozen = list(built.layers[:num_frozen])
    forwards = [layer.forward for layer in frozen]
    folder = Path(cache_dir) / f"{Path(path).name}_{num_frozen}"
    folder.mkdir(parents=True, exist_ok=True)

    @torch.no_grad()
    def lower_layers(hidden: Tensor, *, mask: PackedRows, input_pos: Tensor) -> Tensor:
        """(1, num_computed, embed_dim), before and after the frozen layers."""
        # Padding has the index of a first token.
        lengths = (mask.positions[mask.index] == torch.arange(mask.index.shape[1])).sum(1)
        places = [index[:length] for index, length in zip(mask.index, lengths, strict=True)]
        files = [folder / f"{hashlib.sha1(mask.tokens[place].numpy().tobytes()).hexdigest()}.npy" for place in places]
        output = torch.empty_like(hidden[0])
        try:
            for place, file in zip(places, files, strict=True):
                output[place] = torch.from_numpy(np.load(file))
            return output.unsqueeze(0)
        except FileNotFoundError:
            pass
        for forward in forwards:
            hidden = forward(hidden, mask=mask, input_pos=input_pos)
        for place, file in zip(places, files, strict=True):
            if not file.exists():
                partial = file.with_suffix(f".{os.getpid()}.npy")
                np.save(partial, hidden[0, place].numpy())
                partial.rename(file)
        return hidden

    for layer in frozen:
        layer.forward = lambda hidden, **_: hidden
    frozen[0].forward = lower_layers
    return built
