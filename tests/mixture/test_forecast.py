"""ADAPT with forecast curves: its fits against numpy, its plan against a search, and whole runs without a model."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adapt_recipes.mixture import AdaptForecast, AdaptPlanned, forecast, uniform
from adapt_recipes.mixture.curves import ASYMPTOTES, POWERS, SPEEDS, asymptote_prior, shapes

NAN = math.nan


def make(num_tasks: int, budget_tokens: int = 1000, kind: Any = AdaptForecast, **arguments: Any) -> Any:
    """Measures from the first update on, unlike the default."""
    return kind(
        task_names=[f"task {i}" for i in range(num_tasks)],
        num_supervised_tokens=[100] * num_tasks,
        budget_tokens=budget_tokens,
        **({} if kind is uniform else {"measure_after": 0.0}) | arguments,
    )


def tensor(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


def update(mixture: Any, tokens: Any, losses: Any) -> dict[str, Tensor]:
    return mixture.update(task_tokens=tensor(tokens), **dict.fromkeys(mixture.observes, tensor(losses)))


# ---- curves


def test_fits_against_numpy() -> None:
    """The curves and (2) for one task of four updates, curve by curve, with training losses."""
    mixture = make(2, budget_tokens=1000, discount=0.9, floor=0.1)
    tokens, losses = [[30, 10], [50, 30], [90, 40], [120, 60]], [[4.0, 2.0], [3.0, NAN], [2.0, 2.1], [2.8, 1.9]]
    for n, y in zip(tokens, losses, strict=True):
        present = float(mixture.probabilities()[0])
        logged = update(mixture, n, y)

    n = np.array([15, 40, 70, 105]) / 500
    y = np.array([4.0, 3.0, 2.0, 2.8])
    v = np.array([30 / 20, 20 / 20, 40 / 25, 30 / 25])
    age = np.arange(3, -1, -1)
    d = v * 0.9**age
    m = np.array([np.average(y[: t + 1], weights=v[: t + 1] * 0.7 ** np.arange(t, -1, -1)) for t in range(4)])
    now = np.average(y, weights=v * 0.9 ** (3 * age))
    w = d / (m + 0.05) ** 2
    kinds = [lambda x, k=k: np.exp(-k * x) for k in SPEEDS.tolist()]
    kinds += [lambda x, c=c, e=e: (1 + x / c) ** -e for c, e in POWERS.tolist()]
    log_p, fits, ends, asymptotes = [], [], [], []
    end = (120 + (1000 - 180) * float(mixture.probabilities()[0])) / 500
    for phi, density in zip(ASYMPTOTES.tolist(), asymptote_prior(1 + 3 * 0.82).tolist(), strict=True):
        for g in kinds:
            E = phi * now
            # The smallest sum of squares over C >= 0.
            C = max(0.0, np.linalg.lstsq((w**0.5 * g(n))[:, None], w**0.5 * (y - E))[0][0])
            squares = (w * (y - E - C * g(n)) ** 2).sum() / d.sum()
            log_p.append(np.log(density) - d.sum() / 2 * np.log(squares + 0.03**2))
            fits.append(E + C * g(n))
            ends.append(E + C * g(end))
            asymptotes.append(E)
    P = np.exp(np.array(log_p) - max(log_p))
    P /= P.sum()
    mean = (P * ends).sum()
    # The last loss is above the curve: a part of it was forgotten.
    a = v * 0.7**age
    G = (a * (y - P @ np.array(fits))).sum() / (1 + a.sum())
    assert G > 0.01 and abs(present - float(mixture.probabilities()[0])) > 0.01
    expected = mean + G * present / float(mixture.probabilities()[0])
    assert float(logged["forecast_losses"][0]) == pytest.approx(expected, rel=1e-9)
    assert float(logged["forecast_errors"][0]) == pytest.approx(((P * (ends - mean) ** 2).sum()) ** 0.5, rel=1e-6)
    assert float(logged["asymptotes"][0]) == pytest.approx((P * asymptotes).sum(), rel=1e-9)


@pytest.mark.parametrize("losses", ["train", "validation"])
@pytest.mark.parametrize("speed", [0.5, 3.0, 20.0])
def test_forecasts_the_end_of_a_known_curve(losses: str, speed: float) -> None:
    """When half of the budget is spent, and it is surer of it than before."""
    mixture = make(2, budget_tokens=2000, losses=losses)
    errors = []
    for step in range(1, 21):
        n = step * 25.0
        at = n - 12.5 if losses == "train" else n
        logged = update(mixture, [n, n], [0.4 + 3 * math.exp(-speed * at / 1000), 1.0])
        errors.append(float(logged["forecast_errors"][0]))
    expected = 0.4 + 3 * math.exp(-speed * (500 + 1000 * float(mixture.probabilities()[0])) / 1000)
    # Half of a fair share of a slow task is little to see: its asymptote may be anywhere.
    assert abs(float(logged["forecast_losses"][0]) - expected) < (0.1 if speed > 1 else 1.5 * errors[-1])
    assert errors[-1] < errors[2]


def test_flat_losses_are_no_reason_to_hope() -> None:
    """The longer they stay flat the less; a task that falls has a forecast below its loss."""
    mixture = make(2, budget_tokens=2000)
    gains = []
    for step in range(1, 31):
        logged = update(mixture, [step * 25.0] * 2, [3.0, 3.0 * math.exp(-step / 10)])
        if step > 1:
            gains.append(3.0 - float(logged["forecast_losses"][0]))
    assert all(gain >= -1e-12 for gain in gains) and gains[-1] < 0.1 < gains[0]


@pytest.mark.parametrize("k", [1, 4])
def test_the_prior_of_asymptotes(k: float) -> None:
    """It has the mean of its density, about 1 / (k + 1), and a tenth of it at 1."""
    prior = asymptote_prior(k)
    assert float(prior.sum()) == pytest.approx(1)
    assert float((prior * ASYMPTOTES).sum()) == pytest.approx(0.1 + 0.9 / (k + 1), abs=0.03)
    if k == 1:
        torch.testing.assert_close(
            prior, 0.9 * tensor([0.15, 0.3, 0.25, 0.15, 0.075, 0.05, 0.025]) + tensor([0] * 6 + [0.1])
        )


# ---- the plan


def objective(R: Tensor, s: Tensor, prior: Tensor, mixture: AdaptForecast) -> Tensor:
    """F of (4) for many s, (..., n), with their regrets R."""
    largest, b = R.amax(-1), mixture.sharpness
    worst = largest * (1 + torch.log(torch.exp(b * (R / largest[..., None] - 1)).mean(-1)) / b)
    entropy = (s * torch.log((s / prior).clamp_min(1e-300))).sum(-1)
    return (1 - mixture.risk) * R.mean(-1) + mixture.risk * worst + mixture.entropy_weight * largest * entropy


def forecast_of(sizes: list[float], shape: list[int], *, forgotten: float = 0.0) -> Any:
    """One curve for each task."""
    C = torch.zeros(len(SPEEDS) + len(POWERS), len(sizes), dtype=torch.float64)
    C[shape, range(len(sizes))] = tensor(sizes)
    tenths = tensor([0.1] * len(sizes))
    return forecast._Forecast(tensor(sizes), C, tensor([forgotten] * len(sizes)), tenths, 2.0, 3 * tenths)


def test_slopes_are_those_of_autograd() -> None:
    p = tensor([0.1, 0.5, 0.9]).requires_grad_()
    rho, slopes = forecast_of([1.0, 2.0, 3.0], [2, 9, 20], forgotten=0.3)(p)
    (expected,) = torch.autograd.grad(rho.sum(), p)
    torch.testing.assert_close(slopes, expected, rtol=1e-12, atol=0)


@settings(max_examples=15, deadline=None)
@given(
    risk=st.floats(0, 1),
    sizes=st.lists(st.floats(0.01, 5), min_size=3, max_size=3),
    shape=st.lists(st.integers(0, len(SPEEDS) + len(POWERS) - 1), min_size=3, max_size=3),
)
def test_the_plan_against_a_search_of_the_simplex(risk: float, sizes: list[float], shape: list[int]) -> None:
    mixture, prior = make(3, risk=risk), tensor([0.5, 0.3, 0.2])
    s = mixture._minimize(forecast_of(sizes, shape), prior)
    assert float(s.sum()) == pytest.approx(1) and (s >= 0).all()

    def F(every: Tensor) -> Tensor:
        x = 0.1 + 2.0 * (0.95 * every + 0.05 * prior)
        g = torch.stack([shapes(x[..., i])[0][shape[i]] for i in range(3)], -1)
        g_all = torch.stack([shapes(tensor(2.1))[0][shape[i]] for i in range(3)])
        return objective(tensor(sizes) * (g - g_all), every, prior, mixture)

    first, second = torch.meshgrid(torch.linspace(0.001, 0.998, 100), torch.linspace(0.001, 0.998, 100), indexing="ij")
    every = torch.stack([first, second, 1 - first - second], -1).double()
    lowest, start = F(every[(every > 0).all(-1)]).min(), F(prior)
    assert F(s) <= lowest + 0.01 * (start - lowest) + 1e-6 * start


# ---- whole runs


def run(
    kind: Any, speeds: list[float], floors: list[float], *, updates: int = 60, error: float = 0.05, **arguments: Any
) -> tuple[Tensor, Tensor]:
    """Of known curves: losses fall to their floors as 3 exp(-speed n / fair), and are measured with errors.

    Returns (final losses above the floors, shares of the tokens), (num_tasks,) each.
    """
    num_tasks, budget = len(speeds), 10_000
    mixture, generator = make(num_tasks, budget, kind=kind, **arguments), torch.Generator().manual_seed(1)
    tokens = torch.zeros(num_tasks, dtype=torch.float64)

    def excess() -> Tensor:
        return torch.where(tensor(speeds) > 0, 3 * torch.exp(-tensor(speeds) * tokens * num_tasks / budget), 0)

    for _ in range(updates):
        tokens = tokens + mixture.probabilities() * budget / updates
        if mixture.observes:
            noise = 1 + error * torch.randn(num_tasks, generator=generator, dtype=torch.float64)
            update(mixture, tokens, (tensor(floors) + excess()) * noise)
    return excess(), tokens / budget


SLOW_AND_FAST = [40.0, 20, 10, 5, 3, 1.5, 0.8]


@pytest.mark.parametrize("with_noise", [0, 1])
def test_it_is_better_than_uniform_and_the_first_form(with_noise: int) -> None:
    """In the mean of the tasks without risk, in the worst one with it; noise gets no more than its share."""
    speeds = SLOW_AND_FAST + [0.0] * with_noise
    floors = [0.0, 0.5, 0.0, 0.2, 0.0, 0.0, 0.0] + [2.7] * with_noise
    even, _ = run(uniform, speeds, floors)
    first, _ = run(AdaptPlanned, speeds, floors)
    mean, worst = [], []
    for risk in (0.0, 1.0):
        losses, shares = run(AdaptForecast, speeds, floors, risk=risk, losses="validation")
        mean.append(float(losses.mean()))
        worst.append(float(losses.max()))
        assert not with_noise or shares[-1] < 1 / 8
    assert mean[0] < min(0.5 * float(even.mean()), float(first.mean()))
    assert worst[1] < min(worst[0], 0.3 * float(even.max()), float(first.max()))


def test_what_is_forgotten_is_learned_again() -> None:
    """A task whose loss stays where its share left it, at 0.02 / p: with little risk it gets more than by its curve."""
    mixture, shares = make(3, 10_000, risk=0.0, losses="validation"), []
    tokens = torch.zeros(3, dtype=torch.float64)
    for _ in range(60):
        p = mixture.probabilities()
        tokens = tokens + p * 10_000 / 60
        slow = 3 * torch.exp(-tokens / 5000)
        update(mixture, tokens, torch.stack([0.02 / p[0], slow[1], slow[2]]))
        shares.append(float(p[0]))
    # Where the slopes are equal: 0.02 / p^2 = 3 exp(-n / 5000) h / 5000 is near p = 0.15 in the middle of the run.
    assert 0.05 < shares[30] < 0.4


# ---- what always holds


def test_what_is_not_measured_keeps_its_share() -> None:
    mixture = make(3, prior={"task 0": 1.0, "task 1": 2.0, "task 2": 1.0})
    prior = mixture.probabilities()
    for step in range(1, 6):
        logged = update(mixture, [step * 20.0] * 3, [3.0 / step, NAN, 3.0 - 0.1 * step])
    p = mixture.probabilities()
    assert p[1] == pytest.approx(float(prior[1])) and abs(p[0] - prior[0]) > 0.01
    assert all(math.isnan(values[1]) and not math.isnan(values[0]) for values in logged.values())


def test_before_the_first_measurement_nothing_counts() -> None:
    mixture = make(2, measure_after=0.1)
    assert update(mixture, [40, 40], [9.0, 9.0]) == {}
    for step in range(1, 4):
        update(mixture, [40 + 20 * step] * 2, [3.0 - step / 4, 2.0])
    assert torch.equal(mixture.probabilities(), make(2).probabilities()) is False
    assert int((~mixture.curve_losses.isnan()).sum()) == 6 and float(mixture.curve_losses.nan_to_num().max()) < 9


def test_many_losses_and_no_loss_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest losses are forgotten; losses of 0, and none that can still be lost, are no error."""
    monkeypatch.setattr(forecast, "MAX_LOSSES", 10)
    mixture = make(2, budget_tokens=80)
    for step in range(1, 15):
        update(mixture, [2.0 * step] * 2, [float(step), 0.0])
    assert mixture.curve_losses[:, 0].tolist() == list(range(5, 15)) and torch.isfinite(mixture.probabilities()).all()
    mixture = make(2)
    for step in range(1, 6):
        update(mixture, [20.0 * step] * 2, [0.0, 0.0])
    torch.testing.assert_close(mixture.probabilities(), tensor([0.5, 0.5]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"risk": 1.5}, "mixture.risk must be a finite number >= 0 and <= 1, not 1.5"),
        ({"discount": 0}, "mixture.discount must be a finite number > 0 and <= 1, not 0"),
        ({"losses": "validaton"}, "mixture.losses: 'validaton'"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        make(2, **arguments)
