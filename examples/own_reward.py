r"""A reward of one's own for Mixture-of-Skills: how unlikely the right answers of a task still are.

    tune run mos_full_finetune --config yaml/tiny_mos_cossim.yaml \
        reward=examples.own_reward.Surprise output_dir=runs/own_reward

Start it in the folder above this one. The interface is ``adapt_recipes.signals.reward_interface.Reward``; the functions
that measure the model are those of ``adapt_recipes.signals.passes``. This reward is an illustration, and no paper's.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from adapt_recipes.signals import passes


class Surprise:
    """R(i) = mean over examples of 1 - exp(-loss); exp(-loss) is the geometric mean of the answer's probabilities.

    Args:
        task_names: the tasks, in order.
        model: the model that is trained; see ``adapt_recipes.signals.passes``.
        power: > 0; above 1 the tasks that are nearly learned get less.

    Raises:
        ValueError: ``power`` is out of range.
    """

    # It is called with training examples, others at every update.
    reads = ("train",)
    # For the memory that `tune plan` estimates: it keeps no gradients, because it computes forward passes only.
    gradients = 0

    def __init__(self, *, task_names: Sequence[str], model: nn.Module, power: float = 1.0) -> None:
        if not power > 0:
            raise ValueError(f"reward.power: has to be above 0, not {power}")
        self.num_tasks, self.model, self.power = len(task_names), model, power

    def __call__(self, *, train: Sequence[passes.ExampleBatch]) -> Tensor:
        """(num_tasks,) float64 on the CPU, in [0, 1]; above 0, as the scorer needs it, as long as a loss is."""
        losses = passes.example_losses(self.model, train)  # (num_examples,) nats per supervised token
        surprises = (1 - (-losses).exp()) ** self.power
        return passes.task_means(surprises, train, self.num_tasks)
