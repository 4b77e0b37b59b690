"""Which example made a step's loss or gradient infinite or NaN."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from torch import nn


def raise_nonfinite(model: nn.Module, batches: Sequence[Any], *, names: Sequence[str], step: int) -> NoReturn:
    """Compute a step's examples one by one until one goes wrong, and say which.

    Args:
        model: ``forward(tokens, labels)`` returns losses; its gradients are spent.
        batches: the step's micro-batches.
        names: what to call each example, in the order in which they were batched.
        step: of the run.

    Raises:
        ValueError: always.
    """
    advice = "lower optimizer.lr, or set clip_grad_norm; checkpoints are from before this step"
    for batch in batches:
        for i, row in enumerate(batch.rows.tolist()):
            model.zero_grad(set_to_none=True)
            losses = model(batch.tokens[i : i + 1], batch.labels[i : i + 1])
            if not losses.isfinite().all():
                raise ValueError(f"step {step}: the loss of {names[row]} is not finite; look at it, {advice}")
            losses.sum().backward()
            if not all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None):
                raise ValueError(f"step {step}: the gradient of {names[row]} is not finite; look at it, {advice}")
    raise ValueError(f"step {step}: the gradient is not finite, though that of every single example is; {advice}")
