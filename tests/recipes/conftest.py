"""Recipes are loaded by path: torchtune installs a package called `recipes` that raises when it is imported."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

from adapt_recipes.config import load

ROOT = Path(__file__).parents[2]


def load_recipe(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", ROOT / "recipes" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class Run(NamedTuple):
    """A finished run and what it wrote."""

    folder: Path
    log: list[dict[str, Any]]
    summary: dict[str, Any]

    def events(self, name: str) -> list[dict[str, Any]]:
        return [line for line in self.log if line["event"] == name]

    def training(self) -> list[dict[str, Any]]:
        """The step events without their times."""
        return [{key: value for key, value in line.items() if key != "seconds"} for line in self.events("step")]


Runner = Callable[..., Run]


@pytest.fixture(autouse=True)
def empty_folder(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Every test runs in an empty folder; tokenised tasks are shared between tests."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    before = list(sys.path)
    yield
    sys.path[:] = before


@pytest.fixture(scope="session")
def adapt_full_finetune() -> ModuleType:
    return load_recipe("adapt_full_finetune")


@pytest.fixture(scope="session")
def sft_full_finetune() -> ModuleType:
    return load_recipe("sft_full_finetune")


@pytest.fixture(scope="session")
def mos_full_finetune() -> ModuleType:
    return load_recipe("mos_full_finetune")


@pytest.fixture(scope="session")
def recipes(
    adapt_full_finetune: ModuleType, mos_full_finetune: ModuleType, sft_full_finetune: ModuleType
) -> dict[str, ModuleType]:
    modules = (adapt_full_finetune, mos_full_finetune, sft_full_finetune)
    return {Path(str(module.__file__)).stem: module for module in modules}


@pytest.fixture
def run(recipes: dict[str, ModuleType], tmp_path: Path) -> Runner:
    """Runs a shipped config to its end, in this process, on 8 steps of 16 examples unless told otherwise."""

    def run(config: str, *overrides: str, folder: str = "run", recipe: str | None = None) -> Run:
        path = ROOT / "yaml" / f"{config}.yaml"
        module = recipes[recipe or path.read_text().split()[3]]  # "# tune run RECIPE --config ..."
        small = ["budget.tokens=128", "batch_size=16", "validate_every=0", "checkpoint_every=0"]
        if "mixture_update_every" in path.read_text():
            small += ["mixture_update_every=3", "probe.examples=8"]
        keys = {override.split("=")[0] for override in overrides}
        if keys & {"budget.fraction", "budget.passes"}:
            keys.add("budget.tokens")
        small = [override for override in small if override.split("=")[0] not in keys]
        output_dir = tmp_path / folder
        assert module.main(load(module.Config, path, [*small, f"output_dir={output_dir}", *overrides])) == 0
        log = [json.loads(line) for line in (output_dir / "log.jsonl").read_text().splitlines()]
        return Run(output_dir, log, json.loads((output_dir / "summary.json").read_text()))

    return run
