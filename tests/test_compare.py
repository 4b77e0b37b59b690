"""benchmarks/compare.py runs shipped configs and sums them up."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def compare() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compare", ROOT / "benchmarks" / "compare.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_comparison(
    compare: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words = ["tiny_uniform", "tiny_adapt_planned", "budget.tokens=320", "validate_every=2", "tasks.noise=true"]
    for _ in range(2):  # the second time everything is finished
        compare.main(["--out", str(tmp_path / "out"), "--seeds", "7", *words])
        lines = capsys.readouterr().out.splitlines()
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "---" not in line]
        assert [row[0] for row in cells] == ["", "tiny_uniform", "tiny_adapt_planned"]
        summary = json.loads((tmp_path / "out" / "tiny_uniform_7" / "summary.json").read_text())
        losses = summary["validation_losses"]
        worst = max(loss - (math.log(16) if name == "noise" else 0) for name, loss in losses.items())
        assert cells[1][1] == f"{worst:.3f}" and cells[1][4] == "0.12" and cells[1][7] == str(summary["probe_tokens"])
        assert 0 < int(cells[1][3]) <= 320, "it reaches its own loss at the latest at the end"
        assert cells[1][5:7] == ["5", "0"]
    assert "finished already" in (tmp_path / "out" / "tiny_uniform_7.txt").read_text()


def test_spread(compare: ModuleType) -> None:
    assert compare.spread([1.0, 2.0], 1) == "1.5 (1.0 to 2.0)"
    assert compare.spread([3.0, 3.0], 0) == "3"
    assert compare.spread([math.nan, math.nan], 0) == "never"
    assert compare.spread([math.nan, 2.0], 0) == "not always"
