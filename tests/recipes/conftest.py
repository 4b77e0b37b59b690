"""Fixtures of all tests of runs; the harness itself is ``running.py``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import pytest
import yaml
from running import CONFIGS, Run, Runs, finished, learns
from standins import write_mos_datasets

Runner = Callable[..., Run]


@pytest.fixture(autouse=True)
def empty_folder(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Every test runs in an empty folder; tokenized tasks are shared between tests."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    before = list(sys.path)
    yield
    sys.path[:] = before


@pytest.fixture(scope="session")
def mos_datasets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The datasets of the MoS configs. Where this is the current folder, their names on the hub are paths of it."""
    home = tmp_path_factory.mktemp("mos_datasets")
    tasks = yaml.safe_load(CONFIGS["gemma_2b_uniform_3ep"].read_text())["tasks"]
    write_mos_datasets(home / "hub", tasks["nlp"]["names"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "cache")
        yield home / "hub"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("home"))


@pytest.fixture
def run(tmp_path: Path) -> Runner:
    """Runs a shipped config to its end, in this process, on 8 steps of 16 examples unless the overrides differ."""

    def run(config: str, *overrides: str, folder: str = "run") -> Run:
        short = {"budget.tokens": 128, "batch_size": 16, "validate_every": 0, "checkpoint_every": 0}
        if learns(CONFIGS[config]):
            short |= {"mixture_update_every": 3, "probe.examples": 8}
        for key in (override.partition("=")[0] for override in overrides):
            others = {
                "batch_tokens": "batch_size",
                "budget.fraction": "budget.tokens",
                "budget.epochs": "budget.tokens",
            }
            short.pop(others.get(key, key), None)
        shortened = [f"{key}={value}" for key, value in short.items()]
        return finished(config, *shortened, *overrides, output_dir=tmp_path / folder)

    return run
