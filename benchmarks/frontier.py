"""How good a static mixture can be in a setting, by learning curves that are fitted to finished runs.

The loss of a task is taken to depend on its own tokens alone, whenever they come: curves and weights are those of
``adapt_recipes.mixture.curves``, fitted to the validations of all runs, and then

    (1)  L_i(p) = r_i sum_L P(L) L(p_i B / fair)                after the budget B of a mixture p
         r_i = sum_runs l_i / sum_runs y_i                      l: by which runs are compared, y: the last validation
    (2)  min_p  (1 - risk) mean_i L_i + risk max_i L_i          the best mixture for a trade-off of mean and worst

Losses below 0, as noise leaves them above a floor, count as 0 in r, which is 1 if no run has a y above 0. By such
curves no mixture of several stages is better. How far they can be believed is what the errors on runs say that
were not fitted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from common import ROOT
from torch import Tensor

sys.path.insert(0, str(ROOT))

# Below, so that it runs without an installation as well.
from adapt_recipes.mixture.curves import Curves, asymptote_prior, fit  # noqa: E402
from adapt_recipes.report.read import Array, Run  # noqa: E402

RISKS = (0.0, 0.25, 0.5, 0.75, 1.0)
# Of (2): steps of Adam, its learning rate, and the inverse temperature of the maximum, in 1 / nats.
STEPS, LEARNING_RATE, SHARPNESS = 600, 0.05, 500.0


class Frontier(NamedTuple):
    """Learning curves of a setting with n tasks."""

    curves: Curves
    ratios: Array  # (n,): r
    best: dict[float, Array]  # (n,): the shares (2) for each of ``RISKS``

    def losses(
        self,
        shares: Array,  # (n,)
    ) -> Array:
        """(1): (n,) nats."""
        return predicted(self.curves, torch.from_numpy(self.ratios), torch.from_numpy(shares)).numpy()


def predicted(
    curves: Curves,
    ratios: Tensor,  # (n,)
    shares: Tensor,  # (n,)
) -> Tensor:
    """(1): (n,) nats."""
    # (1): L_i(p) = r_i sum_L P(L) L(p_i B / fair)
    return ratios * curves.mean(shares * len(shares))


def best_shares(
    curves: Curves,
    ratios: Tensor,  # (n,)
    risk: float,
) -> Array:
    """(2): (n,)."""
    scores = torch.zeros_like(ratios).requires_grad_()
    optimizer = torch.optim.Adam([scores], LEARNING_RATE)
    for _ in range(STEPS):
        found = predicted(curves, ratios, torch.softmax(scores, 0))
        # (2): min_p  (1 - risk) mean_i L_i + risk max_i L_i
        objective = (1 - risk) * found.mean() + risk * torch.logsumexp(SHARPNESS * found, 0) / SHARPNESS
        optimizer.zero_grad()
        objective.backward()
        optimizer.step()
    return torch.softmax(scores.detach(), 0).numpy()


def check_runs(runs: Sequence[Run]) -> None:
    """Refuses what no frontier can be made of.

    Raises:
        ValueError: runs of several budgets, a task without a loss, or validations without their steps.
    """
    for run in runs:
        if run.spent != runs[0].spent:
            spent = f"{runs[0].name} spent {runs[0].spent:,} tokens, this one {run.spent:,}"
            raise ValueError(f"{run.folder}: held_out needs runs of one budget: {spent}")
        is_known = np.isfinite([run.result_losses, run.final_losses, *run.validations.losses]).all(0)
        if not is_known.all():
            task = run.tasks[is_known.argmin()]
            raise ValueError(f"{run.folder}: held_out needs all losses of every task; one of {task!r} is missing")
        # Of long runs not all steps are read, but still more than there are validations.
        if len(run.steps.step) < (run.validations.supervised_tokens > 0).sum():
            raise ValueError(f"{run.folder}: held_out needs the steps of validations, which the log lacks")


def fit_frontier(
    runs: Sequence[Run],  # losses above their floors
) -> Frontier:
    """Fits the curves of all tasks to the validations of runs, without those before the first step."""
    fair = runs[0].spent / len(runs[0].tasks)
    x = torch.from_numpy(np.concatenate([tokens_at_validations(run) for run in runs]) / fair)
    validations = [run.validations for run in runs]
    y = torch.from_numpy(np.concatenate([each.losses[each.supervised_tokens > 0] for each in validations]))
    # A mean, because one loss may be low by chance.
    level = y.sort(0).values[: len(runs)].mean(0).clamp_min(0)
    curves = fit(x, y, torch.ones_like(y), y.clamp_min(0), level, asymptote_prior(1))
    # (1): r_i = sum_runs l_i / sum_runs y_i
    results = np.sum([run.result_losses for run in runs], 0).clip(0)
    validated = np.sum([run.final_losses for run in runs], 0).clip(0)
    ratios = np.divide(results, validated, out=np.ones_like(results), where=validated > 0)
    return Frontier(curves, ratios, {risk: best_shares(curves, torch.from_numpy(ratios), risk) for risk in RISKS})


def tokens_at_validations(run: Run) -> Array:
    """(validations, tasks): supervised tokens of each task so far, without the validation before the first step."""
    at = run.validations.supervised_tokens
    spent = [0, *run.steps.supervised_tokens]
    return np.stack([np.interp(at[at > 0], spent, [0, *tokens]) for tokens in run.steps.task_tokens.T], 1)
