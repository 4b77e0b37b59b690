"""Equivalences: runs that have to be equal, and a mixture of one's own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from conftest import Runner
from running import CONFIGS, ROOT, Run
from safetensors.torch import load_file
from tiers import slow_but

from adapt_recipes.config import load
from adapt_recipes.shipped import schema


def assert_same_training(one: Run, other: Run) -> None:
    """Bit for bit, up to what probes have read."""
    assert one.training() == other.training()
    assert one.summary["validation_losses"] == other.summary["validation_losses"]
    ours, theirs = (load_file(done.folder / "model" / "model.safetensors") for done in (one, other))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("config", "still"),
    [
        ("tiny_adapt", ["mixture.meta_lr=0"]),
        ("tiny_mos_diff", ["mixture.form=paper", "mixture.learning_rate=0"]),
        pytest.param("tiny_dro", ["mixture.sharpness=0"], marks=pytest.mark.slow),
        pytest.param("tiny_mos_cossim", ["mixture.form=paper", "mixture.learning_rate=0"], marks=pytest.mark.slow),
        pytest.param("tiny_multidds", ["mixture.learning_rate=0"], marks=pytest.mark.slow),
        pytest.param("tiny_multiuat", ["mixture.learning_rate=0", "reward.mc_samples=3"], marks=pytest.mark.slow),
        pytest.param(
            "tiny_hbo",
            ["mixture.form=paper", "mixture.learning_rate=0", "mixture.prior=uniform"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_mixture_that_stands_still_is_uniform_bit_for_bit(run: Runner, config: str, still: list[str]) -> None:
    """Proves as well that probes leave weights, optimizer, generators and the sampler as they were."""
    both = ("model.attn_dropout=0.1", "tasks.num_validation_rows=16")  # with dropout training draws random numbers
    learned = run(config, *still, *both, "mixture_update_every=2", folder="learned")
    assert learned.summary["mixture_updates"] == 3
    assert_same_training(learned, run("tiny_uniform", *both, folder="uniform"))


@pytest.mark.parametrize(
    ("config", "without"),
    [
        ("tiny_adapt_planned", []),
        pytest.param("tiny_mos_cossim", ["~reward"], marks=pytest.mark.slow),
    ],
)
def test_a_static_mixture_is_the_same_in_all_recipes(run: Runner, config: str, without: list[str]) -> None:
    static = "mixture={_component_: adapt_recipes.mixture.uniform}"
    learned = run(config, static, *without, folder="a")
    assert_same_training(learned, run("tiny_uniform", folder="b"))
    assert learned.summary["mixture_updates"] == 0
    assert [line["probe_tokens"] for line in learned.events("mixture")] == [0]


def test_a_cap_out_of_reach_changes_nothing(run: Runner) -> None:
    capped = run("tiny_adapt_planned", "tasks.max_epochs_per_task=2", folder="capped")
    assert_same_training(capped, run("tiny_adapt_planned", folder="free"))
    mixtures = capped.events("mixture")
    assert len(mixtures) == 3
    assert all(line["effective_probabilities"] == line["probabilities"] for line in mixtures)


@pytest.mark.parametrize("config", ["tiny_unimax", "tiny_adapt_planned", "tiny_mos_diff"])
def test_no_task_is_read_more_often_than_its_cap(run: Runner, config: str) -> None:
    """And a task that p alone would read more often gets there at the end, not before: an answer has one token."""
    done = run(config, "tasks.max_epochs_per_task=0.004", "tasks.num_validation_rows=16")
    sizes = [8000, 6000, 4000, 3000, 4000, 6000, 10000]
    caps = dict(zip(done.summary["task_tokens"], [32, 24, 16, 12, 16, 24, 40], strict=True))
    assert [*caps.values()] == [int(0.004 * size) for size in sizes]
    spent, (first, *updates) = done.summary["task_tokens"], done.events("mixture")
    assert sum(spent.values()) == 128 and all(spent[name] <= cap for name, cap in caps.items())
    assert len(updates) == done.summary["mixture_updates"]
    for line in (first, *updates):
        assert sum(line["effective_probabilities"].values()) == pytest.approx(1)
        assert line["effective_probabilities"] != line["probabilities"]
    # At the start p is uniform.
    limited = [name for name, cap in caps.items() if cap < 128 / 7]
    rest = (128 - 16 - 12 - 16) / 4
    shares = [cap / 128 if name in limited else rest / 128 for name, cap in caps.items()]
    assert [*first["effective_probabilities"].values()] == pytest.approx(shares)
    for line in done.events("step") if not updates else ():
        had = zip(line["task_tokens"].values(), shares, strict=True)
        assert all(abs(tokens - p * line["supervised_tokens"]) <= 1.5 for tokens, p in had)


@pytest.mark.parametrize(
    ("unknown", "given", "message"),
    [
        (", caps=self.sampler.caps(budget_tokens)", "tasks.max_epochs_per_task=1", "tasks.max_epochs_per_task"),
        (", sampling=config.sampling", "sampling=example", "sampling"),
    ],
)
def test_a_recipe_of_ones_own_that_does_not_know_a_key_refuses_it(
    unknown: str, given: str, message: str, tmp_path: Path
) -> None:
    text = (ROOT / "recipes" / "sft_full_finetune.py").read_text()
    assert unknown in text
    (tmp_path / "before.py").write_text(text.replace(unknown, ""))
    config_class = schema(str(tmp_path / "before.py"))
    overrides = ["recipe=before.py", f"output_dir={tmp_path / 'out'}", "budget.tokens=32", given]
    config = load(config_class, CONFIGS["tiny_uniform"], overrides)
    with pytest.raises(ValueError, match=f"^{message}: the recipe has to give it to TokenSampler"):
        sys.modules[config_class.__module__].main(config)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_mixture_moves_towards_what_is_worst(run: Runner) -> None:
    """Not a stub: after a short run what is learned already has next to nothing left of its seventh."""
    done = run(
        "tiny_adapt_planned", "budget.tokens=9600", "batch_size=64", "mixture_update_every=10", "probe.examples=32"
    )
    p = done.summary["probabilities"]
    assert max(p.values()) > 0.25 and p["facts_2"] < 0.05


def test_ado_keeps_the_prior_until_it_has_fitted_a_law(run: Runner) -> None:
    done = run("tiny_ado", "batch_size=8", "mixture_update_every=1", "mixture.ema_decay=0.5")
    p = [list(line["probabilities"].values()) for line in done.events("mixture")]
    assert len(p) == 16 and all(each == [1 / 7] * 7 for each in p[:8])
    assert max(p[-1]) > 0.2


def test_a_schedule_switches_by_supervised_tokens(run: Runner) -> None:
    """Exactly at its boundary, which ends step 4 of 8, as every step has 16 tokens: an update falls on it."""
    done = run("tiny_staged", "mixture_update_every=1")
    assert [line["stage"] for line in done.events("mixture")[1:]] == [1, 1, 1, 2, 2, 2, 2]
    spent = [line["task_tokens"] for line in done.events("step")]
    assert spent[3]["facts_2"] == pytest.approx(64 / 7, abs=1) and spent[7]["facts_2"] == spent[3]["facts_2"]
    assert spent[7]["facts_512"] - spent[3]["facts_512"] == pytest.approx(32, abs=1.5)


def test_exp3_explores_and_learns(run: Runner) -> None:
    """Seven tasks are only explored until sqrt(7 ln 7 / turn) is below 1, in turn 14."""
    done = run("tiny_exp3", "batch_size=8", "mixture_update_every=1")
    p = [list(line["probabilities"].values()) for line in done.events("mixture")]
    assert len(p) == 16 and all(each == [1 / 7] * 7 for each in p[:13])
    assert all(max(each) > 1 / 7 + 1e-6 for each in p[13:])


@pytest.mark.parametrize("config", slow_but(["tiny_adapt"], ["tiny_adapt", "tiny_adapt_planned"]))
def test_micro_batches_do_not_change_the_mathematics(run: Runner, config: str) -> None:
    whole = run(config, "optimizer={_component_: torch.optim.SGD, lr: 0.1}", folder="whole")
    pieces = run(config, "optimizer={_component_: torch.optim.SGD, lr: 0.1}", "micro_batch_tokens=16", folder="pieces")
    for one, other in zip(whole.events("step"), pieces.events("step"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert one["task_tokens"] == other["task_tokens"]


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_same_batch_for_task_gradients_and_objective(run: Runner) -> None:
    done = run("tiny_adapt", "probe.separate_batches=false")
    assert done.summary["mixture_updates"] == 2


def test_bf16_keeps_fp32_weights(run: Runner) -> None:
    done = run("tiny_adapt_planned", "dtype=bf16", "optimizer.lr=1e-5")
    weights = load_file(done.folder / "model" / "model.safetensors")
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    assert any((weight != weight.bfloat16()).any() for weight in weights.values())


@pytest.mark.slow
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


def test_the_mixture_that_a_page_shows(run: Runner, tmp_path: Path) -> None:
    blocks = (ROOT / "docs" / "mixtures.md").read_text().split("```python\n")[1:]
    (code,) = (block.split("```")[0] for block in blocks if "class Mine" in block)
    (tmp_path / "docs_mixture.py").write_text(f"import torch\n\n{code}")
    mixture = "mixture={_component_: docs_mixture.Mine, strength: 3.0}"
    done = run("tiny_adapt_planned", mixture)
    updates = done.events("mixture")[1:]
    assert done.summary["mixture_updates"] == 2 and all("logits" in update for update in updates)
    assert updates[-1]["probabilities"] != done.log[0]["probabilities"]
    # Where losses are missing: a task without validation, and tasks that have not been drawn.
    for i, options in enumerate((["tasks.no_validation=[facts_8]"], ["batch_size=2", "mixture_update_every=1"])):
        some = run("tiny_adapt_planned", mixture, *options, folder=f"missing {i}")
        assert some.summary["mixture_updates"] > 1 and min(some.summary["probabilities"].values()) > 0
