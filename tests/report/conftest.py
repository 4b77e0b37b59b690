"""One real run of a recipe, for the tests of reports."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from adapt_recipes.config import load

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def real_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a tiny run with mixture updates."""
    name = "report_adapt_full_finetune"
    spec = importlib.util.spec_from_file_location(name, ROOT / "recipes" / "adapt_full_finetune.py")
    assert spec is not None and spec.loader is not None
    recipe = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    home = tmp_path_factory.mktemp("real")
    small = ["budget.tokens=1280", "validate_every=5", "mixture_update_every=5", "probe.examples=8"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home / "cache"))
        patch.setattr(sys, "path", list(sys.path))
        config = load(recipe.Config, ROOT / "yaml" / "tiny_adapt.yaml", [*small, f"output_dir={home / 'run'}"])
        assert recipe.main(config) == 0
    return home / "run"
