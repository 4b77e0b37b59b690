"""What losses are counted from: the excess of a loss over a reference, so that what cannot be learned does not count.

A task of pure noise has a high loss for ever. Told its entropy, a worst-case mixture leaves it alone; not told, it
spends the budget there. All of this is ours:

    given           known losses, as the entropies of toy tasks, or those of another run
    ``initial``     the task's first measured loss
    ``asymptote``   where the run's own curve says that the loss will end, as far as it says so

The asymptote of a task is the lowest a >= 0 that its last losses L against its own tokens n do not rule out:

    (1)  L = a + b exp(-c n)                     for each c of a grid, a and b by least squares, S_c the sum of squares
    (2)  a_low = min_c ( a_c - sqrt(A_c (S - S_c)) ) where S_c <= S,   S = min_c S_c + (Z sigma)^2
                                                 A_c: the variance of a_c for losses of variance 1
         sigma^2 = min_c S_c / (num_losses - 3), at least NOISE^2

It is never above the lowest of these losses, and 0 while they are few. What makes it work is the slowest c of the grid:
a loss that stood still while the task had few tokens may yet fall to 0; one that stood still while it had many may not.
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

WORDS = ("initial", "asymptote")

# Of the estimate, all ours. The slowest and the fastest c, per fair share of the tokens, budget / num_tasks. A task
# that falls more slowly than this is taken for one that cannot be learned.
SLOWEST, FASTEST, NUM_SPEEDS = 0.25, 500.0, 128
WINDOW, FEWEST = 32, 8  # losses of a task: how many are kept, and how many it takes to rule anything out
Z = 2.0  # standard deviations
NOISE = 1e-3  # nats: what losses are not believed to tell apart


class Reference:
    """Gives each task's excess loss.

    Args:
        reference: None: 0, so that the excess is the loss. A mapping of each task's name to a loss in nats a supervised
            token, or the path of a JSON file with one; other names may be in it too. ``initial`` or ``asymptote``: see
            the module (a file of such a name is ``./initial``).
        task_names: the tasks, in order.
        budget_tokens: supervised tokens to spend.

    Raises:
        ValueError: a file that cannot be read, a task that is missing, a loss that is no number; it names them.
    """

    def __init__(
        self, reference: str | Mapping[str, float] | None, *, task_names: Sequence[str], budget_tokens: int
    ) -> None:
        num_tasks = len(task_names)
        self.task_names = list(task_names)
        self.word = reference if isinstance(reference, str) and reference in WORDS else None
        self.losses = torch.zeros(num_tasks, dtype=torch.float64)  # what losses are counted from
        self._state: tuple[str, ...] = ()
        if self.word == "initial":
            self.losses.fill_(math.nan)  # not measured yet
            self._state = ("losses",)
        elif self.word == "asymptote":
            self.curve_tokens = torch.full((WINDOW, num_tasks), math.nan, dtype=torch.float64)  # newest last
            self.curve_losses = self.curve_tokens.clone()
            fair = budget_tokens / num_tasks
            speeds = torch.linspace(math.log(SLOWEST), math.log(FASTEST), NUM_SPEEDS, dtype=torch.float64)
            self.speeds = speeds.exp() / fair
            self._state = ("losses", "curve_tokens", "curve_losses")
        elif reference is not None:
            self.losses = torch.tensor(_given(reference, task_names), dtype=torch.float64)
            self._state = ("losses",)  # to know them again: a file may change between a run and its resume

    def excess(self, losses: Tensor) -> Tensor:
        """The losses less the reference.

        Args:
            losses: (num_tasks,) float64, nats a supervised token; NaN for a task that was not measured.

        Returns:
            (num_tasks,) float64; NaN where ``losses`` is; below 0 where a loss is below its reference; 0 where the
            reference is to be these very losses.
        """
        return losses - torch.where(self.losses.isnan(), losses, self.losses)

    def observe(self, losses: Tensor, task_tokens: Tensor) -> None:
        """Lets the run's own losses change the reference, where it is made of them.

        Args:
            losses: as for ``excess``.
            task_tokens: (num_tasks,) supervised tokens each task has had.
        """
        if self.word == "initial":
            self.losses = torch.where(self.losses.isnan(), losses, self.losses)
        elif self.word == "asymptote":
            for task in (~losses.isnan()).nonzero().flatten().tolist():
                for curve, value in ((self.curve_tokens, task_tokens[task]), (self.curve_losses, losses[task])):
                    curve[:, task] = torch.cat([curve[1:, task], value.to(curve)[None]])
                known = ~self.curve_losses[:, task].isnan()
                tokens, curve_losses = self.curve_tokens[known, task], self.curve_losses[known, task]
                self.losses[task] = lowest_asymptote(tokens, curve_losses, self.speeds)

    def state_dict(self) -> dict[str, Tensor]:
        """All that ``load_state_dict`` needs to continue as if never stopped."""
        return {f"reference_{name}": value for name, value in copied_state(self, self._state).items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continues from a ``state_dict``; a ValueError if it is of another reference or number of tasks."""
        given = self.losses
        load_state(self, self._state, {name.removeprefix("reference_"): value for name, value in state.items()})
        if self.word is None and not torch.equal(self.losses, given):
            changed = [name for name, same in zip(self.task_names, self.losses == given, strict=True) if not same]
            raise ValueError(
                f"resume: mixture.reference: the loss given for the task {changed[0]!r} changed since the run began; "
                "put it back, or take another output_dir"
            )


def lowest_asymptote(tokens: Tensor, losses: Tensor, speeds: Tensor) -> Tensor:
    """The lowest loss that a falling exponential through these losses may end at, (2).

    Args:
        tokens: (num_losses,) float64, n of (1), in ascending order.
        losses: (num_losses,) float64, L of (1).
        speeds: (num_speeds,) float64, each c of (1), 1/token.

    Returns:
        A scalar, between 0 and the lowest of the losses.
    """
    m = len(losses)
    if m < FEWEST:
        return losses.new_zeros(())
    x = torch.exp(-speeds[:, None] * (tokens - tokens[0]))  # (num_speeds, m)
    x_mean, mean = x.mean(1, keepdim=True), losses.mean()
    x_square = (x - x_mean).square().sum(1).clamp_min(torch.finfo(x.dtype).tiny)  # 0: no tokens, nothing to tell
    b = ((x - x_mean) * (losses - mean)).sum(1) / x_square
    a = mean - b * x_mean[:, 0]
    squares = (a[:, None] + b[:, None] * x - losses).square().sum(1)  # S_c
    most = squares.min() + Z**2 * (squares.min() / (m - 3)).clamp_min(NOISE**2)  # S
    variance = 1 / m + x_mean[:, 0].square() / x_square  # A_c
    lowest = a - (variance * (most - squares).clamp_min(0)).sqrt()
    return torch.minimum(lowest[squares <= most].min(), losses.min()).clamp_min(0)


def _given(reference: str | Mapping[str, float], task_names: Sequence[str]) -> list[float]:
    """The losses of a mapping or of a JSON file, in the order of the tasks."""
    where, key = "mixture.reference", "reference"
    if isinstance(reference, str):
        where, key = f"{where}: {reference}", f"{key}: {reference}"
        if not Path(reference).is_file():
            raise ValueError(f"{where} is no file{nearest(reference, WORDS)}")
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
