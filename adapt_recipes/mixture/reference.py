"""Reference losses: a task's excess loss over its reference does not count the loss that cannot be learned.

The loss of a task of pure noise stays high forever. A worst-case mixture that is given its entropy leaves it alone;
without it, it spends the budget there. All references are ours:

    given           known losses, such as the entropies of toy tasks, or the losses of another run
    ``initial``     the first measured loss of the task
    ``asymptote``   the final loss that the run's own loss curve predicts, as a lower bound

The asymptote of a task is the lowest a >= 0 that its last losses L, as a function of its own tokens n, do not rule out:

    (1)  L = a + b exp(-c n)                          for each c of a grid: a_c and b_c by least squares, S_c the sum of
                                                      squares, A_c the variance of a_c for losses of variance 1
    (2)  sigma^2 = max(min_c S_c / (num_losses - 3), LOSS_NOISE^2),   S = min_c S_c + (NUM_SIGMAS sigma)^2
    (3)  a_low = min_c ( a_c - sqrt(A_c (S - S_c)) ) over all c with S_c <= S

It is never above the lowest of these losses, and 0 while there are few of them. The slowest c of the grid is what makes
it work: a loss that did not change while the task had few tokens may still fall to 0, but one that did not change while
it had many tokens may not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from adapt_recipes.errors import nearest
from adapt_recipes.mixture.common import copied_state, load_state, number

# References that are computed from the run's own losses.
MEASURED_REFERENCES = ("initial", "asymptote")

# The numbers of the estimate are all ours. The slowest and the fastest c, per fair share of the tokens, which is
# budget / num_tasks. A task that is learned more slowly than the slowest c counts as one that cannot be learned.
SLOWEST_SPEED, FASTEST_SPEED, NUM_SPEEDS = 0.25, 500.0, 128
# Losses that are kept of each task, and the number of them below which nothing is ruled out.
MAX_LOSSES, MIN_LOSSES = 32, 8
# Width of the confidence interval, in standard deviations.
NUM_SIGMAS = 2.0
# The smallest standard deviation of losses, in nats.
LOSS_NOISE = 1e-3


class Reference:
    """The reference loss of each task, and the excess over it.

    Args:
        reference: None: 0, so that the excess is the loss. A mapping of each task's name to a loss in nats per
            supervised token, or the path of a JSON file with one, which may contain other names as well. ``initial`` or
            ``asymptote``: see the module (a file with such a name is ``./initial``).
        task_names: the tasks, in order.
        budget_tokens: supervised tokens to spend.

    Attributes:
        losses: (num_tasks,) float64, the references; NaN: not measured yet.

    Raises:
        ValueError: a file cannot be read, a task is missing, or a loss is not a number; it names them.
    """

    def __init__(
        self, reference: str | Mapping[str, float] | None, *, task_names: Sequence[str], budget_tokens: int
    ) -> None:
        num_tasks = len(task_names)
        self.task_names = list(task_names)
        self.measured = reference if isinstance(reference, str) and reference in MEASURED_REFERENCES else None
        self.losses = torch.zeros(num_tasks, dtype=torch.float64)
        self._state: tuple[str, ...] = ()
        if self.measured == "initial":
            self.losses.fill_(math.nan)
            self._state = ("losses",)
        elif self.measured == "asymptote":
            # The last losses of each task and its tokens, newest last: (MAX_LOSSES, num_tasks) each.
            self.curve_tokens = torch.full((MAX_LOSSES, num_tasks), math.nan, dtype=torch.float64)
            self.curve_losses = self.curve_tokens.clone()
            fair = budget_tokens / num_tasks
            speeds = torch.linspace(math.log(SLOWEST_SPEED), math.log(FASTEST_SPEED), NUM_SPEEDS, dtype=torch.float64)
            self.speeds = speeds.exp() / fair
            self._state = ("losses", "curve_tokens", "curve_losses")
        elif reference is not None:
            # The losses are part of the state because a file may change between a run and its resume.
            self.losses = torch.tensor(_given(reference, task_names), dtype=torch.float64)
            self._state = ("losses",)

    def excess(
        self,
        losses: Tensor,  # (num_tasks,) float64, nats per supervised token; NaN: not measured
    ) -> Tensor:
        """The losses minus the references.

        Returns:
            (num_tasks,) float64; NaN where ``losses`` is; negative where a loss is below its reference; 0 where these
            losses will become the reference.
        """
        return losses - torch.where(self.losses.isnan(), losses, self.losses)

    def observe(
        self,
        losses: Tensor,  # (num_tasks,) float64, nats per supervised token; NaN: not measured
        task_tokens: Tensor,  # (num_tasks,) float64, supervised tokens spent on each task
    ) -> None:
        """Updates a reference that is computed from the run's own losses."""
        if self.measured == "initial":
            self.losses = torch.where(self.losses.isnan(), losses, self.losses)
        elif self.measured == "asymptote":
            for task in (~losses.isnan()).nonzero().flatten().tolist():
                for curve, value in ((self.curve_tokens, task_tokens[task]), (self.curve_losses, losses[task])):
                    curve[:, task] = torch.cat([curve[1:, task], value.to(curve)[None]])
                known = ~self.curve_losses[:, task].isnan()
                tokens, curve_losses = self.curve_tokens[known, task], self.curve_losses[known, task]
                self.losses[task] = lowest_asymptote(tokens, curve_losses, self.speeds)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that an exact resume needs."""
        return {f"reference_{name}": value for name, value in copied_state(self, self._state).items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continues from a ``state_dict``; a ValueError if it is of another reference or number of tasks."""
        given = self.losses
        load_state(self, self._state, {name.removeprefix("reference_"): value for name, value in state.items()})
        if self.measured is None and not torch.equal(self.losses, given):
            changed = [name for name, same in zip(self.task_names, self.losses == given, strict=True) if not same]
            raise ValueError(
                f"resume: mixture.reference: the loss given for the task {changed[0]!r} changed since the run began; "
                "change it back, or use another output_dir"
            )


def lowest_asymptote(
    tokens: Tensor,  # (num_losses,) float64, n of (1), in ascending order
    losses: Tensor,  # (num_losses,) float64, L of (1), nats
    speeds: Tensor,  # (num_speeds,) float64, the values of c in (1), 1/token
) -> Tensor:
    """The lowest value (3) to which an exponential through these losses may fall.

    Returns:
        A scalar, between 0 and the lowest of the losses.
    """
    num_losses = len(losses)
    if num_losses < MIN_LOSSES:
        return losses.new_zeros(())

    # (1): L = a + b exp(-c n); x is (num_speeds, num_losses). Without new tokens all x are equal, and b is 0.
    x = torch.exp(-speeds[:, None] * (tokens - tokens[0]))
    x_mean, mean = x.mean(1, keepdim=True), losses.mean()
    x_square = (x - x_mean).square().sum(1).clamp_min(torch.finfo(x.dtype).tiny)
    b = ((x - x_mean) * (losses - mean)).sum(1) / x_square
    a = mean - b * x_mean[:, 0]
    squares = (a[:, None] + b[:, None] * x - losses).square().sum(1)  # S_c
    variance = 1 / num_losses + x_mean[:, 0].square() / x_square  # A_c

    # (2): sigma^2 = max(min_c S_c / (num_losses - 3), LOSS_NOISE^2), S = min_c S_c + (NUM_SIGMAS sigma)^2
    sigma_square = (squares.min() / (num_losses - 3)).clamp_min(LOSS_NOISE**2)
    max_squares = squares.min() + NUM_SIGMAS**2 * sigma_square

    # (3): a_low = min_c ( a_c - sqrt(A_c (S - S_c)) ) over all c with S_c <= S
    lowest = a - (variance * (max_squares - squares).clamp_min(0)).sqrt()
    return torch.minimum(lowest[squares <= max_squares].min(), losses.min()).clamp_min(0)


def _given(reference: str | Mapping[str, float], task_names: Sequence[str]) -> list[float]:
    """The losses of a mapping or of a JSON file, in the order of the tasks."""
    where, key = "mixture.reference", "reference"
    if isinstance(reference, str):
        where, key = f"{where}: {reference}", f"{key}: {reference}"
        if not Path(reference).is_file():
            raise ValueError(f"{where} is no file{nearest(reference, MEASURED_REFERENCES)}")
        try:
            reference = json.loads(Path(reference).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{where} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(reference, Mapping):
        raise ValueError(f"{where} must map each task's name to a loss, not be {type(reference).__name__}")
    given = {str(name): loss for name, loss in reference.items()}
    for name in task_names:
        if name not in given:
            raise ValueError(f"{where} has no loss for the task {name!r}{nearest(name, given)}")
    return [number(f"{key}[{name!r}]", given[name]) for name in task_names]
