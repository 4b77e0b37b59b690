"""Out of memory in a step, explained in one line."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from adapt_recipes.training.sharding import to_local

ADVICE = (
    "lower micro_batch_tokens or max_seq_len, or set activation_checkpointing=true or loss_chunk_tokens, or train LoRA "
    "adapters or on more processes; checkpoints are from before this step"
)


def out_of_memory(
    error: Exception, model: nn.Module, optimizer: torch.optim.Optimizer, *, step: int
) -> MemoryError | None:
    """The error to show to the user if a step ran out of memory; None: it is another error.

    Args:
        error: that ended the run.
        model: its attribute ``last_shape`` is that of the last micro-batch, (rows, length).
        optimizer: of its parameters.
        step: of the run.
    """
    if not (isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)):
        return None
    parameters = list(model.parameters())
    states = [value for state in optimizer.state.values() for value in state.values()]
    held = {
        "weights": _num_bytes(parameters),
        "gradients": _num_bytes([p.grad for p in parameters]),
        "optimizer": _num_bytes(states),
    }
    sizes = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in held.items())
    rows, length = getattr(model, "last_shape", (0, 0))
    where = f"step {step}: out of memory in a micro-batch of {rows} x {length} tokens"
    return MemoryError(f"{where}, beside {sizes}; {ADVICE}")


def _num_bytes(values: list[Any]) -> int:
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    return sum(to_local(tensor).numel() * tensor.element_size() for tensor in tensors)
