"""Every example runs by the command in its docstring, and does what it says.

Commands are shortened. They start where a reader starts them, in the folder above ``examples/``.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import json
import math
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from running import ROOT, Killed, Run, assert_same_run, before, events, load_recipe
from tiers import slow_but
from tiny import NAMES, alone, batched, tiny_examples, tiny_model
from transformers import LlamaConfig, LlamaForCausalLM

from adapt_recipes import data
from adapt_recipes.config import load
from adapt_recipes.mixture import AdaptForecast

EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(path for path in EXAMPLES.rglob("*.py"))
SHORT = ["budget.tokens=512", "validate_every=0", "checkpoint_every=0", "tasks.num_validation_rows=16"]
LEARNING = [*SHORT, "mixture_update_every=2", "probe.examples=4"]


def module(path: Path) -> Any:
    """A Python file as a module, which pydantic looks for by name."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[path.stem])
    return sys.modules[path.stem]


def command(script: Path) -> list[str]:
    """The words of the first command in the docstring of a file."""
    text = (ast.get_docstring(ast.parse(script.read_text()), clean=False) or "").replace("\\\n", " ")
    return shlex.split(next(line for line in text.splitlines() if line.startswith("    ")))


def run(script: str, output_dir: Path, *overrides: str, recipe: str | None = None) -> Run:
    """The command of an example, with more overrides, in this process, to its end; with its recipe, or another."""
    tune, verb, named, option, config, *own = command(EXAMPLES / f"{script}.py")
    assert (tune, verb, option) == ("tune", "run", "--config")
    chosen = recipe or named
    used = module(ROOT / chosen) if chosen.endswith(".py") else load_recipe(chosen)
    words = [*own, *overrides, f"output_dir={output_dir}"]
    # The last one of a key counts.
    last = {word.partition("=")[0]: word for word in words if word not in ("[key=value", "...]")}
    assert used.main(load(used.Config, ROOT / config, [*last.values()])) == 0
    return Run(output_dir, events(output_dir), json.loads((output_dir / "summary.json").read_text()))


def tiny_llama(folder: Path) -> LlamaForCausalLM:
    """A model of transformers with random weights, also written to a folder with the byte tokenizer."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=257, **sizes))
    model.save_pretrained(folder)
    data.ByteTokenizer(supervise_end=False).save(folder)
    return model


def from_folder(folder: Path) -> list[str]:
    """Overrides with which a tiny config begins with the weights of the folder."""
    model = {"_component_": "adapt_recipes.models.decoder_from_folder", "path": str(folder), "max_seq_len": 16}
    return [f"model={json.dumps(model)}", f"checkpointer.checkpoint_dir={folder}"]


@pytest.fixture(autouse=True)
def in_the_checkout(empty_folder: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    # A worktree beside an editable install has the same modules.
    monkeypatch.syspath_prepend(ROOT)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_an_example_is_short_and_begins_with_its_command(script: Path) -> None:
    text = script.read_text()
    line = text.splitlines()[2]
    assert line.startswith(("    tune run ", "    python examples/")) and "examples" in " ".join(command(script))
    assert len(text.splitlines()) <= 110 or script.stem.endswith("_full_finetune")
    # Nothing private: what an example needs is public.
    tree = ast.parse(text)
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    names |= {name.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for name in node.names}
    assert not [name for name in names if name.startswith("_") and not name.startswith("__")]


# ---- a mixture


def test_own_mixture(tmp_path: Path) -> None:
    """The shares are those of its formula, from the losses in the log; NaN is a task that was not drawn."""
    done = run("own_mixture", tmp_path / "run", *LEARNING)
    updates = done.events("mixture")
    losses, floor = dict.fromkeys(updates[0]["probabilities"], 1.0), 0.1
    assert len(updates) > 3
    for update in updates:
        losses |= {name: loss for name, loss in update.get("train_losses", {}).items() if loss is not None}
        total = math.fsum(losses.values())
        expected = {name: (1 - floor) * loss / total + floor / len(losses) for name, loss in losses.items()}
        assert update["probabilities"] == pytest.approx(expected, rel=1e-14)
    assert len({tuple(update["probabilities"].values()) for update in updates}) == len(updates)


@pytest.mark.slow
def test_own_mixture_resumes_bit_for_bit(tmp_path: Path) -> None:
    settings = [*LEARNING, "checkpoint_every=3"]
    run("own_mixture", tmp_path / "whole", *settings)

    def die() -> None:
        raise Killed

    with before("famo", "step", die, after=5), pytest.raises(Killed):
        run("own_mixture", tmp_path / "resumed", *settings)
    assert any(event["event"] == "resume" for event in run("own_mixture", tmp_path / "resumed", *settings).log)
    assert_same_run(tmp_path / "resumed", tmp_path / "whole")


def test_own_mixture_refuses_another_floor(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mixture.floor: has to be above 0 and below 1, not 1"):
        run("own_mixture", tmp_path / "run", *SHORT, "mixture.floor=1")


# ---- a reward


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_own_reward_is_its_formula(power: float) -> None:
    """Against torchtune's own forward on one unpadded example after the other."""
    model, examples = tiny_model(), tiny_examples((3, 1, 0, 2), seed=1)
    reward = module(EXAMPLES / "own_reward.py").Surprise(task_names=NAMES, model=model, power=power)
    of_task: list[list[float]] = [[] for _ in NAMES]
    for task, example in examples:
        probabilities = [math.exp(-loss) for loss in alone(model, example)[0].tolist()]
        of_task[task].append((1 - math.prod(probabilities) ** (1 / len(probabilities))) ** power)
    expected = [sum(values) / len(values) if values else math.nan for values in of_task]
    assert reward(train=batched(examples)).tolist() == pytest.approx(expected, rel=1e-5, nan_ok=True)


def test_own_reward_changes_the_mixture(tmp_path: Path) -> None:
    done = run("own_reward", tmp_path / "run", *LEARNING)
    first, *updates = done.events("mixture")
    assert len(updates) > 2 and all(0 < reward < 1 for update in updates for reward in update["rewards"].values())
    assert updates[-1]["probabilities"] != first["probabilities"]
    assert done.summary["supervised_tokens"] == 512
    with pytest.raises(ValueError, match="reward.power: has to be above 0, not 0"):
        run("own_reward", tmp_path / "other", *SHORT, "reward.power=0")


# ---- tasks


def test_own_tasks_are_right() -> None:
    tasks = module(EXAMPLES / "own_tasks.py").digit_tasks(num_rows=50, num_digits=2)
    assert [task.name for task in tasks] == ["copy", "reverse", "sum"]
    for task in tasks:
        turns = [(prompt["content"], answer["content"]) for prompt, answer in task.conversations]
        assert len(set(turns)) == 50
        for prompt, answer in turns:
            a, b = prompt.removeprefix(f"{task.name} ").removesuffix("=")
            assert answer == {"copy": a + b, "reverse": b + a, "sum": str(int(a) + int(b))}[task.name]
    with pytest.raises(ValueError, match="tasks.num_rows: 101 is more than the 100 numbers of 2 digits"):
        module(EXAMPLES / "own_tasks.py").digit_tasks(num_rows=101, num_digits=2)


def test_own_tasks_are_trained(tmp_path: Path) -> None:
    done = run("own_tasks", tmp_path / "run", *SHORT[:3], "tasks.num_rows=100", "tasks.validation_examples=20")
    tokens = done.summary["task_tokens"]
    # Uniform: each has its share, up to answers.
    assert [*tokens] == ["copy", "reverse", "sum"] and sum(tokens.values()) == 512
    assert all(abs(spent - 512 / 3) <= 5 for spent in tokens.values())
    assert {*done.summary["validation_losses"]} == {*tokens}


# ---- a copied recipe


def scope(tree: ast.Module, line: int) -> str:
    """The class and function of a line of a file, or "docstring", or "imports"."""
    names = []
    nodes: list[ast.stmt] = tree.body
    while found := [node for node in nodes if node.lineno <= line <= (node.end_lineno or 0)]:
        (node,) = found
        if isinstance(node, ast.Import | ast.ImportFrom):
            return "imports"
        if not isinstance(node, ast.ClassDef | ast.FunctionDef):
            break
        names.append(node.name)
        nodes = node.body if isinstance(node, ast.ClassDef) else []
    return ".".join(names) or "docstring"


def test_the_copied_recipe_differs_only_in_its_loss() -> None:
    texts = [
        (folder / f"{name}_full_finetune.py").read_text()
        for folder, name in ((ROOT / "recipes", "sft"), (EXAMPLES, "z_loss"))
    ]
    trees = [ast.parse(text) for text in texts]
    old, new = (text.splitlines() for text in texts)
    changed = set()
    removed: list[str] = []
    for kind, old_from, old_to, new_from, new_to in difflib.SequenceMatcher(None, old, new, False).get_opcodes():
        if kind != "equal":
            changed |= {scope(trees[0], i + 1) for i in range(old_from, old_to)}
            changed |= {scope(trees[1], i + 1) for i in range(new_from, new_to) if new[i].strip()}
            removed += [line.strip() for line in old[old_from:old_to] if scope(trees[0], old_from + 1) == "Recipe.step"]
    assert changed - {"docstring"} <= {"imports", "Config", "Config.__post_init__", "Recipe.step"}
    assert removed == [
        "losses = self.model(batch.tokens, batch.labels)  # (num_supervised,) nats",
        "(losses.sum() * world_size() / step_tokens).backward()",
    ]


def test_without_z_loss_the_copied_recipe_is_the_recipe(tmp_path: Path) -> None:
    """Bit for bit; the shares of a mixture, the budget and the log are the recipe's."""
    run("z_loss_full_finetune", tmp_path / "copied", *SHORT, "z_loss=0.0")
    config = load(
        load_recipe("sft_full_finetune").Config,
        ROOT / "yaml" / "tiny_uniform.yaml",
        [*SHORT, f"output_dir={tmp_path / 'recipe'}"],
    )
    assert load_recipe("sft_full_finetune").main(config) == 0
    assert_same_run(tmp_path / "copied", tmp_path / "recipe")


@pytest.mark.parametrize("z_loss", slow_but([0.1], [0.0, 0.1]))
def test_the_gradient_of_the_copied_recipe_is_that_of_its_formula(tmp_path: Path, z_loss: float) -> None:
    """Against autograd through transformers' model, on the examples of the first step; the logged loss has no z."""
    model = tiny_llama(tmp_path / "base")
    overrides = ["budget.tokens=64", *SHORT[1:], *from_folder(tmp_path / "base"), f"z_loss={z_loss}"]
    (step,) = run("z_loss_full_finetune", tmp_path / "run", *overrides).events("step")

    config = data.TasksConfig(_component_="adapt_recipes.data.toy_tasks", num_validation_rows=16)
    tasks = data.load_tasks(config, tokenizer=data.ByteTokenizer(supervise_end=False), max_seq_len=16)
    sampler = data.TokenSampler(tasks, seed=0)
    uniform = torch.full((len(tasks),), 1 / len(tasks), dtype=torch.float64)
    loss, objective = torch.zeros(2)
    for draw in sampler.draw(uniform, target_tokens=64, max_tokens=64):
        tokens, labels = sampler.example(draw)
        # The answer is one byte, after the prompt.
        logits = model(tokens[None]).logits[0, -1]
        log_z = logits.exp().sum().log()
        loss = loss + (log_z - logits[labels[-1]]) / 64
        objective = objective + (log_z - logits[labels[-1]] + z_loss * log_z**2) / 64
    objective.backward()
    norm = math.sqrt(sum(float(weight.grad.square().sum()) for weight in model.parameters()))
    assert step["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert step["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_the_copied_recipe_refuses_chunks_of_logits(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="loss_chunk_tokens: this recipe needs all logits"):
        run("z_loss_full_finetune", tmp_path / "run", *SHORT, "loss_chunk_tokens=8")


# ---- another trainer


@pytest.fixture
def other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    return module(EXAMPLES / "other_trainers" / "huggingface_trainer.py")


def test_transformers_trainer_makes_the_run_of_the_recipe(
    other: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the same weights, with the same optimizer: the same losses for the mixture, and the same shares."""
    observed: list[list[float]] = []
    update = AdaptForecast.update

    def spied(self: AdaptForecast, *, task_tokens: torch.Tensor, train_losses: torch.Tensor) -> Any:
        observed.append([*train_losses.tolist(), *task_tokens.tolist()])
        return update(self, task_tokens=task_tokens, train_losses=train_losses)

    monkeypatch.setattr(AdaptForecast, "update", spied)
    model = tiny_llama(tmp_path / "base")
    batches = other.train(model, budget_tokens=1900)

    recipe = load_recipe("adapt_full_finetune")
    overrides = [
        "budget.tokens=1900",
        "checkpoint_every=0",
        "validate_every=0",
        *from_folder(tmp_path / "base"),
        "optimizer.lr=0.002",
        "lr_schedule._component_=adapt_recipes.training.schedule.constant",
        "clip_grad_norm=1.0",
        "output_dir=run",
    ]
    assert recipe.main(load(recipe.Config, ROOT / "yaml" / "tiny_adapt_forecast.yaml", overrides)) == 0
    # After 10 and 20 of 30 steps, by the Trainer and then by the recipe.
    assert len(observed) == 4
    for theirs, ours in zip(observed[:2], observed[2:], strict=True):
        assert theirs == pytest.approx(ours, rel=1e-5)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    p = [*summary["probabilities"].values()]
    # The forecast turns deviations of 1e-7 in the losses into 1e-4 in the shares.
    assert batches.mixture.probabilities().tolist() == pytest.approx(p, abs=2e-3)
    assert min(p) < 0.9 / len(p), "the shares have not moved"
    # To one example of each task.
    assert batches.ledger.task_tokens.tolist() == pytest.approx([*summary["task_tokens"].values()], abs=1)
    assert batches.ledger.supervised_tokens == summary["supervised_tokens"] == 1900


def test_transformers_trainer_keeps_the_budget_where_it_ends_within_an_answer(other: Any) -> None:
    """Of the labels that the Trainer reads, exactly so many count."""
    other.MAX_SEQ_LEN = 32
    config = data.TasksConfig(_component_="examples.own_tasks.digit_tasks", num_rows=40, validation_examples=4)
    tasks = data.load_tasks(config, tokenizer=data.ByteTokenizer(), max_seq_len=32)
    for budget_tokens in (199, 200, 201):
        batches = other.Batches(tasks, budget_tokens=budget_tokens)
        counts = [
            (int((batch["labels"] != data.IGNORE_INDEX).sum()), len(batch["supervised_tasks"])) for batch in batches
        ]
        assert sum(count for count, _ in counts) == sum(count for _, count in counts) == budget_tokens
        assert batches.ledger.supervised_tokens == budget_tokens and len(counts) == math.ceil(budget_tokens / 64)
