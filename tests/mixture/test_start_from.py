"""A mixture that starts from another run: what it has learned, by task, and new tasks at their prior share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from adapt_recipes.mixture import (
    Adapt,
    AdaptForecast,
    AdaptKSteps,
    AdaptPlanned,
    Ado,
    Dynamix,
    Exp3,
    Grape,
    GroupDRO,
    Pike,
    Scorer,
)
from adapt_recipes.mixture.common import carried, carried_scores

OLD = ["a", "b", "c", "d"]
SIZES = {"a": 600, "b": 300, "c": 100, "d": 50, "e": 200, "f": 1000}
LEARNED: dict[str, tuple[Any, dict[str, Any]]] = {
    "adapt": (Adapt, {}),
    "adapt_forecast": (AdaptForecast, {}),
    "adapt_ksteps": (AdaptKSteps, {}),
    "adapt_planned": (AdaptPlanned, {"measure_after": 0.0}),
    "ado": (Ado, {}),
    "dro": (GroupDRO, {}),
    "dynamix": (Dynamix, {"ema_decay": 0.5}),
    "grape": (Grape, {}),
    "dro_exponentiated": (GroupDRO, {"form": "exponentiated_gradient"}),
    "exp3": (Exp3, {}),
    "mos": (Scorer, {}),
    "pike": (Pike, {}),
}
every_mixture = pytest.mark.parametrize("name", LEARNED)
every_prior = pytest.mark.parametrize("prior", ["uniform", "proportional"])


def make(name: str, tasks: list[str], **arguments: Any) -> Any:
    kind, own = LEARNED[name]
    sizes = torch.tensor([SIZES[task] for task in tasks])
    return kind(task_names=tasks, num_supervised_tokens=sizes, budget_tokens=1000, **{**own, **arguments})


def learned(name: str, **arguments: Any) -> Any:
    """After eight updates on random signals."""
    mixture, generator = make(name, OLD, **arguments), torch.Generator().manual_seed(0)
    for update in range(1, 9):
        values = {each: 0.1 + torch.rand(4, generator=generator, dtype=torch.float64) for each in mixture.observes}
        mixture.update(task_tokens=torch.tensor([40.0, 30, 20, 10], dtype=torch.float64) * update, **values)
    start = make(name, OLD, **arguments).probabilities()
    assert (mixture.probabilities() - start).abs().max() > 1e-3, "nothing was learned"
    return mixture


def started(name: str, before: Any, tasks: list[str], **arguments: Any) -> Any:
    mixture = make(name, tasks, **arguments)
    positions = [OLD.index(task) if task in OLD else -1 for task in tasks]
    mixture.start_from(before.state_dict(), torch.tensor(positions))
    return mixture


@every_mixture
@every_prior
def test_the_same_tasks_have_the_same_shares(name: str, prior: str) -> None:
    before = learned(name, prior=prior)
    after = started(name, before, OLD, prior=prior).probabilities()
    torch.testing.assert_close(after, before.probabilities(), rtol=1e-12, atol=0)
    tasks = ["c", "a", "d", "b"]
    after = started(name, before, tasks, prior=prior).probabilities()
    expected = before.probabilities()[[OLD.index(task) for task in tasks]]
    torch.testing.assert_close(after, expected, rtol=1e-12, atol=0)


@every_mixture
@every_prior
def test_new_tasks_have_their_prior_share(name: str, prior: str) -> None:
    """And the others share the rest in the ratios of before, but for the floor."""
    tasks, new, kept = ["e", "c", "a", "f"], [0, 3], [1, 2]
    no_floor = {"exp3": {}, "dynamix": {"exploration": 0.0}}.get(name, {"floor": 0.0})
    before = learned(name, prior=prior, **no_floor)
    p, old = started(name, before, tasks, prior=prior, **no_floor).probabilities(), before.probabilities()[[2, 0]]
    prior_shares = make(name, tasks, prior=prior, **no_floor).probabilities()
    if name in ("exp3", "dynamix"):
        # Its rewards are averages: a new task has that of the others, so that it is close to the prior.
        assert ((p - prior_shares)[new].abs() < 0.2).all()
        assert prior == "proportional" or (p[1] > p[2]) == (old[0] > old[1])
        return
    torch.testing.assert_close(p[new], prior_shares[new], rtol=1e-12, atol=0)
    # Scores relative to the prior keep their ratios where the prior does.
    if prior == "uniform" or name in ("dro", "dro_exponentiated", "pike", "ado", "grape", "adapt_forecast"):
        torch.testing.assert_close(p[kept] / p[kept].sum(), old / old.sum(), rtol=1e-12, atol=0)


@every_mixture
def test_it_learns_from_there_and_leaves_the_other_alone(name: str) -> None:
    before = learned(name)
    kept = before.probabilities()
    mixture = started(name, before, ["d", "e", "a"])
    other = started(name, before, ["d", "e", "a"])
    values = {each: torch.tensor([0.5, 0.7, 0.9], dtype=torch.float64) for each in mixture.observes}
    for _ in range(3):
        mixture.update(task_tokens=torch.tensor([10.0, 20, 30], dtype=torch.float64), **values)
    assert torch.isfinite(mixture.probabilities()).all() and float(mixture.probabilities().sum()) == pytest.approx(1)
    assert torch.equal(before.probabilities(), kept)
    # The state is complete: a resume goes on from it.
    other.load_state_dict(mixture.state_dict())
    assert torch.equal(other.probabilities(), mixture.probabilities())


def test_measured_speeds_are_carried() -> None:
    """Where ``AdaptPlanned`` plans first, it knows how fast the tasks of the other run have learned."""
    before = make("adapt_planned", OLD)
    losses = torch.tensor([4.0, 4.0, 4.0, 4.0], dtype=torch.float64)
    for update in range(12):
        losses = losses * torch.tensor([0.7, 0.99, 0.7, 0.99], dtype=torch.float64)
        before.update(task_tokens=torch.full((4,), 20.0 * update, dtype=torch.float64), validation_losses=losses)
    first = torch.full((4,), 4.0, dtype=torch.float64)
    speeds = {}
    for name, mixture in (("fresh", make("adapt_planned", OLD)), ("started", started("adapt_planned", before, OLD))):
        logged = mixture.update(task_tokens=torch.full((4,), 20.0, dtype=torch.float64), validation_losses=first)
        speeds[name] = logged["speeds"]
    assert len(set(speeds["fresh"].tolist())) == 1
    assert speeds["started"][0] > 2 * speeds["started"][1]


def test_the_paper_s_network_is_of_its_tasks() -> None:
    before, mixture = make("mos", OLD, form="paper"), make("mos", OLD)
    with pytest.raises(ValueError, match=r"^the network of form: paper and policy_gradient is of its tasks; both need"):
        mixture.start_from(before.state_dict(), torch.arange(4))
    with pytest.raises(ValueError, match=r"^the network of form: paper"):
        make("mos", OLD, form="paper").start_from(mixture.state_dict(), torch.arange(4))


def test_carried_by_hand() -> None:
    old, fresh = torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([7.0, 8.0]).double()
    assert carried(old, fresh, torch.tensor([2, -1])).tolist() == [3, 8]
    # Log shares .5 and .25 of three tasks become ratios 2 : 1 in the half of a prior of quarters and a half.
    log_shares: Tensor = torch.tensor([0.5, 0.25, 0.25]).double().log()
    prior = torch.tensor([0.25, 0.5, 0.25]).double().log()
    shares = carried_scores(log_shares, prior, torch.tensor([0, -1, 1])).exp()
    torch.testing.assert_close(shares, torch.tensor([1 / 3, 1 / 2, 1 / 6]).double())
