"""benchmarks/frontier.py predicts runs that it was not fitted to, and finds the best static mixtures by its curves."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from test_benchmarks import benchmark

from adapt_recipes.mixture.curves import Curves, asymptote_prior, fit
from adapt_recipes.report.read import Array, Mixtures, Run, Steps, Validations

TASKS = ("slow", "medium", "fast")
BUDGET, STEPS = 3000, 30
FAIR = BUDGET / len(TASKS)
# True curves E + C exp(-k x), x in fair shares; test losses are RATIOS times those of validation.
E, C, K = np.array([[0.5, 0.2, 0.1], [2.5, 2.0, 3.0], [0.8, 2.0, 5.0]])
RATIOS = np.array([1.2, 1.0, 0.8])


@pytest.fixture(scope="module")
def frontier() -> ModuleType:
    return benchmark("frontier")


def true_losses(
    tokens: Array,  # (..., tasks)
) -> Array:
    return E + C * np.exp(-K * tokens / FAIR)


def run_of(
    shares: Array,  # (STEPS, tasks): of the tokens of each step
) -> Run:
    """With a validation before the first step, and after every third."""
    task_tokens = (shares * BUDGET / STEPS).cumsum(0)
    steps = np.arange(1.0, STEPS + 1)
    spent = steps * BUDGET / STEPS
    at = np.concatenate([[0], spent[2::3]])
    losses = true_losses(np.concatenate([np.zeros((1, len(TASKS))), task_tokens[2::3]]))
    summary = {
        "supervised_tokens": BUDGET,
        "task_tokens": dict(zip(TASKS, task_tokens[-1], strict=True)),
        "validation_losses": dict(zip(TASKS, losses[-1], strict=True)),
        "test_losses": dict(zip(TASKS, RATIOS * losses[-1], strict=True)),
    }
    return Run(
        folder=Path("run_0"),
        config={},
        summary=summary,
        ended="",
        notes=(),
        tasks=TASKS,
        num_updates=0,
        steps=Steps(steps, spent, spent, spent, steps, steps, task_tokens),
        mixtures=Mixtures(*[np.zeros(1)] * 4, probabilities=shares[:1]),
        validations=Validations(at, losses),
        split="test",
    )


def static(*shares: float) -> Run:
    return run_of(np.tile(shares, (STEPS, 1)))


def fitted_runs() -> list[Run]:
    """Static mixtures, and one of two stages, by which x differs from the share of all tokens so far."""
    stages = np.repeat([[0.1, 0.2, 0.7], [0.7, 0.2, 0.1]], STEPS // 2, 0)
    return [static(1 / 3, 1 / 3, 1 / 3), static(0.6, 0.3, 0.1), static(0.1, 0.6, 0.3), run_of(stages)]


def test_it_predicts_static_mixtures_that_it_was_not_fitted_to(frontier: ModuleType) -> None:
    fitted = frontier.fit_frontier(fitted_runs())
    np.testing.assert_allclose(fitted.ratios, RATIOS)
    for shares in np.random.default_rng(0).dirichlet([3.0, 3.0, 3.0], 20):
        expected = RATIOS * true_losses(shares * BUDGET)
        np.testing.assert_allclose(fitted.losses(shares), expected, rtol=0.03, atol=0.02)


def test_a_task_at_its_floor_has_the_ratio_1(frontier: ModuleType) -> None:
    """Where losses are those above a floor, noise takes some below 0; neither 0 / 0 nor a sign may come of it."""

    def lowered(run: Run) -> Run:
        losses = run.validations.losses * [1, 1, 0]
        floored = {
            "validation_losses": dict(zip(TASKS, losses[-1] - [0, 0, 0.001], strict=True)),
            "test_losses": run.summary["test_losses"] | {"fast": -0.002},
        }
        return replace(run, summary=run.summary | floored, validations=run.validations._replace(losses=losses))

    fitted = frontier.fit_frontier([lowered(run) for run in fitted_runs()])
    np.testing.assert_allclose(fitted.ratios, [*RATIOS[:2], 1])
    for shares in fitted.best.values():
        assert np.isfinite(shares).all() and fitted.losses(shares)[2] == pytest.approx(0, abs=1e-6)


def curves_of_several_shapes() -> Curves:
    x = torch.linspace(0.05, 2, 12, dtype=torch.float64)[:, None].expand(-1, 3)
    y = torch.from_numpy(E + C * (1 + x.numpy() / 0.3) ** -K)
    return fit(x, y, torch.ones_like(y), y, y.min(0).values, asymptote_prior(1))


@pytest.mark.parametrize("risk", [0.0, 0.5, 1.0])
def test_the_best_shares_are_those_of_a_fine_search(frontier: ModuleType, risk: float) -> None:
    curves = curves_of_several_shapes()
    ratios = torch.from_numpy(RATIOS)

    def objective(shares: Array) -> Array:
        """(2) without the smooth maximum: (...,) of (..., 3)."""
        found = (ratios * curves.mean(torch.from_numpy(shares) * 3)).numpy()
        return (1 - risk) * found.mean(-1) + risk * found.max(-1)

    best = frontier.best_shares(curves, ratios, risk)
    assert best.sum() == pytest.approx(1) and (best >= 0).all()
    # The search of a grid, and then of a finer one around its best point.
    i, j = np.meshgrid(np.linspace(0, 1, 201), np.linspace(0, 1, 201))
    grid = np.stack([i, j, 1 - i - j], -1)[i + j <= 1]
    near = grid[objective(grid).argmin()] + np.stack([i, j, -i - j], -1).reshape(-1, 3) * 0.02 - [0.01, 0.01, -0.02]
    near = near[(near >= 0).all(-1)]
    lowest = objective(near).min()
    assert lowest <= objective(grid).min() + 1e-9
    assert lowest - 1e-6 <= objective(best) <= lowest + 1e-3
    assert objective(np.full(3, 1 / 3)) > lowest + 0.01, "else any shares would do"


def test_tokens_at_validations(frontier: ModuleType) -> None:
    """Between two steps, and between the start and the first step, tokens are interpolated."""
    run = static(1 / 3, 1 / 3, 1 / 3)
    steps = run.steps._replace(
        supervised_tokens=np.array([100.0, 300.0]), task_tokens=np.array([[60.0, 40.0, 0.0], [60.0, 140.0, 100.0]])
    )
    at = np.array([0.0, 50.0, 100.0, 150.0, 300.0])
    run = replace(run, steps=steps, validations=Validations(at, np.ones((5, 3))))
    expected = [[30, 20, 0], [60, 40, 0], [60, 65, 25], [60, 140, 100]]
    np.testing.assert_allclose(frontier.tokens_at_validations(run), expected)


def test_what_no_frontier_can_be_made_of(frontier: ModuleType) -> None:
    runs = fitted_runs()
    frontier.check_runs(runs)
    one = runs[0]
    losses = one.validations.losses.copy()
    losses[3, 1] = np.nan
    refused = {
        "runs of one budget: run_0 spent 3,000 tokens, this one 2,999": replace(
            one, summary=one.summary | {"supervised_tokens": BUDGET - 1}
        ),
        "one of 'medium' is missing": replace(one, validations=one.validations._replace(losses=losses)),
        "one of 'fast' is missing": replace(
            one, summary=one.summary | {"test_losses": one.summary["test_losses"] | {"fast": None}}
        ),
        "steps of validations, which the log lacks": replace(one, steps=Steps(*(each[[0, -1]] for each in one.steps))),
    }
    for said, run in refused.items():
        with pytest.raises(ValueError, match=re.escape(said)) as error:
            frontier.check_runs([*runs, run])
        assert str(error.value).startswith("run_0: held_out needs ") and "\n" not in str(error.value)
