"""The interface of a reward, from which a scorer learns, and its checks before a run starts."""

from __future__ import annotations

from typing import Any, Protocol, get_args

from torch import Tensor

from adapt_recipes.errors import nearest
from adapt_recipes.mixture.interface import check_takes
from adapt_recipes.signals import passes

READS = ("train", "validation", "pool", "base_losses")
TOKENS = get_args(passes.Tokens)


class Reward(Protocol):
    """One reward per task, measured on a few examples of each. Any class with these members is a reward.

    A recipe builds it with the keywords ``task_names`` and ``model``, and with the arguments in the config. If base
    losses are to be of all tokens, not of answers, it has the attribute ``tokens``, which is "all".
    """

    reads: tuple[str, ...]
    """the batches it is called with, each name once for every time that it is read: ``train`` (training examples,
    others at every update), ``validation`` (always the same) or ``pool`` (training examples, always the same; it comes
    with ``base_losses``, (num_examples,) float64, their losses before the first step). With ``base_losses`` beside
    ``train``, these examples are read once more, and come with the base model's losses of them."""

    def __call__(self, **batches: Any) -> Tensor:
        """(num_tasks,) float64 on the CPU; NaN for a task without an example in these batches."""
        ...


def tokens_of(reward: Any) -> passes.Tokens:
    """Of which tokens the base model's losses are that a reward is given."""
    tokens: passes.Tokens = getattr(reward, "tokens", "answer")
    return tokens


def check_reward(reward: Any, mixture: Any) -> None:
    """Refuses a reward that the mixture does not observe, or that does not have the interface.

    Args:
        reward: the built component; None: the config names none.
        mixture: the built component.

    Raises:
        ValueError: it names the reward and what it lacks.
    """
    learns_from_it = "rewards" in mixture.observes
    if reward is None:
        if learns_from_it:
            raise ValueError(f"missing key 'reward': mixture: {type(mixture).__name__} observes rewards")
        return
    name = f"reward: {type(reward).__name__}"
    if not learns_from_it:
        raise ValueError(f"{name} is unused: mixture: {type(mixture).__name__} does not observe rewards; remove it")
    reads = getattr(reward, "reads", None)
    if not callable(reward) or not isinstance(reads, tuple) or not reads:
        raise ValueError(f"{name} has to be callable, with `reads`, a tuple out of {', '.join(READS)}")
    for read in reads:
        if read not in READS:
            raise ValueError(f"{name} reads {read!r}{nearest(str(read), READS)}")
    if "base_losses" in reads and ("train" not in reads or "pool" in reads):
        reason = "the pool comes with its own" if "pool" in reads else "they are of these examples"
        raise ValueError(f"{name} reads 'base_losses', which is for `reads` with 'train' and without 'pool': {reason}")
    if (tokens := tokens_of(reward)) not in TOKENS:
        raise ValueError(f"{name}.tokens: {tokens!r}{nearest(str(tokens), TOKENS)}")
    given = [*dict.fromkeys([*reads, *(["base_losses"] if "pool" in reads else [])])]
    check_takes(f"{name}.__call__", reward, given)
