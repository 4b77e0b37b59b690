"""The recipe for MoS: what rewards are measured on, what they do to the mixture, and batches of one task."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import Runner
from running import Runs, assert_same_run, events, recipe_class, summary
from torch import Tensor

from adapt_recipes import data
from adapt_recipes.mixture import Scorer
from adapt_recipes.signals import passes

# What each reward reads, a name as often as it is read.
READS = {
    "mos_cossim": ("train",),
    "mos_diff": ("train", "base_losses"),
    "mos_diff fixed": ("pool",),
    "multidds": ("validation", "train"),
    "multiuat": ("validation",) * 3,
    "hbo": ("train",),
}
SETTINGS = {
    "mos_cossim": {"sampling": "dataset"},
    "mos_diff": {"sampling": "example", "reward.tokens": "all", "reward.examples": "fresh"},
    "mos_diff fixed": {"reward.tokens": "answer", "reward.examples": "fixed"},
    "multiuat": {"reward.mc_samples": 3},
}
SEED, BUDGET, BATCH_SIZE, NUM_EXAMPLES = 3, 250, 8, 3


class Watched(NamedTuple):
    """A run, what its probes read, and what they should have measured.

    Attributes:
        strategy: which it is, with a word for its settings.
        config: its config.
        folder: the run directory.
        tasks: what it trains on.
        read: of measuring the base model and of each update: labels in the model's forwards, and supervised tokens that
            are booked.
        rewards: of each update, what a reward of the test's own measures at the same weights.
    """

    strategy: str
    config: Any
    folder: Path
    tasks: list[data.Task]
    read: list[tuple[int, int]]
    rewards: list[Tensor]

    def examples(self, name: str, update: int) -> list[tuple[int, data.Example]]:
        if name == "validation":
            return data.validation_examples(self.tasks, NUM_EXAMPLES)
        return data.random_examples(self.tasks, NUM_EXAMPLES, seed=SEED, update=None if name == "pool" else update)

    def batches(self, name: str, update: int) -> list[data.MicroBatch]:
        tasks, examples = zip(*self.examples(name, update), strict=True)
        return data.micro_batches(examples, tasks, max_tokens=4096)

    def by_task(self, values: Tensor) -> dict[str, float | None]:
        """As it stands in the log."""
        numbers = [None if math.isnan(value) else value for value in values.tolist()]
        return dict(zip([task.name for task in self.tasks], numbers, strict=True))


def num_supervised(examples: list[tuple[int, data.Example]]) -> int:
    return sum(int((example.labels != data.IGNORE_INDEX).sum()) for _, example in examples)


def num_labels(examples: list[tuple[int, data.Example]], tokens: str) -> int:
    """With which the model computes losses: at all positions but the last, which is supervised here, or at those."""
    return sum(len(example.tokens) for _, example in examples) if tokens == "all" else num_supervised(examples)


def watch(runs: Runs, strategy: str, folder: Path) -> Watched:
    name = strategy.split()[0]
    recipe = recipe_class(name)
    measure_base_model, update_mixture = recipe.measure_base_model, recipe.update_mixture
    changes = {"seed": SEED, "budget.tokens": BUDGET, "validate_every": 0, "mixture_update_every": 2}
    changes |= SETTINGS.get(strategy, {})
    config = runs.config(name, folder, **changes)
    tasks = data.load_tasks(config.tasks, tokenizer=config.tokenizer.build(), max_seq_len=config.max_seq_len)
    base: list[Any] = []
    watched = Watched(strategy, config, folder, tasks, [], [])
    given: dict[str, Any] = {}

    def count(method: Callable[[Any], None], self: Any) -> None:
        in_forwards, booked = 0, self.ledger.probe_tokens

        def add(module: Any, arguments: tuple[Any, ...]) -> None:
            nonlocal in_forwards
            in_forwards += int((arguments[1] != data.IGNORE_INDEX).sum())

        with self.model.register_forward_pre_hook(add):
            method(self)
        watched.read.append((in_forwards, self.ledger.probe_tokens - booked))

    def measure(self: Any) -> None:
        base.append(copy.deepcopy(self.model))
        if "pool" in READS[strategy]:
            given["base_losses"] = passes.example_losses(self.model, watched.batches("pool", 0))
        count(measure_base_model, self)

    def update(self: Any) -> None:
        reward = config.reward.build(task_names=[task.name for task in tasks], model=self.model)
        for source in READS[strategy]:
            if source == "base_losses":
                given[source] = passes.example_losses(base[0], given["train"], tokens=reward.tokens)
            else:
                given[source] = watched.batches(source, len(watched.rewards))
        watched.rewards.append(reward(**given))
        count(update_mixture, self)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(recipe, "measure_base_model", measure)
        patched.setattr(recipe, "update_mixture", update)
        assert runs.run(name, folder, **changes) == 0
    return watched


@pytest.fixture(scope="module", params=READS)
def watched(runs: Runs, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Watched:
    shutil.rmtree(runs.cache / "base_losses", ignore_errors=True)
    return watch(runs, request.param, tmp_path_factory.mktemp("watched") / "run")


# ---- what is measured, booked and logged


def test_probe_tokens_are_what_the_reward_reads(watched: Watched) -> None:
    """In the model, in the ledger and in the log it is what the data says."""
    # The base model's losses are of the training examples.
    reads = [name.replace("base_losses", "train") for name in READS[watched.strategy]]
    tokens = watched.config.reward.arguments.get("tokens", "answer")
    num_updates = range(len(watched.rewards))
    examples = [watched.examples("pool", 0) if "pool" in reads else []]
    examples += [[each for name in reads for each in watched.examples(name, update)] for update in num_updates]
    base, *updates = map(num_supervised, examples)
    assert len(updates) >= 2
    assert watched.read == [(num_labels(each, tokens), num_supervised(each)) for each in examples]

    validation = num_supervised(data.validation_examples(watched.tasks))
    logged = [event["probe_tokens"] for event in events(watched.folder) if event["event"] == "mixture"]
    assert logged == [base, *(base + sum(updates[: number + 1]) for number in num_updates)]
    assert summary(watched.folder)["probe_tokens"] == base + sum(updates)
    assert summary(watched.folder)["validation_tokens"] == 2 * validation


def test_how_uncertainty_is_measured_stands_in_the_log(watched: Watched) -> None:
    """And is said once: with dropout, as these runs have, or without."""
    notes = [event for event in events(watched.folder) if event["event"] == "note"]
    uncertain = {"event": "note", "step": 0, "text": "uncertainty is the mean over 3 forward passes with dropout"}
    assert notes == ([uncertain] if watched.strategy == "multiuat" else [])


def test_rewards_are_of_these_examples_at_these_weights(watched: Watched) -> None:
    """To the last bit. All tasks have all rewards, but one without a validation split no uncertainty."""
    start, *updates = (event for event in events(watched.folder) if event["event"] == "mixture")
    assert "rewards" not in start and "averaged_rewards" not in start
    assert [event["rewards"] for event in updates] == [watched.by_task(rewards) for rewards in watched.rewards]
    assert updates[0]["rewards"] != updates[1]["rewards"]
    without = {"d"} if watched.strategy == "multiuat" else set()
    assert all({name for name in "abcd" if event["rewards"][name] is None} == without for event in updates)


def test_the_mixture_follows_from_the_rewards_and_the_steps_from_the_mixture(watched: Watched) -> None:
    """All that a log says of them, worked out from its rewards alone."""
    names, sizes = [task.name for task in watched.tasks], [int(t.train.num_supervised.sum()) for t in watched.tasks]
    scorer = watched.config.mixture.build(task_names=names, num_supervised_tokens=sizes, budget_tokens=BUDGET)
    sampling = watched.config.sampling
    sampler = data.TokenSampler(watched.tasks, seed=SEED, sampling=sampling)
    had, mixtures = torch.zeros(4, dtype=torch.int64), []
    for event in events(watched.folder):
        if event["event"] == "mixture":
            if "rewards" in event:
                rewards = [math.nan if reward is None else reward for reward in event["rewards"].values()]
                logged = scorer.update(task_tokens=had, rewards=torch.tensor(rewards, dtype=torch.float64))
                assert event["averaged_rewards"] == watched.by_task(logged["averaged_rewards"])
            assert event["probabilities"] == watched.by_task(scorer.probabilities())
            mixtures.append(event["probabilities"])
        elif event["event"] == "step":
            p, left = scorer.probabilities(), BUDGET - int(had.sum())
            assert sampling != "dataset" or len(event["task_losses"]) == 1
            for draw in sampler.draw(p, max_examples=BATCH_SIZE, max_tokens=left):
                had[draw.task] += draw.num_supervised_tokens
            assert event["task_tokens"] == watched.by_task(had)
    assert int(had.sum()) == BUDGET
    assert len({tuple(mixture.values()) for mixture in mixtures}) == len(mixtures) >= 3, "each update moves it"


def test_a_base_model_that_nothing_is_relative_to_is_not_read(runs: Runs, tmp_path: Path) -> None:
    assert runs.run("mos_diff", tmp_path / "run", mixture_update_every=0) == 0
    validation = [event for event in events(tmp_path / "run") if event["event"] == "validation"]
    tasks = data.load_tasks(
        (config := runs.config("mos_diff", tmp_path)).tasks,
        tokenizer=config.tokenizer.build(),
        max_seq_len=config.max_seq_len,
    )
    read = len(validation) * num_supervised(data.validation_examples(tasks))
    done = summary(tmp_path / "run")
    assert (done["probe_tokens"], done["validation_tokens"]) == (0, read)


def test_base_losses_from_the_cache_are_booked_all_the_same(runs: Runs, tmp_path: Path) -> None:
    shutil.rmtree(runs.cache / "base_losses", ignore_errors=True)
    first, again = (watch(runs, "mos_diff fixed", tmp_path / name) for name in ("first", "again"))
    (tokens, booked), *updates = first.read
    assert tokens == booked > 0 and again.read == [(0, booked), *updates]
    assert_same_run(again.folder, first.folder)


@pytest.mark.slow
def test_what_a_specialist_changes(run: Runner) -> None:
    """Similarity is with its task alone, or its difficulty counts twice; the rest stays, until mixtures differ."""
    cossim, spec_cossim, diff, spec_diff = (
        run(f"tiny_{name}", "tasks.num_validation_rows=16", folder=name).events("mixture")[1]["rewards"]
        for name in ("mos_cossim", "mospec_cossim", "mos_diff", "mospec_diff")
    )
    assert spec_diff == diff | {"facts_512": 2 * diff["facts_512"]}
    assert spec_cossim["facts_512"] == pytest.approx(1) and max(spec_cossim.values()) == spec_cossim["facts_512"]
    assert all(abs(spec_cossim[name] - cossim[name]) > 1e-3 for name in cossim)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [each for each in READS if " " not in each])
def test_rewards_in_every_precision(runs: Runs, tmp_path: Path, strategy: str) -> None:
    """Measured after one step, so that the weights are nearly the same."""

    def rewards(**switch: str) -> dict[str, float]:
        folder = tmp_path / "-".join(["run", *switch.values()])
        one_update = {"model.attn_dropout": 0.0, "budget.tokens": 60, "mixture_update_every": 1}
        assert runs.run(strategy, folder, **one_update, **switch) == 0
        measured = next(event["rewards"] for event in events(folder) if "rewards" in event)
        return {name: reward for name, reward in measured.items() if reward is not None}

    plain = rewards()
    assert rewards(activation_checkpointing="true") == pytest.approx(plain, rel=1e-6)
    assert rewards(dtype="bf16") == pytest.approx(plain, rel=0.02, abs=1e-3)
    assert rewards(dtype="pure_bf16") == pytest.approx(plain, rel=0.1, abs=0.01)


# ---- batches of one task


@pytest.mark.slow
def test_tasks_of_batches_are_drawn_as_the_mixture_says(run: Runner) -> None:
    weights = {"facts_2": 0, "facts_8": 5, "facts_32": 3, "facts_64": 2, "facts_128": 1, "facts_256": 1, "facts_512": 1}
    mixture = f"mixture={{_component_: adapt_recipes.mixture.fixed_weights, weights: {weights}}}".replace("'", "")
    done = run("tiny_mos_cossim", mixture, "~reward", "sampling=dataset", "batch_size=2", "budget.tokens=520")
    tasks = [name for line in done.events("step") for name in line["task_losses"]]
    assert len(tasks) == 260
    expected = {name: 260 * weight / 13 for name, weight in weights.items()}
    assert "facts_2" not in tasks
    chi_square = sum((tasks.count(name) - n) ** 2 / n for name, n in expected.items() if n)
    assert chi_square < 20.5  # of 5 degrees of freedom: more in 1 of 1000 runs
    assert tasks[:13] != tasks[13:26], "drawn, not dealt"
    assert done.summary["task_tokens"] == {name: 2 * tasks.count(name) for name in weights}


# ---- levels inside a task


LEVELS = "levels={number: 2, examples: 4}"


@pytest.mark.parametrize("learned", [True, False])
def test_levels_learn_beside_a_mixture_that_does_and_one_that_does_not(run: Runner, learned: bool) -> None:
    """All training examples are read once, and some of each level at every update; shares follow from the rewards."""
    static = ["mixture=adapt_recipes.mixture.uniform", "~mixture.prior", "~mixture.form", "~reward"]
    done = run("tiny_hbo", LEVELS, *([] if learned else static))
    start, *updates = done.events("mixture")
    train = start["probe_tokens"]
    assert train == 41000 and len(updates) == 2
    per_update = 7 * 2 * 4 + (7 * 8 if learned else 0)
    assert [each["probe_tokens"] for each in updates] == [train + per_update, train + 2 * per_update]
    assert done.summary["probe_tokens"] == train + 2 * per_update
    for name in start["probabilities"]:
        rewards = [[each[f"level_{k}_rewards"][name] for k in (1, 2)] for each in updates]
        scorer = Scorer(task_names=["1", "2"], num_supervised_tokens=[1, 1], budget_tokens=0)
        for number, each in enumerate(rewards):
            assert sum(each) == pytest.approx(2) and each[0] != each[1]
            scorer.update(task_tokens=torch.zeros(2), rewards=torch.tensor(each, dtype=torch.float64))
            p = [updates[number][f"level_{k}_probabilities"][name] for k in (1, 2)]
            assert p == scorer.probabilities().tolist()
    assert ("rewards" in updates[0]) == (updates[1]["probabilities"] != start["probabilities"]) == learned


def test_levels_do_not_change_how_much_a_task_gets(run: Runner) -> None:
    """Where its examples are of one length; they only change which ones."""
    fixed = ["mixture=adapt_recipes.mixture.uniform", "~mixture.prior", "~mixture.form", "~reward"]
    runs = [run("tiny_hbo", *fixed, *levels, folder=str(len(levels))) for levels in ([], [LEVELS])]
    without, with_levels = ([line["task_tokens"] for line in each.events("step")] for each in runs)
    assert without == with_levels
    losses = [[line["loss"] for line in each.events("step")] for each in runs]
    assert losses[0] != losses[1]


# ---- components of one's own


OWN_REWARD = '''
import torch


class Favourite:
    """Reads all there is to read, and one of it twice."""

    reads = ("pool", "train", "validation", "train")

    def __init__(self, *, task_names, model, task, favour=2.0):
        self.rewards = torch.ones(len(task_names), dtype=torch.float64)
        self.rewards[task_names.index(task)] = favour

    def __call__(self, *, pool, base_losses, train, validation):
        assert base_losses.shape == (7 * 8,) and base_losses.isfinite().all()
        for batches in (pool, train, validation):
            assert sorted(row for batch in batches for row in batch.rows.tolist()) == list(range(7 * 8))
        return self.rewards
'''


def test_a_reward_of_ones_own_is_named_in_the_config(run: Runner, tmp_path: Path) -> None:
    (tmp_path / "my_rewards.py").write_text(OWN_REWARD)
    done = run("tiny_mos_cossim", "reward={_component_: my_rewards.Favourite, task: facts_64, favour: 4}")
    last, validation, reading = done.events("mixture")[-1], 7 * 256, 7 * 8  # tokens: one a row
    assert last["rewards"] == dict.fromkeys(last["rewards"], 1.0) | {"facts_64": 4.0}
    p = done.summary["probabilities"]
    assert p["facts_64"] > 1 / 7 + 0.003 and all(p[name] < 1 / 7 for name in p if name != "facts_64")
    assert done.summary["probe_tokens"] == reading + 2 * 4 * reading
    assert done.summary["validation_tokens"] == 2 * validation


class Everything:
    """A mixture that observes all that the recipe measures, and learns nothing."""

    observes = ("train_losses", "validation_losses", "rewards")

    def __init__(self, *, task_names: list[str], **given: Any) -> None:
        self.p = torch.full((len(task_names),), 1 / len(task_names), dtype=torch.float64)

    def probabilities(self) -> Tensor:
        return self.p

    def update(self, *, task_tokens: Tensor, **signals: Tensor) -> dict[str, Tensor]:
        assert signals.keys() == set(self.observes)
        return {"had": task_tokens}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


@pytest.mark.slow
def test_a_mixture_may_observe_more_than_rewards(run: Runner) -> None:
    done = run("tiny_mos_diff", "mixture={_component_: test_mos.Everything}", "validate_every=3", "probe.examples=256")
    validated = {line["step"]: line["losses"] for line in done.events("validation")}
    sums, counts, had = (dict.fromkeys(validated[0], 0.0) for _ in range(3))
    num_updates = 0
    for line in done.log:
        if line["event"] == "step":
            for name, loss in line["task_losses"].items():
                count = line["task_tokens"][name] - had[name]
                sums[name], counts[name] = sums[name] + count * loss, counts[name] + count
            had = line["task_tokens"]
        elif line["event"] == "mixture" and line["step"]:
            assert line["train_losses"] == pytest.approx({name: sums[name] / counts[name] for name in sums})
            assert line["validation_losses"] == pytest.approx(validated[line["step"]])  # all rows of the split are read
            assert line["had"] == had and len(line["rewards"]) == 7
            sums, counts = dict.fromkeys(sums, 0.0), dict.fromkeys(sums, 0.0)
            num_updates += 1
    assert num_updates == 2
