"""What the base model makes of a pool of examples, measured once and kept for later runs."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from uuid import uuid4

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapt_recipes import probe
from adapt_recipes.data import MicroBatch
from adapt_recipes.models import TokenLosses
from adapt_recipes.training.distributed import gathered, rank
from adapt_recipes.training.sharding import local


def base_losses(model: TokenLosses, pool: Sequence[MicroBatch], *, cache_dir: Path) -> Tensor:
    """The mean loss of each example of a pool, as the model is now, or from the cache.

    Args:
        model: before the first step.
        pool: micro-batches of all examples.
        cache_dir: folder of the cache. An entry's name is a hash of all that the losses depend on: weights, settings of
            the modules, which of them are compiled, examples, precision, device, number of threads and torch's
            version. It is written beside and renamed.

    Returns:
        (num_examples,) float64, nats a supervised token, in the order in which the examples were batched.
    """
    file = cache_dir / "base_losses" / f"{_key(model, pool)}.safetensors"
    losses = gathered(_read(file))[0]  # the first process's, for all or none have to measure
    if losses is not None:
        return losses
    losses = probe.example_losses(model, pool)
    if rank() > 0:
        return losses
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_suffix(f".{uuid4().hex}.tmp")
    try:
        save_file({"losses": losses}, beside)
        beside.replace(file)
    finally:
        beside.unlink(missing_ok=True)
    return losses


def _read(file: Path) -> Tensor | None:
    try:
        return load_file(file)["losses"]
    except (OSError, SafetensorError, KeyError):  # none yet, or a damaged one
        return None


def _key(model: TokenLosses, pool: Sequence[MicroBatch]) -> str:
    weights = model.state_dict()
    device = next(iter(weights.values())).device.type
    settings = [  # the number of heads and the base of the rotations show in no weight
        (name, type(module).__qualname__, [pair for pair in vars(module).items() if isinstance(pair[1], int | float)])
        for name, module in model.named_modules()
    ]
    compiled = [name for name, module in model.named_modules() if module._compiled_call_impl is not None]
    how = (model.compute_dtype, device, torch.get_num_threads(), torch.__version__, settings, compiled, *weights)
    digest = blake2b(" ".join(map(str, how)).encode(), digest_size=16)
    for tensor in (*weights.values(), *(part for batch in pool for part in (batch.tokens, batch.labels, batch.rows))):
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(local(tensor.detach()).cpu().flatten().view(torch.uint8).numpy().data)
    digests = gathered(digest.hexdigest())  # of each process's shards and examples
    return digests[0] if len(digests) == 1 else blake2b(" ".join(digests).encode(), digest_size=16).hexdigest()
