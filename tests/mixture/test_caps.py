"""Shares under caps: waterfilling."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adapt_recipes.mixture.caps import capped


@st.composite
def problems(draw: st.DrawFn, size: int = 10**9) -> tuple[Tensor, Tensor, int]:
    """Probabilities, many of them 0 or tiny, and caps that leave room for the budget, often for no more."""
    num_tasks = draw(st.integers(1, 8))
    weight = st.one_of(st.just(0.0), st.floats(1e-12, 1.0), st.just(0.25), st.just(1e-310))
    weights = draw(st.lists(weight, min_size=num_tasks, max_size=num_tasks).filter(any))
    p = torch.tensor(weights, dtype=torch.float64)
    cap = st.one_of(st.integers(0, 9), st.integers(0, size))
    caps = torch.tensor(draw(st.lists(cap, min_size=num_tasks, max_size=num_tasks).filter(any)))
    total = int(caps.sum())
    budget = draw(st.one_of(st.just(total), st.integers(1, total), st.integers(1, min(total, 50))))
    return p / p.sum(), caps, budget


@given(problems())
def test_waterfilling(problem: tuple[Tensor, Tensor, int]) -> None:
    """On the simplex, below the caps, and in proportion to p where no cap is reached: there is only one such point."""
    p, caps, budget = problem
    shares = capped(p, caps, budget)
    most = caps.double() / budget
    assert shares.dtype == torch.float64 and (shares >= 0).all()
    assert float(shares.sum()) == pytest.approx(1, abs=1e-12)
    assert (shares <= most * (1 + 1e-12)).all()
    scales = (shares / p)[p > 1e-300]
    is_full = (shares >= most * (1 - 1e-12))[p > 1e-300]
    if not is_full.all():
        scale = float(scales[~is_full].max())
        assert torch.allclose(scales[~is_full], torch.tensor(scale, dtype=torch.float64), rtol=1e-9)
        assert (scales[is_full] <= scale * (1 + 1e-9)).all(), "a capped task has less than its proportion"


@given(problems())
def test_a_task_without_a_share_gets_something_only_if_all_others_are_capped(
    problem: tuple[Tensor, Tensor, int],
) -> None:
    p, caps, budget = problem
    shares = capped(p, caps, budget)
    needed = budget - int(caps[p > 0].sum())
    others = shares[p == 0]
    if needed <= 0:
        assert (others == 0).all()
    else:
        assert torch.equal(shares[p > 0], caps[p > 0].double() / budget)
        torch.testing.assert_close(others * budget, caps[p == 0].double() / caps[p == 0].sum() * needed)


@given(problems())
def test_tasks_with_a_share_have_room_for_the_whole_budget(problem: tuple[Tensor, Tensor, int]) -> None:
    """So a sampler that draws by the shares, and stops drawing from a task at its cap, cannot get stuck."""
    p, caps, budget = problem
    assert int(caps[capped(p, caps, budget) > 0].sum()) >= budget


@given(problems())
def test_caps_out_of_reach_change_no_bit(problem: tuple[Tensor, Tensor, int]) -> None:
    p, _, budget = problem
    assert torch.equal(capped(p, torch.full(p.shape, budget), budget), p)


def test_unimax() -> None:
    """The algorithm of the paper: from the smallest, each takes an even part of what is left, or all that it may."""
    sizes, budget, epochs = [5, 100, 20, 1000], 600, 2
    expected, left = {}, float(budget)
    for number, i in enumerate(sorted(range(4), key=lambda i: sizes[i])):
        expected[i] = min(left / (4 - number), epochs * sizes[i])
        left -= expected[i]
    shares = capped(torch.full((4,), 0.25, dtype=torch.float64), epochs * torch.tensor(sizes), budget)
    assert (shares * budget).tolist() == pytest.approx([expected[i] for i in range(4)], rel=1e-12)
    assert (shares * budget).tolist() == pytest.approx([10, 200, 40, 350], rel=1e-12)
