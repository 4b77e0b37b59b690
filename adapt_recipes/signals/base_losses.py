"""What the base model makes of a pool of examples, measured once and kept for later runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    """The mean loss of each example of a pool under the base model: what rewards on the pool are relative to.

    Attributes:
        values: (num_examples,) float64, nats per supervised token, in the order in which the examples were batched;
            empty until measured.
    """

    def __init__(self) -> None:
        self.values = torch.empty(0, dtype=torch.float64)

    def measure(self, model: TokenLosses, pool: Sequence[MicroBatch], *, cache_dir: Path) -> None:
        """Measures the model as it is now, or reads what was measured before from the cache.

        Args:
            model: before the first step.
            pool: micro-batches of all examples.
            cache_dir: folder of the cache. An entry's name is a hash of all that the losses depend on: weights,
                settings of the modules, which of them are compiled, examples, precision, device, number of threads and
                torch's version.
        """
        file = cache_dir / "base_losses" / f"{_key(model, pool)}.safetensors"
        losses = all_gather_object(_read(file))[0]  # rank 0's: all ranks have to measure, or none
        if losses is None:
            losses = passes.example_losses(model, pool)
            if rank() == 0:
                file.parent.mkdir(parents=True, exist_ok=True)
                with atomic_file(file, shared=True) as partial:
                    save_file({"losses": losses}, partial)
        self.values = losses

    def state_dict(self) -> dict[str, Tensor]:
        return {"values": self.values.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.values = state["values"]


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
        digest.update(to_local(tensor.detach()).cpu().flatten().view(torch.uint8).numpy().data)
    digests = all_gather_object(digest.hexdigest())  # of each process's shards and examples
    return digests[0] if len(digests) == 1 else blake2b(" ".join(digests).encode(), digest_size=16).hexdigest()
