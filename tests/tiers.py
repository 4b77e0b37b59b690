"""Parameters of a test in two tiers."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow_but(quick: Collection[Any], values: Iterable[Any]) -> list[Any]:
    """The values of a parameter, all of which are slow but a few that stand for them in ``make test``."""
    return [value if value in quick else pytest.param(value, marks=pytest.mark.slow) for value in values]
