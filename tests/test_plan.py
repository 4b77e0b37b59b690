"""``tune plan`` says what a run then does: compared with the ``summary.json`` of real runs of the shipped recipes."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiers import slow_but

from adapt_recipes import commands, shipped
from adapt_recipes.config import load
from adapt_recipes.data import LeftOut
from adapt_recipes.models import TokenLosses
from adapt_recipes.planning import Plan, make_plan, show
from adapt_recipes.planning.memory import Memory
from adapt_recipes.planning.plan import TaskPlan
from adapt_recipes.signals.rewards import Uncertainty

ROOT = Path(__file__).parents[1]
KEYS = """
    tasks targets available_supervised_tokens budget_tokens steps tokens parameters memory_bytes checkpoint_bytes
    mixture_updates mixture_cost_steps probe_tokens validation_tokens total_tokens exact
    exact_steps warnings
"""
TASK_KEYS = "examples dropped left_out supervised_tokens share mean_supervised_tokens mean_tokens probability"
TASK_KEYS += " effective_probability epochs"
COMMON = [
    "~tasks.noise",
    "tasks=adapt_recipes.data.jsonl_tasks",
    "tokenizer.supervise_end=true",
    "max_seq_len=64",
    "model.num_layers=1",
    "model.embed_dim=16",
    "model.intermediate_dim=24",
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current folder; tokenised tasks are shared between tests, and so are the tasks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    (tmp_path / "uneven").mkdir()
    answers = {"a": (12, "x"), "b": (20, "yes yes"), "c": (30, "12"), "d": (16, "it is")}
    for task, (num_rows, answer) in answers.items():  # of many lengths; two of them are too long
        rows = [{"prompt": task * (i % 9) + str(i), "response": answer * (1 + i % 3)} for i in range(num_rows)]
        rows += [{"prompt": "x" * 99, "response": "y"}] * (2 if task == "b" else 0)
        (tmp_path / "uneven" / f"{task}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "even").mkdir()
    for task in "abc":  # whatever is drawn, a step and a probe read as much
        rows = [{"prompt": f"{task}{i:02}", "response": f"{i % 7}{task}"} for i in range(24)]
        (tmp_path / "even" / f"{task}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    before = list(sys.path)
    yield tmp_path
    sys.path[:] = before


def config_of(config: str, *overrides: str, recipe: str | None = None) -> Any:
    path = ROOT / "yaml" / f"tiny_{config}.yaml"
    schema = shipped.schema(shipped.recipe_file(recipe or str(shipped.recipe_of(path))))
    return load(schema, path, both([*COMMON, f"output_dir=run_{config}"], overrides))


def both(common: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """Overrides, of which the second have their way."""
    given = {override.partition("=")[0] for override in overrides}
    return [*(each for each in common if each.partition("=")[0] not in given), *overrides]


def run(config: Any) -> dict[str, Any]:
    """The summary of a real run."""
    assert sys.modules[type(config).__module__].main(config) == 0  # type: ignore[attr-defined]
    return json.loads((Path(config.output_dir) / "summary.json").read_text())


def assert_same(plan: Plan, summary: dict[str, Any]) -> None:
    for key in (
        "steps",
        "tokens",
        "budget_tokens",
        "probe_tokens",
        "validation_tokens",
        "total_tokens",
        "mixture_updates",
    ):
        assert getattr(plan, key) == summary[key], key


UNEVEN = ["tasks.path=uneven", "tasks.validation_examples=3", "tasks.no_validation=[d]", "batch_size=7"]
EVEN = [
    "tasks.path=even",
    "tasks.validation_examples=6",
    "batch_size=4",
    "budget.tokens=144",
    "tasks.max_epochs_per_task=1000",
]


# ---- a mixture that stays as it is


@pytest.mark.parametrize(
    ("config", "recipe", "overrides"),
    [
        ("uniform", None, ["budget.epochs=2.3", "validate_every=4"]),
        ("uniform", None, ["budget.epochs=1.2", "tasks.test_examples=5"]),
        ("uniform", None, ["budget.epochs=1.2", "tasks.max_epochs_per_task=1.3"]),
        ("uniform", None, ["budget.epochs=1.2", "tasks.targets=[b]", "tasks.test_examples=2"]),
        pytest.param("proportional", None, ["budget.tokens=99", "validate_every=0"], marks=pytest.mark.slow),
        pytest.param("temperature", None, ["budget.fraction=0.9", "seed=3"], marks=pytest.mark.slow),
        ("fixed", None, ["mixture.weights={a: 7, b: 1, c: 2, d: 0}", "budget.epochs=1.5"]),
        ("uniform", "mos_full_finetune", ["sampling=dataset", "budget.epochs=1.5", "seed=5"]),
        ("uniform", "sft_full_finetune", ["sampling=example", "budget.epochs=1.5", "seed=5"]),
        ("uniform", "mos_full_finetune", ["sampling=dataset", "budget.epochs=1.5", "tasks.max_epochs_per_task=1.6"]),
        pytest.param(
            "uniform", "adapt_full_finetune", ["budget.epochs=1.1", "mixture_update_every=2"], marks=pytest.mark.slow
        ),
        pytest.param("adapt_planned", None, ["budget.tokens=60", "mixture_update_every=0"], marks=pytest.mark.slow),
        # It reads its pool once all the same.
        ("mos_diff", None, ["budget.tokens=60", "mixture_update_every=50", "reward.examples=fixed"]),
    ],
)
def test_exact(config: str, recipe: str | None, overrides: list[str]) -> None:
    loaded = config_of(config, *UNEVEN, *overrides, recipe=recipe)
    plan, summary = make_plan(loaded), run(loaded)
    assert plan.exact and plan.mixture_updates == 0
    assert (plan.mixture_cost_steps > 0) == (config == "mos_diff")
    assert_same(plan, summary)
    spent = {name: round(task.epochs * task.supervised_tokens) for name, task in plan.tasks.items()}
    assert spent == summary["task_tokens"]
    assert {name: task.probability for name, task in plan.tasks.items()} == summary["probabilities"]
    log = map(json.loads, Path(loaded.output_dir, "log.jsonl").read_text().splitlines())
    start = next(line for line in log if line["event"] == "mixture")
    effective = {name: task.effective_probability for name, task in plan.tasks.items()}
    assert effective == start.get("effective_probabilities", start["probabilities"])
    max_epochs = loaded.tasks.max_epochs_per_task
    assert (effective != summary["probabilities"]) == (max_epochs is not None)
    assert max_epochs is None or all(task.epochs <= max_epochs for task in plan.tasks.values())


def test_the_test_split_is_part_of_the_estimate(folder: Path) -> None:
    """Its longest example may be the longest of all, and its size that of the largest micro-batch that is only read."""
    (folder / "tested.py").write_text(
        "from adapt_recipes.data import RawTask\n"
        "def row(prompt):\n"
        "    return [{'role': 'user', 'content': prompt}, {'role': 'assistant', 'content': 'x'}]\n"
        "def tasks(length, number):\n"
        "    rows = [row(f'{i:02}') for i in range(20)]\n"
        "    return [RawTask('a', rows, rows[:2], test=[row('y' * length)] * number)]\n"
    )

    def memory(length: int, number: int, *overrides: str) -> Memory:
        source = ["tasks=tested.tasks", f"tasks.length={length}", f"tasks.number={number}", "budget.tokens=20"]
        return make_plan(config_of("uniform", *source, *overrides)).memory_bytes

    assert memory(40, 1).activations > 2 * memory(2, 1).activations
    alone = "batch_size=1"
    assert memory(2, 200, alone).total > memory(2, 1, alone).total


@pytest.mark.slow
@pytest.mark.parametrize("sampling", ["tokens", "example", "dataset"])
def test_a_run_knows_about_how_many_steps_it_makes(sampling: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As it starts, without drawing: to a few per cent where it is long, whether p is of tokens or of steps."""
    overrides = [f"sampling={sampling}", "budget.epochs=9", "batch_size=4"]
    summary = run(config_of("uniform", *both(UNEVEN, overrides), recipe="mos_full_finetune"))
    said = re.search(r"about ([\d,]+) steps of 4 examples", capsys.readouterr().out)
    assert said is not None
    assert int(said[1].replace(",", "")) == pytest.approx(summary["steps"], rel=0.1)


def test_tasks_by_hand() -> None:
    plan = make_plan(config_of("uniform", *UNEVEN, "budget.tokens=50"))
    rows = {name: Path(f"uneven/{name}.jsonl").read_text().splitlines() for name in "abcd"}
    held = {"a": 3, "b": 3, "c": 3, "d": 0}
    assert [*plan.tasks] == [*"abcd"]
    for name, task in plan.tasks.items():
        assert task.dropped == (2 if name == "b" else 0)
        assert task.examples == len(rows[name]) - held[name] - task.dropped
        assert task.supervised_tokens == round(task.examples * task.mean_supervised_tokens)
        assert task.share == task.supervised_tokens / plan.available_supervised_tokens
        assert task.probability == 0.25
    # Of "d" nothing is held. An answer's bytes and its end; all of these, less the last: that is only predicted.
    answers = [len(json.loads(row)["response"]) + 1 for row in rows["d"]]
    assert plan.tasks["d"].mean_supervised_tokens == sum(answers) / 16
    lengths = [len(json.loads(row)["prompt"]) + answer - 1 for row, answer in zip(rows["d"], answers, strict=True)]
    assert plan.tasks["d"].mean_tokens == sum(lengths) / 16
    assert sum(task.share for task in plan.tasks.values()) == pytest.approx(1)
    assert sum(task.epochs * task.supervised_tokens for task in plan.tasks.values()) == pytest.approx(50)


# ---- a mixture that is learned

LEARNED = {
    "adapt": ["probe.examples=3"],
    "adapt, backward": ["probe.estimator=backward"],
    "adapt, exact": ["probe.exact_lookahead=true"],
    "adapt, on validation": ["probe.separate_batches=false"],
    # What has the weight 0 is read but not computed in the backward pass, which a plan does not know.
    "adapt, targets": ["tasks.targets=[b]", "tasks.target_weights={a: 1, b: 2, c: 1}"],
    "adapt, targets, on validation": [
        "tasks.targets=[b]",
        "tasks.target_weights={a: 1, b: 2, c: 1}",
        "probe.separate_batches=false",
    ],
    "adapt_ksteps": ["probe.steps=3"],
    "adapt_ksteps, backward": ["probe.estimator=backward"],
    "adapt_ksteps, the last layer": ["probe.last_layers=1"],
    "adapt_ksteps, on validation": ["probe.separate_batches=false"],
    "adapt_planned": ["mixture.measure_after=0.0"],
    "adapt_forecast": [],
    "pike": [],
    "grape": [],
    "dynamix": [],
    "mos_cossim": [],
    "mos_diff": [],
    "mos_diff, fixed": ["reward.examples=fixed", "reward.tokens=answer"],
    "multidds": [],
    "multiuat": ["validate_every=6"],
    "hbo": [],
    "dro": [],
    "exp3": [],
}


@pytest.mark.parametrize("name", slow_but(("adapt", "mos_diff"), LEARNED))
def test_learned(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all examples are alike a run has as many steps and reads as much, however its mixture has changed.

    And an update's work is that of the forwards it makes, counted 3 where they are to have a backward.
    """
    overrides = both(["mixture_update_every=3", "probe.examples=2"], LEARNED[name])
    config = config_of(name.partition(",")[0], *EVEN, *overrides)
    plan = make_plan(config)
    work = []
    forward = TokenLosses.forward

    def counted(model: TokenLosses, tokens: torch.Tensor, *arguments: Any) -> torch.Tensor:
        if not model.training:  # probes and validation
            work.append(tokens.numel() * (3 if torch.is_grad_enabled() else 1))
        return forward(model, tokens, *arguments)

    monkeypatch.setattr(TokenLosses, "forward", counted)
    summary = run(config)
    assert_same(plan, summary)
    assert plan.mixture_updates == (summary["steps"] - 1) // config.mixture_update_every > 0
    assert not plan.exact
    (length,) = {task.mean_tokens for task in plan.tasks.values()}
    validations = 2 + ((plan.steps - 1) // config.validate_every if config.validate_every else 0)
    work_of_validation = validations * 18 * length
    assert (sum(work) - work_of_validation) / (3 * plan.tokens / plan.steps) == pytest.approx(plan.mixture_cost_steps)


def test_a_schedule_shows_its_first_stage() -> None:
    stages = "[{share: 0.5, weights: {a: 2, b: 1, c: 1}}, {share: 0.5, weights: {a: 0, b: 1, c: 1}}]"
    plan = make_plan(config_of("staged", *EVEN, f"mixture.stages={stages}"))
    assert [task.probability for task in plan.tasks.values()] == [0.5, 0.25, 0.25]
    assert plan.mixture_updates > 0 and plan.mixture_cost_steps == 0 and not plan.exact


UNIFORM = ["mixture=adapt_recipes.mixture.uniform", "~mixture.prior", "~mixture.form", "~reward"]


@pytest.mark.parametrize("overrides", [[], UNIFORM], ids=["hbo", "uniform"])
def test_levels(overrides: list[str]) -> None:
    """What they read, where all examples are alike, also where nothing else learns."""
    few = ["budget.tokens=100", "tasks.max_epochs_per_task=null", "mixture_update_every=3", "probe.examples=2"]
    config = config_of("hbo", *both(EVEN, [*few, "levels={number: 2, examples: 4}", *overrides]))
    plan, summary = make_plan(config), run(config)
    assert_same(plan, summary)
    assert plan.mixture_updates >= 2 and not plan.exact
    # 3 tasks of 18 examples with 3 supervised tokens each: all of them once, and some at every update.
    of_update = 3 * 3 * (2 * 4 + (0 if overrides else 2))
    assert plan.probe_tokens == 3 * 3 * 18 + plan.mixture_updates * of_update
    memory = [make_plan(config_of("hbo", *both(EVEN, [*few, *more]))).memory_bytes for more in ([], ["levels={}"])]
    assert memory[0].activations < memory[1].activations, "the first reads all training examples"


def test_levels_of_unlike_examples_read_about_as_much_as_planned() -> None:
    few = ["budget.epochs=0.9", "mixture_update_every=2", "probe.examples=2", "levels={number: 2, examples: 3}"]
    config = config_of("hbo", *both(UNEVEN, few))
    plan, summary = make_plan(config), run(config)
    assert plan.probe_tokens == pytest.approx(summary["probe_tokens"], rel=0.2)
    show(plan, config, num_processes=1, console=Console(file=(out := io.StringIO()), width=200))
    assert f"mixture updates read about {plan.probe_tokens:,} supervised tokens" in out.getvalue()


@pytest.mark.parametrize("name", slow_but(["dro"], ["dro", "mos_diff", "adapt", "adapt_ksteps"]))
def test_steps_of_tokens_are_exact_with_a_learned_mixture(name: str) -> None:
    """And so is what its updates and validations read; training reads other tokens, as it draws other examples."""
    size = ["batch_size=null", "batch_tokens=50", "budget.epochs=1.0"]
    config = config_of(name, *both(UNEVEN, size), "mixture_update_every=2", "probe.examples=2")
    plan, summary = make_plan(config), run(config)
    assert plan.exact_steps and not plan.exact
    for key in ("steps", "budget_tokens", "probe_tokens", "validation_tokens", "mixture_updates"):
        assert getattr(plan, key) == summary[key], key
    assert plan.steps == -(-plan.budget_tokens // 50) and plan.mixture_updates >= 5
    (warning,) = (each for each in plan.warnings if each.startswith("batch_tokens"))
    assert warning.endswith(f"expect {plan.steps} steps")


def test_memory_of_a_step_of_tokens_is_that_of_as_many_of_the_shortest_answer() -> None:
    """Here two tokens, an "x" and its end; the micro-batch bounds it all the same."""

    def memory(*overrides: str) -> Memory:
        small = ["tasks.max_epochs_per_task=null", "budget.tokens=60", "micro_batch_tokens=10000"]
        return make_plan(config_of("uniform", *both(both(UNEVEN, small), overrides))).memory_bytes

    assert memory("batch_size=null", "batch_tokens=8") == memory("batch_size=4")
    assert memory("batch_size=null", "batch_tokens=9") == memory("batch_size=5") != memory("batch_size=4")
    assert memory("batch_size=null", "batch_tokens=5000") == memory("batch_size=30"), "no more than the budget"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adapt", "hbo", "mos_diff"])
def test_learned_of_unlike_examples(name: str) -> None:
    """With a mixture that learns next to nothing a run is the planned one, and each update reads other examples."""
    slow = ["mixture.form=paper", "mixture.prior=uniform", "mixture.learning_rate=1.0e-30"]
    slow = ["mixture.meta_lr=1.0e-30"] if name == "adapt" else slow
    overrides = ["budget.epochs=0.9", "mixture_update_every=1", "probe.examples=2", *slow]
    config = config_of(name, *UNEVEN, *overrides)
    plan, summary = make_plan(config), run(config)
    assert len(set(summary["probabilities"].values())) == 1 and plan.mixture_updates > 5
    assert_same(plan, summary)
    spent = {name: round(task.epochs * task.supervised_tokens) for name, task in plan.tasks.items()}
    assert spent == summary["task_tokens"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "per_token"),
    [
        ("adapt", 2),
        ("adapt_ksteps", 15),
        ("pike", 1),
        ("grape", 2),
        ("dynamix", 5 / 3),
        ("adapt_planned", 1 / 3),
        ("mos_diff", 2 / 3),
        ("hbo", 1),
        ("multidds", 2),
    ],
)
def test_the_cost_of_an_update_is_that_of_the_docs(config: str, per_token: float) -> None:
    """In docs/mixtures.md, in steps for r = tokens that a probe reads over tokens of a step."""
    plan = make_plan(config_of(config, *EVEN, "mixture_update_every=3", "probe.examples=2"))
    r = 2 * 3 * plan.tasks["a"].mean_tokens / (plan.tokens / plan.steps)
    assert plan.mixture_cost_steps / plan.mixture_updates == pytest.approx(per_token * r)


# ---- the command


def command(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """(exit status, standard output, standard error) of `tune plan`."""
    status = 0
    try:
        commands.plan(words)
    except SystemExit as exit:
        status = int(exit.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def plain(config: str, *overrides: str) -> list[str]:
    return ["--config", str(ROOT / "yaml" / f"tiny_{config}.yaml"), *both(COMMON, overrides)]


def test_a_long_phase_is_said_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "PHASE_SECONDS", 0.001)
    status, out, err = command(capsys, "sft_full_finetune", *plain("uniform", *EVEN))
    assert status == 0 and "budget: " in out
    said = {line.partition(":")[0] for line in err.splitlines()}
    assert {"drawing examples", "estimating memory"} & said
    assert said <= {"reading the recipe", "drawing examples", "estimating memory"}


def test_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    make = Uncertainty.__init__

    @wraps(make)
    def say_so(self: Uncertainty, **given: Any) -> None:
        print("a component is made")
        make(self, **given)

    monkeypatch.setattr(Uncertainty, "__init__", say_so)
    words = plain("multiuat", *EVEN, "mixture_update_every=3", "probe.examples=2")
    status, out, err = command(capsys, "mos_full_finetune", *words, "--json")
    plan = json.loads(out)
    assert status == 0 and [*plan] == KEYS.split()
    assert all([*task] == TASK_KEYS.split() for task in plan["tasks"].values())
    assert [*plan["memory_bytes"]] == ["parameters", "gradients", "optimizer", "activations", "mixture"]
    assert plan == json.loads(json.dumps(make_plan(config_of("multiuat", *words[2:])).to_dict()))
    assert "a component is made" in err  # what components print does not come between


@pytest.mark.slow
@pytest.mark.parametrize("terminal", [True, False])
def test_a_spinner_is_for_a_terminal_alone(folder: Path, terminal: bool) -> None:
    """On stderr: what a script reads from stdout stays one JSON object."""
    words = ["sft_full_finetune", *plain("uniform", *UNEVEN, "budget.tokens=60"), "--json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm"}
    read, write = pty.openpty() if terminal else os.pipe()
    with subprocess.Popen(
        [sys.executable, "-m", "tune_cli_ext", "plan", *words], env=environment, stdout=subprocess.PIPE, stderr=write
    ) as process:
        os.close(write)
        said = b""
        with contextlib.suppress(OSError):  # how a terminal ends that nobody has open any more
            while part := os.read(read, 4096):
                said += part
        assert process.stdout is not None
        assert json.loads(process.stdout.read())["steps"] > 0
    os.close(read)
    assert (b"\x1b" in said) == terminal and (b"reading the recipe" in said or not terminal), said
    doings: list[str] = []  # the others may be over before they are shown
    make_plan(config_of("uniform", *UNEVEN, "budget.tokens=60"), say=doings.append)
    assert doings == ["reading tasks", "drawing examples", "estimating memory"]


@pytest.mark.slow
def test_processes_share_memory_alone(capsys: pytest.CaptureFixture[str]) -> None:
    def planned(*words: str) -> dict[str, Any]:
        status, out, err = command(capsys, *words)
        assert status == 0, err
        return json.loads(out)

    words = ["sft_full_finetune", *plain("uniform", *both(UNEVEN, ["budget.tokens=60", "batch_size=8"])), "--json"]
    one, four = planned(*words), planned("--nproc_per_node", "4", *words)
    assert four == planned("--nnodes=2", *words, "--nproc-per-node", "2")
    memory = {
        name: [plan.pop("memory_bytes")[name] for plan in (dict(one), dict(four))] for name in one["memory_bytes"]
    }
    assert {k: v for k, v in one.items() if k != "memory_bytes"} == {
        k: v for k, v in four.items() if k != "memory_bytes"
    }
    for name in ("parameters", "gradients", "optimizer"):
        whole, share = memory[name]
        assert whole / 4 <= share < whole / 2


@pytest.mark.slow
def test_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    words = plain("adapt", *EVEN, "mixture_update_every=3", "probe.examples=2")
    status, out, _ = command(capsys, "adapt_full_finetune", *words, "--nproc_per_node", "2")
    plan = make_plan(config_of("adapt", *words[2:]), num_processes=2)
    assert status == 0
    assert f"in about {plan.steps} steps that read {plan.tokens} tokens" in out
    assert f"memory of each of 2 processes: {plan.memory_bytes.total / 1e6:.1f} MB (parameters" in out
    assert f"mixture: {plan.mixture_updates} updates; costs as much as about {plan.mixture_cost_steps:.1f} steps" in out
    assert out.startswith("adapt_full_finetune: strategy adapt, on cpu in fp32\n")
    assert f"read about {plan.probe_tokens} supervised tokens more, validation and test about" in out
    assert "starting probabilities" in out and "\nwarning: mixture updates, validation and test would read" in out
    for name, task in plan.tasks.items():
        (row,) = (line.split() for line in out.splitlines() if line.split()[:1] == [name])
        assert row[1:4] == [str(task.examples), "0", str(task.supervised_tokens)]


LONG = ["dialogue generation, many turns", "question answering, no context", "summarisation of long articles"]


class LongConfig:
    """As far as it is shown."""

    __module__ = "sft_full_finetune"
    strategy, device, dtype, keep_checkpoints, keep_best = "uniform", None, "bf16", 1, None


def long_plan(**changes: Any) -> Plan:
    """Of tasks with names of 30 characters and counts of seven digits."""
    numbers = {"share": 1.0, "mean_supervised_tokens": 1234.5, "mean_tokens": 2345.6}
    numbers |= {"probability": 1.0, "effective_probability": 1.0}
    counts = {"examples": 1_234_567, "dropped": 2_345_678, "supervised_tokens": 345_678_901}
    tasks = {
        name[:30]: TaskPlan(**counts, left_out=LeftOut(too_long=2_345_678), **numbers, epochs=10.25) for name in LONG
    }
    few = Memory(parameters=10**9, gradients=10**9, optimizer=2 * 10**9, activations=10**9, mixture=0)
    plan = Plan(
        tasks=tasks,
        targets={"mmlu": {"validation": 64, "test": 32}},
        available_supervised_tokens=61_536,
        budget_tokens=184_608,
        steps=1234,
        tokens=1_234_567,
        parameters=135_000_000,
        memory_bytes=few,
        checkpoint_bytes=1_600_000_000,
        mixture_updates=0,
        mixture_cost_steps=0.0,
        probe_tokens=1000,
        validation_tokens=2000,
        total_tokens=1_243_567,
        exact=True,
        exact_steps=True,
        warnings=["task 'dialogue generation, many turn' would be read 10.2 times over, more than 4"],
    )
    return replace(plan, **changes)


def shown(plan: Plan, *, width: int, num_processes: int = 1) -> str:
    """On a terminal so wide, without its colours."""
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None, highlight=False)
    show(plan, LongConfig(), num_processes=num_processes, console=console)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [80, 100, 120])
def test_names_give_way_and_numbers_do_not(width: int) -> None:
    lines = shown(long_plan(), width=width).splitlines()
    rows = [line for line in lines if line.rstrip().endswith("! 10.2")]
    means = "  100.0%   1,234.5   2,345.6" if width >= 100 else ""
    numbers = f" 1,234,567  2,345,678  345,678,901{means}    1.000  ! 10.2"
    assert len(rows) == len(LONG) and max(map(len, rows)) <= width
    for name, row in zip(LONG, rows, strict=True):
        assert row.rstrip().endswith(numbers)
        assert row.split("1,234,567")[0].strip().rstrip("…") in name
        assert name[:16] in row and (width < 120 or name[:30] in row)
    (header,) = (line for line in lines if "examples" in line and "start p" in line)
    assert ("sup./ex." in header) == bool(means) and "…" not in header


def test_what_is_said_of_a_plan() -> None:
    lines = shown(long_plan(), width=300).splitlines()
    assert lines[0] == "sft_full_finetune: strategy uniform, on the best device there is in bf16"
    table_ends = lines.index("! read more than 4 times, or never")
    assert lines[table_ends - 1] == "target, never trained: mmlu (validation 64 examples, test 32 examples)"
    assert lines[table_ends + 1 :] == [
        "budget: 184,608 supervised tokens (3.0 times the 61,536 there are), in 1,234 steps that read 1,234,567 tokens",
        "model: 135,000,000 parameters",
        "disk: a checkpoint takes 1.6 GB; while one is saved there are keep_checkpoints + 1, 3.2 GB",
        "memory of the process: 5.0 GB (parameters 1.0 GB, gradients 1.0 GB, optimizer 2.0 GB, activations 1.0 GB, "
        "mixture 0.0 MB), plus kernel and CUDA overhead (1 to 2 GB on a GPU)",
        "mixture: fixed",
        "mixture updates read 1,000 supervised tokens more, validation and test 2,000; 1,243,567 tokens read in all",
        "warning: task 'dialogue generation, many turn' would be read 10.2 times over, more than 4",
    ]
    learned = {
        "exact": False,
        "exact_steps": False,
        "mixture_updates": 1,
        "mixture_cost_steps": 1.0,
        "steps": 1,
        "budget_tokens": 6154,
    }
    lines = shown(long_plan(**learned, tasks={}, warnings=[]), width=300).splitlines()
    assert "mixture: 1 update; costs as much as about 1.0 steps (50.0% of the time)" in lines
    assert any(
        "6,154 supervised tokens (10.0% of the 61,536 there are), in about 1 step that" in line for line in lines
    )
    assert lines[-1] == "the mixture is learned: steps and epochs assume that it stays at its starting probabilities"
    certain = shown(long_plan(**learned | {"exact_steps": True}, tasks={}, warnings=[]), width=300).splitlines()
    assert any("in 1 step that read about 1,234,567 tokens" in line for line in certain)
    assert any(line.startswith("mixture updates read 1,000 supervised tokens more, validat") for line in certain)
    assert certain[-1].startswith("the mixture is learned: steps are exact; tokens and epochs assume that it stays")
    assert not any(line.startswith("!") for line in lines), "no legend of a mark that is not there"


def test_warnings_have_a_colour() -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system="standard", highlight=False)
    show(long_plan(), LongConfig(), num_processes=1, console=console)
    out = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b[33mwarning: task" in out and "\x1b[33m! read more" in out


@pytest.mark.parametrize("terminal", [True, False])
def test_lines_are_broken_between_words_on_a_terminal_alone(terminal: bool) -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=terminal, color_system=None, highlight=False)
    show(long_plan(), LongConfig(), num_processes=1, console=console)
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    assert (max(map(len, lines)) <= 80) == terminal
    words = set(" ".join(shown(long_plan(), width=300).splitlines()).split())
    assert all(word in words for line in lines for word in line.split() if "…" not in word and "─" not in word)


@pytest.mark.slow
def test_a_recipe_of_ones_own_in_a_process_of_its_own(folder: Path) -> None:
    """As a user types it, from a folder of theirs; without memory for the weights, which would be 5 GB."""
    source = (ROOT / "recipes" / "sft_full_finetune.py").read_text()
    (folder / "helper.py").write_text("")
    (folder / "mine.py").write_text(source.replace("import torch\n", "import helper\nimport torch\n", 1))
    shipped = str(ROOT / "yaml" / "llama3_2_1b_uniform_10pct.yaml")
    overrides = [
        "tokenizer=adapt_recipes.data.ByteTokenizer",
        "~tokenizer.path",
        "tasks=adapt_recipes.data.jsonl_tasks",
    ]
    overrides += ["~tasks.types", "tasks.path=even", "max_seq_len=64"]
    overrides += ["tasks.validation_examples=2", "tasks.test_examples=2"]
    program = "import re, sys; sys.argv[0] = 'tune'; import tune_cli_ext; tune_cli_ext.hook()\n"
    program += "from torchtune._cli.tune import main; main()\n"
    # Not `ru_maxrss`, which begins with what this process has.
    program += "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1], file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", program, "plan", "./mine.py", "--json", "--config", shipped, *overrides],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["parameters"] == 1_235_814_400 and plan["exact"]
    assert plan["memory_bytes"]["gradients"] == 4 * plan["parameters"]
    assert int(done.stderr.split()[-1]) < 2e6  # kB
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["adapt_full_finetun", *plain("adapt")], "did you mean 'adapt_full_finetune'?"),
        (["full_finetune_distributed", "--config", "llama2/7B_full"], "no recipe 'full_finetune_distributed'"),
        (["gone.py", *plain("adapt")], "no recipe 'gone.py'"),
        (["plain.py", *plain("adapt")], "plain.py has no class Config"),
        (["broken.py", *plain("adapt")], "broken.py cannot be imported: ZeroDivisionError"),
        (["small.py", "--config", "small.yaml"], "Config does not inherit TrainConfig, which a plan needs"),
        (["mixture_eval", "--config", "eval_tasks"], "Config does not inherit TrainConfig, which a plan needs"),
        (["adapt_full_finetune", "--config", "tiny_adapd"], "neither a file nor a known name"),
        (["adapt_full_finetune", *plain("adapt", "sede=1")], "unknown key 'sede'; did you mean 'seed'?"),
        (["adapt_full_finetune", *plain("adapt", "tasks.path=nowhere")], "nowhere"),
        (["adapt_full_finetune", *plain("adapt", "seed")], "'seed' is not an override"),
        (["sft_full_finetune", *plain("uniform", *UNEVEN), "--nproc_per_node=0"], "--nproc_per_node: has to"),
        (["sft_full_finetune", *plain("uniform", *UNEVEN), "--nnodes=-1"], "--nnodes: has to be at least 1, not -1"),
        (["sft_full_finetune", *plain("uniform", *UNEVEN), "--nproc_per_node=8"], "7 examples are too few"),
        (["sft_full_finetune", *plain("uniform", *UNEVEN)], "budget.tokens: 38400 is more than"),
        (
            ["sft_full_finetune", *plain("uniform", *EVEN, "mixture=adapt_recipes.mixture.Exp3")],
            "observes 'train_losses', which sft_full_finetune does not measure; it measures nothing",
        ),
        (
            [
                str(ROOT / "recipes" / "mos_full_finetune.py"),
                *plain("uniform", *EVEN, "mixture=adapt_recipes.mixture.Scorer"),
            ],
            "missing key 'reward'",
        ),
        (["mos_full_finetune", *plain("hbo", *EVEN, "mixture=adapt_recipes.mixture.uniform", "~mixture.prior",
          "~mixture.form")], "is unused"),
        (["sft_full_finetune", *plain("uniform", *EVEN, "model.vocab_size=64")], "model.vocab_size: 64 is too small"),
        (["sft_full_finetune", *plain("uniform", *EVEN, "model.num_heads=5")], "model: "),
        (["sft_full_finetune", *plain("uniform", *EVEN, "max_seq_len=4")], "longer than max_seq_len=4"),
        (["sft_full_finetune", *plain("uniform", *EVEN, "model.max_seq_len=8")], "model.max_seq_len: 8 is less than"),
        (["adapt_full_finetune", *plain("adapt", *EVEN, "dtype=pure_bf16")], "pure_bf16 rounds the steps of finite"),
        (["adapt_full_finetune", *plain("dynamix", *EVEN, "dtype=pure_bf16")], "pure_bf16 rounds the steps that the"),
        (["sft_full_finetune", *plain("uniform", *EVEN, "optimizer=plain.Stubborn", "~optimizer.weight_decay")],
         "optimizer: the memory of plain.Stubborn cannot be estimated"),
    ],
)  # fmt: skip
def test_what_cannot_be_planned_ends_in_one_line(
    capsys: pytest.CaptureFixture[str], folder: Path, words: list[str], hint: str
) -> None:
    (folder / "plain.py").write_text(
        "import torch\nclass Stubborn(torch.optim.SGD):\n    def step(self):\n        raise RuntimeError('numbers!')\n"
    )
    (folder / "broken.py").write_text("1 / 0\n")
    (folder / "small.py").write_text(
        "from pydantic.dataclasses import dataclass\n@dataclass(kw_only=True)\nclass Config:\n    seed: int = 0\n"
    )
    (folder / "small.yaml").write_text("seed: 1\n")
    status, out, err = command(capsys, *words)
    assert status == 2 and out == ""
    assert err.startswith("tune plan: error: ") and err.count("\n") == 1 and hint in err, err


@pytest.mark.parametrize("words", [[], ["adapt_full_finetune"], ["adapt_full_finetune", "--config"], ["a", "--jsn"]])
def test_a_command_that_is_not_one(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    status, out, err = command(capsys, *words)
    assert status == 2 and out == "" and err.startswith("tune plan: error: ") and err.count("\n") == 1


# ---- warnings


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "overrides", "warnings"),
    [
        ("fixed", [*UNEVEN, "mixture.weights={a: 1, b: 1, c: 0, d: 0}", "budget.epochs=1"], [
            "task 'a' would be read 10.6 times over, more than 4",
            "task 'c' would never be read: its p is 0",
            "task 'd' would never be read: its p is 0",
        ]),
        ("uniform", both(EVEN, ["budget.tokens=60"]), ["mixture updates, validation and test would read 108"]),
        ("exp3", [*EVEN, "mixture_update_every=99"], ["the mixture would not be updated: every 99 steps of 12"]),
        ("exp3", [*EVEN, "mixture_update_every=0"], ["the mixture would not be updated: never (mixture_update_every)"]),
        ("hbo", [*EVEN, "~reward.tokens", "reward=planned_reward.Mine"], ["reward: Mine has no attribute `gradients`"]),
    ],
)  # fmt: skip
def test_warnings(folder: Path, config: str, overrides: list[str], warnings: list[str]) -> None:
    (folder / "planned_reward.py").write_text(
        "class Mine:\n    reads = ('train',)\n    def __init__(self, *, task_names, model): pass\n"
        "    def __call__(self, *, train): pass\n"
    )
    plan = make_plan(config_of(config, *overrides))
    for warning in warnings:
        assert any(each.startswith(warning) for each in plan.warnings), plan.warnings
    if config == "fixed":  # half of as many tokens as there are goes to "a"
        of_a = plan.tasks["a"].supervised_tokens
        assert plan.tasks["a"].epochs == pytest.approx(plan.available_supervised_tokens / 2 / of_a, abs=3 / of_a)
