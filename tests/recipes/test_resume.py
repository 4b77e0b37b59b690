"""A run that is stopped at any moment and resumed is the run that was never stopped, bit for bit."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from running import (
    RECIPES,
    Runs,
    assert_same_run,
    events,
    files,
    load_checkpoint,
    load_recipe,
    recipe_class,
    said,
    sequence,
    summary,
)
from tiers import slow_but

from adapt_recipes.config import FREE_AT_RESUME
from adapt_recipes.models import HuggingFaceCheckpointer
from adapt_recipes.run import Run
from adapt_recipes.strict import marked
from adapt_recipes.training.rng import rng_state

# One strategy or two of each recipe: what a resume reads is the recipe's, and the mixture's own.
STRATEGIES = ["adapt", "adapt_planned", "mos_diff", "uniform"]
# Binds for one task from the start, and for others as the mixture moves.
CAP = {"tasks.max_epochs_per_task": 1.2, "batch_size": 6}
# Whole examples, with the excess carried over: of 4 to 8 tokens, so that few steps take 21.
TOKENS = {"batch_size": "null", "batch_tokens": 21}
# No task is capped.
LEVELS: dict[str, Any] = {
    "tasks.max_epochs_per_task": "null",
    "budget.tokens": "null",
    "budget.epochs": 1.3,
    "levels.number": 3,
    "levels.examples": 2,
}
ONE_OF_EACH_RECIPE = ["adapt_planned", "mos_diff", "uniform"]
# What a run carries along from one update to the next, besides that.
CARRYING: list[tuple[str, dict[str, Any]]] = [
    (
        "mos_cossim",
        {
            "mixture.form": "paper",
            "mixture.optimizer": "adam",
            "mixture.learning_rate": 0.05,
            "mixture.ema_decay": 0.5,
        },
    ),
    ("mos_diff", {"reward.examples": "fixed", "reward.tokens": "answer"}),
    ("mos_diff", {"sampling": "dataset", "mixture.floor": 0.1}),
    ("multiuat", {"reward.mc_samples": 2}),
    ("adapt", {"mixture.reference": "asymptote", "mixture_update_every": 1}),
    ("adapt_ksteps", {"mixture_update_every": 1, "probe.steps": 2}),
    ("adapt_ksteps", {"mixture_update_every": 1, "probe.steps": 2, "probe.last_layers": 1}),
    ("dro_asymptote", {"mixture_update_every": 1}),
    ("dro_exponentiated", {}),
    ("exp3", {"mixture_update_every": 1}),
    ("pike", {"mixture_update_every": 1, "probe.examples": 4}),
    ("grape", {"mixture_update_every": 1}),
    ("dynamix", {"mixture_update_every": 1}),
    ("ado", {"mixture_update_every": 1}),
    ("adapt_forecast", {"mixture_update_every": 1}),
    ("adapt_forecast", {"mixture_update_every": 1, "mixture.losses": "validation"}),
    ("famo", {"mixture_update_every": 1, "mixture.reference": "asymptote"}),
    ("mos_diff", {"sampling": "dataset"} | CAP),
    ("uniform", {"sampling": "example"} | CAP),
    ("adapt_planned", CAP),
    ("mos_diff", {"sampling": "dataset"} | TOKENS),
    ("uniform", CAP | TOKENS),
    ("mos_diff", LEVELS | {"sampling": "example"}),
    ("hbo", LEVELS | TOKENS),
]


@pytest.fixture(scope="module")
def stopped(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of adapt_planned that died in step 6; its checkpoints are from steps 2 and 4."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    runs.stop("adapt_planned", folder, after=5, keep_checkpoints=2)
    assert names(folder / "checkpoints") == ["step_2", "step_4"] and events(folder)[-1]["step"] == 5
    return folder


@pytest.fixture
def folder(stopped: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(stopped, tmp_path / "run"))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def assert_nothing_left_over(folder: Path) -> None:
    steps = summary(folder)["steps"]
    assert names(folder / "checkpoints") == [f"step_{steps}"]
    assert names(folder) == ["checkpoints", "log.jsonl", "model", "resolved.yaml", "summary.json"]


# ---- stopped anywhere


# An update comes every 3 steps and a checkpoint every 2: these resumes are from 1, 2 and 1 steps after an update.
THREE_STEPS = (5, 8, 11)


@pytest.mark.parametrize(
    ("strategy", "changes"),
    [
        *((strategy, {}) for strategy in STRATEGIES),
        ("uniform", CAP),
        ("adapt_planned", TOKENS),
        ("mos_cossim", LEVELS),
        *(pytest.param(*carrying, marks=pytest.mark.slow) for carrying in CARRYING),
    ],
    ids=str,
)
def test_stopped_before_a_step(runs: Runs, tmp_path: Path, strategy: str, changes: dict[str, Any]) -> None:
    """Before every step with one strategy, before three steps with the others."""
    expected = runs.whole(strategy, **changes)
    num_steps = summary(expected)["steps"]
    assert num_steps >= 9
    before = range(num_steps) if strategy == "adapt" and not changes else [n for n in THREE_STEPS if n < num_steps]
    for step in before:
        runs.stop(strategy, tmp_path / "run", after=step, **changes)
        shutil.rmtree(runs.cache / "base_losses", ignore_errors=True)  # what a run needs is in its own folder
    assert runs.run(strategy, tmp_path / "run", **changes) == 0
    assert_same_run(tmp_path / "run", expected)
    resumed_at = [event["step"] for event in events(tmp_path / "run") if event["event"] == "resume"]
    assert resumed_at == sorted(resumed_at) and set(resumed_at) == {step - step % 2 for step in before} - {0}
    states = [load_checkpoint(path / "checkpoints" / f"step_{num_steps}") for path in (tmp_path / "run", expected)]
    for state in states:
        state["rng"] = state["rng"]["torch"]
        state["run"] = {name: value for name, value in state["run"].items() if "seconds" not in name}
    for part in ("model", "optimizer", "groups", "rng", *states[1]["states"]):
        torch.testing.assert_close(states[0][part], states[1][part], rtol=0, atol=0, equal_nan=True)


def test_fresh_examples_after_a_resume_from_a_folder_of_weights(runs: Runs, tmp_path: Path) -> None:
    """The base model is read from its folder again, and not from the checkpoint; other runs read it only once."""
    changes = {"checkpointer.checkpoint_dir": runs.whole("uniform") / "model", "validate_every": 0}
    assert runs.run("mos_diff", tmp_path / "expected", **changes) == 0
    runs.stop("mos_diff", tmp_path / "run", after=7, **changes)
    loaded = []
    load = HuggingFaceCheckpointer.load
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(HuggingFaceCheckpointer, "load", lambda self: loaded.append(self) or load(self))
        assert runs.run("mos_diff", tmp_path / "run", **changes) == 0
        assert len(loaded) == 1
        runs.stop("mos_cossim", tmp_path / "other", after=7, **changes)
        assert runs.run("mos_cossim", tmp_path / "other", **changes) == 0
        assert len(loaded) == 2
    assert_same_run(tmp_path / "run", tmp_path / "expected")
    rewards = [event["rewards"] for event in events(tmp_path / "run") if "rewards" in event]
    assert len(rewards) >= 3 and all(abs(each["a"] - 1) > 1e-4 for each in rewards[1:])


class MostLost:
    """A mixture of one's own, which goes by training losses: sums since its last update, so often in mid-sum."""

    observes = ("train_losses",)

    def __init__(self, *, task_names: list[str], **given: Any) -> None:
        self.p = torch.full((len(task_names),), 1 / len(task_names), dtype=torch.float64)

    def probabilities(self) -> torch.Tensor:
        return self.p

    def update(self, *, train_losses: torch.Tensor, **signals: torch.Tensor) -> dict[str, torch.Tensor]:
        self.p = torch.softmax(train_losses.nan_to_num(), dim=0)
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"p": self.p.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.p = state["p"]


@pytest.mark.parametrize(("strategy", "changes"), [("adapt_planned", {}), ("mos_cossim", {"reward": "null"})])
def test_a_mixture_of_ones_own_is_resumed_as_well(
    runs: Runs, tmp_path: Path, strategy: str, changes: dict[str, Any]
) -> None:
    changes = changes | {"mixture": "test_resume.MostLost"}
    for step in range(2, 10, 3):
        runs.stop(strategy, tmp_path / "run", after=step, **changes)
    assert runs.run(strategy, tmp_path / "run", **changes) == 0
    assert_same_run(tmp_path / "run", runs.whole(strategy, **changes))


def test_seconds_go_on_without_the_down_time(runs: Runs, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.perf_counter
    before = [event["seconds"] for event in events(folder) if event["event"] == "step"]
    monkeypatch.setattr(time, "perf_counter", lambda: now() + 1000)
    assert runs.run("adapt_planned", folder) == 0
    seconds = [event["seconds"] for event in events(folder) if event["event"] == "step"]
    assert seconds[:4] == before[:4] and seconds == sorted(seconds)
    total = json.loads((folder / "summary.json").read_text())["seconds"]
    assert seconds[-1] < total < 500


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["adapt_planned", "mos_diff", "uniform"])
def test_killed_before_random_operations_on_its_files(runs: Runs, tmp_path: Path, strategy: str) -> None:
    """kill -9 by the process itself: between making, writing, flushing, renaming and removing its files."""
    generator = random.Random(strategy)
    for kills in itertools.count():  # noqa: B007 (asserted on below)
        status = runs.finish(strategy, tmp_path / "run", die_at_operation=generator.randint(5, 50))
        if status == 0:
            break
        assert status == -9, said(tmp_path / "run", ".err")
    assert kills >= 3
    assert_same_run(tmp_path / "run", runs.whole(strategy))
    assert_nothing_left_over(tmp_path / "run")


@pytest.mark.slow
def test_killed_before_every_operation_at_the_end(runs: Runs, tmp_path: Path) -> None:
    """The last checkpoint is there, and a model/ as well: what is left is to write it again, and the summary."""
    ready, left_behind = tmp_path / "ready", set()
    runs.stop("uniform", ready, method="finish")
    shutil.copytree(runs.whole("uniform") / "model", ready / "model")
    shutil.copytree(runs.whole("uniform") / "checkpoints", ready / "checkpoints" / "step_8.removed")
    for operation in itertools.count(1):
        folder = Path(shutil.copytree(ready, tmp_path / "run", dirs_exist_ok=True))
        status = runs.finish("uniform", folder, die_at_operation=operation)
        assert status in (0, -9), said(folder, ".err")
        left_behind |= set(names(folder))
        assert runs.run("uniform", folder) == 0
        assert_same_run(folder, runs.whole("uniform"))
        assert_nothing_left_over(folder)
        if status == 0:
            break
        shutil.rmtree(folder)
    assert operation > 20
    assert left_behind >= {"resolved.yaml.partial", "model.partial", "model.removed", "summary.json.partial"}


def writing_checkpoint(folder: Path) -> bool:
    return any((folder / "checkpoints").glob("step_*.partial/__0_0.distcp"))


def writing_model(folder: Path) -> bool:
    return (folder / "model.partial").exists()


def writing_summary(folder: Path) -> bool:
    return any(event["event"] == "end" for event in events(folder)[-1:])


@pytest.mark.slow
def test_killed_from_outside_again_and_again(runs: Runs, tmp_path: Path) -> None:
    strategy, generator = "adapt_planned", random.Random(0)
    changes: dict[str, Any] = {"budget.tokens": 1500}
    expected, kills = runs.whole(strategy, **changes), 0
    for moment in (writing_checkpoint, None, writing_checkpoint, None, writing_model, writing_summary):
        process = runs.start(strategy, tmp_path / "run", checkpoint_every=1, **changes)
        if moment is None:
            time.sleep(generator.uniform(0.1, 0.5))
        while moment and process.exitcode is None and not moment(tmp_path / "run"):
            pass
        process.kill()
        process.join()
        assert process.exitcode in (0, -9), said(tmp_path / "run", ".err")
        kills += process.exitcode == -9
    assert kills >= 3
    assert runs.finish(strategy, tmp_path / "run", **changes) == 0
    assert_same_run(tmp_path / "run", expected)
    assert_nothing_left_over(tmp_path / "run")


# ---- what a folder holds when a run starts in it


def test_a_stale_log_without_a_checkpoint_is_replaced(runs: Runs, tmp_path: Path) -> None:
    runs.stop("uniform", tmp_path / "run", after=1)
    assert len(events(tmp_path / "run")) == 3 and not (tmp_path / "run" / "checkpoints").exists()
    (tmp_path / "run" / "log.jsonl").open("a").write('{"event": "st')
    assert runs.run("uniform", tmp_path / "run") == 0
    assert_same_run(tmp_path / "run", runs.whole("uniform"))
    assert "resume" not in {event["event"] for event in events(tmp_path / "run")}


def state_of(folder: Path) -> dict[str, Any]:
    """Every file with its content and the time it was written."""
    return {name: (content, (folder / name).stat().st_mtime_ns) for name, content in files(folder).items()}


def test_a_finished_run_says_so_and_is_left_alone(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(runs.whole("uniform"), tmp_path / "run")
    before = state_of(tmp_path / "run")
    assert runs.run("uniform", tmp_path / "run") == 0
    assert "is finished already" in capsys.readouterr().out
    assert state_of(tmp_path / "run") == before


@pytest.mark.parametrize("kept", ["resolved.yaml", "checkpoints", None])
def test_without_resume_a_folder_that_holds_a_run_is_refused(runs: Runs, tmp_path: Path, kept: str | None) -> None:
    shutil.copytree(runs.whole("uniform"), tmp_path / "run")
    for path in (tmp_path / "run").iterdir():
        if kept not in (None, path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = state_of(tmp_path / "run")
    with pytest.raises(ValueError, match=rf"^output_dir: {tmp_path / 'run'} holds a run; set resume=true[^\n]*\Z"):
        runs.run("uniform", tmp_path / "run", resume="false")
    assert state_of(tmp_path / "run") == before


# ---- what may change and what may not

CHANGES: dict[str, Any] = {
    "recipe": "another.py",
    "strategy": "another",
    "seed": 1,
    "dtype": "bf16",
    "deterministic": "true",
    "model.attn_dropout": 0.2,
    "tokenizer.supervise_end": "false",
    "checkpointer.checkpoint_dir": "MODEL",
    "tasks.validation_examples": 3,
    "max_seq_len": 15,
    "budget.tokens": 331,
    "mixture.floor": 0.1,
    "mixture_update_every": 4,
    "probe.examples": 4,
    "optimizer.lr": 0.001,
    "lr_schedule.warmup": 0.1,
    "batch_size": 9,
    "clip_grad_norm": 1.0,
    "compile": "true",
    "activation_checkpointing": "true",
    "loss_chunk_tokens": 3,
    "keep_best": "mean",
}


CHANGES_OF_MOS = {"reward.specialist": "a", "sampling": "dataset"}


@pytest.fixture
def torch_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Puts back what `deterministic` sets for the whole process."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("key", CHANGES)
def test_a_changed_key_is_refused_by_name(runs: Runs, folder: Path, torch_settings: None, key: str) -> None:
    before = state_of(folder)
    value = runs.whole("adapt_planned") / "model" if CHANGES[key] == "MODEL" else CHANGES[key]
    with pytest.raises(
        ValueError, match=rf"^resume: (model\.max_seq_len, )?{key} changed since the run began; [^\n]*\Z"
    ):
        runs.run("adapt_planned", folder, **{key: value})
    assert state_of(folder) == before


@pytest.mark.parametrize("key", CHANGES_OF_MOS)
def test_a_changed_key_of_mos_is_refused_by_name(runs: Runs, tmp_path: Path, key: str) -> None:
    runs.stop("mos_diff", tmp_path / "run", after=3)
    before = state_of(tmp_path / "run")
    with pytest.raises(ValueError, match=rf"^resume: {key} changed since the run began; [^\n]*\Z"):
        runs.run("mos_diff", tmp_path / "run", **{key: CHANGES_OF_MOS[key]})
    assert state_of(tmp_path / "run") == before


def test_another_end_is_refused(runs: Runs, tmp_path: Path) -> None:
    changes = {"keep_best": "worst", "stop_after": 2}
    runs.stop("uniform", tmp_path / "run", after=3, **changes)
    with pytest.raises(ValueError, match=r"^resume: stop_after changed since the run began; "):
        runs.run("uniform", tmp_path / "run", **changes | {"stop_after": 3})


def test_other_levels_are_refused(runs: Runs, tmp_path: Path) -> None:
    runs.stop("mos_cossim", tmp_path / "run", after=3, **LEVELS)
    with pytest.raises(ValueError, match=r"^resume: levels.number changed since the run began; [^\n]*\Z"):
        runs.run("mos_cossim", tmp_path / "run", **LEVELS | {"levels.number": 2})


def test_tokens_in_place_of_examples_are_refused(runs: Runs, folder: Path) -> None:
    with pytest.raises(ValueError, match=r"^resume: batch_size, batch_tokens changed since"):
        runs.run("adapt_planned", folder, **TOKENS)


def test_every_changed_key_is_named(runs: Runs, folder: Path) -> None:
    with pytest.raises(ValueError, match=r"^resume: seed, mixture\.floor, optimizer\.eps changed since"):
        runs.run("adapt_planned", folder, seed=3, **{"mixture.floor": 0, "optimizer.eps": 1e-6})


FREE: dict[str, Any] = {
    "metric_logger": None,
    "checkpoint_every": 1,
    "validate_every": 2,
    "log_every": 1,
    "keep_checkpoints": 3,
    "async_checkpointing": "true",
    "tasks.cache_dir": "elsewhere",
    # Random weights are stored in it anyway.
    "checkpointer.save_dtype": "fp32",
}


@pytest.mark.parametrize("key", slow_but(["metric_logger", "validate_every"], FREE))
def test_a_free_key_may_change(runs: Runs, folder: Path, tmp_path: Path, key: str) -> None:
    changes = {key: FREE[key]}
    if key == "metric_logger":
        logger = "torchtune.training.metric_logging.DiskLogger"
        changes = {"metric_logger._component_": logger, "metric_logger.log_dir": tmp_path / "metrics"}
    if key == "tasks.cache_dir":
        changes[key] = tmp_path / "cache"
    assert runs.run("adapt_planned", folder, **changes) == 0
    if key == "validate_every":
        assert training(folder) == training(runs.whole("adapt_planned"))
        assert files(folder / "model") == files(runs.whole("adapt_planned") / "model")
    else:
        assert_same_run(folder, runs.whole("adapt_planned"))
    if key == "metric_logger":
        assert names(tmp_path / "metrics")


def steps(folder: Path) -> list[dict[str, Any]]:
    return [event for event in sequence(folder) if event["event"] == "step"]


def training(folder: Path) -> list[dict[str, Any]]:
    """The steps without what was read for other purposes."""
    return [{key: value for key, value in step.items() if key != "total_tokens"} for step in steps(folder)]


def test_another_micro_batch_bound_goes_on_with_a_warning(
    runs: Runs, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runs.run("adapt_planned", folder, micro_batch_tokens=17) == 0
    assert "warning: micro_batch_tokens changed" in capsys.readouterr().err
    here, there = steps(folder), steps(runs.whole("adapt_planned"))
    assert here[:4] == there[:4]
    counts = ("step", "supervised_tokens", "tokens", "lr")
    assert [[s[name] for name in counts] for s in here] == [[s[name] for name in counts] for s in there]
    losses, others = ([each["loss"] for each in lines] for lines in (here, there))
    assert losses == pytest.approx(others, rel=0.05)


def test_every_key_is_either_free_or_refused(runs: Runs, tmp_path: Path) -> None:
    """A new key needs a decision: here, and in the contract."""
    elsewhere = {"device", "activation_offloading", "fsdp_cpu_offload"}  # where numbers are, not what they are
    free = {*FREE, "resume", "change_budget", "output_dir", "micro_batch_tokens", *elsewhere}
    for recipe in set(RECIPES.values()):
        assert set(marked(load_recipe(recipe).Config, FREE_AT_RESUME)) == free
    keys = {field.name for recipe in set(RECIPES.values()) for field in fields(load_recipe(recipe).Config)}
    assert keys == {key.split(".")[0] for key in (*CHANGES, *CHANGES_OF_MOS, *TOKENS, *LEVELS, *free, "stop_after")}


@pytest.mark.parametrize("change", ["an answer", "a row more", "a task less"])
def test_changed_data_is_refused(tmp_path: Path, change: str) -> None:
    runs = Runs(tmp_path)
    runs.stop("uniform", tmp_path / "run", after=3)
    rows = (runs.tasks / "c.jsonl").read_text()
    if change == "an answer":
        (runs.tasks / "c.jsonl").write_text(rows.replace('"125"', '"126"'))
    elif change == "a row more":
        (runs.tasks / "c.jsonl").write_text(rows + '\n{"prompt": "new", "response": "1"}')
    else:
        (runs.tasks / "c.jsonl").unlink()
    before = state_of(tmp_path / "run")
    with pytest.raises(ValueError, match=r"^resume: tasks: the data changed since the run began"):
        runs.run("uniform", tmp_path / "run")
    assert state_of(tmp_path / "run") == before
    (runs.tasks / "c.jsonl").write_text(rows)
    assert runs.run("uniform", tmp_path / "run") == 0


# ---- damage


@pytest.mark.parametrize("left", [None, 200])
def test_a_run_goes_on_without_the_log_that_was_deleted_or_cut(
    runs: Runs, folder: Path, left: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    log = (folder / "log.jsonl").read_bytes()
    (folder / "log.jsonl").unlink()
    if left is not None:
        (folder / "log.jsonl").write_bytes(log[:left])
    assert runs.run("adapt_planned", folder) == 0
    assert f"warning: {folder}/log.jsonl is shorter than at the checkpoint" in capsys.readouterr().err
    whole = runs.whole("adapt_planned")
    without = {name: content for name, content in files(folder).items() if "checkpoints" not in name}
    assert without.keys() == {name for name in files(whole) if "checkpoints" not in name}
    assert (folder / "model" / "model.safetensors").read_bytes() == (whole / "model" / "model.safetensors").read_bytes()
    lines = (folder / "log.jsonl").read_bytes()
    assert lines.startswith(log[: log.rfind(b"\n", 0, left or 0) + 1]) and b'"resume"' in lines


def test_the_checkpoint_before_a_damaged_one_serves(
    runs: Runs, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = folder / "checkpoints" / "step_4" / "__0_0.distcp"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert runs.run("adapt_planned", folder) == 0
    assert "step_4 (__0_0.distcp is not what was written); going on from step_2" in capsys.readouterr().err
    assert [event["step"] for event in events(folder) if event["event"] == "resume"] == [2]
    assert_same_run(folder, runs.whole("adapt_planned"))
    assert_nothing_left_over(folder)


@pytest.mark.slow
@pytest.mark.parametrize("full_at", ["checkpoint", "model", "log"])
def test_a_full_disk_ends_in_one_line_and_costs_nothing(runs: Runs, folder: Path, tmp_path: Path, full_at: str) -> None:
    """Stood in for by the system's limit on the size of a file."""
    limit, message = 100_000, f"error: no space left while writing checkpoint step_6 in {folder / 'checkpoints'}; "
    message += "the newest whole checkpoint is step_4"
    if full_at == "model":
        shutil.rmtree(folder)
        runs.stop("adapt_planned", folder, method="finish")
        message = f"error: no space left while writing {folder / 'model'}"
    if full_at == "log":
        limit = load_checkpoint(folder / "checkpoints" / "step_4")["log_bytes"] + 400
        message = f"error: output_dir: {folder / 'log.jsonl'}: file too large"
    before = names(folder / "checkpoints")
    assert (folder / "log.jsonl").stat().st_size < 100_000
    assert runs.finish("adapt_planned", folder, max_file_bytes=limit, keep_checkpoints=2) == 2
    lines = [line for line in said(folder, ".err").splitlines() if "torchao" not in line]
    assert len(lines) == 1 and lines[0].startswith(message)
    assert names(folder / "checkpoints") == before and not list(folder.glob("model*"))
    if full_at != "log":
        assert (events(folder)[-1]["event"], events(folder)[-1]["reason"]) == ("end", "error")
    assert runs.run("adapt_planned", folder) == 0
    assert_same_run(folder, runs.whole("adapt_planned"))
    assert_nothing_left_over(folder)


# ---- the same seed, the same run


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ONE_OF_EACH_RECIPE)
def test_the_seed_alone_decides(runs: Runs, tmp_path: Path, strategy: str) -> None:
    assert runs.finish(strategy, tmp_path / "again") == 0
    assert_same_run(tmp_path / "again", runs.whole(strategy))
    assert runs.run(strategy, tmp_path / "other", seed=1) == 0
    first, other = steps(runs.whole(strategy)), steps(tmp_path / "other")
    assert all(here["loss"] != there["loss"] for here, there in zip(first, other, strict=False))


def test_each_line_of_the_log_is_there_when_it_is_written(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_class("uniform")
    step, validate, seen = recipe.step, recipe.validate, []

    def read_after(method: Callable[[Any], None]) -> Callable[[Any], None]:
        def reading(self: Any) -> None:
            method(self)
            last = (tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1]
            seen.append((json.loads(last)["event"], json.loads(last)["step"]))

        return reading

    monkeypatch.setattr(recipe, "step", read_after(step))
    monkeypatch.setattr(recipe, "validate", read_after(validate))
    assert runs.run("uniform", tmp_path / "run") == 0
    num_steps = summary(tmp_path / "run")["steps"]
    assert [number for event, number in seen if event == "step"] == list(range(1, num_steps + 1))
    assert [number for event, number in seen if event == "validation"] == [0, 4, 8, num_steps]


@pytest.mark.parametrize("strategy", slow_but(["uniform"], ONE_OF_EACH_RECIPE))
def test_validation_does_not_touch_the_training(runs: Runs, tmp_path: Path, strategy: str) -> None:
    expected = runs.whole(strategy)  # validates every 4 steps
    for every in (0, 1):
        folder = tmp_path / str(every)
        assert runs.run(strategy, folder, validate_every=every) == 0
        validated = [event["step"] for event in events(folder) if event["event"] == "validation"]
        assert len(validated) == (2 if every == 0 else summary(folder)["steps"] + 1)
        assert training(folder) == training(expected)
        assert files(folder / "model") == files(expected / "model")


@pytest.mark.parametrize(
    ("strategy", "changes"),
    [
        ("adapt", {}),
        ("adapt", {"probe.estimator": "backward"}),
        ("adapt", {"probe.exact_lookahead": "true", "probe.separate_batches": "false"}),
        ("adapt_ksteps", {}),
        ("pike", {}),
        ("grape", {}),
        ("dynamix", {}),
        ("adapt_ksteps", {"probe.estimator": "backward"}),
        ("adapt_ksteps", {"probe.last_layers": 1}),
        ("adapt_planned", {}),
        ("mos_cossim", {}),
        ("mos_diff", {}),
        ("mos_diff", {"reward.examples": "fixed"}),
        ("multidds", {}),
        ("multiuat", {"reward.mc_samples": 2}),
        ("hbo", {}),
    ],
)
def test_probes_leave_generators_weights_and_gradients_alone(
    runs: Runs, tmp_path: Path, strategy: str, changes: dict[str, Any]
) -> None:
    config = runs.config(strategy, tmp_path / "run", **changes)
    with Run(config) as run:
        recipe = recipe_class(strategy)(config, run)
        recipe.setup()
        if strategy == "mos_diff":
            shutil.rmtree(runs.cache / "base_losses", ignore_errors=True)
            before = recipe_state(recipe)
            recipe.measure_base_model()
            assert recipe_state(recipe) == before
        for _ in range(3):
            recipe.step()
        before = recipe_state(recipe)
        recipe.validate()
        assert recipe_state(recipe) == before
        probabilities = recipe.mixture.probabilities()
        for _ in range(2):  # adapt_planned's first losses are a starting point and no progress
            recipe.step()
            before = recipe_state(recipe)
            recipe.update_mixture()
            assert recipe_state(recipe) == before
        assert not torch.equal(recipe.mixture.probabilities(), probabilities)
        recipe.step()
        assert recipe_state(recipe)["generators"] != before["generators"], "training draws no random numbers here"


def recipe_state(recipe: Any) -> dict[str, Any]:
    parameters = dict(recipe.model.named_parameters())
    generators = rng_state() | {"torch": torch.get_rng_state().tolist()}
    return {
        "generators": {name: state for name, state in generators.items() if name != "cuda"},
        "weights": {name: parameter.detach().numpy().tobytes() for name, parameter in parameters.items()},
        "gradients": {name: parameter.grad is None for name, parameter in parameters.items()},
        "training": {name: module.training for name, module in recipe.model.named_modules()},
    }
