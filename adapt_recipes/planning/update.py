"""What a mixture update reads, computes and keeps in memory.

It describes ``update_mixture`` of the recipes, by what the mixture observes and by the reward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from adapt_recipes.signals.reward_interface import tokens_of

Source = Literal["validation", "train", "train_steps", "pool", "levels", "all_train"]


@dataclass(frozen=True)
class Pass:
    """A pass over ``probe.examples`` of each task, or over other training examples.

    Attributes:
        source: the first examples of the validation split, random training examples, or those of the pool;
            ``train_steps``: random training examples for each of ``probe.steps`` look-ahead steps;
            ``levels``: ``levels.examples`` of each level of each task; ``all_train``: all training examples.
        backward: whether it includes a backward pass.
    """

    source: Source
    backward: bool = False

    @property
    def steps(self) -> float:
        """Its cost, where a training step on the same tokens costs 1."""
        return 1.0 if self.backward else 1 / 3


@dataclass(frozen=True)
class Update:
    """The computation of a mixture update.

    Attributes:
        passes: in order.
        first: the passes before the first step.
        kept_in_backward: number of full-size gradients (or copies) in memory while another gradient is computed.
        kept_in_forward: the same while only forward passes are computed: directions, and copies of the weights.
        kept_always: the same during the whole run, in host memory: the base model's weights.
        last_layers: the layers whose weights alone those gradients and copies are of; None: all weights that train.
        all_tokens: whether losses are of all tokens, not only of supervised ones.
    """

    passes: tuple[Pass, ...] = ()
    first: tuple[Pass, ...] = ()
    kept_in_backward: int = 0
    kept_in_forward: int = 0
    kept_always: int = 0
    last_layers: int | None = None
    all_tokens: bool = False

    @property
    def has_backward(self) -> bool:
        return any(each.backward for each in self.passes)


def update_of(observes: Sequence[str], probe: Any, reward: Any = None, levels: Any = None) -> Update:
    """The update of a mixture in the recipes.

    Args:
        observes: of the mixture.
        probe: the config's ``probe``; None: the recipe has none.
        reward: the built component; None: there is none. Without an attribute ``gradients`` it is assumed to compute
            only forward passes.
        levels: the config's ``levels``; None: there are none.
    """
    passes: list[Pass] = []
    in_backward = in_forward = always = 0
    last_layers: int | None = None
    all_tokens = False
    if "gradient_dots" in observes:
        train: Source = "train" if probe.separate_batches else "validation"
        if probe.exact_lookahead:
            # The gradient of the look-ahead step and a copy of the weights; afterwards the gradient alone.
            passes += [Pass(train, backward=True)]
            in_backward, in_forward = 2, 1
        passes += [Pass("validation"), Pass("validation", backward=True)]
        if probe.estimator == "finite_difference":
            # On both sides of the weights; the direction and a copy of the weights are kept.
            passes += [Pass(train), Pass(train)]
            in_forward += 2
        else:
            # The direction is kept.
            passes += [Pass(train, backward=True)]
            in_backward = max(in_backward, in_forward + 1)
    elif "kstep_differences" in observes:
        steps: list[Source] = ["train_steps"] if probe.separate_batches else ["validation"] * probe.steps
        passes += [Pass("validation")]
        last_layers = probe.last_layers
        if probe.estimator == "finite_difference":
            # Two paths, and the losses at their ends. A copy of the weights, and in a step of the second a gradient.
            passes += [Pass(source, backward=True) for source in steps * 2]
            passes += [Pass("validation", backward=True)] * probe.steps
            passes += [Pass(source) for source in steps * 2]
            in_backward, in_forward = 2, 1
        else:
            # The weights and gradients of all steps.
            passes += [Pass(source, backward=True) for source in [*steps, "validation"]]
            in_backward = 2 * probe.steps
    elif "validation_losses" in observes:
        passes += [Pass("validation")]
    if {"squared_gradient_norms", "gradient_variances"} & {*observes}:
        # The gradients of a task's two halves.
        passes += [Pass("train", backward=True)]
        in_backward = max(in_backward, 1)
    if "step_gains" in observes:
        # The loss before, the gradient, and the loss after a step, with the gradient and a copy of the weights.
        passes += [Pass("train"), Pass("train", backward=True), Pass("train")]
        in_forward = max(in_forward, 2)
    if reward is not None:
        gradients = getattr(reward, "gradients", 0)
        passes += [Pass(source, backward=gradients > 0) for source in reward.reads if source != "base_losses"]
        in_backward = max(in_backward, gradients - 1)
        if "base_losses" in reward.reads:
            passes += [Pass("train")]
            always = 1
        all_tokens = tokens_of(reward) == "all"
    # (9) of MoS measures the base model on the pool, and HBO's levels are cut by its losses of all examples.
    first = [Pass("pool")] if any(each.source == "pool" for each in passes) else []
    if levels is not None:
        passes += [Pass("levels")]
        first += [Pass("all_train")]
    return Update(tuple(passes), tuple(first), in_backward, in_forward, always, last_layers, all_tokens)
