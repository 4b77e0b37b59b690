"""Whatever a user gets wrong ends in one line that names it, with status 2, no traceback and nothing written."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from running import CONFIGS, RECIPES, ROOT, exit_status
from safetensors.torch import load_file, save_file
from torchtune.models.llama3_2 import llama3_2

from adapt_recipes.data import ByteTokenizer
from adapt_recipes.models import HuggingFaceCheckpointer, huggingface_config

ADAPT, KSTEPS, PLANNED, UNIFORM, ORACLE, COSSIM, DIFF, MOSPEC, MULTIUAT = (
    str(CONFIGS[f"tiny_{name}"])
    for name in (
        "adapt",
        "adapt_ksteps",
        "adapt_planned",
        "uniform",
        "dro_oracle",
        "mos_cossim",
        "mos_diff",
        "mospec_diff",
        "multiuat",
    )
)
LLAMA = "torchtune.models.llama3_2.llama3_2"

Start = Callable[..., int]
Refusal = Callable[..., str]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Start:
    """Runs a recipe in this process as from a command line, into ./out; returns the exit status."""
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # put back what `command_line` sets

    def start(*overrides: str, config: str = PLANNED) -> int:
        recipe = RECIPES.get(Path(config).stem.removeprefix("tiny_"), "adapt_full_finetune")
        return exit_status(recipe, ["--config", config, "output_dir=out", *overrides])

    return start


@pytest.fixture
def refusal(start: Start, capsys: pytest.CaptureFixture[str]) -> Refusal:
    """What the recipe says when it refuses a command line."""

    def refusal(*overrides: str, config: str = PLANNED, writes: bool = False) -> str:
        assert start(*overrides, config=config) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: ")
        assert writes or not Path("out").exists()
        return lines[0].removeprefix("error: ")

    return refusal


# ---- what looks odd and is right


def test_paths_with_spaces_and_letters_of_other_languages(start: Start) -> None:
    """Of the config, the tasks, the run and the model."""
    folder = Path("zwei Wörter")
    (folder / "Daten é").mkdir(parents=True)
    config, run = folder / "tiny_größe 1.yaml", f"output_dir={folder / 'läuft é'}"
    config.write_text(Path(UNIFORM).read_text().replace("resume: true", "resume: false"))
    for name in ("añb c", "d"):
        rows = ({"prompt": f"q{i}", "response": "a"} for i in range(40))
        (folder / "Daten é" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = f"tasks={{_component_: adapt_recipes.data.jsonl_tasks, path: {folder / 'Daten é'}, validation_examples: 2}}"
    words = ["--config", str(config), tasks, "budget.tokens=8", "batch_tokens=4"]
    assert exit_status("sft_full_finetune", [*words, run]) == 0
    summary = json.loads((folder / "läuft é" / "summary.json").read_text())
    assert summary["supervised_tokens"] == 8 and set(summary["task_tokens"]) == {"añb c", "d"}
    # The model that the run has written.
    from_model = f"checkpointer.checkpoint_dir={folder / 'läuft é' / 'model'}"
    assert exit_status("sft_full_finetune", [*words, from_model, "output_dir=ö 2"]) == 0
    assert Path("ö 2", "model").is_dir()


# ---- keys and values


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batchsize=3", "unknown key 'batchsize'; did you mean 'batch_size'?"),
        ("budget.token=3", "unknown key 'budget.token'; did you mean 'tokens'?"),
        ("probe.exampels=3", "unknown key 'probe.exampels'; did you mean 'examples'?"),
        ("model.num_layer=3", f"unknown key 'model.num_layer' for {LLAMA}; did you mean 'num_layers'?"),
        (
            "mixture.florr=0.1",
            "unknown key 'mixture.florr' for adapt_recipes.mixture.AdaptPlanned; did you mean 'floor'?",
        ),
        (
            "tasks.validation_exampls=3",
            "unknown key 'tasks.validation_exampls' for adapt_recipes.data.toy_tasks; "
            "did you mean 'validation_examples'?",
        ),
        (
            "optimizer.learning_rate=1",
            "unknown key 'optimizer.learning_rate' for torch.optim.AdamW; did you mean 'lr'?",
        ),
        ("batch_size=sixteen", 'batch_size: has to be a whole number, not "sixteen"'),
        ("batch_size=true", "batch_size: has to be a whole number, not true"),
        ("batch_size=0", "batch_size: has to be greater than 0, not 0"),
        ("batch_size={a: 1}", 'batch_size: has to be a whole number, not {"a": 1}'),
        ("batch_size.a=1", 'batch_size: has to be a whole number, not {"a": 1}'),
        ("seed=1.5", "seed: has to be a whole number, not 1.5"),
        ("compile=maybe", 'compile: has to be true or false, not "maybe"'),
        ("compile=1", "compile: has to be true or false, not 1"),
        ("strategy=[a]", 'strategy: has to be a string, not ["a"]'),
        ("strategy=null", "strategy: has to be a string, not null"),
        ("~strategy", "missing key 'strategy'"),
        ("dtype=fp16", "dtype: has to be 'fp32', 'bf16' or 'pure_bf16', not \"fp16\""),
        ("budget=5", "budget: has to be a mapping of keys to values, not 5"),
        ("budget.fraction=abc", 'budget.fraction: has to be a number, not "abc"'),
        ("mixture=3", "mixture: has to be a mapping of keys to values, not 3"),
        ("mixture=null", "mixture: has to be a mapping of keys to values, not null"),
        ("probe.steps=0", "probe.steps: has to be greater than 0, not 0"),
        ("probe.validation_weight=0", "probe.validation_weight: has to be greater than 0, not 0"),
        ("probe=[1]", "probe: has to be a mapping of keys to values, not [1]"),
        ("tasks.no_validation=3", "tasks.no_validation: has to be a list, not 3"),
        ("tasks.no_validation=[3]", "tasks.no_validation.0: has to be a string, not 3"),
        ("tasks.noise=maybe", 'tasks.noise: has to be true or false, not "maybe"'),
        ("model.num_layers=2.5", "model.num_layers: has to be a whole number, not 2.5"),
        ("model.num_layers=true", "model.num_layers: has to be a whole number, not true"),
        ("optimizer.lr=abc", 'optimizer.lr: has to be a number, not "abc"'),
        ("micro_batch_tokens=8", "micro_batch_tokens: 8 is less than max_seq_len, 16"),
        ("device=cuda:77", "device: 'cuda:77' cannot be used: "),
        ("device=cude", "device: 'cude' cannot be used: "),
        # the budget
        ("budget.tokens=0", "budget.tokens: has to be greater than or equal to 1, not 0"),
        ("tasks.max_epochs_per_task=0", "tasks.max_epochs_per_task: has to be greater than 0, not 0"),
        ("tasks.max_epochs_per_task=-1", "tasks.max_epochs_per_task: has to be greater than 0, not -1"),
        ("tasks.max_epochs_per_task=.inf", "tasks.max_epochs_per_task: has to be less than or equal to 1000000"),
        ("budget.fraction=0", "budget.fraction: has to be greater than 0, not 0"),
        ("budget.fraction=1.5", "budget.fraction: has to be less than or equal to 1, not 1.5"),
        ("budget.fraction=.nan", "budget.fraction: has to be a finite number, not NaN"),
        ("budget.epochs=.inf", "budget.epochs: has to be a finite number, not Infinity"),
        # the size of a step
        ("~batch_tokens", "batch_size, batch_tokens: give exactly one of them, not none"),
        ("batch_size=null", "batch_size, batch_tokens: give exactly one of them, not none"),
        ("batch_tokens=0", "batch_tokens: has to be greater than 0, not 0"),
        ("batch_tokens=few", 'batch_tokens: has to be a whole number, not "few"'),
        ("~budget.tokens", "budget: give exactly one of fraction, tokens, epochs, not none"),
        # components
        ("~model._component_", "missing key 'model._component_'"),
        ("model._component_=3", "model._component_: has to be a string, not 3"),
        ("model=a b", "model._component_: 'a b' is not an import path like 'package.module.name'"),
        ("model=nowhere.x", "model._component_: 'nowhere.x' cannot be imported: there is no module 'nowhere'"),
        (
            "model=torchtune.modls.x",
            "model._component_: 'torchtune.modls.x' cannot be imported: 'torchtune' has no 'modls'; "
            "did you mean 'models'?",
        ),
        (
            "mixture=adapt_recipes.mixture.Adpat",
            "mixture._component_: 'adapt_recipes.mixture.Adpat' cannot be imported: 'adapt_recipes.mixture' has no "
            "'Adpat'; did you mean 'Adapt'?",
        ),
        ("tasks=adapt_recipes.data", "tasks._component_: 'adapt_recipes.data' is not a class or function"),
        (
            "mixture=torch.optim.AdamW",
            "mixture._component_: 'torch.optim.AdamW' does not take 'task_names', which the recipe passes",
        ),
        ("optimizer.params=[]", "optimizer.params: the recipe passes this itself; remove it"),
        ("~model.vocab_size", f"missing key 'model.vocab_size', which {LLAMA} needs"),
        (
            "mixture=adapt_recipes.mixture.fixed_weights",
            "missing key 'mixture.weights', which adapt_recipes.mixture.fixed_weights needs",
        ),
        # overrides
        ("seed", "'seed' is not an override: write key=value, or ~key to remove a key"),
        ("--seed=3", "'--seed=3' is not an override: write key=value, or ~key to remove a key"),
        ("~seed=3", "'~seed=3' is not an override: write key=value, or ~key to remove a key"),
        ("=3", "'=3' is not an override: write key=value, or ~key to remove a key"),
        ("output_dir=x", "output_dir is given twice on the command line"),
        ("~probe.example", "~probe.example: the config has no such key; did you mean 'examples'?"),
        ("seed=${sed}", "seed: Interpolation key 'sed' not found"),
        ("seed=${", "seed=${: no viable alternative at input '${'"),
        ("seed=???", "seed: Missing mandatory value: seed"),
        ("tasks.no_validation=[a", "tasks.no_validation=[a: did not find expected ',' or ']'"),
    ],
)
def test_an_override(refusal: Refusal, override: str, message: str) -> None:
    assert refusal(override).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, ": no such file; "),
        ("", ": has to be a mapping of keys to values, and is empty"),
        ("- a\n- b\n", ": has to be a mapping of keys to values"),
        ("seed: 1\nbudget: [1\nmodel: 2\n", ", line 3: did not find expected ',' or ']'"),
        ("seed: 1\n\nseed: 2\n", ", line 3: found duplicate key seed"),
        ("budget:\n\ttokens: 1\n", ", line 2: found character that cannot start any token"),
        ("seed: 1\nstrategy: a: b\n", ", line 2: mapping values are not allowed in this context"),
        (b"strategy: \xff\n", ": 'utf-8' codec can't decode byte 0xff"),
    ],
)
def test_a_file_that_is_no_config(refusal: Refusal, text: str | bytes | None, message: str) -> None:
    if text is not None:
        Path("mine.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert refusal(config="mine.yaml").startswith(f"--config mine.yaml{message}")


def test_a_folder_for_a_config(refusal: Refusal) -> None:
    assert refusal(config=".") == "--config .: not a file"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "batch_tokens: 64",
            "batch_size: 64\nbatch_tokens: 64",
            "batch_size, batch_tokens: give exactly one of them, not both",
        ),
        ("batch_tokens: 64", "batchsize: 64", "unknown key 'batchsize'; did you mean 'batch_size'?"),
        ("  tokens: 38400", "  tokns: 38400", "unknown key 'budget.tokns'; did you mean 'tokens'?"),
        ("  num_layers: 2", "  num_layer: 2", f"unknown key 'model.num_layer' for {LLAMA}; did you mean 'num_layers'?"),
        ("seed: 0", "seed: zero", 'seed: has to be a whole number, not "zero"'),
        ("seed: 0", "seed:", "seed: has to be a whole number, not null"),
        ("${max_seq_len}", "${max_sequence}", "model.max_seq_len: Interpolation key 'max_sequence' not found"),
        (
            "  tokens: 38400",
            "  tokens: 38400\n  epochs: 1",
            "budget: give exactly one of fraction, tokens, epochs, not budget.tokens and budget.epochs",
        ),
    ],
)
def test_a_line_in_the_file(refusal: Refusal, old: str, new: str, message: str) -> None:
    text = Path(PLANNED).read_text()
    assert old in text
    Path("mine.yaml").write_text(text.replace(old, new))
    assert refusal(config="mine.yaml") == message


SCORER, REWARDS = "adapt_recipes.mixture.Scorer", "adapt_recipes.signals.rewards"


@pytest.mark.slow
@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize(
    ("config", "overrides", "message"),
    [
        (COSSIM, ["sampling=foo"], "sampling: has to be 'tokens', 'example' or 'dataset', not \"foo\""),
        # the reward
        (
            MOSPEC,
            ["reward.specialist=facts_51"],
            "reward.specialist: 'facts_51' is no task of this run; did you mean 'facts_512'?",
        ),
        (MOSPEC, ["reward.specialist=3"], "reward.specialist: has to be a string, not 3"),
        (
            MULTIUAT,
            ["reward.mc_samples=3"],
            "reward.mc_samples: 3 samples need dropout, and the model has none; leave the key out",
        ),
        (MULTIUAT, ["reward.mc_samples=0"], "reward.mc_samples: has to be at least 1, not 0"),
        (MULTIUAT, ["reward.measure=PreTO"], "reward.measure: 'PreTO'; did you mean 'PreTP'?"),
        (MULTIUAT, ["reward.mesure=PreTP"], f"unknown key 'reward.mesure' for {REWARDS}.Uncertainty; did you mean "),
        (
            COSSIM,
            [f"reward={REWARDS}.CosinSimilarity"],
            f"reward._component_: '{REWARDS}.CosinSimilarity' cannot be imported: '{REWARDS}' has no "
            "'CosinSimilarity'; did you mean 'CosineSimilarity'?",
        ),
        (
            COSSIM,
            ["reward._component_=adapt_recipes.rewards.GradientNorm"],
            f"reward._component_: 'adapt_recipes.rewards.GradientNorm' has moved to '{REWARDS}.GradientNorm'",
        ),
        (COSSIM, ["reward.model=x"], "reward.model: the recipe passes this itself; remove it"),
        (COSSIM, ["~reward._component_"], "missing key 'reward._component_'"),
        (COSSIM, ["reward=mine.Unread"], "reward: Unread has to be callable, with `reads`, a tuple out of train, "),
        (COSSIM, ["reward=mine.Misread"], "reward: Misread reads 'trian'; did you mean 'train'?"),
        (COSSIM, ["reward=torch.nn.Linear"], "reward._component_: 'torch.nn.Linear' does not take 'task_names'"),
        # the mixture, and whether it goes with the reward and the recipe
        (COSSIM, ["mixture.prior=unifrom"], "mixture.prior: 'unifrom'; did you mean 'uniform'?"),
        (COSSIM, ["mixture.form=papr"], "mixture.form: 'papr'; did you mean 'paper'?"),
        (DIFF, ["reward.tokens=al"], "reward.tokens: 'al'; did you mean 'all'?"),
        (DIFF, ["reward.examples=fresch"], "reward.examples: 'fresch'; did you mean 'fresh'?"),
        (COSSIM, ["mixture.floor=1"], "mixture.floor must be a finite number >= 0 and < 1, not 1"),
        (COSSIM, ["mixture.floor=-0.1"], "mixture.floor must be a finite number >= 0 and < 1, not -0.1"),
        (COSSIM, ["mixture.ema_decay=1"], "mixture.ema_decay must be a finite number >= 0 and < 1, not 1"),
        (COSSIM, ["~reward"], "missing key 'reward': mixture: Scorer observes rewards"),
        (COSSIM, ["reward=null"], "missing key 'reward': mixture: Scorer observes rewards"),
        (
            COSSIM,
            ["mixture={_component_: adapt_recipes.mixture.uniform}"],
            "reward: CosineSimilarity is unused: mixture: Static does not observe rewards; remove it",
        ),
        (
            COSSIM,
            ["mixture={_component_: adapt_recipes.mixture.Adapt}", "~reward"],
            "mixture: Adapt observes 'gradient_dots', which mos_full_finetune does not measure; allowed: ",
        ),
        (
            COSSIM,
            ["mixture={_component_: adapt_recipes.mixture.Dynamix}", "~reward"],
            "mixture: Dynamix observes 'step_gains', which mos_full_finetune does not measure; allowed: ",
        ),
        (
            PLANNED,
            [f"mixture={{_component_: {SCORER}}}"],
            "mixture: Scorer observes 'rewards', which adapt_full_finetune does not measure; allowed: ",
        ),
        (
            UNIFORM,
            [f"mixture={{_component_: {SCORER}}}"],
            "mixture: Scorer observes 'rewards', which sft_full_finetune does not measure; it measures nothing",
        ),
        (PLANNED, [f"reward={REWARDS}.GradientNorm"], "unknown key 'reward'"),
        (PLANNED, ["levels.number=3"], "unknown key 'levels'"),
        (KSTEPS, ["probe.last_layers=0"], "probe.last_layers: has to be greater than 0, not 0"),
        (KSTEPS, ["probe.last_layers=3"], "probe.last_layers: 3, but the model has 2 layers"),
        (
            ADAPT,
            ["probe.last_layers=1"],
            "probe.last_layers is unused: mixture: Adapt does not observe kstep_differences, as AdaptKSteps does; ",
        ),
        (COSSIM, ["levels.number=1"], "levels.number: has to be greater than or equal to 2, not 1"),
        (COSSIM, ["levels.number=3", "mixture_update_every=0"], "levels: needs mixture_update_every above 0"),
        (
            COSSIM,
            ["levels.number=3", "tasks.max_epochs_per_task=2"],
            "levels: needs mixture_update_every above 0, and no tasks.max_epochs_per_task",
        ),
        (ORACLE, ["~mixture.reference.facts_64"], "mixture.reference has no loss for the task 'facts_64'; "),
        (ORACLE, ["mixture.reference=asymptot"], "mixture.reference: asymptot is no file; did you mean 'asymptote'?"),
        (ORACLE, ["mixture.form=sofmax"], "mixture.form: 'sofmax'; did you mean 'softmax'?"),
    ],
)
def test_a_reward_and_its_mixture(refusal: Refusal, config: str, overrides: list[str], message: str) -> None:
    assert refusal(*overrides, config=config).startswith(message)


def test_two_budgets_on_the_command_line(refusal: Refusal) -> None:
    message = "budget: give exactly one of fraction, tokens, epochs, not budget.fraction and budget.tokens"
    assert refusal("budget.tokens=5", "budget.fraction=0.5") == message


def test_a_budget_of_more_than_there_is(refusal: Refusal) -> None:
    assert refusal("budget.tokens=100000").startswith("budget.tokens: 100000 is more than the 41000 supervised tokens")
    assert refusal("budget.tokens=100000", "tasks.max_epochs_per_task=2") == (
        "tasks.max_epochs_per_task: 2 epochs of all tasks are 82000 supervised tokens, fewer than the budget of "
        "100000; set 2.44 or more, or lower the budget"
    )


def test_several_processes_that_nobody_has_started(refusal: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert refusal().startswith(
        "WORLD_SIZE is 2 in the environment, without RANK, MASTER_ADDR, MASTER_PORT; start them"
    )


def test_an_output_dir_that_is_a_file(refusal: Refusal) -> None:
    Path("out").write_text("mine")
    assert refusal(writes=True) == f"output_dir: {Path('out').resolve()}: file exists"
    assert Path("out").read_text() == "mine"


# ---- components of one's own


MINE = """
import torch
from torchtune.models.llama3_2 import llama3_2

from adapt_recipes.data import RawTask


def type_error(**arguments):
    return 1 + "1"


def value_error(**arguments):
    raise ValueError("not today")


class Unread:
    def __init__(self, *, task_names, model):
        pass

    def __call__(self, **batches):
        pass


class Misread(Unread):
    reads = ("trian",)


class Given(Unread):
    reads = ("train",)

    def __init__(self, *, task_names, model, rewards):
        self.rewards = [float(reward) for reward in rewards]

    def __call__(self, *, train):
        return torch.tensor(self.rewards, dtype=torch.float64)


class Single(Given):
    def __call__(self, *, train):
        return torch.tensor(self.rewards, dtype=torch.float32)


class Attached(Given):
    def __call__(self, *, train):
        return torch.tensor(self.rewards, dtype=torch.float64, requires_grad=True)


class Listed(Given):
    def __call__(self, *, train):
        return self.rewards


class Drifting:
    observes = ("train_losses",)

    def __init__(self, *, task_names, num_supervised_tokens, budget_tokens, becomes, logs=None):
        self.p = torch.full((len(task_names),), 1 / len(task_names), dtype=torch.float64)
        self.becomes, self.logs = torch.tensor(becomes, dtype=torch.float64), logs

    def probabilities(self):
        return self.p

    def update(self, *, task_tokens, **signals):
        self.p = self.becomes
        return {"own": self.logs} if self.logs else {}

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def infinite(**arguments):
    decoder = llama3_2(**arguments)
    decoder.tok_embeddings.weight.data[ord("Z")] = float("inf")
    return decoder


def overflowing(**arguments):
    def overflow(gradient):
        gradient = gradient.clone()
        gradient[ord("Z")] *= 1e30
        gradient[ord("Z")] *= 1e30
        return gradient

    decoder = llama3_2(**arguments)
    decoder.tok_embeddings.weight.register_hook(overflow)
    return decoder


def tasks(train: str, validation: str):
    def conversations(letters):
        return [
            [{"role": "user", "content": f"{letter}{i}"}, {"role": "assistant", "content": "x"}]
            for i, letter in enumerate(letters)
        ]

    return [RawTask("easy", conversations(32 * "A"), conversations(4 * "A"), memorized=True),
            RawTask("hard", conversations(train), conversations(validation), memorized=True)]
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of the user's, beside the config."""
    Path("mine.py").write_text(MINE)
    monkeypatch.delitem(sys.modules, "mine", raising=False)


@pytest.mark.usefixtures("mine")
def test_a_component_that_raises(refusal: Refusal, start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    message = "model: mine.type_error cannot be built: TypeError: unsupported operand type(s) for +: 'int' and 'str'"
    assert refusal("model=mine.type_error") == f"{message} (ADAPT_TRACEBACK=1 shows where)"
    assert refusal("model=mine.value_error") == "model: not today"
    assert refusal("optimizer.lr=-1") == "optimizer: Invalid learning rate: -1"
    assert refusal("mixture.floor=2") == "mixture.floor must be a finite number >= 0 and < 1, not 2"
    assert refusal("mixture.floor=.nan") == "mixture.floor must be a finite number >= 0 and < 1, not nan"


@pytest.mark.usefixtures("mine")
def test_a_traceback_when_asked_for(
    start: Start, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADAPT_TRACEBACK", "1")
    assert start("model=mine.type_error") == 2
    error = capsys.readouterr().err
    assert "Traceback" in error and 'return 1 + "1"' in error and "model: mine.type_error cannot be built" in error


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import nowhere_at_all", "it needs the package 'nowhere_at_all'"),
        ("def build(:", "SyntaxError: invalid syntax (broken.py, line 1)"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("from torch import nothing_of_the_kind", "ImportError: cannot import name 'nothing_of_the_kind' from 'torch'"),
    ],
)
def test_a_component_whose_module_fails(
    refusal: Refusal, monkeypatch: pytest.MonkeyPatch, source: str, message: str
) -> None:
    Path("broken.py").write_text(source)
    monkeypatch.delitem(sys.modules, "broken", raising=False)
    said = refusal("model=broken.build")
    assert said.startswith(f"model._component_: 'broken.build' cannot be imported: {message}")


# ---- tasks


def write_tasks(**tasks: list[Any]) -> list[str]:
    """Overrides for task files of (prompt, response), or of lines as they are."""
    Path("tasks").mkdir()
    for name, rows in tasks.items():
        lines = [
            row if isinstance(row, str) else json.dumps(dict(zip(("prompt", "response"), row, strict=True)))
            for row in rows
        ]
        Path("tasks", f"{name}.jsonl").write_text("".join(line + "\n" for line in lines))
    return ["tasks={_component_: adapt_recipes.data.jsonl_tasks, path: tasks, validation_examples: 2}"]


GOOD = [(f"q{i}", "a") for i in range(8)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "tasks: tasks/b.jsonl is empty"),
        ([*GOOD, "{"], "tasks/b.jsonl, line 9: not valid JSON"),
        ([*GOOD, '{"prompt": "q", "respons": "a"}'], "tasks/b.jsonl, line 9: no 'response', which"),
        ([*GOOD, ("q", " ")], "tasks/b.jsonl, line 9: message 1: the assistant's answer is empty"),
        (GOOD[:2], "tasks.validation_examples: 2 is too many for task 'b', which has 2 different prompts"),
        ([("q" * 20, "a")], "task 'b': all 1 train examples are longer than max_seq_len=16; the shortest has 21"),
    ],
)
def test_a_task_file(refusal: Refusal, rows: list[Any], message: str) -> None:
    assert refusal(*write_tasks(a=GOOD, b=rows)).startswith(message)


def test_no_task_file(refusal: Refusal) -> None:
    tasks = write_tasks()
    assert refusal(*tasks) == "tasks.path: tasks has no file that ends in .jsonl, .jsonl.gz, .json, .json.gz, .parquet"
    Path("tasks").rmdir()
    assert refusal(*tasks) == "tasks.path: no folder tasks"


def test_no_task_left_to_validate_on(refusal: Refusal) -> None:
    said = refusal(*write_tasks(a=GOOD, b=GOOD), "tasks.no_validation=[a, b]")
    assert said == "tasks.no_validation: it names every task; leave at least one to validate on"


def test_a_type_that_no_task_has(refusal: Refusal) -> None:
    task = {"Categories": ["Translation"], "Definition": "Translate.", "Instances": [{"input": "a", "output": "b"}]}
    Path("tasks").mkdir()
    Path("tasks", "task1.json").write_text(json.dumps(task))
    node = "tasks={_component_: adapt_recipes.data.natural_instructions, path: ., types: [Translaton]}"
    assert refusal(node) == "tasks.types: no task in . is of type 'Translaton'; did you mean 'Translation'?"


def test_some_examples_that_are_too_long_are_counted(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write_tasks(
        a=[*GOOD, *(("q" * length, "a") for length in (15, 16, 17))], b=[(f"p{i}", "a") for i in range(8)]
    )
    assert start(*rows, "batch_size=4", "budget.epochs=1", "probe.examples=2") == 0
    plan = capsys.readouterr().out.partition("budget:")[0].splitlines()
    heads = next(line.split() for line in plan if "dropped" in line)
    assert heads[:3] == ["task", "examples", "dropped"]
    assert [line.split()[2] for line in plan if line.split()[:1] in (["a"], ["b"])] == ["2", "0"]


def test_what_is_left_out_is_in_the_table_the_log_and_the_summary(
    start: Start, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bad rows that are skipped, rows without an answer to learn, leaks, and keys that nobody reads."""
    monkeypatch.setenv("COLUMNS", "150")
    extra = json.dumps({"prompt": "own", "response": "a", "weight": 0, "id": 1})
    leak = json.dumps({"messages": [*turns("q0", "a"), *turns("own", "b")]})
    rows = write_tasks(a=GOOD, b=[*((f"p{i}", "a") for i in range(8)), "{", extra, leak, ("q1", "a"), ("q2", "a")])
    rows += ["tasks.validation_examples=7", "tasks.no_validation=[b]", "batch_size=4", "budget.epochs=1"]
    assert (
        start(
            *rows,
            "tasks.on_bad_rows=skip",
        )
        == 0
    )
    plan = capsys.readouterr().out.partition("budget:")[0].splitlines()
    (head,) = (line.split() for line in plan if "dropped" in line)
    (row,) = (line.split() for line in plan if line.split()[:1] == ["b"])
    left_out = json.loads(Path("out/summary.json").read_text())["left_out"]
    assert head[2:9] == ["dropped", "bad", "rows", "no", "label", "leaks", "context"]
    b = left_out["b"]
    reasons = [b[key] for key in ("bad_rows", "unlabeled", "leaked_examples", "leaked_answers")]
    assert row[2:7] == [str(b["bad_rows"] + b["unlabeled"] + b["leaked_examples"]), *map(str, reasons)]
    assert (b["bad_rows"], b["unlabeled"], b["unused_keys"]) == (1, 1, {"id": 1})
    assert b["leaked_examples"] + b["leaked_answers"] >= 2, "of seven held-out pairs out of eight"
    assert left_out["a"] == dict.fromkeys(b, 0) | {"unused_keys": {}}
    first = json.loads(Path("out/log.jsonl").read_text().splitlines()[0])
    assert first == {"event": "data", "step": 0, "left_out": left_out}
    assert "keys that are not used: id (1 row)" in plan


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def turns(prompt: str, answer: str) -> list[dict[str, str]]:
    return [message("user", prompt), message("assistant", answer)]


# ---- model folders


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    decoder = llama3_2(
        vocab_size=257, num_layers=1, num_heads=2, num_kv_heads=2, embed_dim=16, max_seq_len=16, scale_factor=1,
        intermediate_dim=32, tie_word_embeddings=False,
    )  # fmt: skip
    HuggingFaceCheckpointer(None).save(
        decoder.state_dict(), folder, config=huggingface_config(decoder), tokenizer=ByteTokenizer()
    )
    return folder


def from_folder(folder: Path) -> list[str]:
    return [
        f"model={{_component_: adapt_recipes.models.decoder_from_folder, path: {folder}, max_seq_len: 16}}",
        f"checkpointer.checkpoint_dir={folder}",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("model.norm.weight"), "the folder lacks model.norm.weight"),
        (
            lambda weights: weights.update({"model.layers.1.mlp.up_proj.weight": weights["lm_head.weight"].clone()}),
            "the model has no model.layers.1.mlp.up_proj.weight",
        ),
        (lambda weights: weights.update({"model.odd.weight": weights["lm_head.weight"].clone()}), "has no place in"),
        (
            lambda weights: weights.update({"lm_head.weight": weights["lm_head.weight"][:200].clone()}),
            "lm_head.weight is (200, 16) in the folder and (257, 16) in the model",
        ),
    ],
)
def test_weights_that_do_not_fit(
    refusal: Refusal, model_folder: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    folder = Path("tiny")
    folder.mkdir()
    for file in model_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
    said = refusal(*write_tasks(a=GOOD, b=GOOD[::-1]), *from_folder(folder), "budget.epochs=1")
    assert said.startswith("checkpointer.checkpoint_dir: tiny") and message in said


def test_a_folder_without_a_model(refusal: Refusal) -> None:
    Path("tiny").mkdir()
    said = refusal(*write_tasks(a=GOOD, b=GOOD[::-1]), "checkpointer.checkpoint_dir=tiny", "budget.epochs=1")
    assert said.startswith("checkpointer.checkpoint_dir: there is no tiny/config.json")


# ---- losses and gradients that are not finite


def planted(train: str, validation: str, *more: str) -> list[str]:
    """Overrides for two tasks with a prompt for every letter, of which Z is the fatal one."""
    tasks = f"tasks={{_component_: mine.tasks, train: {train}, validation: {validation}}}"
    return [tasks, "budget.epochs=1", "batch_size=4", "checkpoint_every=1", *more]


EVERY_STEP = "mixture_update_every=1"


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize(
    ("config", "model", "overrides", "message"),
    [
        (UNIFORM, "infinite", planted(20 * "B" + "Z", "B"), "the loss of training example 20 of task 'hard'"),
        (UNIFORM, "infinite", planted(20 * "B", "BBZ"), "the loss of validation example 2 of task 'hard'"),
        (PLANNED, "infinite", planted(20 * "B" + "Z", "B"), "the loss of training example 20 of task 'hard'"),
        (PLANNED, "infinite", planted(20 * "B", "BBZ"), "the loss of validation example 2 of task 'hard'"),
        (PLANNED, "overflowing", planted(20 * "B" + "Z", "B"), "the gradient of training example 20 of task 'hard'"),
        # what an update of the mixture reads
        (
            ADAPT,
            "overflowing",
            planted(20 * "B", "BBZ", EVERY_STEP),
            "the gradient of validation example 2 of task 'hard'",
        ),
        (
            ADAPT,
            "overflowing",
            planted(20 * "B" + "Z" + 20 * "B", "B", EVERY_STEP, "probe.estimator=backward"),
            "the gradient of training examples of task 'hard'",
        ),
    ],
)
def test_what_is_not_finite(refusal: Refusal, config: str, model: str, overrides: list[str], message: str) -> None:
    said = refusal(f"model=mine.{model}", *overrides, config=config, writes=True)
    assert f": {message} is not finite; " in said
    assert_died(said, step=int(said.removeprefix("step ").partition(":")[0]))


def assert_died(said: str, *, step: int) -> None:
    """The log has a last line that says why, and what was whole before the step is there, and no more."""
    end = json.loads(Path("out", "log.jsonl").read_text().splitlines()[-1])
    assert end == {"event": "end", "reason": "error", "step": step, "message": said}
    assert {path.name for path in Path("out").glob("checkpoints/*")} == ({f"step_{step - 1}"} if step > 1 else set())
    assert not Path("out", "summary.json").exists() and not Path("out", "model").exists()


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("Given, rewards: [1]", "reward: Given has to return (2,) float64 on the CPU, not (1,) torch.float64 on cpu"),
        ("Single, rewards: [1, 1]", "Single has to return (2,) float64 on the CPU, not (2,) torch.float32 on cpu"),
        ("Attached, rewards: [1, 1]", "not (2,) torch.float64 on cpu with a gradient"),
        ("Listed, rewards: [1, 1]", "reward: Listed has to return (2,) float64 on the CPU, not list"),
        ("Given, rewards: [1, nan]", "step 2: the reward of task 'hard' is nan; "),
        ("Given, rewards: [inf, 1]", "step 2: the reward of task 'easy' is inf; "),
        ("Given, rewards: [1, -inf]", "step 2: the reward of task 'hard' is -inf; "),
        ("Given, rewards: [1, -2]", "mixture.form: paper needs rewards >= 0 (authors and policy_gradient do not)"),
        ("Given, rewards: [1, -2]", "that of task 'hard' is -2"),
    ],
)
def test_what_is_no_reward(refusal: Refusal, reward: str, message: str) -> None:
    tasks = planted(20 * "B", "B", "mixture_update_every=2")
    said = refusal(f"reward={{_component_: mine.{reward}}}", *tasks, "mixture.form=paper", config=COSSIM, writes=True)
    assert message in said
    assert_died(said, step=2)


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize("config", [PLANNED, COSSIM])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "becomes: [.nan, .5]",
            "Drifting.probabilities() has to be (2,) float64 on the CPU, sum to 1 and have",
        ),
        ("becomes: [.5, .4]", "below 0; it sums to 0.9, and its lowest is 0.4"),
        ("becomes: [1]", "Drifting.probabilities() has to be (2,) float64 on the CPU"),
        ("becomes: [.5, .5], logs: 3", "Drifting.update returned 'own', which is not a tensor of shape () or (2,): 3"),
    ],
)
def test_a_mixture_that_an_update_makes_none(refusal: Refusal, config: str, arguments: str, message: str) -> None:
    mixture = f"mixture={{_component_: mine.Drifting, {arguments}}}"
    without = ["reward=null"] if config == COSSIM else []
    tasks = planted(20 * "B", "B", "mixture_update_every=2")
    said = refusal(mixture, *without, *tasks, config=config, writes=True)
    assert said.startswith("mixture: ") and message in said
    assert_died(said, step=2)


@pytest.mark.usefixtures("mine")
def test_rewards_below_0_that_are_allowed(start: Start) -> None:
    reward = "reward={_component_: mine.Given, rewards: [1, -2]}"
    tasks = planted(20 * "B", "B", EVERY_STEP)
    assert start(reward, *tasks, "mixture.form=policy_gradient", config=COSSIM) == 0
    p = json.loads(Path("out", "summary.json").read_text())["probabilities"]
    assert p["easy"] > 0.5 > p["hard"]


@pytest.mark.usefixtures("mine")
def test_a_base_model_that_is_not_finite(refusal: Refusal) -> None:
    planted_in_pool = planted(20 * "B" + "Z", "B", "seed=3")  # where the pool has it among the first of its task
    said = refusal("model=mine.infinite", *planted_in_pool, "reward.examples=fixed", config=DIFF, writes=True)
    assert said.startswith("step 0: the loss of an example of task 'hard' in the pool is not finite; ")
    assert_died(said, step=0)


# ---- metric loggers


LOGGERS = "torchtune.training.metric_logging"
SHORT = ["budget.tokens=32", "batch_size=16", "mixture_update_every=0", "tasks.num_validation_rows=2"]


def test_a_logger_on_disk(start: Start) -> None:
    node = f"metric_logger={{_component_: {LOGGERS}.DiskLogger, log_dir: '${{output_dir}}/metrics', filename: log.txt}}"
    assert start(*SHORT, node) == 0
    assert "Step 2 | loss:" in Path("out", "metrics", "log.txt").read_text()


def test_a_logger_on_standard_output(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    assert start(*SHORT, f"metric_logger._component_={LOGGERS}.StdoutLogger") == 0
    assert "Step 2 | loss:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("logger", "package"), [("WandBLogger, project: x", "wandb"), ("TensorBoardLogger, log_dir: x", "tensorboard")]
)
def test_a_logger_whose_package_is_missing(
    refusal: Refusal, monkeypatch: pytest.MonkeyPatch, logger: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    said = refusal(*SHORT, f"metric_logger={{_component_: {LOGGERS}.{logger}}}")
    assert said.startswith(f"metric_logger: {LOGGERS}.") and package in said
    gc.collect()  # torchtune's half-built TensorBoardLogger raises when it goes: here, where nobody listens


# ---- as a process


@pytest.mark.parametrize(
    ("recipe", "config"),
    [
        ("adapt_full_finetune", ADAPT),
        pytest.param("mos_full_finetune", COSSIM, marks=pytest.mark.slow),
        pytest.param("sft_full_finetune", UNIFORM, marks=pytest.mark.slow),
    ],
)
def test_a_process(recipe: str, config: str) -> None:
    command = [sys.executable, str(ROOT / "recipes" / f"{recipe}.py"), "--config", config]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, "output_dir=out", "batchsize=3"], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and not Path("out").exists()
    assert done.stderr.splitlines()[-1] == "error: unknown key 'batchsize'; did you mean 'batch_size'?"
    assert "Traceback" not in done.stderr
