"""Two runs that differ in one bit, one field or one event are found to differ, and where."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_benchmarks import ROOT, benchmark
from torch import Tensor

Run = tuple[list[dict[str, Any]], dict[str, Tensor]]  # log and weights


def make_run() -> Run:
    log: list[dict[str, Any]] = []
    for step in (1, 2, 3):
        task_losses = {"a": 0.1 * step, "b": 0.3}
        log.append({"event": "step", "step": step, "loss": 0.1 + step, "task_losses": task_losses, "seconds": step / 7})
        log.append({"event": "validation", "step": step, "losses": {"a": 1.0 / step, "b": None}})
    weights = {"head.weight": torch.linspace(-1, 1, 12).view(3, 4), "scale": torch.ones(2, dtype=torch.bfloat16)}
    return log, weights


def differences(tmp_path: Path, change: Callable[[Run], object], **arguments: Any) -> Any:
    """Of a run and the same run after a change."""
    module = benchmark("same_runs")
    run = make_run()
    for name, (log, weights) in (("old", run), ("new", copy.deepcopy(run))):
        if name == "new":
            change((log, weights))
        (tmp_path / name / "model").mkdir(parents=True)
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in log))
        (tmp_path / name / "summary.json").write_text(json.dumps({"steps": 3, "seconds": 1.0}))
        save_file(weights, tmp_path / name / "model" / "model.safetensors")
    found = module.Differences(**arguments)
    found.add(module.results(tmp_path / "old"), module.results(tmp_path / "new"))
    return found


def test_the_same_but_for_times(tmp_path: Path) -> None:
    found = differences(tmp_path, lambda run: run[0][0].update(seconds=99))
    assert (found.numbers, found.weights, found.forms, found.largest) == ([], [], [], 0)


def test_one_bit_of_a_weight(tmp_path: Path) -> None:
    found = differences(tmp_path, lambda run: run[1]["scale"].view(torch.int16)[1].add_(1))
    (line,) = found.weights
    assert line.startswith(
        "model/model.safetensors, scale: 1 of 2 elements differ between old and new, by up to 0.0078"
    )
    assert not found.numbers and not found.forms and found.largest == 2**-7


def test_negative_zero_is_another_number() -> None:
    found = benchmark("same_runs").Differences()
    found.add({"loss": 0.0, "weight": torch.zeros(3)}, {"loss": -0.0, "weight": -torch.zeros(3)})
    assert found.numbers == ["loss: old 0.0, new -0.0, relative deviation 0"]
    assert found.weights == ["weight: 3 of 3 elements differ between old and new, by up to 0, relative deviation 0"]
    assert not found.forms and found.largest == 0


def test_last_bit_of_a_loss(tmp_path: Path) -> None:
    def change(run: Run) -> None:
        run[0][2]["loss"] = 2.1000000000000005
        run[0][4]["task_losses"]["a"] = 7.0

    found = differences(tmp_path, change)
    first, second = found.numbers
    assert first == "step 2, loss: old 2.1, new 2.1000000000000005, relative deviation 2.1e-16"
    assert second.startswith("step 3, task_losses.a: old 0.30000000000000004, new 7.0")
    assert not found.weights and not found.forms


def test_null_is_no_number(tmp_path: Path) -> None:
    found = differences(tmp_path, lambda run: run[0][1]["losses"].update(b=0.0), rtol=0.5)
    assert found.numbers == ["validation at step 1, losses.b: old None, new 0.0, relative deviation inf"]


def test_numbers_within_a_tolerance(tmp_path: Path) -> None:
    def change(run: Run) -> None:
        run[0][0]["loss"] *= 1 + 1e-13
        run[1]["head.weight"][0, 0] *= 1 + 1e-3

    found = differences(tmp_path, change, rtol=1e-12)
    assert not found.numbers and len(found.weights) == 1 and found.largest == pytest.approx(1e-3, rel=1e-3)


def test_renamed_field(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line for a field in all events, none for one in the table."""

    def change(run: Run) -> None:
        for event in run[0]:
            if "losses" in event:
                event["validation_losses"] = event.pop("losses")

    lines = differences(tmp_path / "not", change).forms
    assert lines[0] == "validation at step 1, losses.a is only in old (and 5 more)"
    assert lines[1] == "validation at step 1, validation_losses.a is only in new (and 5 more)" and len(lines) == 2
    monkeypatch.setattr(benchmark("same_runs"), "RENAMED_FIELDS", {"losses": "validation_losses"})
    assert not differences(tmp_path / "renamed", change).forms


def test_missing_events_and_their_order(tmp_path: Path) -> None:
    found = differences(tmp_path / "short", lambda run: run[0].__delitem__(slice(3, None)))
    lines = ["validation at step 2 is only in old (and 1 more)", "step 3 is only in old"]
    assert found.forms == lines and not found.numbers
    found = differences(tmp_path / "order", lambda run: run[0].insert(0, run[0].pop(1)))
    (line,) = found.forms
    assert line == "another order: old has step 1, event where new has validation at step 1, event"
    found = differences(tmp_path / "twice", lambda run: run[0].insert(2, run[0][1]))
    assert found.forms[0].startswith("validation at step 1, again, event is only in new")


def test_missing_tensors_and_other_shapes(tmp_path: Path) -> None:
    def change(run: Run) -> None:
        run[1]["scale"] = run[1]["scale"].float()
        run[1]["other.weight"] = run[1].pop("head.weight")

    found = differences(tmp_path, change)
    places = [f"model/model.safetensors, {name}.weight is only in" for name in ("head", "other")]
    assert found.forms == [f"{places[0]} old", f"{places[1]} new"]
    assert found.weights == ["model/model.safetensors, scale: old torch.bfloat16 [2], new torch.float32 [2]"]


def test_commands_are_those_of_the_side(tmp_path: Path) -> None:
    """The recipe is named in a comment or by a key; a renamed key is given by the name that the side knows."""
    rest = "tasks: {_component_: toy, noise: false}\nbudget: "
    (tmp_path / "old" / "yaml").mkdir(parents=True)
    (tmp_path / "old" / "yaml" / "tiny_a.yaml").write_text(f"# tune run one --config a\n{rest}{{tokens: 1}}")
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    (tmp_path / "new" / "yaml" / "tiny_a.yaml").write_text(f"recipe: one\n{rest}{{epochs: 1}}")
    overrides = ["budget.passes=2", "batch_size=3"]
    old, new = (
        benchmark("same_runs").commands(tmp_path / side, ["a", "a-two-processes"], overrides) for side in ("old", "new")
    )
    assert old["a"][:4] == ["one", "--config", "yaml/tiny_a.yaml", "~tasks.noise"]
    assert old["a-two-processes"][:3] == ["--nproc_per_node", "2", "one"]
    assert "batch_size=3" in old["a"] and "batch_size=8" not in old["a"]
    assert new["a"] == ["budget.epochs=2" if word == "budget.passes=2" else word for word in old["a"]]


def test_imports_from_elsewhere_are_refused(tmp_path: Path) -> None:
    guard = benchmark("checkouts").GUARD.format(root=str(tmp_path / "checkout"))
    (tmp_path / "sitecustomize.py").write_text(guard)
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run([sys.executable, "-c", "print(1)"], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (3, "") and "not imported from the checkout" in done.stderr


@pytest.mark.parametrize("words", [["no-such-revision"], ["a", "b", "c"]], ids=" ".join)
def test_wrong_words(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        benchmark("same_runs").main(words)
    assert leaving.value.code == 2
    assert re.fullmatch(r"same_runs.py: error: [^\n]+\n", capsys.readouterr().err)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_changed_recipe_is_found(tmp_path: Path) -> None:
    """In a repository of its own: a commit, and a working tree with another learning rate in one of the recipes."""
    tree = tmp_path / "tree"
    for folder in ("adapt_recipes", "benchmarks", "recipes", "yaml"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "tune_cli_ext.py", tree)
    git = ["git", "-c", "user.name=test", "-c", "user.email=test", "-c", "commit.gpgsign=false", "-C", str(tree)]
    for words in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "one"]):
        subprocess.run([*git, *words], check=True)
    recipe = tree / "recipes" / "sft_full_finetune.py"
    text = recipe.read_text()
    recipe.write_text(text.replace('group["lr"] = ', 'group["lr"] = 1.001 * '))
    assert recipe.read_text() != text
    command = [sys.executable, str(tree / "benchmarks" / "same_runs.py"), "HEAD", "--configs", "uniform", "exp3"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(r"^differs  uniform\n +step 2, loss: old [\d.]+, new [\d.]+, relative", done.stdout, re.MULTILINE)
    assert re.search(r"^same     exp3$", done.stdout, re.MULTILINE)
    assert re.search(r"^not the same: uniform; largest relative deviation", done.stdout, re.MULTILINE)
