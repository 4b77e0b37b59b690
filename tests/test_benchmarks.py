"""Each benchmark runs on tiny settings and counts right. No test looks at a time."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tiny import VOCAB, batched, tiny_examples

from adapt_recipes.data import RawTask, natural_instructions
from adapt_recipes.models import TokenLosses, decoder_from_folder

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


def benchmark(name: str) -> ModuleType:
    """A benchmark's module; its folder is on the path, as when it is run as a script."""
    if (folder := str(ROOT / "benchmarks")) not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(name)


def test_throughput_trains_all_on_the_same_examples(tmp_path: Path) -> None:
    out = tmp_path / "numbers.json"
    argv = ["--examples", "16", "--rounds", "1", "--max-seq-len", "384", "--json", str(out)]
    numbers = benchmark("throughput").main(argv)
    assert json.loads(out.read_text()) == numbers
    assert numbers["num_examples"] == 16
    assert 0 < numbers["num_supervised_tokens"] < numbers["num_tokens"]
    of, skipped = numbers["contenders"], numbers["skipped"]
    assert of.keys() | skipped.keys() == set(benchmark("contenders").CONTENDERS)
    assert {"ours", "torchtune", "torchtune packed"} <= of.keys()
    for name, contender in of.items():
        # On average over its steps, in which the contenders have different examples.
        assert contender["loss"] == pytest.approx(of["ours"]["loss"], rel=0.05)
        tried = contender["search_seconds"]
        assert list(tried) == [str(size) for size in benchmark("contenders").SIZES[name]]
        assert str(contender["size"]) == min(tried, key=tried.get)
        assert (contender["computed"] < 1) == (name == "ours"), "beginnings that examples share are computed once"


@pytest.mark.parametrize("workload", ["long_answers", "mixed_lengths"])
def test_throughput_has_other_workloads(workload: str) -> None:
    argv = ["--examples", "16", "--rounds", "1", "--workload", workload, "--contenders", "ours"]
    numbers = benchmark("throughput").main(argv)
    share = numbers["num_supervised_tokens"] / numbers["num_tokens"]
    assert 0.4 < share < 0.55 if workload == "long_answers" else 0.05 < share < 0.4


def test_throughput_refuses_a_batch_that_does_not_divide() -> None:
    with pytest.raises(SystemExit):
        benchmark("throughput").main(["--examples", "20"])


def test_update_cost_reads_the_same_tokens_whatever_the_number_of_tasks() -> None:
    strategies = benchmark("update_cost").STRATEGIES.split(",")
    numbers = benchmark("update_cost").main(["--tasks", "2,10", "--examples", "10", "--rounds", "1"])
    assert numbers["tokens"] > 0
    assert {count: [*of] for count, of in numbers["cost_in_steps"].items()} == {2: strategies, 10: strategies}
    assert all(cost > 0 for of in numbers["cost_in_steps"].values() for cost in of.values())
    assert all(0 < share < 100 for share in numbers["share"].values())


def test_equal_tasks_deal_out_the_same_examples(tmp_path: Path) -> None:
    common = benchmark("common")
    common.instructions(tmp_path)

    def prompts(tasks: list[RawTask]) -> set[str]:
        return {each.messages[0]["content"] for task in tasks for each in task.conversations}

    few, many = (common.equal_tasks(tmp_path, num_tasks=n, num_examples=20, max_bytes=300) for n in (2, 20))
    assert (len(few), len(many)) == (2, 20) and prompts(few) == prompts(many)
    with pytest.raises(ValueError, match="for 3 tasks"):
        common.equal_tasks(tmp_path, num_tasks=3, num_examples=20, max_bytes=300)


def test_startup_reports_what_the_runs_wrote() -> None:
    numbers = benchmark("startup").main(["--budget", "1280", "--rounds", "2"])
    assert len(numbers["ls"]) == len(numbers["validate"]) == 2
    for state in ("cold", "cached"):
        of = numbers[state]
        assert of["steps"] == [20, 20] and of["mixture_updates"] == [1, 1]
        assert 0 < of["computed"][0] == of["computed"][1] < 1  # toy examples begin alike
        assert all(0 < share < 1 for share in of["mixture_share"])
        milestones = zip(of["startup_seconds"], of["first_step_seconds"], of["wall_seconds"], strict=True)
        assert all(0 < first_line <= first_step <= wall for first_line, first_step, wall in milestones)


def test_data_scale_counts_every_example(tmp_path: Path) -> None:
    """More than the source has: the first copy is the source, and the others differ from it and from each other."""
    out = tmp_path / "numbers.json"
    numbers = benchmark("data_scale").main(["--examples", "450", "--json", str(out)])
    assert json.loads(out.read_text()) == numbers
    assert numbers["examples"] == 450 and numbers["cold"]["kept"] == 450
    assert numbers["limit"]["tokens"] == numbers["cold"]["tokens"] == numbers["warm"][0]["tokens"]
    assert len({each["fingerprint"] for each in (numbers["cold"], *numbers["warm"])}) == 1
    assert 0 < numbers["warm"][0]["cpu_seconds"] < numbers["cold"]["cpu_seconds"]
    assert all(each["private"] >= numbers["baseline"]["private"] / 2 > 0 for each in numbers["memory"])


def test_data_scale_copies_are_different_examples(tmp_path: Path) -> None:
    source = benchmark("common").instructions(tmp_path / "source", examples=3)
    assert benchmark("data_scale").copy_examples(source, tmp_path / "copies", 40) == 40

    def prompts(folder: Path) -> list[str]:
        return [c.messages[0]["content"] for task in natural_instructions(folder) for c in task.conversations]

    many, few = prompts(tmp_path / "copies"), prompts(source)
    assert len(many) == len(set(many)) == 40 and set(few) < set(many)


def test_soak_ends_as_if_never_killed() -> None:
    """In a process of its own, which forks those that it kills."""
    command = [sys.executable, str(ROOT / "benchmarks" / "soak.py"), "--kills", "2", "mixture_update_every=3"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    *kills, last = done.stdout.splitlines()
    assert len(kills) == 2 and last.startswith("equal to the uninterrupted run: ")


def test_top_layers_compute_what_the_whole_decoder_does(tmp_path: Path) -> None:
    """Also from what an earlier pass has kept; the layers below get no gradients, those above the same."""
    config = {"model_type": "llama", "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24}
    config |= {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5, "rope_theta": 10_000.0}))
    top = benchmark("top_layers").decoder(str(tmp_path), 64, trained_layers=1, cache_dir=str(tmp_path / "hidden"))
    whole = decoder_from_folder(str(tmp_path), 64)
    whole.load_state_dict(top.state_dict())
    for number in range(2):
        for batch in batched(tiny_examples(seed=number)):
            for _ in range(2):  # computed, and read
                models = [TokenLosses(each) for each in (top, whole)]
                losses = [model(batch.tokens, batch.labels) for model in models]
                torch.testing.assert_close(*losses)
                for each, loss in zip((top, whole), losses, strict=True):
                    each.zero_grad()
                    loss.sum().backward()
                for (name, ours), theirs in zip(top.named_parameters(), whole.parameters(), strict=True):
                    assert (ours.grad is not None) == name.startswith("layers.2."), name
                    if ours.grad is not None:
                        torch.testing.assert_close(ours.grad, theirs.grad)
    assert len(list((tmp_path / "hidden").rglob("*.npy"))) > 10
