"""Equivalences: runs that have to be equal, and a mixture of one's own."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import ROOT, Runner
from safetensors.torch import load_file

ADAPT = "adapt_recipes.mixture.Adapt"


def test_a_meta_learning_rate_of_0_is_uniform_bit_for_bit(run: Runner) -> None:
    """Proves as well that probes leave weights, optimizer, generators and the sampler as they were."""
    uniform = run("tiny_uniform", folder="uniform")
    adapt = run("tiny_adapt", "mixture.meta_lr=0", "mixture_update_every=2", folder="adapt")
    assert adapt.training() == uniform.training()
    assert adapt.summary["validation_losses"] == uniform.summary["validation_losses"]
    ours, theirs = (load_file(done.folder / "model" / "model.safetensors") for done in (adapt, uniform))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_static_mixture_is_the_same_in_both_recipes(run: Runner) -> None:
    static = "mixture._component_=adapt_recipes.mixture.uniform"
    in_adapt = run("tiny_adapt_planned", static, folder="a")
    assert in_adapt.training() == run("tiny_uniform", folder="b").training()
    assert in_adapt.summary["mixture_updates"] == 0


def test_the_mixture_moves_towards_what_is_worst(run: Runner) -> None:
    """Not a stub: after a short run what is learned already has next to nothing left of its seventh."""
    done = run(
        "tiny_adapt_planned", "budget.tokens=9600", "batch_size=64", "mixture_update_every=10", "probe.examples=32"
    )
    p = done.summary["probabilities"]
    assert max(p.values()) > 0.25 and p["facts_2"] < 0.05


@pytest.mark.parametrize("config", ["tiny_adapt", "tiny_adapt_planned"])
def test_micro_batches_do_not_change_the_mathematics(run: Runner, config: str) -> None:
    whole = run(config, "optimizer={_component_: torch.optim.SGD, lr: 0.1}", folder="whole")
    pieces = run(config, "optimizer={_component_: torch.optim.SGD, lr: 0.1}", "micro_batch_tokens=16", folder="pieces")
    for one, other in zip(whole.events("step"), pieces.events("step"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert one["task_tokens"] == other["task_tokens"]


def test_both_estimators_and_both_orders_move_the_mixture_alike(run: Runner) -> None:
    """At a small look-ahead step; the mixtures agree to 1e-3 after two updates."""
    options = {
        "finite": [],
        "backward": ["probe.estimator=backward"],
        "exact": ["probe.exact_lookahead=true", "mixture.lookahead_lr=0.001"],
    }
    p = {name: run("tiny_adapt", *given, folder=name).summary["probabilities"] for name, given in options.items()}
    moved = max(abs(value - 1 / 7) for value in p["finite"].values())
    assert moved > 0.02
    for name in ("backward", "exact"):
        assert p[name] == pytest.approx(p["finite"], abs=1e-3 + 0.02 * moved), name


def test_the_same_batch_for_task_gradients_and_objective(run: Runner) -> None:
    done = run("tiny_adapt", "probe.separate_batches=false")
    assert done.summary["mixture_updates"] == 2


@pytest.mark.parametrize(
    ("override", "tolerance"),
    [("activation_checkpointing=true", 1e-6), ("dtype=bf16", 0.05), ("dtype=pure_bf16", 0.1), ("compile=true", 1e-5)],
)
def test_precision_and_speed_switches(run: Runner, override: str, tolerance: float) -> None:
    plain = run("tiny_adapt_planned", folder="plain")
    other = run("tiny_adapt_planned", override, "mixture_update_every=0", folder="other")
    static = run("tiny_adapt_planned", "mixture_update_every=0", folder="static")
    assert plain.events("step")[0]["loss"] == static.events("step")[0]["loss"]
    for one, two in zip(static.events("step"), other.events("step"), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=tolerance)


def test_bf16_keeps_fp32_weights(run: Runner) -> None:
    done = run("tiny_adapt_planned", "dtype=bf16", "optimizer.lr=1e-5")
    weights = load_file(done.folder / "model" / "model.safetensors")
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    assert any((weight != weight.bfloat16()).any() for weight in weights.values())


def test_one_task_and_a_task_left_out_of_the_objective(run: Runner, tmp_path: Path) -> None:
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    for name in ("one", "two"):
        lines = [f'{{"prompt": "{name} {i}", "response": "{i % 10}"}}\n' for i in range(80)]
        (tasks / f"{name}.jsonl").write_text("".join(lines))
    source = f"tasks={{_component_: adapt_recipes.data.jsonl_tasks, path: {tasks}, validation_examples: 8}}"
    for config in ("tiny_adapt", "tiny_adapt_planned"):
        left_out = run(config, source, "tasks.no_validation=[two]", folder=f"{config}_left_out")
        assert left_out.summary["validation_losses"]["two"] is None
        assert left_out.summary["worst_validation_loss"] == left_out.summary["validation_losses"]["one"]
        assert left_out.summary["task_tokens"]["two"] > 0
    (tasks / "two.jsonl").unlink()
    for config in ("tiny_adapt", "tiny_adapt_planned"):
        assert run(config, source, "budget.tokens=64", folder=f"{config}_one").summary["probabilities"] == {"one": 1.0}


OWN_MIXTURE = '''
import torch

class TwoToOne:
    """Two shares for the task with the higher training loss, one for every other."""

    observes = ("train_losses",)

    def __init__(self, *, task_names, num_supervised_tokens, budget_tokens, favour=2.0):
        self.favour = favour
        self.weights = torch.ones(len(task_names), dtype=torch.float64)

    def probabilities(self):
        return self.weights / self.weights.sum()

    def update(self, *, task_tokens, train_losses, **signals):
        assert train_losses.shape == task_tokens.shape == self.weights.shape and train_losses.isfinite().all()
        self.weights = torch.ones_like(self.weights)
        self.weights[train_losses.argmax()] = self.favour
        return {"favoured": train_losses.argmax()}

    def state_dict(self):
        return {"weights": self.weights}

    def load_state_dict(self, state):
        self.weights = state["weights"]
'''


def test_a_mixture_of_ones_own_is_named_in_the_config(run: Runner, tmp_path: Path) -> None:
    (tmp_path / "my_mixtures.py").write_text(OWN_MIXTURE)
    done = run("tiny_adapt_planned", "mixture={_component_: my_mixtures.TwoToOne, favour: 4}")
    assert sorted(done.summary["probabilities"].values()) == pytest.approx([0.1] * 6 + [0.4])
    assert "favoured" in done.events("mixture")[-1]
    with pytest.raises(ValueError, match="observes 'train_losses', which sft_full_finetune does not measure"):
        run("tiny_uniform", "mixture._component_=my_mixtures.TwoToOne", folder="other")


def test_the_mixture_of_the_readme(run: Runner, tmp_path: Path) -> None:
    blocks = (ROOT / "README.md").read_text().split("```python\n")[1:]
    (code,) = (block.split("```")[0] for block in blocks if "class Mine" in block)
    (tmp_path / "readme_mixture.py").write_text(f"import torch\n\n{code}")
    done = run("tiny_adapt_planned", "mixture={_component_: readme_mixture.Mine, temperature: 0.5}")
    assert done.summary["mixture_updates"] == 2 and "logits" in done.events("mixture")[-1]


def test_the_lines_that_recipes_share_are_the_same(
    adapt_full_finetune: ModuleType, sft_full_finetune: ModuleType
) -> None:
    """What differs between the two recipes is the mixture update and nothing else."""
    adapt, sft = adapt_full_finetune.AdaptFullFinetune, sft_full_finetune.SFTFullFinetune
    for name in ("save", "_load", "cleanup", "_batches", "_by_task", "_seconds", "_log_step"):
        assert inspect.getsource(getattr(adapt, name)) == inspect.getsource(getattr(sft, name)), name
    ours, theirs = (inspect.getsource(module).splitlines() for module in (adapt_full_finetune, sft_full_finetune))
    only_sft = [line for line in theirs if line not in ours]
    assert len(only_sft) <= 30, only_sft
