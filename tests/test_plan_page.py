"""The table of docs/scaling.md is what its script prints, and says what it should."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "scaling.md").read_text()
TABLE = PAGE.partition("## Memory")[2].partition("## ")[0]
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in TABLE.splitlines() if line.startswith("| `")]
PARAMETERS = {  # as the models' own pages give them, in 1e9
    "gemma3_1b": 1.0,
    "llama3_2_1b": 1.236,
    "qwen3_0_6b": 0.596,
    "qwen1_5_0_5b": 0.464,
    "gemma_2b": 2.506,
    "llama3_8b": 8.03,
}


def benchmark() -> ModuleType:
    if (folder := str(ROOT / "benchmarks")) not in sys.path:
        sys.path.append(folder)
    return importlib.import_module("memory")


# Not all rows: the largest take half a minute each.
@pytest.mark.slow
@pytest.mark.parametrize(("model", "processes"), [("qwen1_5_0_5b", 2)])
def test_a_row_is_what_the_script_prints(model: str, processes: int) -> None:
    header, rule, row = benchmark().main(["--models", model, "--processes", str(processes)])
    assert f"{header}\n{rule}\n" in PAGE
    assert row in PAGE.splitlines()


def test_every_model_and_number_of_gpus_has_a_row() -> None:
    assert [(row[0].strip("`"), row[1]) for row in ROWS] == [(m, n) for m in benchmark().MODELS for n in "1248"]
    assert [*benchmark().MODELS] == [*PARAMETERS]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]} {row[1]}")
def test_a_row_adds_up(row: list[str]) -> None:
    """By hand: 4, 4 and 8 bytes a weight over the processes; the sum of the parts; nine tenths of a GPU."""
    model, processes = row[0].strip("`"), int(row[1])
    weights, gradients, optimizer = (float(cell) for cell in row[2:5])
    each = 4 * PARAMETERS[model] / processes
    assert (gradients, optimizer) == pytest.approx((each, 2 * each), abs=0.06)
    assert each - 0.06 <= weights <= each + 0.4  # buffers: rotations of up to 131,072 positions
    activations, adapt, total = ([float(part) for part in cell.split(" / ")] for cell in row[5:8])
    for i in (0, 1):
        assert total[i] == pytest.approx(weights + gradients + optimizer + activations[i] + adapt[i], abs=0.3)
    assert total[1] < total[0]
    for size, answer in zip(benchmark().GPUS, row[8:], strict=True):
        fits = [answer_ for answer_, part in zip(("yes", "C"), total, strict=True) if part <= 0.9 * size - 0.05]
        if fits:
            assert answer == fits[0]
        elif min(total) > 0.9 * size + 0.05:
            assert answer in ("S", "L", "no")
