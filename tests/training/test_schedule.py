"""Every schedule, over its whole range of arguments, is a continuous multiplier of the learning rate."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapt_recipes.training.schedule import constant, cosine, linear

shares = st.floats(0, 1)
warmups = st.floats(0, 1, exclude_max=True)
decaying = st.sampled_from([cosine, linear])


@given(decaying, warmups, shares, shares)
def test_bounded_whatever_the_arguments(schedule: Any, warmup: float, final: float, share: float) -> None:
    assert 0 <= schedule(warmup=warmup, final=final)(share) <= 1
    assert 0 <= constant(warmup=warmup)(share) <= 1


@given(decaying, warmups, shares)
def test_warmup_reaches_one_and_the_end_is_final(schedule: Any, warmup: float, final: float) -> None:
    multiplier = schedule(warmup=warmup, final=final)
    assert multiplier(warmup) == pytest.approx(1)
    assert multiplier(1) == pytest.approx(final)
    assert multiplier(0) == (0 if warmup else 1)
    assert constant(warmup=warmup)(warmup) == constant(warmup=warmup)(1) == 1


@given(decaying, st.floats(0.05, 0.95), shares, shares, st.floats(0, 1e-6))
def test_continuous(schedule: Any, warmup: float, final: float, share: float, step: float) -> None:
    for multiplier in (schedule(warmup=warmup, final=final), constant(warmup=warmup)):
        steepest = 35  # 1 / warmup, and pi / 2 / (1 - warmup) of the cosine
        assert abs(multiplier(min(1, share + step)) - multiplier(share)) <= steepest * step + 1e-12


@given(decaying, warmups, shares, shares, shares)
def test_rises_then_falls(schedule: Any, warmup: float, final: float, first: float, second: float) -> None:
    multiplier = schedule(warmup=warmup, final=final)
    first, second = sorted((first, second))
    if second < warmup:
        assert multiplier(first) <= multiplier(second)
    if first >= warmup:
        assert multiplier(first) >= multiplier(second) - 1e-12


def test_values() -> None:
    assert [cosine(warmup=0.2)(share) for share in (0.1, 0.2, 0.6, 1)] == pytest.approx([0.5, 1, 0.5, 0])
    assert [linear(warmup=0.2, final=0.5)(share) for share in (0.1, 0.2, 0.6, 1)] == pytest.approx([0.5, 1, 0.75, 0.5])
    assert [constant()(share) for share in (0, 0.5, 1)] == [1, 1, 1]
    assert cosine()(0.1) == linear()(0.1) == 1, "the default warm-up is a tenth of the budget"


@pytest.mark.parametrize("schedule", [cosine, linear, constant])
@pytest.mark.parametrize("warmup", [-0.1, 1, 1.5, float("nan"), "0.1", True, None])
def test_a_bad_warmup_is_refused_by_name(schedule: Any, warmup: Any) -> None:
    with pytest.raises(ValueError, match=r"^lr_schedule\.warmup: .*; allowed: [^\n]*$"):
        schedule(warmup=warmup)


@pytest.mark.parametrize("schedule", [cosine, linear])
@pytest.mark.parametrize("final", [-0.1, 1.1, float("nan"), "0", False])
def test_a_bad_final_is_refused_by_name(schedule: Any, final: Any) -> None:
    with pytest.raises(ValueError, match=r"^lr_schedule\.final: .*; allowed: [^\n]*$"):
        schedule(final=final)
