"""Static mixtures: uniform, proportional to size, by temperature, and fixed weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from adapt_recipes.errors import nearest
from adapt_recipes.mixture.common import number


class Static:
    """The same shares for the whole run.

    Args:
        probabilities: (num_tasks,) float64, on the simplex.
    """

    observes: tuple[str, ...] = ()

    def __init__(self, probabilities: Tensor) -> None:
        self._probabilities = probabilities

    def probabilities(self) -> Tensor:
        """(num_tasks,) float64, sums to 1."""
        return self._probabilities.clone()

    def update(self, *, task_tokens: Tensor, **signals: Tensor) -> dict[str, Tensor]:
        """Does nothing and logs nothing."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """Empty, because the shares follow from the config."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Accepts the empty state of a static mixture."""
        assert not state, f"a static mixture has no state, but got {sorted(state)}"


def uniform(*, task_names: Sequence[str], num_supervised_tokens: Tensor | Sequence[int], budget_tokens: int) -> Static:
    """The same share of the supervised tokens for every task (the SFT-U baseline of arXiv 2512.04555).

    Args:
        task_names: the tasks, in order.
        num_supervised_tokens: (num_tasks,) supervised tokens available per task; not used.
        budget_tokens: supervised tokens to spend; not used.
    """
    return Static(torch.full((len(task_names),), 1 / len(task_names), dtype=torch.float64))


def proportional(
    *, task_names: Sequence[str], num_supervised_tokens: Tensor | Sequence[int], budget_tokens: int
) -> Static:
    """Shares proportional to the available supervised tokens (the SFT-P baseline of arXiv 2512.04555).

    Args:
        task_names: the tasks, in order; not used.
        num_supervised_tokens: (num_tasks,) supervised tokens available per task.
        budget_tokens: supervised tokens to spend; not used.
    """
    return Static(_by_size(num_supervised_tokens, temperature=1.0))


def temperature(
    *,
    task_names: Sequence[str],
    num_supervised_tokens: Tensor | Sequence[int],
    budget_tokens: int,
    temperature: float,
) -> Static:
    """Shares proportional to size^(1/temperature) (MoS, arXiv 2406.08811): 1 is proportional, infinity uniform.

    Args:
        task_names: the tasks, in order; not used.
        num_supervised_tokens: (num_tasks,) supervised tokens available per task.
        budget_tokens: supervised tokens to spend; not used.
        temperature: > 0; ``.inf`` in YAML for infinity.

    Raises:
        ValueError: the temperature is not a number above 0.
    """
    return Static(_by_size(num_supervised_tokens, number("temperature", temperature, above=0, finite=False)))


def fixed_weights(
    *,
    task_names: Sequence[str],
    num_supervised_tokens: Tensor | Sequence[int],
    budget_tokens: int,
    weights: Mapping[str, float],
) -> Static:
    """Shares given in the config, normalized to sum to 1.

    Args:
        task_names: the tasks, in order.
        num_supervised_tokens: (num_tasks,) supervised tokens available per task; not used.
        budget_tokens: supervised tokens to spend; not used.
        weights: a weight >= 0 for each task, by name; a task of weight 0 is never drawn.

    Raises:
        ValueError: a task is missing or unknown, a weight is not a number >= 0, or all are 0.
    """
    return Static(given_shares("weights", weights, task_names=task_names, at_least=0))


def given_shares(
    key: str,
    weights: Mapping[str, float],
    *,
    task_names: Sequence[str],
    at_least: float | None = None,
    above: float | None = None,
) -> Tensor:
    """Weights from the config, by task, as shares.

    Args:
        key: name of the argument, under ``mixture``.
        weights: a number for each task, by name.
        task_names: the tasks, in order.
        at_least, above: of every weight, see ``number``.

    Returns:
        (num_tasks,) float64, on the simplex.

    Raises:
        ValueError: a task is missing or unknown, a weight is out of range, or all are 0.
    """
    if not isinstance(weights, Mapping):
        raise ValueError(f"mixture.{key} must map each task's name to a weight, not {weights!r}")
    given = {str(name): weight for name, weight in weights.items()}
    for name in given:
        if name not in task_names:
            raise ValueError(f"mixture.{key}: {name!r} is no task of this run{nearest(name, task_names)}")
    leave_out = " (0 to leave it out)" if above is None else ""
    for name in task_names:
        if name not in given:
            raise ValueError(f"mixture.{key} lacks a weight for the task {name!r}{leave_out}")
    values = [number(f"{key}[{name!r}]", given[name], at_least=at_least, above=above) for name in task_names]
    if not any(values):
        raise ValueError(f"mixture.{key}: at least one weight must be above 0, and all are 0")
    # Relative to the largest, so that the sum of finite weights stays finite.
    shares = torch.tensor(values, dtype=torch.float64) / max(values)
    return shares / shares.sum()


def _by_size(num_supervised_tokens: Tensor | Sequence[int], temperature: float) -> Tensor:
    sizes = torch.as_tensor(num_supervised_tokens, dtype=torch.float64)
    assert sizes.min() >= 0 and sizes.max() > 0, f"sizes {sizes.tolist()}"
    # Relative to the largest, so that a low temperature cannot overflow. An empty task has share 0 at any temperature.
    weights = torch.where(sizes > 0, (sizes / sizes.max()) ** (1 / temperature), 0.0)
    return weights / weights.sum()
