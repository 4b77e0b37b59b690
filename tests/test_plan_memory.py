"""The estimated memory is what the recipes' own steps and mixture updates take, by torch's profiler."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import group
import pytest
import torch
from tiers import slow_but

import adapt_recipes.run
from adapt_recipes import data, models
from adapt_recipes.config import load
from adapt_recipes.data.packing import pack_rows, supervised_lengths
from adapt_recipes.planning.memory import CPU, LiveBytes, Memory, Shape, Size, estimate_memory
from adapt_recipes.planning.update import update_of
from adapt_recipes.run import Run
from adapt_recipes.shipped import recipe_file, recipe_of, schema
from adapt_recipes.training.process_group import process_group
from adapt_recipes.training.sharding import to_local

ROOT = Path(__file__).parents[1]
# Large enough that what torch keeps of its own (a few hundred kB) is little beside it.
MODEL = {
    "model.vocab_size": 600,
    "model.num_layers": 4,
    "model.embed_dim": 128,
    "model.num_kv_heads": 2,
    "model.intermediate_dim": 384,
    "model.max_seq_len": 64,
}
CHECKPOINTED = {"activation_checkpointing": "true"}
LORA = {
    "model": "torchtune.models.llama3_2.lora_llama3_2",
    "model.lora_attn_modules": "[q_proj,v_proj]",
    "model.lora_rank": 8,
    "model.lora_alpha": 16,
}
GEMMA = {
    "model": "adapt_recipes.models.gemma3",
    "~model.rope_base": None,
    "~model.scale_factor": None,
    "~model.tie_word_embeddings": None,
    "model.head_dim": 32,
    "model.sliding_window": 24,
    "model.sliding_window_pattern": 2,
}
SMALL_BATCHES = {"micro_batch_tokens": 64, **CHECKPOINTED}  # weights are more than activations


class Case(NamedTuple):
    """A run: a tiny config and what is changed in it."""

    config: str
    changes: dict[str, Any]


CASES = {
    "fp32": Case("uniform", {}),
    "bf16": Case("uniform", {"dtype": "bf16"}),
    "bf16, checkpointed": Case("uniform", {"dtype": "bf16", **CHECKPOINTED}),
    "pure_bf16": Case("uniform", {"dtype": "pure_bf16", "optimizer.lr": 1e-3}),
    "one micro-batch": Case("uniform", {"batch_size": 4}),
    "LoRA": Case("uniform", LORA),
    "Gemma 3": Case("uniform", GEMMA),
    "not fused": Case("uniform", {"optimizer.fused": "false", "model.vocab_size": 4000, **SMALL_BATCHES}),
    "SGD": Case("uniform", {"optimizer": "torch.optim.SGD"}),
    "adapt": Case("adapt", SMALL_BATCHES),
    "adapt, by backward": Case("adapt", {"probe.estimator": "backward", **SMALL_BATCHES}),
    "adapt, exact look-ahead": Case("adapt", {"probe.exact_lookahead": "true", **SMALL_BATCHES}),
    "adapt_ksteps": Case("adapt_ksteps", SMALL_BATCHES),
    "adapt_ksteps, the last layer": Case("adapt_ksteps", {"probe.last_layers": 1, **SMALL_BATCHES}),
    "adapt_planned": Case("adapt_planned", SMALL_BATCHES),
    "dynamix": Case("dynamix", SMALL_BATCHES),
    "multiuat": Case("multiuat", SMALL_BATCHES),
    "multidds": Case("multidds", SMALL_BATCHES),
    "hbo": Case("hbo", SMALL_BATCHES),
    "mos_diff, fresh": Case("mos_diff", {"reward.tokens": "answer", **SMALL_BATCHES}),
}
ON_TWO = ["fp32", "bf16", "bf16, checkpointed", "adapt", "multidds"]


def write_tasks(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for task in "abc":
        rows = [{"prompt": f"{task}{i:02}" + "x" * 40, "response": f"{i % 7}" * 12} for i in range(20)]
        (folder / f"{task}.jsonl").write_text("\n".join(map(json.dumps, rows)))


def config_of(case: Case, folder: Path) -> Any:
    path = ROOT / "yaml" / f"tiny_{case.config}.yaml"
    recipe = recipe_file(str(recipe_of(path)))
    settings = MODEL | {
        "tasks": "adapt_recipes.data.jsonl_tasks",
        "tasks.path": folder / "tasks",
        "tasks.cache_dir": folder / "cache",
        "tasks.validation_examples": 4,
        "optimizer.fused": "true",  # as shipped for large models
        "tasks.max_epochs_per_task": 1000,
        "max_seq_len": 64,
        "micro_batch_tokens": 256,
        "batch_size": 8,
        "output_dir": folder / "-".join(("run", case.config, *map(str, case.changes.values()))).replace("/", "-"),
    }
    if "mixture_update_every" in path.read_text():
        settings["probe.examples"] = 4
    settings |= case.changes
    overrides = [key if value is None else f"{key}={value}" for key, value in settings.items()]
    return load(schema(recipe), path, ["~tasks.noise", "tokenizer.supervise_end=true", *overrides])


def peak(run: Callable[[], object], recipe: Any) -> int:
    """Bytes that live at a time at the most while something runs, beside those at its start: all that is allocated."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = profiled.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted(
        (event.start_ns(), i, event.nbytes()) for i, event in enumerate(events) if event.name() == "[memory]"
    )
    return max(accumulate((size for *_, size in changes), initial=0))


def peak_of_tensors(run: Callable[[], object], recipe: Any) -> int:
    """The same without what an operation allocates for itself. The profiler sees nothing that gloo's threads free, as
    they do now and then with what they have sent: on several processes it would count that for ever. A thread that is
    late with it (three of a hundred times on a busy machine) adds a layer, so the least of several runs counts."""
    states = [value for state in recipe.optimizer.state.values() for value in state.values()]
    with LiveBytes() as live:
        for tensor in [*recipe.model.parameters(), *recipe.model.buffers(), *filter(torch.is_tensor, states)]:
            tensor.detach()  # seen now, it is not new when an operation changes it
        peaks = []
        for _ in range(4):
            with live.measured() as found:
                run()
            peaks.append(found.peak)
    return min(peaks)


def measured(name: str, folder: Path, peak: Callable[[Callable[[], object], Any], int]) -> dict[str, Any]:
    """Of a process: what is there before a step, the peaks of a step and of an update, and the largest micro-batch."""
    config = config_of(CASES[name], folder)
    with Run(config) as run:
        recipe = sys.modules[type(config).__module__].Recipe(config, run)
        recipe.setup()
        batches, make = [], recipe.batches
        recipe.batches = lambda examples: batches.append(make(examples)) or batches[-1]
        if hasattr(recipe, "measure_base_model"):
            recipe.measure_base_model()
        recipe.step()  # the optimizer makes its state
        states = [value for state in recipe.optimizer.state.values() for value in state.values()]
        tensors = [*recipe.model.parameters(), *recipe.model.buffers(), *filter(torch.is_tensor, states)]
        before = sum(to_local(tensor.detach()).untyped_storage().nbytes() for tensor in tensors)
        base = getattr(recipe, "base_weights", None)
        kept = sum(weight.nbytes for weight in base._weights) if base else 0
        found = {"before": before, "kept": kept, "step": peak(recipe.step, recipe), "update": 0}
        if recipe.mixture.observes:
            recipe.update_mixture()  # the first time DTensor works out what each operation means for it
            found["update"] = peak(recipe.update_mixture, recipe)
        run.save()
        saved = run.checkpoints.newest()
        assert saved is not None
        found["checkpoint"] = sum(file.stat().st_size for file in saved.folder.rglob("*.distcp"))

    def computed(batch: data.MicroBatch) -> int:
        return len(pack_rows(batch.tokens, supervised_lengths(batch.labels)).tokens)

    largest = max((batch for each in batches for batch in each), key=computed)
    num_supervised = int((largest.labels != -100).sum())
    found["shape"] = Shape(computed(largest), largest.tokens.shape[1], num_supervised, len(batches[0]) > 1)
    return found


def estimated(name: str, folder: Path, shape: Shape, *, num_processes: int = 1) -> tuple[Memory, Size]:
    config = config_of(CASES[name], folder)
    model = models.build(config, [], device=CPU, checkpointer=None)
    given = {"task_names": ["a", "b", "c"], "num_supervised_tokens": torch.ones(3), "budget_tokens": 1}
    reward = getattr(config, "reward", None)
    reward = reward.build(task_names=["a", "b", "c"], model=model) if reward else None
    update = update_of(config.mixture.build(**given).observes, getattr(config, "probe", None), reward)
    return estimate_memory(model, config, shape, update=update, num_processes=num_processes)


def assert_close(memory: Memory, found: dict[str, Any], *, within: float = 0.02) -> None:
    """The sum of the parts is right, and each part as far as it matters for the sum."""
    step, update = found["before"] + found["step"], found["before"] + found["update"]
    total = max(step, update) + found["kept"]
    print(asdict(memory), "step", step, "update", update, "estimated / measured", round(memory.total / total, 4))
    assert memory.total == pytest.approx(total, rel=within)
    assert memory.parameters + memory.optimizer == pytest.approx(found["before"], rel=0.005)
    activations = step - found["before"] - memory.gradients
    assert memory.activations == pytest.approx(activations, rel=2.5 * within, abs=within / 2 * total)
    assert memory.mixture == pytest.approx(total - step, abs=within * total)


@pytest.mark.parametrize("name", slow_but(list(CASES)[:1], CASES))
def test_on_one_process(name: str, tmp_path: Path) -> None:
    write_tasks(tmp_path / "tasks")
    found = measured(name, tmp_path, peak)
    memory, size = estimated(name, tmp_path, found["shape"])
    assert_close(memory, found)
    assert 0 < found["checkpoint"] - size.checkpoint_bytes < 4e5  # what is said of each tensor, beside its values


def on_two(folder: Path) -> dict[str, Any]:
    os.environ["HOME"] = str(folder)
    if os.environ["RANK"] == "0":
        write_tasks(folder / "tasks")
    one_for_all = mock.patch.object(adapt_recipes.run, "process_group", lambda *_, **__: contextlib.nullcontext())
    with process_group("cpu", batch_size=8), one_for_all:
        return {name: measured(name, folder, peak_of_tensors) for name in ON_TWO}


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[group.Ended]]:
    folder = tmp_path_factory.mktemp("group")
    return folder / "on_two", group.run((on_two,), folder)["on_two"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_TWO)
def test_on_two_processes(name: str, ended: tuple[Path, list[group.Ended]]) -> None:
    folder, (first, second) = ended
    assert first.status == second.status == 0, first.err + second.err
    found = max(first.result[name], second.result[name], key=lambda each: each["before"] + each["step"])
    memory, _ = estimated(name, folder, found["shape"], num_processes=2)
    assert_close(memory, found)


def test_what_lives_is_counted_once_and_while_it_lives() -> None:
    with LiveBytes() as live:
        one = torch.zeros(100, dtype=torch.float64)
        views = [one[10:], one.view(10, 10), one.detach()]
        assert live.now == 800
        with live.measured() as measured:
            (one + 1).sum()
        assert live.now == 800 and measured.start == 800 and 800 <= measured.peak <= 816
        one.untyped_storage().resize_(80)  # as FSDP2 frees what it has gathered
        assert live.now == 80
        one.untyped_storage().resize_(1600)
        assert live.now == 1600
        del one, views
        assert live.now == 0
