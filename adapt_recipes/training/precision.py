"""The three values of the config's ``dtype``."""

from __future__ import annotations

from typing import Literal

import torch

from adapt_recipes.errors import warn

DType = Literal["fp32", "bf16", "pure_bf16"]

# An AdamW step of 1e-5 changes only 16 % of bf16 weights of size 0.02; the others are rounded back.
SMALL_LEARNING_RATE = 1e-4


def weights_dtype(dtype: DType) -> torch.dtype:
    """The dtype of weights and optimizer state."""
    return torch.bfloat16 if dtype == "pure_bf16" else torch.float32


def compute_dtype(dtype: DType) -> torch.dtype | None:
    """The dtype of matrix products; None: that of the weights."""
    return torch.bfloat16 if dtype == "bf16" else None


def finite_difference_step(dtype: DType) -> dict[str, float]:
    """The step of a central finite difference: a compromise of rounding and curvature, see ``passes.gradient_dots``."""
    return {"relative_step": 3e-3, "loss_step": 1.0} if dtype == "bf16" else {"relative_step": 1e-3, "loss_step": 0.05}


def check(dtype: DType, *, learning_rate: float, finite_differences: bool, step_gains: bool = False) -> None:
    """Refuses measurements by small steps with bf16 weights, and warns of learning rates that are too small for them.

    Args:
        dtype: of the config.
        learning_rate: of the optimizer.
        finite_differences: whether the run uses them.
        step_gains: whether the mixture observes them.

    Raises:
        ValueError: finite differences or step gains with bf16 weights, which round a small step away.
    """
    if dtype != "pure_bf16":
        return
    if finite_differences:
        raise ValueError(
            "dtype: pure_bf16 rounds the steps of finite differences away; use bf16, or probe.estimator=backward"
        )
    if step_gains:
        raise ValueError("dtype: pure_bf16 rounds the steps that the mixture observes (step_gains) away; use bf16")
    if learning_rate < SMALL_LEARNING_RATE:
        warn(f"pure_bf16 rounds most steps of optimizer.lr {learning_rate:g} away; bf16 keeps fp32 weights")
