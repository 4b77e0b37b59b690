"""What one mixture update reads, what it computes on that, and what it keeps in memory meanwhile.

The recipes' ``update_mixture`` in a table: what they do with a mixture that observes this or that, and with a reward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Source = Literal["validation", "train", "pool"]


@dataclass(frozen=True)
class Pass:
    """Examples that are read once: ``probe.examples`` of each task.

    Attributes:
        source: the first of the validation split, random training examples, or those of the pool.
        backward: whether their gradient is computed.
    """

    source: Source
    backward: bool = False

    @property
    def steps(self) -> float:
        """Its work, where a training step on the same tokens is 1."""
        return 1.0 if self.backward else 1 / 3


@dataclass(frozen=True)
class Update:
    """What every mixture update does.

    Attributes:
        passes: in turn.
        kept_in_backward: tensors of the size of all gradients that are kept while another gradient is computed.
        kept_in_forward: the same while forwards alone are computed: directions, and copies of the weights.
    """

    passes: tuple[Pass, ...] = ()
    kept_in_backward: int = 0
    kept_in_forward: int = 0

    @property
    def has_backward(self) -> bool:
        return any(each.backward for each in self.passes)


def update_of(observes: Sequence[str], probe: Any, reward: Any = None) -> Update:
    """What the recipes do for a mixture.

    Args:
        observes: of the mixture.
        probe: the config's ``probe``; None: the recipe has none.
        reward: built; None: there is none. One that does not say how many ``gradients`` it keeps is taken to compute
            forwards alone.
    """
    passes: list[Pass] = []
    in_backward = in_forward = 0
    if "gradient_dots" in observes:
        train: Source = "train" if probe.separate_batches else "validation"
        if probe.exact_lookahead:
            passes += [Pass(train, backward=True)]
            in_backward, in_forward = 2, 1  # the step's gradient and a copy of the weights; later the gradient alone
        passes += [Pass("validation"), Pass("validation", backward=True)]
        if probe.estimator == "finite_difference":
            passes += [Pass(train), Pass(train)]  # on both sides of the weights
            in_forward += 2  # the direction and a copy of the weights
        else:
            passes += [Pass(train, backward=True)]
            in_backward = max(in_backward, in_forward + 1)  # the direction
    elif "validation_losses" in observes:
        passes += [Pass("validation")]
    if reward is not None:
        gradients = getattr(reward, "gradients", 0)
        passes += [Pass(source, backward=gradients > 0) for source in reward.reads]
        in_backward = max(in_backward, gradients - 1)
    return Update(tuple(passes), in_backward, in_forward)
