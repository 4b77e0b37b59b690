"""What a recipe relies on in a mixture and in a reward component, checked before a run starts and at every update."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from adapt_recipes.errors import nearest

METHODS = ("probabilities", "update", "state_dict", "load_state_dict")
READS = ("train", "validation", "pool")
LOGGED = ("event", "step", "supervised_tokens", "probe_tokens", "mixture_seconds", "probabilities")  # by recipes


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
            can = nearest(signal, measurable) if measurable else "; it measures nothing"
            raise ValueError(f"{name} observes '{signal}', which {recipe} does not measure{can}")
    if observes:
        _check_takes(f"{name}.update", mixture.update, ["task_tokens", *observes])
    _check_probabilities(mixture, num_tasks=num_tasks)


def check_update(mixture: Any, logged: Any, *, num_tasks: int) -> None:
    """Refuse what an update has made of a mixture, or what it wants to log.

    Args:
        mixture: just updated.
        logged: what its ``update`` has returned.
        num_tasks: tasks in the run.

    Raises:
        ValueError: it names what is wrong.
    """
    _check_probabilities(mixture, num_tasks=num_tasks)
    name = f"mixture: {type(mixture).__name__}.update"
    if not isinstance(logged, Mapping):
        raise ValueError(f"{name} has to return a dict of tensors to log, which may be empty, not {logged!r}")
    for key, value in logged.items():
        if not isinstance(value, torch.Tensor) or value.shape not in ((), (num_tasks,)):
            raise ValueError(f"{name} returned as '{key}' no tensor of shape () or ({num_tasks},): {value!r}")
        if key in (*LOGGED, *mixture.observes):
            raise ValueError(f"{name} returned '{key}', which is logged already; give it another name")


def _check_takes(name: str, function: Callable[..., Any], given: Sequence[str]) -> None:
    try:
        inspect.signature(function).bind(**dict.fromkeys(given))
    except TypeError as error:
        raise ValueError(f"{name} cannot take {', '.join(given)} by name: {error}") from error


def _check_probabilities(mixture: Any, *, num_tasks: int) -> None:
    p = mixture.probabilities()
    needs = f"mixture: {type(mixture).__name__}.probabilities() has to be ({num_tasks},) float64 on the CPU, sum to 1 "
    needs += "and hold none below 0"
    if not isinstance(p, torch.Tensor):
        raise ValueError(f"{needs}; it is a {type(p).__name__}")
    if p.dtype != torch.float64 or p.shape != (num_tasks,) or p.device.type != "cpu":
        raise ValueError(f"{needs}; it is {tuple(p.shape)} {str(p.dtype).removeprefix('torch.')} on {p.device}")
    if not (p >= 0).all() or abs(float(p.sum()) - 1) > 1e-9:
        raise ValueError(f"{needs}; it sums to {float(p.sum()):.12g}, and its lowest is {float(p.min()):g}")


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
    given = [*dict.fromkeys(reads), *(["base_losses"] if "pool" in reads else [])]
    _check_takes(f"{name}.__call__", reward, given)
