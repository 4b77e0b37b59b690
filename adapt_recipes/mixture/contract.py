"""What a recipe relies on in a mixture and in a reward component, checked before a run starts."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from adapt_recipes.errors import nearest

METHODS = ("probabilities", "update", "state_dict", "load_state_dict")
READS = ("train", "validation", "pool")


def check_mixture(mixture: Any, measurable: Collection[str], *, num_tasks: int, recipe: str) -> None:
    """Refuse a mixture that the recipe cannot serve or that breaks the contract.

    Args:
        mixture: the built component.
        measurable: the signals that the recipe can measure.
        num_tasks: tasks in the run.
        recipe: its name, for the error.

    Raises:
        ValueError: it names what is missing.
    """
    name = f"mixture: {type(mixture).__name__}"
    observes = getattr(mixture, "observes", None)
    if not isinstance(observes, tuple):
        raise ValueError(f"{name} needs `observes`, a tuple of the signals it wants; () for none")
    methods = METHODS if observes else METHODS[:1] + METHODS[2:]
    needed = [*methods, *(["objective_weights", "lookahead_lr"] if "gradient_dots" in observes else [])]
    for method in needed:
        if not hasattr(mixture, method):
            raise ValueError(f"{name} needs `{method}`, because it observes {observes or 'nothing'}")
    for signal in observes:
        if signal not in measurable:
            can = ", ".join(measurable) or "nothing"
            raise ValueError(f"{name} observes '{signal}', which {recipe} does not measure; it measures {can}")
    p = mixture.probabilities()
    valid = (
        isinstance(p, torch.Tensor) and p.dtype == torch.float64 and p.shape == (num_tasks,) and p.device.type == "cpu"
    )
    if not valid or not (p >= 0).all() or abs(float(p.sum()) - 1) > 1e-9:
        raise ValueError(
            f"{name}.probabilities() has to be ({num_tasks},) float64 on the CPU, sum to 1 and hold none below 0"
        )


def check_reward(reward: Any, mixture: Any) -> None:
    """Refuse a reward that the mixture does not go with or that breaks the contract of ``adapt_recipes.rewards``.

    Args:
        reward: the built component; None: the config names none.
        mixture: the built component.

    Raises:
        ValueError: it names what is missing.
    """
    learns_from_it = "rewards" in mixture.observes
    if reward is None:
        if learns_from_it:
            raise ValueError(f"missing key 'reward': mixture: {type(mixture).__name__} observes rewards")
        return
    name = f"reward: {type(reward).__name__}"
    if not learns_from_it:
        raise ValueError(
            f"{name} is for nothing: mixture: {type(mixture).__name__} does not observe rewards; take it out"
        )
    reads = getattr(reward, "reads", None)
    if not callable(reward) or not isinstance(reads, tuple) or not reads:
        raise ValueError(f"{name} has to be callable, with `reads`, a tuple out of {', '.join(READS)}")
    for read in reads:
        if read not in READS:
            raise ValueError(f"{name} reads {read!r}{nearest(str(read), READS)}")
