"""Shared by mixtures: checked arguments, floor, smooth worst case, averages of values, and the state for a resume."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def number(
    key: str,
    value: Any,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    finite: bool = True,
) -> float:
    """Checks a number from the config.

    Args:
        key: name of the argument, under ``mixture``.
        value: of the config.
        at_least: the smallest allowed value.
        at_most: the largest allowed value.
        above: the value must be greater than this.
        below: the value must be less than this.
        finite: refuse infinity.

    Returns:
        ``value`` as a float.

    Raises:
        ValueError: ``value`` is not a number or out of range; one line that names ``mixture.<key>``.
    """
    bounds = [
        f"{sign} {bound:g}"
        for sign, bound in ((">=", at_least), (">", above), ("<=", at_most), ("<", below))
        if bound is not None
    ]
    allowed = " ".join(["a finite number" if finite else "a number", *" and ".join(bounds).split()])
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
    if (
        not is_number
        or (finite and math.isinf(value))
        or (at_least is not None and value < at_least)
        or (at_most is not None and value > at_most)
        or (above is not None and value <= above)
        or (below is not None and value >= below)
    ):
        raise ValueError(f"mixture.{key} must be {allowed}, not {value!r}")
    return float(value)


def floored(
    shares: Tensor,  # (num_tasks,) float64, on the simplex
    floor: float,  # 0 <= floor < 1
    prior: Tensor,  # (num_tasks,) float64, on the simplex
) -> Tensor:
    """``(1 - floor) * shares + floor * prior``, the floor of every learned mixture.

    Computed as an interpolation, ``shares + floor * (prior - shares)``, so that shares equal to the prior stay equal to
    the last bit.

    Returns:
        (num_tasks,) float64, on the simplex, nowhere below ``floor * prior``.
    """
    return torch.lerp(shares, prior, floor)


def worst_case(
    losses: Tensor,  # (n,) float64; NaN: not measured
    weights: Tensor,  # (n,) float64, >= 0, up to a factor
    sharpness: float,  # > 0
) -> tuple[Tensor, Tensor]:
    """The smooth worst case ``(1/beta) log( sum_j o_j exp(beta l_j) )`` and its gradient ``w ~ o exp(beta l)``.

    Returns:
        A scalar, and (n,) float64, which is 0 for a loss that is not measured or has no weight.
    """
    measured = ~losses.isnan() & (weights > 0)
    o = weights[measured]
    exponents = sharpness * losses[measured] + o.log()
    gradient = torch.zeros_like(losses)
    gradient[measured] = torch.softmax(exponents, dim=0)
    return (torch.logsumexp(exponents, dim=0) - o.sum().log()) / sharpness, gradient


def averaged(
    old: Tensor,  # (num_tasks,) float64; NaN: never measured
    new: Tensor,  # (num_tasks,) float64; NaN: not measured now
    ema_decay: float,  # weight of the old
) -> Tensor:
    """The exponential average of values over updates: (num_tasks,) float64; it stays where nothing is measured."""
    mean = torch.where(old.isnan(), new, ema_decay * old + (1 - ema_decay) * new)
    return torch.where(new.isnan(), old, mean)


def filled(
    values: Tensor,  # (num_tasks,) float64; NaN: never measured
    shares: Tensor,  # (num_tasks,) float64, on the simplex
) -> Tensor:
    """(num_tasks,) float64: a task that was never measured has the mean of the others under ``shares``."""
    known = ~values.isnan()
    u = torch.where(known, values, 0.0)
    return torch.where(known, u, (shares * u).sum() / (shares * known).sum().clamp_min(torch.finfo(u.dtype).tiny))


def centered_and_scaled(u: Tensor) -> tuple[Tensor, bool]:
    """z = (u - mean u) / rms(u - mean u), and whether the u_i differ; if not, z is 0."""
    centered = u - u.mean()
    size = centered.abs().max()
    differ = bool(size > 1e-9 * u.abs().max())
    # Divided by its largest value first, so that no square overflows.
    z = centered / size
    return (z / z.square().mean().sqrt() if differ else torch.zeros_like(u)), differ


def joined(
    validation_losses: Tensor,  # (num_tasks,) float64
    target_losses: Tensor | None,  # (num_targets,) float64
) -> Tensor:
    """The losses of tasks and targets: (num_tasks + num_targets,) float64."""
    return validation_losses if target_losses is None else torch.cat([validation_losses, target_losses])


def carried(
    old: Tensor,  # (num_old_tasks,), of another run
    fresh: Tensor,  # (num_tasks,), at the start of this run
    positions: Tensor,  # (num_tasks,) int64, of each task in the other run; -1: it is new
) -> Tensor:
    """(num_tasks,): what the other run had for a task, and ``fresh`` for a new one."""
    return torch.where(positions < 0, fresh, old[positions.clamp_min(0)])


def carried_scores(
    old: Tensor,  # (num_old_tasks,) float64, of another run
    fresh: Tensor,  # (num_tasks,) float64, at the start of this run
    positions: Tensor,  # (num_tasks,) int64, of each task in the other run; -1: it is new
    offset: Tensor | float = 0.0,  # (num_tasks,) float64; scores + offset are log shares, up to a constant
) -> Tensor:
    """``carried`` for scores: a new task has the share that it has with ``fresh``; the others share the rest as before.

    Returns:
        (num_tasks,) float64.
    """
    known, scores = positions >= 0, carried(old, fresh, positions)
    shift = torch.logsumexp((fresh + offset)[known], 0) - torch.logsumexp((scores + offset)[known], 0)
    return torch.where(known, scores + shift, fresh)


def copied_state(mixture: object, names: Sequence[str]) -> dict[str, Tensor]:
    """Copies of the attributes ``names`` of a mixture, all of them tensors."""
    return {name: getattr(mixture, name).clone() for name in names}


def load_state(mixture: object, names: Sequence[str], state: Mapping[str, Tensor]) -> None:
    """Sets the attributes ``names`` of a mixture to copies of the tensors in ``state``.

    Raises:
        ValueError: ``state`` is that of another kind of mixture or of another number of tasks.
    """
    if set(state) != set(names):
        raise ValueError(f"mixture: the state has {sorted(state)}, and this mixture needs {sorted(names)}")
    for name in names:
        here = getattr(mixture, name)
        if state[name].shape != here.shape:
            raise ValueError(f"mixture: the state is of {state[name].numel()} tasks, this run has {here.numel()}")
    for name in names:
        here = getattr(mixture, name)
        setattr(mixture, name, state[name].to(here, copy=True))
