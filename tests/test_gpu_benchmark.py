"""``benchmarks/gpu.py`` on tiny models on the CPU. No test looks at a time."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_benchmarks import benchmark
from tiny import tiny_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from adapt_recipes.data import IGNORE_INDEX
from adapt_recipes.models import TokenLosses


def gpu_numbers(tmp_path: Path, *argv: str) -> dict[str, Any]:
    """The numbers of gpu.py --tiny, as it returns and as it writes them."""
    out = tmp_path / "numbers.json"
    numbers = benchmark("gpu").main(["--tiny", "--minutes", "30", "--json", str(out), *argv])
    assert json.loads(out.read_text()) == numbers
    return numbers


def check_speed(row: dict[str, Any]) -> None:
    assert row["status"] == "ok" and row["tokens_per_second"] > 0 and row["share_of_peak"] > 0
    assert row["computed"] > 0 and row["peak_gib"] is None
    assert row["steps_measured"] >= benchmark("gpu").MIN_STEPS


def test_gpu_measures_a_model(tmp_path: Path) -> None:
    rows = gpu_numbers(tmp_path, "--models", "qwen3_0_6b", "--variants", "plain")["rows"]
    assert [*rows] == ["qwen3_0_6b, plain, short answers", "qwen3_0_6b, plain, long answers"]
    for row in rows.values():
        check_speed(row)
        assert row["graphs"] == 0
    short, long = rows.values()
    assert 0.03 < short["supervised_share"] < 0.15 and 0.4 < long["supervised_share"] < 0.6


@pytest.mark.slow
def test_gpu_runs_every_variant(tmp_path: Path) -> None:
    gpu = benchmark("gpu")
    rows = gpu_numbers(tmp_path, "--models", "llama3_2_1b")["rows"]
    assert [*rows] == [key for variant in gpu.VARIANTS for key in gpu.keys("llama3_2_1b", variant)]
    for key, row in rows.items():
        if row["status"].startswith("skipped: no "):
            assert ", trainer, " in key
        elif ", updates, " in key:
            assert row["status"] == "ok" and row["steps"] > 0 and row["probe_tokens"] > 0
        else:
            check_speed(row)
            assert bool(row["graphs"]) == ("compile" in key)


@pytest.mark.slow
def test_gpu_runs_a_model_with_sliding_windows(tmp_path: Path) -> None:
    rows = gpu_numbers(tmp_path, "--models", "gemma3_1b", "--variants", "compile_checkpointing")["rows"]
    assert len(rows) == 2
    for row in rows.values():
        check_speed(row)
        assert row["graphs"] > 0


def test_gpu_says_what_there_was_no_time_for(tmp_path: Path) -> None:
    gpu = benchmark("gpu")
    rows = gpu_numbers(tmp_path, "--minutes", "0", "--variants", "torchtune", "updates", "plain")["rows"]
    # The updates are those of the smallest model, and torchtune has Llama only.
    jobs = [*((model, "plain") for model in gpu.MODELS), ("llama3_2_1b", "torchtune"), ("qwen3_0_6b", "updates")]
    assert [*rows] == [key for job in jobs for key in gpu.keys(*job)]
    assert {row["status"] for row in rows.values()} == {"not run: no time"}


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("import torch; torch.empty(2**60)", "out of memory"),
        ("class OutOfMemoryError(RuntimeError): ...\nraise OutOfMemoryError('CUDA')", "out of memory"),
        ("raise ValueError('no such thing')", "failed: ValueError: no such thing"),
        ("import os; os.kill(os.getpid(), 9)", "failed: killed by signal 9"),
        ("", "not run: no time"),
        ("import time; time.sleep(60)", "not run: no time"),
    ],
)
def test_gpu_gives_the_rows_of_a_process_that_ended_a_status(
    code: str, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = benchmark("gpu")
    monkeypatch.setattr(gpu, "MEASURE", code)
    job = {"model": "qwen3_0_6b", "variant": "plain", "tiny": True}
    assert gpu.run_job(job, limit=5 if "sleep" in code else 120) == status


def test_gpu_times_steps_that_compile_nothing_after_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = benchmark("gpu")
    # Seconds, real tokens, computed positions, graphs. All measured steps but one have 100 tokens per second.
    steps = [(5, 100, 200, 1), (1, 100, 200, 0), (1, 100, 125, 0), (9, 300, 400, 2), (2, 200, 250, 0), (2, 100, 125, 0)]
    totals = [[sum(column) for column in zip((0, 0, 0, 0), *steps[:n], strict=True)] for n in range(len(steps) + 1)]
    states = iter(totals)
    monkeypatch.setattr(gpu.Clock, "state", lambda self: [float(each) for each in next(states)])
    clock = gpu.Clock(torch.device("cpu"), seconds=1000, steps=3)
    clock.start(lambda: (0, 0))
    for _ in steps[:-1]:
        clock.step()
    with pytest.raises(gpu.Enough):
        clock.step()
    tasks = [SimpleNamespace(train=SimpleNamespace(lengths=torch.tensor([5]), num_supervised=torch.tensor([2])))]
    row = clock.row(tiny_model().decoder, tasks)
    assert row["tokens_per_second"] == 100 and row["range"] == "50 to 100"
    assert row["computed"] == pytest.approx(1.25) and row["graphs"] == 3 and row["steps_measured"] == 3
    # 4 s of the first step, and 6 s of the one that compiled later.
    assert row["compile_seconds"] == pytest.approx(4 + 0 + 6)
    assert row["supervised_share"] == 0.5


@pytest.mark.parametrize("name", ["llama3_2_1b", "gemma3_1b", "qwen3_0_6b"])
def test_flops_are_those_that_torch_counts(name: str) -> None:
    """Without padding, and with the masked half of the scores, which torch computes and the formula does not count."""
    flops, synthetic = benchmark("flops"), benchmark("synthetic")
    sizes = synthetic.TINY_SIZES | synthetic.TINY_MODELS[name]
    decoder = synthetic.random_decoder(sizes.pop("_component_"), **sizes)
    rows, length, supervised = 3, 40, 10
    tokens = torch.randint(sizes["vocab_size"], (rows, length))
    labels = tokens.clone()
    labels[:, :-supervised] = IGNORE_INDEX
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        TokenLosses(decoder)(tokens, labels).sum().backward()

    lengths = torch.full((rows,), length)
    needed = flops.flops_per_token(decoder, supervised_share=supervised / length, lengths=lengths)
    masked = 0.0
    for layer in (layer.attn for layer in decoder.layers):
        attended = flops.mean_attended(lengths, getattr(layer, "sliding_window", None))
        masked += 12 * layer.num_heads * layer.head_dim * (length - attended)
    assert 0.02 < masked / needed < 0.5
    assert counter.get_total_flops() / (rows * length) == pytest.approx(needed + masked, rel=1e-6)


@pytest.mark.parametrize("window", [None, 1, 4, 7, 100])
def test_a_token_attends_to_those_before_it_in_the_window(window: int | None) -> None:
    lengths = [1, 3, 7, 20]
    attended = [min(position + 1, window or length) for length in lengths for position in range(length)]
    expected = sum(attended) / sum(lengths)
    assert benchmark("flops").mean_attended(torch.tensor(lengths), window) == pytest.approx(expected)
