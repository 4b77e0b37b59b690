"""The budget and its ledger."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from adapt_recipes.budget import BudgetConfig, Ledger


def budget(**values: object) -> BudgetConfig:
    return TypeAdapter(BudgetConfig).validate_python(values)


@given(st.integers(1, 10**9), st.floats(1e-6, 1))
def test_a_fraction_is_rounded_and_never_nothing(available: int, fraction: float) -> None:
    assert budget(fraction=fraction).num_tokens(available) == max(1, round(fraction * available))


@pytest.mark.parametrize(("values", "tokens"), [({"epochs": 3}, 300), ({"epochs": 0.5}, 50), ({"tokens": 100}, 100)])
def test_passes_and_tokens(values: dict[str, float], tokens: int) -> None:
    assert budget(**values).num_tokens(100) == tokens


def test_more_tokens_than_there_are_need_a_cap() -> None:
    """Which says how often a task may repeat. Whether that is enough, the sampler says."""
    with pytest.raises(ValueError, match=r"budget\.tokens: 101 is more than the 100 .* tasks\.max_epochs_per_task$"):
        budget(tokens=101).num_tokens(100)
    assert budget(tokens=101).num_tokens(100, max_epochs=2.0) == 101
    assert budget(epochs=1.01).num_tokens(100) == 101


@pytest.mark.parametrize(
    "values",
    [{}, {"fraction": 0}, {"fraction": 1.1}, {"fraction": -0.1}, {"tokens": 0}, {"epochs": 0}]
    + [{"fraction": 0.1, "tokens": 5}, {"tokens": 5, "epochs": 1}, {"fraction": float("nan")}],
)
def test_refused(values: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        budget(**values)


def test_the_ledger_counts_and_comes_back() -> None:
    ledger = Ledger(10, 3)
    batch = SimpleNamespace(computed_tokens=10, num_tokens=7, num_supervised_tokens=4)
    ledger.spend(torch.tensor([3, 0, 1]), unique=2, batches=[batch])
    ledger.probe([batch, batch])
    ledger.validate([batch])
    assert (ledger.supervised_tokens, ledger.left, ledger.share(), ledger.share(pending=2)) == (4, 6, 0.4, 0.6)
    assert (ledger.tokens, ledger.computed_tokens, ledger.unique_supervised_tokens) == (7, 10, 2)
    assert (ledger.probe_tokens, ledger.probe_total_tokens) == (8, 14)
    assert (ledger.validation_tokens, ledger.validation_total_tokens) == (4, 7)
    assert ledger.total_tokens == 7 + 14 + 7
    with pytest.raises(AssertionError):
        ledger.spend(torch.tensor([7, 0, 0]), unique=0, batches=[])

    other = Ledger(10, 3)
    other.load_state_dict(ledger.state_dict())
    ledger.spend(torch.tensor([0, 1, 0]), unique=1, batches=[])
    assert other.task_tokens.tolist() == [3, 0, 1] and other.state_dict()["probe_tokens"] == 8
    assert other.total_tokens == 28
