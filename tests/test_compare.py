"""benchmarks/compare.py runs shipped configs and sums them up."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType

import pytest
import yaml

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def compare() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compare", ROOT / "benchmarks" / "compare.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_comparison(
    compare: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], split: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words = ["budget.tokens=320", "validate_every=2", "tasks.noise=true", "tiny_uniform", "tiny_adapt_planned"]
    words += ["mixture_update_every=2", "tiny_dro", "strategy=mild", "mixture.sharpness=0.1"]
    if split == "test":
        words.insert(0, "tasks.test_examples=1")
    for _ in range(2):  # the second time everything is finished
        compare.main(["--out", str(tmp_path / "out"), "--seeds", "7", *words])
        lines = capsys.readouterr().out.splitlines()
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "---" not in line]
        assert [row[0] for row in cells] == ["", "tiny_uniform", "tiny_adapt_planned", "mild"]
        summary = json.loads((tmp_path / "out" / "tiny_uniform_7" / "summary.json").read_text())
        assert cells[0][1:3] == [f"worst {split} excess", f"mean {split} excess"]
        losses = summary[f"{split}_losses"]
        worst = max(loss - (math.log(16) if name == "noise" else 0) for name, loss in losses.items())
        assert cells[1][1] == f"{worst:.3f}" and cells[1][4] == "0.12" and cells[1][7] == str(summary["probe_tokens"])
        assert 0 < int(cells[1][3]) <= 320, "it reaches its own loss at the latest at the end"
        assert [row[5:7] for row in cells[1:3]] == [["5", "0"], ["5", "2"]]
        resolved = yaml.safe_load((tmp_path / "out" / "mild_7" / "resolved.yaml").read_text())
        assert resolved["mixture"]["sharpness"] == 0.1 and resolved["tasks"]["noise"]
    assert "finished already" in (tmp_path / "out" / "tiny_uniform_7.txt").read_text()


def test_overrides_are_for_all_or_for_one(compare: ModuleType) -> None:
    first, second, third = compare.rows(["a=1", "one", "two", "b=2", "two", "strategy=x", "c=3"])
    assert first == ("one", ["a=1"]) and second == ("two", ["a=1", "b=2"])
    assert third == ("two", ["a=1", "strategy=x", "c=3"])
    assert [first.name, second.name, third.name] == ["one", "two", "x"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("seed=1", "name a config"),
        ("tiny_uniforn", "there is no yaml/tiny_uniforn.yaml"),
        ("tiny_dro tiny_dro mixture.sharpness=1", "two rows have the name tiny_dro"),
    ],
)
def test_what_cannot_be_compared(
    words: str, said: str, compare: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        compare.main(["--out", str(tmp_path / "out"), "--seeds", "0", *words.split()])
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_spread(compare: ModuleType) -> None:
    assert compare.cell([1.0, 2.0], 1) == "1.5 (1.0 to 2.0)"
    assert compare.cell([3.0, 3.0], 0) == "3"
    assert compare.cell([math.nan, math.nan], 0) == "never"
    assert compare.cell([math.nan, 2.0], 0) == "not always"
