"""The interface of a mixture, and its checks before a run starts and after every update."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from adapt_recipes.errors import nearest

METHODS = ("probabilities", "update", "state_dict", "load_state_dict")
# Keys of a mixture event that recipes write themselves.
LOGGED_BY_RECIPES = (
    "event",
    "step",
    "supervised_tokens",
    "total_tokens",
    "probe_tokens",
    "seconds",
    "mixture_seconds",
    "probabilities",
    "effective_probabilities",
)


# Signals that take the members of a ``GradientMixture``, and that which takes its ``lookahead_lr`` alone.
OF_LOOKAHEAD = {"gradient_dots", "kstep_differences"}
OF_STEPS = {"step_gains"}


class Mixture(Protocol):
    """The shares of the tasks in the budget of supervised tokens. Any class with these members is a mixture.

    A recipe builds it with the keywords ``task_names``, ``num_supervised_tokens`` (available per task, (num_tasks,))
    and ``budget_tokens``, and with the arguments in the config. It must be the same on every rank, so it may depend on
    nothing but its arguments and the signals.

    One that takes ``target_names`` and ``target_weights`` is built with them if there are targets, which are validated
    on and never trained. It then observes ``target_losses``. The weights, (num_tasks + num_targets,) float64, say what
    the objective is over.

    One that can start from another run has ``start_from(state, positions)``, called before anything else. ``state`` is
    the ``state_dict`` that the other run ended with, and ``positions``, (num_tasks,) int64, are those of each task in
    it, -1 for a new one, which starts with its share of the prior.
    """

    observes: tuple[str, ...]
    """the signals that ``update`` takes, out of those in the recipe's ``SIGNALS``; () for a static mixture"""

    def probabilities(self) -> Tensor:
        """The share of supervised tokens of each task: (num_tasks,) float64 on the CPU, >= 0, sums to 1."""
        ...

    def update(self, *, task_tokens: Tensor, **signals: Tensor) -> Mapping[str, Tensor]:
        """Learns from the signals. A mixture that observes nothing needs no ``update``.

        Args:
            task_tokens: (num_tasks,) float64, supervised tokens spent on each task so far.
            signals: (num_tasks,) float64 on the CPU each, the same on every rank; NaN for a task that was not measured.
                ``target_losses`` are (num_targets,).

        Returns:
            Tensors to log, each () or (num_tasks,), or (num_targets,) if their name begins with ``target_``; may be
            empty.
        """
        ...

    def state_dict(self) -> Mapping[str, Any]:
        """Everything that an exact resume needs."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class GradientMixture(Mixture, Protocol):
    """A mixture that observes ``gradient_dots`` or ``kstep_differences`` also has these, for look-ahead and objective.

    One that observes ``step_gains`` has ``lookahead_lr``.
    If it observes ``target_losses`` as well, ``objective_weights`` takes them second, and returns the weights of tasks
    and targets, (num_tasks + num_targets,).
    """

    lookahead_lr: float
    """the step size of a look-ahead step"""

    def objective_weights(self, validation_losses: Tensor) -> Tensor:
        """The weight of each task's validation gradient in the objective's; (num_tasks,) float64 in and out."""
        ...


def check_mixture(
    mixture: Any, measurable: Collection[str], *, num_tasks: int, num_targets: int = 0, recipe: str
) -> None:
    """Refuses a mixture whose signals the recipe cannot measure, or that does not have the interface.

    Args:
        mixture: the built component.
        measurable: the signals that the recipe can measure.
        num_tasks: tasks in the run.
        num_targets: targets in the run.
        recipe: its name, for the error.

    Raises:
        ValueError: it names the missing member or signal, or the targets that the mixture would ignore.
    """
    name = f"mixture: {type(mixture).__name__}"
    observes = getattr(mixture, "observes", None)
    if not isinstance(observes, tuple):
        raise ValueError(f"{name} needs `observes`, a tuple of the signals it observes; () for none")
    methods = METHODS if observes else METHODS[:1] + METHODS[2:]
    needed = [*methods, *(["objective_weights"] if OF_LOOKAHEAD & {*observes} else [])]
    needed += ["lookahead_lr"] if (OF_LOOKAHEAD | OF_STEPS) & {*observes} else []
    for method in needed:
        if not hasattr(mixture, method):
            raise ValueError(f"{name} needs `{method}`, because it observes {observes or 'nothing'}")
    for signal in observes:
        if signal not in measurable:
            can = nearest(signal, measurable) if measurable else "; it measures nothing"
            raise ValueError(f"{name} observes '{signal}', which {recipe} does not measure{can}")
    if num_targets and observes and "target_losses" not in observes:
        advice = "remove them, or take Adapt, another mixture that observes target_losses, or one that does not learn"
        raise ValueError(f"{name} would ignore the targets in tasks.targets; {advice}")
    if "target_losses" in observes and not num_targets:
        raise ValueError(f"{name} observes 'target_losses', and there are no targets; name them in tasks.targets")
    if observes:
        check_takes(f"{name}.update", mixture.update, ["task_tokens", *observes])
    _check_probabilities(mixture, num_tasks=num_tasks)


def check_update(mixture: Any, logged: Any, *, num_tasks: int, num_targets: int = 0) -> None:
    """Refuses a mixture whose update left invalid probabilities, or returned something that cannot be logged.

    Args:
        mixture: after its update.
        logged: the return value of its ``update``.
        num_tasks: tasks in the run.
        num_targets: targets in the run.

    Raises:
        ValueError: it names the mixture and the value.
    """
    _check_probabilities(mixture, num_tasks=num_tasks)
    name = f"mixture: {type(mixture).__name__}.update"
    if not isinstance(logged, Mapping):
        raise ValueError(f"{name} has to return a dict of tensors to log, which may be empty, not {logged!r}")
    for key, value in logged.items():
        size = num_targets if num_targets and key.startswith("target_") else num_tasks
        if not isinstance(value, torch.Tensor) or value.shape not in ((), (size,)):
            raise ValueError(f"{name} returned '{key}', which is not a tensor of shape () or ({size},): {value!r}")
        if key in (*LOGGED_BY_RECIPES, *mixture.observes):
            raise ValueError(f"{name} returned '{key}', which is logged already; give it another name")


def check_takes(name: str, function: Callable[..., Any], given: Sequence[str]) -> None:
    """Refuses a function that cannot be called with these keywords."""
    try:
        inspect.signature(function).bind(**dict.fromkeys(given))
    except TypeError as error:
        raise ValueError(f"{name} cannot take {', '.join(given)} by name: {error}") from error


def _check_probabilities(mixture: Any, *, num_tasks: int) -> None:
    p = mixture.probabilities()
    needs = f"mixture: {type(mixture).__name__}.probabilities() has to be ({num_tasks},) float64 on the CPU, sum to 1 "
    needs += "and have no value below 0"
    if not isinstance(p, torch.Tensor):
        raise ValueError(f"{needs}; it is a {type(p).__name__}")
    if p.dtype != torch.float64 or p.shape != (num_tasks,) or p.device.type != "cpu":
        raise ValueError(f"{needs}; it is {tuple(p.shape)} {str(p.dtype).removeprefix('torch.')} on {p.device}")
    if not (p >= 0).all() or abs(float(p.sum()) - 1) > 1e-9:
        raise ValueError(f"{needs}; it sums to {float(p.sum()):.12g}, and its lowest is {float(p.min()):g}")
