"""A recipe on two processes is the recipe on one: the same examples, losses, weights, signals, files and errors.

Where a mixture learns, two processes are compared with one by ``Replay``: they measure and learn as ever, but draw by
the probabilities in the log of the one. For a learned mixture differs in its last bits, and so, in time, in its draws.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import os
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import group
import pytest
import torch
from running import (
    RECIPES,
    Runs,
    events,
    files,
    load_checkpoint,
    load_recipe,
    recipe_class,
    sequence,
    summary,
)
from safetensors.torch import load_file
from tiers import slow_but
from torch import Tensor
from torchtune.models.llama3_2 import llama3_2
from torchtune.modules import TransformerDecoder

from adapt_recipes.budget import Ledger
from adapt_recipes.config import command_line
from adapt_recipes.data import IGNORE_INDEX, TokenSampler
from adapt_recipes.data.packing import pack_rows, supervised_lengths
from adapt_recipes.models import TokenLosses
from adapt_recipes.run import Run
from adapt_recipes.strict import locate
from adapt_recipes.training import process_group
from adapt_recipes.training.checkpoint import Checkpoints
from adapt_recipes.training.process_group import rank, world_size

# ------------------------------------------------------------------------------------------------ what configs name


class Replay:
    """A learned mixture that measures and learns as ever, but draws by the probabilities of another run's log."""

    def __init__(self, *, of: str, log: str, **arguments: Any) -> None:
        self.learned = locate(of)(**arguments)
        recorded = [event["probabilities"] for event in events(Path(log)) if event["event"] == "mixture"]
        self.recorded = [torch.tensor(list(p.values()), dtype=torch.float64) for p in recorded]
        self.num_updates = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.learned, name)

    def probabilities(self) -> Tensor:
        return self.recorded[self.num_updates]

    def update(self, **signals: Tensor) -> dict[str, Tensor]:
        self.num_updates += 1
        return self.learned.update(**signals)

    def state_dict(self) -> dict[str, Any]:
        return {"num_updates": self.num_updates, "learned": self.learned.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.num_updates = state["num_updates"]
        self.learned.load_state_dict(state["learned"])


class Apart:
    """A mixture that is another on each process, after its first update or from the start."""

    observes = ("validation_losses",)

    def __init__(self, *, task_names: list[str], from_the_start: bool = False, **given: Any) -> None:
        self.p = torch.full((len(task_names),), 1 / len(task_names), dtype=torch.float64)
        if from_the_start:
            self.update()

    def probabilities(self) -> Tensor:
        return self.p

    def update(self, **signals: Tensor) -> dict[str, Tensor]:
        self.p[0] += 1e-12 * rank()
        self.p /= self.p.sum()
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


class Negative:
    """A reward that the paper's form of the scorer refuses."""

    reads = ("train",)

    def __init__(self, *, task_names: list[str], model: Any) -> None:
        self.num_tasks = len(task_names)

    def __call__(self, *, train: Any) -> Tensor:
        return torch.full((self.num_tasks,), -2.0, dtype=torch.float64)


def infinite(**sizes: Any) -> TransformerDecoder:
    """A model that the letter Z makes infinite."""
    model = llama3_2(**sizes)
    with torch.no_grad():
        model.tok_embeddings.weight[ord("Z")] = torch.inf
    return model


# ------------------------------------------------------------------------------------------------ what a process does


class Job(NamedTuple):
    """A command line, for any number of processes.

    Attributes:
        strategy: names the config and the recipe.
        argv: the command line.
        stop_after: a step in which the last of the processes gets a SIGTERM.
        num_devices: as many CUDA devices as the machine is to seem to have.
    """

    strategy: str
    argv: list[str]
    stop_after: int | None = None
    num_devices: int | None = None


def do(job: Job) -> dict[str, Any]:
    """Runs a command line as this process, and tells what this process has done.

    Returns:
        ``draws``: of each step the probabilities and what was drawn by them; ``steps``: of each step this process's
        micro-batches; ``forwards`` and ``backwards``: how many in all; ``start`` and ``saved``: the states of
        which a checkpoint is made, without times, after the set-up and at each checkpoint; ``mask``: what dropout would
        leave after the set-up; ``status``, ``out`` and ``err``.
    """
    seen: dict[str, Any] = {"draws": [], "steps": [], "saved": [], "forwards": 0, "backwards": 0}
    recipe, module = recipe_class(job.strategy), load_recipe(RECIPES[job.strategy])

    def drawn(sampler: TokenSampler, draws: Any, p: Tensor, **named: Any) -> None:
        seen["draws"].append((p.tolist(), [tuple(draw) for draw in draws]))

    def spent(ledger: Ledger, nothing: None, *arguments: Any, batches: Any, **named: Any) -> None:
        seen["steps"].append(batches)

    def counted(name: str) -> Callable[..., None]:
        def count(*arguments: Any, **named: Any) -> None:
            seen[name] += 1

        return count

    def state(states: Mapping[str, Any]) -> dict[str, Any]:
        here = {name: value for name, value in states["run"].items() if "seconds" not in name}
        return copy.deepcopy({**states, "run": here})

    def started(run: Run, nothing: None, *arguments: Any, **named: Any) -> None:
        states = {**arguments[-1], "run": run, "best": run._best}
        seen.update(start=state({name: each.state_dict() for name, each in states.items()}), mask=mask())

    def saved(checkpoints: Checkpoints, nothing: None, *arguments: Any, shared: Any, own: Any, best: int) -> None:
        seen["saved"].append(state(shared["states"]))

    def mask() -> Tensor:
        with torch.random.fork_rng(devices=[]):
            return torch.nn.functional.dropout(torch.ones(64))

    def stepped(recipe: Any, nothing: None) -> None:
        if recipe.ledger.steps == job.stop_after and rank() == world_size() - 1:
            signal.raise_signal(signal.SIGTERM)

    out, err = io.StringIO(), io.StringIO()
    with contextlib.ExitStack() as stack:
        for owner, name, note in (
            (TokenSampler, "draw", drawn),
            (Ledger, "spend", spent),
            (TokenLosses, "forward", counted("forwards")),
            (Tensor, "backward", counted("backwards")),
            (Run, "start", started),
            (Checkpoints, "save", saved),
            (recipe, "step", stepped),
        ):
            stack.enter_context(also(owner, name, note))
        if job.num_devices is not None:
            stack.enter_context(devices(job.num_devices))
        stack.enter_context(mock.patch.object(os, "_exit", leave))
        # On a slow machine a process would say that it waits for the other.
        stack.enter_context(mock.patch("adapt_recipes.data.load._SILENT_SECONDS", 3600.0))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        try:
            command_line(module.main, module.Config, job.argv)
        except SystemExit as end:
            seen["status"] = end.code
        except Exception:  # as it would end a process
            seen["status"] = 1
            traceback.print_exc()
    return seen | {"out": out.getvalue(), "err": err.getvalue()}


def leave(status: int) -> None:
    """In the place of ``os._exit``, which would be the end of the jobs to come as well."""
    torch.distributed.destroy_process_group()
    raise SystemExit(status)


def also(owner: Any, name: str, note: Callable[..., None]) -> Any:
    """Patches a method: ``note`` is called after it, with what it has returned and what it was given."""
    original = getattr(owner, name)

    def noting(self: Any, *arguments: Any, **named: Any) -> Any:
        result = original(self, *arguments, **named)
        note(self, result, *arguments, **named)
        return result

    return mock.patch.object(owner, name, noting)


@contextlib.contextmanager
def devices(number: int) -> Iterator[None]:
    """As on a machine with CUDA devices, which meet over gloo here."""
    init = torch.distributed.init_process_group
    with (
        mock.patch.object(torch.cuda, "is_available", lambda: True),
        mock.patch.object(torch.cuda, "device_count", lambda: number),
        mock.patch.object(process_group.utils, "get_device", lambda name: torch.device("cpu")),
        mock.patch.object(torch.distributed, "init_process_group", lambda backend, **named: init("gloo", **named)),
    ):
        yield


def do_all(folder: Path) -> dict[str, dict[str, Any]]:
    """As one of a group: all jobs that are written down beside the folder, one after the other, where it can see."""
    os.chdir(folder.parent / os.environ["RANK"])
    done = {}
    for name, (port, *job) in json.loads((folder.parent / "jobs.json").read_text()).items():
        os.environ["MASTER_PORT"] = str(port)  # a store of their own
        done[name] = do(Job(*job))
    return done


# ------------------------------------------------------------------------------------------------ and what came of it


def in_two(jobs: Mapping[str, Job], folder: Path) -> dict[str, list[dict[str, Any]]]:
    """What each of two processes has done, by job. They run in the folders 0 and 1 of ``folder``."""
    for number in range(2):
        (folder / str(number)).mkdir(parents=True, exist_ok=True)
    ports = group.free_ports(len(jobs))
    table = {name: [port, *job] for port, (name, job) in zip(ports, jobs.items(), strict=True)}
    (folder / "jobs.json").write_text(json.dumps(table))
    ended = group.run((do_all,), folder)["do_all"]
    assert [each.status for each in ended] == [0, 0], ended[0].err + ended[1].err
    assert [each.out for each in ended] == ["", ""], "nothing is said by another way"
    return {name: [each.result[name] for each in ended] for name in jobs}


SGD = "{_component_: torch.optim.SGD, lr: 0.3, momentum: 0.5}"
LORA: dict[str, Any] = {
    "model._component_": "torchtune.models.llama3_2.lora_llama3_2",
    "model.lora_attn_modules": "[q_proj, v_proj]",
    "model.apply_lora_to_mlp": "true",
    "model.lora_rank": 3,
    "model.lora_alpha": 8,
}
TIED = {"model.tie_word_embeddings": "true"}
FROM_FOLDER = {**TIED, "checkpointer.checkpoint_dir": "BASE"}
CHECKPOINTED = {"activation_checkpointing": "true"}
SMALL = {"micro_batch_tokens": 96, "clip_grad_norm": 0.5}

# At least 30 steps of each. Where there are three examples a step, the last step is of one supervised token.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "static": ("proportional", SMALL | {"micro_batch_tokens": 48, "budget.tokens": 1180}),
    "static, checkpointed": ("proportional", SMALL | CHECKPOINTED | {"budget.tokens": 1180}),
    "three examples a step": ("uniform", {"batch_size": 3, "budget.tokens": 379}),
    "fewer examples than processes": ("uniform", {"batch_size": "null", "batch_tokens": 6, "budget.tokens": 187}),
    "adapt, steps of so many tokens": ("adapt", SMALL | {"batch_size": "null", "batch_tokens": 30}),
    "adapt": ("adapt", SMALL),
    "adapt by backward, ahead, with adapters": (
        "adapt",
        SMALL | FROM_FOLDER | LORA | {"probe.estimator": "backward", "probe.exact_lookahead": "true"},
    ),
    "adapt_planned, checkpointed": ("adapt_planned", SMALL | CHECKPOINTED),
    "dro": ("dro", {"async_checkpointing": "true", "checkpoint_every": 10}),
    "dro by training losses": ("dro_exponentiated", SMALL),
    "mos_cossim, batches of one task": ("mos_cossim", {"sampling": "dataset"}),
    "mos_diff, checkpointed": ("mos_diff", SMALL | CHECKPOINTED),
    "multidds, tied, from a folder": ("multidds", SMALL | FROM_FOLDER),
}
LEARNED = [case for case, (strategy, _) in CASES.items() if RECIPES[strategy] != "sft_full_finetune"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def runs(home: Path) -> Runs:
    """Tasks whose examples are of many lengths, no dropout, and a folder to start from."""
    runs = Runs(home)
    for file in runs.tasks.iterdir():
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        for i, row in enumerate(rows):
            row["prompt"] += "." * (7 * i % 23)
        file.write_text("\n".join(map(json.dumps, rows)))
    del runs.settings["model.attn_dropout"]
    runs.settings |= {"optimizer": SGD, "max_seq_len": 48, "validate_every": 15, "checkpoint_every": 0}
    runs.settings |= {"budget.tokens": 1040, "lr_schedule.warmup": 0.2}
    runs.learned_settings = {"mixture_update_every": 5, "probe.examples": 4}
    assert runs.run("uniform", home / "base", **TIED, **{"budget.tokens": 20}) == 0
    shutil.copytree(runs.tasks, home / "Z")
    (home / "Z" / "c.jsonl").write_text((home / "Z" / "c.jsonl").read_text().replace("c5", "Z5"))
    return runs


@pytest.fixture(scope="module")
def jobs(runs: Runs, home: Path) -> Callable[..., Job]:
    def job(strategy: str, folder: Path, changes: Mapping[str, Any], *, log: Path | None = None, **more: Any) -> Job:
        """With ``log``, probabilities are replayed from there."""
        places = {"BASE": home / "base" / "model", "WITH_Z": home / "Z", "USED": home / "base"}
        changes = {key: places.get(value, value) for key, value in changes.items()}
        if log is not None:
            learned = runs.config(strategy, folder).mixture.component
            changes |= {"mixture._component_": "test_processes.Replay", "mixture.of": learned, "mixture.log": log}
        return Job(strategy, runs.argv(strategy, folder, **changes), **more)

    return job


@pytest.fixture(scope="module")
def cases(request: pytest.FixtureRequest) -> dict[str, tuple[str, dict[str, Any]]]:
    """Those of ``CASES`` that the tests of this session ask for."""
    here = (item for item in request.session.items if item.path == request.path)
    wanted = [
        item.callspec.params.get("case")
        for item in here
        if isinstance(item, pytest.Function) and hasattr(item, "callspec")
    ]
    if any(item.name == "test_the_cases_have_what_they_are_for" for item in request.session.items):
        wanted += ["static", "three examples a step", "fewer examples than processes"]
    return {case: settings for case, settings in CASES.items() if case in wanted}


@pytest.fixture(scope="module")
def alone(jobs: Callable[..., Job], cases: Any, home: Path) -> dict[str, dict[str, Any]]:
    """What one process does in each case, in ``home/alone``."""
    return {case: do(jobs(strategy, home / "alone" / case, changes)) for case, (strategy, changes) in cases.items()}


@pytest.fixture(scope="module")
def both(jobs: Callable[..., Job], cases: Any, alone: Any, home: Path) -> dict[str, list[dict[str, Any]]]:
    """What each of two does, in ``home/both``."""
    table = {}
    for case, (strategy, changes) in cases.items():
        log = home / "alone" / case if case in LEARNED else None
        table[case] = jobs(strategy, home / "both" / case, changes, log=log)
    return in_two(table, home / "in two")


# Counts, and what follows from them alone. Two processes cut a step into other micro-batches, with other padding.
EXACT = ("event", "step", "supervised_tokens", "tokens", "task_tokens", "lr", "probabilities", "probe_tokens", "reason")


def assert_same_log(folder: Path, expected: Path) -> None:
    """The same lines, once each, with the same counts; losses within 1e-5, signals within 1e-4 of the largest."""
    here, there = sequence(folder), sequence(expected)
    assert [event["event"] for event in here] == [event["event"] for event in there]
    for ours, theirs in zip(here, there, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"computed_tokens"}:
            if name in EXACT:
                assert ours[name] == theirs[name], f"{name} of step {ours['step']}"
                continue
            largest, tolerance = float(numbers(theirs[name]).nan_to_num().abs().max()), 1e-5
            if name == "grad_norm":
                tolerance *= max(largest, 1)
            elif ours["event"] == "mixture":
                tolerance = 1e-4 * largest
            assert difference(ours[name], theirs[name]) <= tolerance, f"{name} of step {ours['step']}"


def numbers(of: Any) -> Tensor:
    """A value of the log, or one a task."""
    listed = list(of.values()) if isinstance(of, dict) else [of]
    return torch.tensor([float("nan") if value is None else value for value in listed], dtype=torch.float64)


def difference(here: Any, there: Any) -> float:
    """The largest one, of a value of two logs or of two tensors; infinite where one alone has none."""
    ours, theirs = (each if isinstance(each, Tensor) else numbers(each) for each in (here, there))
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    if not torch.equal(ours.isnan(), theirs.isnan()):
        return math.inf
    return float((ours - theirs).nan_to_num().abs().max())


def assert_same_weights(folder: Path, expected: Path) -> None:
    """Two folders hold the same files, and weights within 1e-5 of each other."""
    here, there = files(folder), files(expected)
    assert here.keys() == there.keys()
    for name in here:
        if not name.endswith(".safetensors"):
            assert here[name] == there[name], name
            continue
        ours, theirs = load_file(folder / name), load_file(expected / name)
        assert ours.keys() == theirs.keys()
        assert max(difference(ours[key], theirs[key]) for key in ours) <= 1e-5


@pytest.mark.parametrize("case", slow_but(("static", "adapt"), CASES))
def test_two_processes_are_one_run(alone: Any, both: Any, home: Path, case: str) -> None:
    (first, second), only = both[case], alone[case]
    assert [each["status"] for each in (only, first, second)] == [0, 0, 0], first["err"] + second["err"]
    assert len(only["draws"]) >= 25
    assert first["draws"] == second["draws"] == only["draws"], "the same mixture and examples"
    assert torch.equal(first["mask"], only["mask"]) and not torch.equal(first["mask"], second["mask"]), "of dropout"
    torch.testing.assert_close(first["saved"], second["saved"], rtol=0, atol=0, equal_nan=True)

    here, there = home / "both" / case, home / "alone" / case
    assert {path.name for path in here.iterdir()} == {path.name for path in there.iterdir()}
    assert_same_log(here, there)
    assert [event["event"] for event in events(here)] == [event["event"] for event in events(there)]
    for folder in ("model", "adapter") if "adapters" in case else ("model",):
        assert_same_weights(here / folder, there / folder)
    ours, theirs = summary(here), summary(there)
    assert ours.keys() == theirs.keys()
    for name in ours.keys() - {"computed_tokens"}:
        if "loss" in name or "bits_per_byte" in name:
            assert difference(ours[name], theirs[name]) <= 1e-5, name
        else:
            assert ours[name] == theirs[name], name
    step = f"checkpoints/step_{ours['steps']}"
    ours, theirs = load_checkpoint(here / step), load_checkpoint(there / step)
    for part in ("model", "optimizer"):
        torch.testing.assert_close(ours[part], theirs[part], rtol=0, atol=1e-5)
    torch.testing.assert_close(ours["sampler"], theirs["sampler"], rtol=0, atol=0)


@pytest.mark.slow
def test_two_processes_have_the_same_levels(jobs: Callable[..., Job], home: Path) -> None:
    """And the same shares of them, which are those of one process as long as both have drawn the same."""
    budget = {"tasks.max_epochs_per_task": "null", "budget.tokens": "null", "budget.epochs": 2}
    changes = SMALL | budget | {"levels.number": 2, "levels.examples": 3}
    only = do(jobs("mos_cossim", home / "alone" / "levels", changes))
    both = in_two({"levels": jobs("mos_cossim", home / "both" / "levels", changes)}, home / "in two, levels")
    first, second = both["levels"]
    assert [each["status"] for each in (only, first, second)] == [0, 0, 0], first["err"] + second["err"]
    assert first["draws"] == second["draws"]
    torch.testing.assert_close(first["saved"], second["saved"], rtol=0, atol=0, equal_nan=True)
    ours, theirs = (
        [e for e in events(home / each / "levels") if e["event"] == "mixture"] for each in ("both", "alone")
    )
    assert len(ours) >= 3 and ours[1].keys() == theirs[1].keys()
    for name in ours[1]:
        if name.startswith("level_"):
            assert difference(ours[1][name], theirs[1][name]) < 1e-4, name
            assert ours[1][name] != ours[2][name]
    assert ours[1]["probe_tokens"] == theirs[1]["probe_tokens"] > ours[0]["probe_tokens"] > 0


@pytest.mark.parametrize("case", slow_but(("static", "adapt"), CASES))
def test_the_first_process_alone_speaks(alone: Any, both: Any, case: str) -> None:
    """As much as one does: the plan, some steps, the results."""
    (first, second), only = both[case], alone[case]
    assert second["out"] == second["err"] == "" and first["err"] == only["err"]
    assert bool(first["err"]) == ("batch_tokens" in CASES[case][1]), "a warning that steps are small"
    assert len(first["out"].splitlines()) == len(only["out"].splitlines()) > 10
    assert first["out"].count("budget: ") == first["out"].count("results: ") == 1


@pytest.mark.parametrize("case", slow_but(("static", "adapt"), CASES))
def test_both_do_the_same_amount_of_work(both: Any, case: str) -> None:
    """As many forwards and backwards, of nearly as many tokens, and every example on one of them."""
    first, second = both[case]
    assert first["forwards"] == second["forwards"] and first["backwards"] == second["backwards"]
    for (_, draws), *batches in zip(first["draws"], first["steps"], second["steps"], strict=True):
        rows = [[row for batch in each for row in batch.rows.tolist() if row >= 0] for each in batches]
        assert sorted(rows[0] + rows[1]) == list(range(len(draws)))
        assert len(batches[0]) == len(batches[1])
        for here, there in zip(*batches, strict=True):
            work = [len(pack_rows(each.tokens, supervised_lengths(each.labels)).tokens) for each in (here, there)]
            assert abs(work[0] - work[1]) <= 2 * max(int(batch.lengths.max()) for each in batches for batch in each)


@pytest.mark.slow
def test_the_cases_have_what_they_are_for(both: Any) -> None:
    """A process without examples, a task that one process lacks, micro-batches that one has more rows of."""
    first, second = both["three examples a step"]
    last = first["steps"][-1] + second["steps"][-1]
    assert sum(int((batch.labels != IGNORE_INDEX).sum()) for batch in last) == 1
    assert [-1] in [batch.rows.tolist() for batch in last], "nothing but a dummy"
    assert {len(draws) for _, draws in first["draws"]} == {1, 3}
    few = both["fewer examples than processes"]
    num_drawn = [len(draws) for _, draws in few[0]["draws"]]
    assert num_drawn.count(1) > 5 and num_drawn.count(2) > 5
    for number, *steps in zip(num_drawn, *(each["steps"] for each in few), strict=True):
        dummies = [[-1] in [batch.rows.tolist() for batch in step] for step in steps]
        assert dummies.count(True) == (number == 1), "one of the two has nothing but a dummy"
    tasks = [[{*torch.cat([b.tasks for b in step]).tolist()} for step in each["steps"]] for each in both["static"]]
    assert any(one != other for one, other in zip(*tasks, strict=True))
    assert max(len(step) for step in both["static"][0]["steps"]) > 1, "several micro-batches"


# ------------------------------------------------------------------------------------- resumed by more or by fewer

STOPPED: dict[str, dict[str, Any]] = {
    "adapt_planned": {"mixture.measure_after": 0},
    "mos_diff": {"async_checkpointing": "true"},
    "uniform": {"clip_grad_norm": 0.5},
}
STOP_AFTER = 13  # between two updates
WAYS = ("one, then two", "two, then one")


@pytest.fixture(scope="module")
def halves(jobs: Callable[..., Job], home: Path) -> dict[str, dict[str, Any]]:
    """What one process does until it is stopped."""
    return {
        strategy: do(jobs(strategy, home / WAYS[0] / strategy, changes, stop_after=STOP_AFTER))
        for strategy, changes in STOPPED.items()
    }


@pytest.fixture(scope="module")
def ended(jobs: Callable[..., Job], runs: Runs, halves: Any, home: Path) -> dict[str, list[dict[str, Any]]]:
    """What each of two has done of the second halves of runs, of the first halves of others, and of what is refused."""
    table = {}
    for strategy, changes in STOPPED.items():
        table[f"{WAYS[0]} {strategy}"] = jobs(strategy, home / WAYS[0] / strategy, changes)
        table[f"{WAYS[1]} {strategy}"] = jobs(strategy, home / WAYS[1] / strategy, changes, stop_after=STOP_AFTER)
    for case, (strategy, changes, _) in REFUSED.items():
        table[case] = jobs(strategy, home / case, changes, num_devices=1 if "devices" in case else None)
    for case, (strategy, changes, _) in ENDED_AS_ALONE.items():
        table[case] = jobs(strategy, home / case, changes)
    unlike(home / "ended", runs, home)
    return in_two(table, home / "ended")


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("strategy", STOPPED)
def test_resumed_on_another_number_of_processes(
    jobs: Callable[..., Job], halves: Any, ended: Any, home: Path, strategy: str, way: str
) -> None:
    """It has the mixture to the bit, and goes on as a run that was never stopped and draws by the same shares."""
    changes, folder, other = STOPPED[strategy], home / way / strategy, ended[f"{way} {strategy}"]
    if way == WAYS[0]:
        before, after = [halves[strategy]], other
    else:
        before, after = other, [do(jobs(strategy, folder, changes))]
    replayed = home / "replayed" / way / strategy
    replay = do(jobs(strategy, replayed, changes, log=None if strategy == "uniform" else folder))
    assert {each["status"] for each in before} == {143} and {each["status"] for each in (*after, replay)} == {0}
    assert f"stopped at step {STOP_AFTER} by SIGTERM" in before[0]["out"]
    for one, each in product(before, after):
        assert len(one["saved"]) == 1 and len(one["draws"]) == STOP_AFTER
        torch.testing.assert_close(each["start"], one["saved"][0], rtol=0, atol=0, equal_nan=True)
        assert one["draws"] + each["draws"] == replay["draws"]
    numbers = f"{len(before)} processes before, {len(after)} now"
    said = f"warning: {numbers}: the run goes on, but no longer bit for bit\n"
    assert [each["err"] for each in after] == [said, ""][: len(after)]
    assert [event["step"] for event in events(folder) if event["event"] == "resume"] == [STOP_AFTER]
    assert_same_log(folder, replayed)
    assert_same_weights(folder / "model", replayed / "model")


# ------------------------------------------------------------------------------------------------ what is refused

NOT_THE_SAME = "not the same on process 1 as on process 0"
DOWNLOAD = "`tune download MODEL --output-dir FOLDER` creates one"
HAVE_TO_BE, MAY_DEPEND = "have to be the same for all", "may depend on nothing but what it is given"
# Each process runs in a folder of its own, ``unlike`` the other's: a path that is not absolute is another for each.
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "too few examples": ("uniform", {"batch_size": 1}, "batch_size: 1 examples are too few for 2 processes; one each"),
    "too few devices": (
        "uniform",
        {"device": "null"},
        "--nproc_per_node: 2 processes and 1 CUDA devices; one each (on process 1)",
    ),
    "other configs": (
        "adapt_planned",
        {"strategy": "${oc.env:RANK}"},
        f"strategy: {NOT_THE_SAME}; start all with the same command",
    ),
    "a model of the first": (
        "mos_diff",
        {"checkpointer.checkpoint_dir": "first/model", **TIED},
        f"checkpointer.checkpoint_dir: there is no folder first/model; {DOWNLOAD} (on process 1)",
    ),
    "a model of the second": (
        "uniform",
        {"checkpointer.checkpoint_dir": "second/model"},
        f"checkpointer.checkpoint_dir: there is no folder second/model; {DOWNLOAD}",
    ),
    "data of the first": (
        "mos_cossim",
        {"tasks.path": "first/tasks"},
        "tasks.path: no folder first/tasks (on process 1)",
    ),
    "data of the second": ("adapt", {"tasks.path": "second/tasks"}, "tasks.path: no folder second/tasks"),
    "other data": ("uniform", {"tasks.path": "tasks"}, f"tasks: {NOT_THE_SAME}; the data files {HAVE_TO_BE}"),
    "a mixture's file of the first": (
        "dro",
        {"mixture.reference": "first/losses.json"},
        "mixture.reference: first/losses.json is no file; allowed: initial, asymptote (on process 1)",
    ),
    "a mixture's file of the second": (
        "dro",
        {"mixture.reference": "second/losses.json"},
        "mixture.reference: second/losses.json is no file; allowed: initial, asymptote",
    ),
    "mixtures apart from the start": (
        "mos_diff",
        {"mixture": "{_component_: test_processes.Apart, from_the_start: true}", "reward": "null"},
        f"mixture.a, mixture.b, mixture.c, mixture.d: {NOT_THE_SAME}; it {MAY_DEPEND}",
    ),
    "mixtures apart after an update": (
        "adapt_planned",
        {"mixture": "test_processes.Apart"},
        f"mixture.a, mixture.b, mixture.c, mixture.d: {NOT_THE_SAME}; it {MAY_DEPEND}",
    ),
}

# What one process ends with as well.
INFINITE = {"model._component_": "test_processes.infinite", "tasks.path": "WITH_Z"}
ENDED_AS_ALONE: dict[str, tuple[str, dict[str, Any], str]] = {
    "a loss that is not finite": ("uniform", INFINITE, "step 4: the loss of training example 5 of task 'c' is not"),
    "a base model that is not finite": (
        "mos_diff",
        INFINITE | {"probe.examples": 64, "reward.examples": "fixed"},
        "step 0: the loss of an example of task 'c' in the pool is not finite",
    ),
    "a reward below 0": (
        "mos_cossim",
        {"reward": "test_processes.Negative", "mixture.form": "paper"},
        "mixture.form: paper needs rewards >= 0",
    ),
    "a folder with a run": ("uniform", {"resume": "false", "output_dir": "USED"}, "output_dir: "),
}


def unlike(folder: Path, runs: Runs, home: Path) -> None:
    """The folders 0 and 1: each has what is named after it, and ``tasks`` in which one answer differs."""
    for number, name in enumerate(("first", "second")):
        mine = folder / str(number) / name
        mine.mkdir(parents=True)
        (mine / "model").symlink_to(home / "base" / "model")
        (mine / "tasks").symlink_to(runs.tasks)
        (mine / "losses.json").write_text(json.dumps(dict.fromkeys("abcd", 0.5)))
        tasks = Path(shutil.copytree(runs.tasks, folder / str(number) / "tasks"))
        (tasks / "b.jsonl").write_text((tasks / "b.jsonl").read_text().replace("yes3", f"yes{3 + number}"))


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED)
def test_what_several_processes_refuse(ended: Any, home: Path, case: str) -> None:
    first, second = ended[case]
    assert (first["status"], first["err"]) == (2, f"error: {REFUSED[case][2]}\n")
    assert (second["status"], second["err"], second["out"]) == (2, "", "")
    assert (home / case).exists() == (case == "mixtures apart after an update")


@pytest.mark.slow
@pytest.mark.parametrize("case", ENDED_AS_ALONE)
def test_what_ends_as_on_one_process(jobs: Callable[..., Job], ended: Any, home: Path, case: str) -> None:
    strategy, changes, message = ENDED_AS_ALONE[case]
    (first, second), only = ended[case], do(jobs(strategy, home / "refused" / case, changes))
    assert only["status"] == 2 and only["err"].startswith(f"error: {message}") and only["err"].count("\n") == 1
    assert (first["status"], first["err"]) == (2, only["err"])
    assert (second["status"], second["err"], second["out"]) == (2, "", "")
