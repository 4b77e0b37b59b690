"""Targets: tasks that a run validates on and never trains, and the mixture that learns from them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from running import Runs, assert_same_run, events, files, summary
from tiers import slow_but

from adapt_recipes.planning.plan import make_plan

TARGET = {"tasks.targets": "[c]"}
WEIGHTED = TARGET | {"tasks.target_weights": "{c: 2, a: 1}"}
ADAPT = {"probe.estimator": "backward", "mixture.floor": 0.0}


def without_c(runs: Runs, tmp_path: Path) -> dict[str, Any]:
    """A source of the other tasks."""
    shutil.copytree(runs.tasks, tmp_path / "others")
    (tmp_path / "others" / "c.jsonl").unlink()
    return {"tasks.path": tmp_path / "others"}


def test_a_target_is_never_trained(runs: Runs, tmp_path: Path) -> None:
    """Bit for bit the run on the other tasks; and a source of its own gives the same losses."""
    with_target = runs.whole("uniform", **TARGET)
    others = without_c(runs, tmp_path)
    assert runs.run("uniform", tmp_path / "without", **others) == 0
    own = {f"tasks.targets.{key}": value for key, value in {"path": runs.tasks / "c.jsonl"}.items()}
    own = {"tasks.targets": "{_component_: adapt_recipes.data.jsonl_tasks}"} | own
    assert runs.run("uniform", tmp_path / "own", **others, **own) == 0
    assert files(with_target / "model") == files(tmp_path / "without" / "model") == files(tmp_path / "own" / "model")

    results, plain = summary(with_target), summary(tmp_path / "without")
    for key in ("task_tokens", "validation_losses", "worst_validation_loss", "mean_validation_loss", "probabilities"):
        assert results[key] == plain[key]
    assert list(results["target_losses"]) == ["c"] and plain["target_losses"] is None
    assert results["worst_target_loss"] == results["mean_target_loss"] == results["target_losses"]["c"] > 0
    assert results["target_losses"]["c"] != results["initial_target_losses"]["c"]
    assert results["left_out"]["c"]["untrained"] == 30 - 4
    assert {key: value for key, value in results.items() if "target" in key} == {
        key: value for key, value in summary(tmp_path / "own").items() if "target" in key
    }
    validations = [event for event in events(with_target) if event["event"] == "validation"]
    assert validations[-1]["target_losses"] == results["target_losses"]
    assert all(list(event["losses"]) == ["a", "b", "d"] for event in validations)


def test_the_test_of_a_target(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "170")
    assert runs.run("uniform", tmp_path / "run", **TARGET, **{"tasks.test_examples": 3}) == 0
    results = summary(tmp_path / "run")
    assert list(results["target_test_losses"]) == ["c"] and list(results["test_losses"]) == ["a", "b", "d"]
    assert results["worst_target_test_loss"] == results["target_test_losses"]["c"] > 0

    # On a wide terminal, in every unit.
    (row,) = (line.split() for line in capsys.readouterr().out.splitlines() if line.split()[:2] == ["c", "target"])
    keys = ("initial_target_losses", "target_losses", "target_test_losses", "target_test_exact_match")
    keys += ("target_test_bits_per_byte",)
    assert row[4:] == [f"{results[key]['c']:.3f}" for key in keys]


@pytest.mark.parametrize(
    "case",
    slow_but(
        [("adapt", WEIGHTED)],
        [
            ("adapt", TARGET),
            ("adapt", WEIGHTED),
            ("adapt", {**WEIGHTED, "probe.exact_lookahead": "true", "probe.separate_batches": "false"}),
            ("adapt", {**TARGET, "probe.estimator": "finite_difference", "mixture.reference": "asymptote"}),
            ("grape", WEIGHTED),
        ],
    ),
)
def test_a_mixture_learns_from_targets(runs: Runs, tmp_path: Path, case: tuple[str, dict[str, Any]]) -> None:
    """What it logs, that its objective is over them, and a kill and a resume."""
    strategy, options = case
    options = ADAPT | options
    whole = tmp_path / "whole"
    assert runs.run(strategy, whole, **options) == 0
    updates = [event for event in events(whole) if event["event"] == "mixture" and "weights" in event]
    assert len(updates) > 2
    for event in updates:
        assert list(event["probabilities"]) == list(event["gradient_dots"]) == ["a", "b", "d"]
        assert list(event["target_losses"]) == list(event["target_weights"]) == ["c"]
        is_weighted = "tasks.target_weights" in options
        assert (event["weights"]["a"] > 0) == is_weighted and event["weights"]["b"] == 0
        assert event["weights"]["a"] + event["target_weights"]["c"] == pytest.approx(1)
    runs.stop(strategy, tmp_path / "run", after=7, **options)
    assert runs.run(strategy, tmp_path / "run", **options) == 0
    assert_same_run(tmp_path / "run", whole)

    plan, results = make_plan(runs.config(strategy, tmp_path / "plan", **options)), summary(whole)
    assert plan.targets == {"c": {"validation": 4}} and list(plan.tasks) == ["a", "b", "d"]
    validated = [event for event in events(whole) if event["event"] == "validation"]
    per_validation = results["validation_tokens"] / len(validated)
    assert plan.validation_tokens % per_validation == 0


def test_a_target_that_needs_one_task_moves_the_mixture_to_it(runs: Runs, tmp_path: Path) -> None:
    """The target has the questions and the kind of answers of a; b and d have others."""
    target = tmp_path / "like_a.jsonl"
    target.write_text((runs.tasks / "a.jsonl").read_text().replace("a", "a "))
    options = {"tasks.targets": f"{{_component_: adapt_recipes.data.jsonl_tasks, path: {target}}}", **ADAPT}
    more = {"mixture.meta_lr": 0.3, "mixture.entropy_weight": 0.1, "probe.examples": 8, "optimizer.lr": 0.01}
    assert runs.run("adapt", tmp_path / "run", **options, **more, **{"budget.tokens": 600}) == 0
    p = torch.tensor(list(summary(tmp_path / "run")["probabilities"].values()))
    assert p.argmax() == 0, p.tolist()


@pytest.mark.slow
def test_on_two_processes(runs: Runs, tmp_path: Path) -> None:
    """The tokens are those of one process; losses differ by rounding."""
    assert runs.finish_group("uniform", tmp_path / "run", **TARGET, **{"model.attn_dropout": 0.0}) == [0, 0]
    one, two = summary(runs.whole("uniform", **TARGET, **{"model.attn_dropout": 0.0})), summary(tmp_path / "run")
    assert one["task_tokens"] == two["task_tokens"] and one["validation_tokens"] == two["validation_tokens"]
    assert one["target_losses"]["c"] == pytest.approx(two["target_losses"]["c"], rel=1e-3)
    assert runs.finish_group("adapt", tmp_path / "adapt", **WEIGHTED, **ADAPT) == [0, 0]


@pytest.mark.parametrize(
    ("strategy", "changes", "message"),
    [
        (
            "dro",
            TARGET,
            "mixture: GroupDRO would ignore the targets in tasks.targets; remove them, or take Adapt, another mixture "
            "that observes target_losses, or one that does not learn",
        ),
        ("mos_diff", TARGET, "mixture: Scorer would ignore the targets in tasks.targets; remove them, or take Adapt, "),
        ("adapt", {"tasks.targets": "[cc]"}, "tasks.targets: no task 'cc'; did you mean 'c'?"),
        (
            "uniform",
            {"tasks.targets": "[a,b,c,d]", "tasks.no_validation": "[]"},
            "tasks.targets: it names every task; leave at least one to train on",
        ),
        ("uniform", {"tasks.targets": "[d]"}, "tasks.no_validation: 'd' is a target, and nothing but validated on"),
        (
            "adapt",
            {"tasks.targets": "c"},
            "tasks.targets: must be a list of names of tasks, or a node with a _component_",
        ),
        (
            "adapt",
            {"tasks.targets": "{_component_: adapt_recipes.data.jsonl_tasks, paht: x}"},
            "unknown key 'tasks.targets.paht' for adapt_recipes.data.jsonl_tasks; did you mean 'path'?",
        ),
        (
            "adapt",
            {"tasks.target_weights": "{c: 1}"},
            "tasks.target_weights: there are no targets; name them in tasks.targets, or remove it",
        ),
        (
            "adapt",
            TARGET | {"tasks.target_weights": "{d: 1}"},
            "tasks.target_weights: no task or target 'd' to validate on; allowed: a, b, c",
        ),
        (
            "adapt",
            TARGET | {"tasks.target_weights": "{c: 0, a: 0}"},
            "tasks.target_weights: at least one weight must be above 0, and all are 0",
        ),
        (
            "adapt",
            TARGET | {"mixture.target_names": "[c]"},
            "mixture.target_names: the recipe passes this itself; remove it",
        ),
    ],
)
def test_what_is_refused_in_one_line(
    runs: Runs, tmp_path: Path, strategy: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)) as error:
        runs.run(strategy, tmp_path / "run", **changes)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
