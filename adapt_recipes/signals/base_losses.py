"""The losses of the base model: on a pool of examples, measured once and cached for later runs, or on any others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from hashlib import blake2b
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapt_recipes.data import MicroBatch
from adapt_recipes.files import atomic_file
from adapt_recipes.models import TokenLosses
from adapt_recipes.signals import passes
from adapt_recipes.training.process_group import all_gather_object, rank
from adapt_recipes.training.sharding import to_local


class BaseLosses:
    """The mean loss of each example of a pool under the base model. Rewards on the pool are relative to it.

    Attributes:
        values: (num_examples,) float64, nats per token, in the order in which the examples were batched; empty until
            measured.
    """

    def __init__(self) -> None:
        self.values = torch.empty(0, dtype=torch.float64)

    def measure(
        self, model: TokenLosses, pool: Sequence[MicroBatch], *, cache_dir: Path, tokens: passes.Tokens = "answer"
    ) -> None:
        """Measures the model with its current weights, or reads an earlier measurement from the cache.

        Args:
            model: before the first step.
            pool: micro-batches of all examples.
            cache_dir: folder of the cache. The name of an entry is a hash of everything that the losses depend on:
                weights, settings of the modules, which modules are compiled, examples, ``tokens``, precision, device,
                number of threads and torch's version.
            tokens: see ``passes.example_losses``.
        """
        file = cache_dir / "base_losses" / f"{_key(model, pool, tokens)}.safetensors"
        # Rank 0 decides for all: either every rank measures, or none does.
        losses = all_gather_object(_read(file))[0]
        if losses is None:
            losses = passes.example_losses(model, pool, tokens=tokens)
            if rank() == 0:
                file.parent.mkdir(parents=True, exist_ok=True)
                with atomic_file(file, shared=True) as partial:
                    save_file({"losses": losses}, partial)
        self.values = losses

    def state_dict(self) -> dict[str, Tensor]:
        return {"values": self.values.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.values = state["values"]


class BaseWeights:
    """A copy of the base model's trainable weights in host memory, of each process's own shards.

    Args:
        model: before the first step.
    """

    def __init__(self, model: TokenLosses) -> None:
        self._weights = passes.trainable_copies(model, device=torch.device("cpu"))

    def loaded_into(self, model: TokenLosses) -> AbstractContextManager[None]:
        """The model as the base model; at the end of the context its weights are, bit for bit, what they were."""
        return passes.exchanged(model, self._weights)


def _read(file: Path) -> Tensor | None:
    """An entry of the cache; None if there is none or it is damaged."""
    try:
        return load_file(file)["losses"]
    except (OSError, SafetensorError, KeyError):
        return None


def _key(model: TokenLosses, pool: Sequence[MicroBatch], tokens: passes.Tokens) -> str:
    weights = model.state_dict()
    device = next(iter(weights.values())).device.type
    # Settings that no weight shows, such as the number of heads and the base of RoPE.
    settings = [
        (name, type(module).__qualname__, [pair for pair in vars(module).items() if isinstance(pair[1], int | float)])
        for name, module in model.named_modules()
    ]
    compiled = [name for name, module in model.named_modules() if module._compiled_call_impl is not None]
    setup = (
        model.compute_dtype,
        device,
        torch.get_num_threads(),
        torch.__version__,
        settings,
        compiled,
        tokens,
        *weights,
    )
    digest = blake2b(" ".join(map(str, setup)).encode(), digest_size=16)
    parts = (part for batch in pool for part in (batch.tokens, batch.labels, batch.rows, batch.lengths))
    for tensor in (*weights.values(), *parts):
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(to_local(tensor.detach()).cpu().flatten().view(torch.uint8).numpy().data)
    # Each process has hashed its own shards and examples.
    digests = all_gather_object(digest.hexdigest())
    return digests[0] if len(digests) == 1 else blake2b(" ".join(digests).encode(), digest_size=16).hexdigest()
