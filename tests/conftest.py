"""What every test starts from: one thread, no model hub, and marked tests only when asked for.

There are two tiers. A test marked ``slow`` runs in ``make test-all`` only; every other one in ``make test`` as well,
which takes a few minutes. Mark what takes seconds and what another quick test already stands for. Quick tests cover
every module, a run of every recipe, a resume, a run on two processes, and bad input.
"""

from __future__ import annotations

import math
import os

import pytest
from hypothesis import settings

# The same examples every time: a failure is the change's own. `--hypothesis-profile=default` looks for new ones.
settings.register_profile("same", derandomize=True, deadline=None)
settings.load_profile("same")

# Before anything imports torch. One thread: the same sums in the same order everywhere, and small models run faster.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

MARKED = ("network", "root", "browser")


@pytest.fixture(autouse=True)
def no_line_of_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a slow machine it would stand among the lines that a test expects."""
    monkeypatch.setattr("adapt_recipes.data.progress._LINE_SECONDS", math.inf)
    monkeypatch.setattr("adapt_recipes.commands.PHASE_SECONDS", None)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip tests that need more than a plain machine, unless `-m` names their marker."""
    for item in items:
        for marker in MARKED:
            if item.get_closest_marker(marker) and marker not in config.option.markexpr:
                item.add_marker(pytest.mark.skip(reason=f"marked {marker}: run with pytest -m {marker}"))
