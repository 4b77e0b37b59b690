"""The numbers of a report, against a few lines of plain Python over the logs."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from report_runs import events, write_run

from adapt_recipes.report.read import Run, on_one_split, read_run
from adapt_recipes.report.tables import (
    COUNTERS,
    Group,
    all_tokens_to_reach,
    counters,
    differing_settings,
    final_mean,
    final_worst,
    group_runs,
    on_shared_tasks,
    spread,
    task_results,
    tokens_to_reach,
)

ROOT = Path(__file__).parents[2]
TASKS = ("one", "two", "three", "four")
STRATEGIES = ("uniform", "adapt", "proportional")
SEEDS = (5, 7)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Path]:
    """Three strategies over two seeds, with losses that cross."""
    home = tmp_path_factory.mktemp("runs")
    made = {}
    for rank, strategy in enumerate(STRATEGIES):
        for seed in SEEDS:

            def loss(task: int, share: float, rank: int = rank, seed: int = seed) -> float:
                slow = 1 + ((task + rank + seed) % 3)
                return (task + 2) * math.exp(-share * (1 + rank) / slow) + 0.01 * rank

            folder = home / f"{strategy}_{seed}"
            made[strategy, seed] = write_run(
                folder, strategy=strategy, seed=seed, tasks=TASKS, loss=loss, steps=40, validate_every=3
            )
    return made


@pytest.fixture(scope="module")
def groups(folders: dict[tuple[str, int], Path]) -> list[Group]:
    return group_runs([read_run(folder) for folder in folders.values()])


def last_losses(folder: Path) -> dict[str, float]:
    return events(folder, "validation")[-1]["losses"]


def by_name(groups: list[Group], name: str) -> Group:
    return next(group for group in groups if group.name == name)


def test_spread() -> None:
    assert spread([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0)
    assert spread([0.1, 0.1, 0.1]) == (0.1, 0.1, 0.1), "the mean of equal numbers is that number"
    assert all(map(math.isnan, spread([1.0, math.nan])))


def test_means_and_ranges_over_seeds(groups: list[Group], folders: dict[tuple[str, int], Path]) -> None:
    assert {group.name for group in groups} == set(STRATEGIES)
    for group in groups:
        assert group.seeds == "5, 7"
        last = [last_losses(folders[group.name, seed]) for seed in SEEDS]
        worst = [max(losses.values()) for losses in last]
        means = [sum(losses.values()) / len(losses) for losses in last]
        assert final_worst(group) == pytest.approx((sum(worst) / 2, min(worst), max(worst)), rel=1e-12)
        assert final_mean(group) == pytest.approx((sum(means) / 2, min(means), max(means)), rel=1e-12)
    means_of_worst = [final_worst(group).mean for group in groups]
    assert means_of_worst == sorted(means_of_worst), "the best comes first"


def test_tokens_to_reach_the_worst_loss_of_another(groups: list[Group], folders: dict[tuple[str, int], Path]) -> None:
    seen = set()
    for one, other in [*permutations(STRATEGIES, 2), ("adapt", "adapt")]:
        expected = []
        for seed in SEEDS:
            target = max(last_losses(folders[other, seed]).values())
            reached = [
                line["supervised_tokens"]
                for line in events(folders[one, seed], "validation")
                if max(line["losses"].values()) <= target
            ]
            expected.append(reached[0] if reached else math.nan)
        assert all_tokens_to_reach(by_name(groups, one), by_name(groups, other)) == pytest.approx(expected, nan_ok=True)
        seen |= {math.isnan(tokens) for tokens in expected}
    assert seen == {True, False}


def test_tokens_to_reach_are_those_of_the_first_validation_that_is_low_enough(
    groups: list[Group], folders: dict[tuple[str, int], Path]
) -> None:
    for (strategy, seed), folder in folders.items():
        run = next(run for run in by_name(groups, strategy).runs if run.seed == seed)
        validations = [
            (line["supervised_tokens"], max(line["losses"].values())) for line in events(folder, "validation")
        ]
        for worst in (0.5, 1.0, 2.0, 3.0, validations[-1][1], validations[3][1]):
            expected = next((tokens for tokens, highest in validations if highest <= worst), math.nan)
            assert tokens_to_reach(run, worst) == pytest.approx(expected, nan_ok=True)


def test_runs_without_a_common_seed_are_all_held_against_each_other(tmp_path: Path) -> None:
    ends = {"a": (0, 1.0), "b": (1, 2.0), "c": (2, 3.0)}
    runs = {
        name: read_run(write_run(tmp_path / name, seed=seed, loss=lambda task, share, end=end: 5 - (5 - end) * share))
        for name, (seed, end) in ends.items()
    }
    one, two = Group("one", (runs["a"],)), Group("two", (runs["b"], runs["c"]))
    total = 20 * 64
    assert all_tokens_to_reach(one, two) == [total, total / 2], "5 to 1 passes 3 half way, and 2 at the next validation"
    assert all(map(math.isnan, all_tokens_to_reach(Group("three", (runs["c"],)), one)))


def test_the_winner_of_a_task(groups: list[Group], folders: dict[tuple[str, int], Path]) -> None:
    for result in task_results(groups):
        finals = {s: [last_losses(folders[s, seed])[result.task] for seed in SEEDS] for s in STRATEGIES}
        best = min(STRATEGIES, key=lambda strategy: sum(finals[strategy]))
        assert result.winner is not None and groups[result.winner].name == best
        others = [loss for strategy in STRATEGIES if strategy != best for loss in finals[strategy]]
        assert result.is_clear == (max(finals[best]) < min(others))
        assert [losses.mean for losses in result.losses] == pytest.approx(
            [sum(finals[group.name]) / 2 for group in groups], rel=1e-12
        )
    assert [result.task for result in task_results(groups)] == list(TASKS)


def constant(home: Path, name: str, losses: dict[int, dict[int, float]], *, finished: bool = True) -> list[Run]:
    """A run a seed with losses that never change, by task."""
    return [
        read_run(
            write_run(
                home / f"{name}_{seed}",
                strategy=name,
                seed=seed,
                tasks=("one", "two"),
                loss=lambda task, share, by_task=by_task: by_task[task],
                finished=finished,
            )
        )
        for seed, by_task in losses.items()
    ]


def test_ties_ranges_and_what_was_not_measured(tmp_path: Path) -> None:
    nan = math.nan
    runs = constant(tmp_path, "a", {0: {0: 1.0, 1: nan}, 1: {0: 2.0, 1: nan}})
    runs += constant(tmp_path, "b", {0: {0: 1.9, 1: nan}, 1: {0: 1.9, 1: nan}})
    one, two = task_results(group_runs(runs))
    assert group_runs(runs)[one.winner or 0].name == "a" and not one.is_clear, "the worst seed of a is above b"
    assert two.winner is None
    runs = constant(tmp_path, "c", {0: {0: 1.0, 1: 2.0}}) + constant(tmp_path, "d", {0: {0: 1.0, 1: 3.0}})
    one, two = task_results(group_runs(runs))
    assert one.winner is None, "nobody wins where two are equal"
    assert two.winner == 0 and not two.is_clear, "with a seed of each it may be chance"
    for count, is_clear in ((1, False), (2, True)):
        runs = constant(tmp_path, f"e{count}", {seed: {0: 1.0, 1: 1.0} for seed in (0, 1)})
        runs += constant(tmp_path, f"f{count}", {seed: {0: 2.0, 1: 2.0} for seed in range(count)})
        assert [result.is_clear for result in task_results(group_runs(runs))] == [is_clear] * 2


def test_unfinished_runs_win_nothing_and_come_last(tmp_path: Path) -> None:
    runs = constant(tmp_path, "best", {0: {0: 0.1, 1: 0.1}}, finished=False)
    runs += constant(tmp_path, "worse", {0: {0: 1.0, 1: 1.0}}) + constant(tmp_path, "worst", {0: {0: 2.0, 1: 2.0}})
    groups = group_runs(runs)
    assert [group.name for group in groups] == ["worse", "worst", "best, unfinished"]
    assert [result.winner for result in task_results(groups)] == [0, 0]
    assert [result.winner for result in task_results(groups[::2])] == [None, None], "nobody wins alone"


# ---- by test losses


def with_test(home: Path, name: str, validation: list[float], test: list[float] | None, **keys: Any) -> Run:
    """A run with these losses at all times, and at its end."""
    folder = write_run(
        home / name, strategy=name, tasks=("one", "two"), loss=lambda task, share: validation[task], test=test, **keys
    )
    return read_run(folder)


def test_runs_are_compared_by_their_test_losses(tmp_path: Path) -> None:
    """The run that is best in validation is worst in the test."""
    runs = on_one_split(
        [with_test(tmp_path, "a", [1.0, 2.0], [6.0, 7.0]), with_test(tmp_path, "b", [3.0, 4.0], [3.5, 4.5])]
    )
    groups = group_runs(runs)
    assert [group.name for group in groups] == ["b", "a"] and {group.split for group in groups} == {"test"}
    assert [final_worst(group).mean for group in groups] == [4.5, 7.0]
    assert [final_mean(group).mean for group in groups] == [4.0, 6.5]
    assert [(result.winner, [loss.mean for loss in result.losses]) for result in task_results(groups)] == [
        (0, [3.5, 6.0]),
        (0, [4.5, 7.0]),
    ]
    by_validation = group_runs([replace(run, split="validation") for run in runs])
    assert [group.name for group in by_validation] == ["a", "b"]
    assert [result.winner for result in task_results(by_validation)] == [0, 0]


def test_tokens_to_reach_are_of_validation_whatever_the_test_says(tmp_path: Path) -> None:
    """The target too: the loss of one split at the end says nothing about that of another on the way."""
    runs = on_one_split(
        [with_test(tmp_path, "a", [1.0, 2.0], [6.0, 7.0]), with_test(tmp_path, "b", [3.0, 4.0], [3.5, 4.5])]
    )
    a, b = (Group(run.strategy, (run,)) for run in runs)
    assert all_tokens_to_reach(a, b) == [0] and math.isnan(all_tokens_to_reach(b, a)[0])


@pytest.mark.parametrize(
    ("test", "keys", "split"),
    [
        ([5.0, 5.0], {}, "test"),
        (None, {}, "validation"),
        ([5.0, math.nan], {}, "validation"),
        ([5.0, 5.0], {"finished": False}, "validation"),
    ],
    ids=["all", "no test", "not every task", "unfinished"],
)
def test_by_test_losses_only_if_all_have_them(
    tmp_path: Path, test: list[float] | None, keys: dict[str, Any], split: str
) -> None:
    runs = [with_test(tmp_path, "a", [1.0, 2.0], [6.0, 7.0]), with_test(tmp_path, "b", [3.0, 4.0], test, **keys)]
    assert {run.split for run in on_one_split(runs)} == {split}
    best = {"test": "b", "validation": "a"}[split]
    assert group_runs(on_one_split(runs))[0].name == best


def test_a_task_that_is_not_validated_needs_no_test(tmp_path: Path) -> None:
    nan = math.nan
    runs = [with_test(tmp_path, "a", [1.0, nan], [6.0, nan]), with_test(tmp_path, "b", [3.0, nan], [3.5, nan])]
    groups = group_runs(on_one_split(runs))
    assert groups[0].split == "test" and final_worst(groups[0]) == final_mean(groups[0]) == (3.5, 3.5, 3.5)


def test_shared_tasks_are_enough(tmp_path: Path) -> None:
    """What only one of them has is left out, tested or not."""
    one = read_run(write_run(tmp_path / "a", strategy="a", tasks=("x", "y"), test=[1.0, math.nan]))
    other = read_run(write_run(tmp_path / "b", strategy="b", tasks=("x", "z"), test=[2.0, 3.0]))
    shared, _ = on_shared_tasks([one, other])
    assert [run.split for run in on_one_split(shared)] == ["test"] * 2
    assert [run.split for run in on_one_split([one, other])] == ["validation"] * 2
    assert [run.result_losses.tolist() for run in on_one_split(shared)] == [[1.0], [2.0]]


# ---- groups


@pytest.mark.parametrize(
    ("one", "other", "names"),
    [
        ({"seed": 1}, {"seed": 2}, ["adapt"]),
        ({"tasks": {"seed": 1, "n": 1}}, {"tasks": {"seed": 2, "n": 1}}, ["adapt"]),
        ({"resume": True, "output_dir": "a", "log_every": 1}, {"resume": False, "output_dir": "b"}, ["adapt"]),
        ({"versions": {"torch": "2.13"}}, {"versions": {"torch": "2.14"}}, ["adapt"]),
        ({"optimizer": {"lr": 1}}, {"optimizer": {"lr": 2}}, ["adapt, optimizer.lr=1", "adapt, optimizer.lr=2"]),
        ({"mixture": {"floor": 0.1}}, {}, ["adapt, mixture.floor=0.1", "adapt, mixture.floor=None"]),
        ({"strategy": "dro"}, {"batch_size": 2}, ["adapt", "dro"]),
        (
            {"a": 1, "b": 1, "c": 1, "d": 1},
            {"a": 1, "b": 1, "c": 1, "d": 2},
            ["adapt, d=1", "adapt, d=2"],
        ),
    ],
)
def test_runs_that_differ_only_in_seed_are_one_group(tmp_path: Path, one: dict, other: dict, names: list[str]) -> None:
    runs = [read_run(write_run(tmp_path / name, resolved=keys)) for name, keys in (("a", one), ("b", other))]
    groups = group_runs(runs)
    assert sorted(group.name for group in groups) == names
    assert sum(len(group.runs) for group in groups) == 2


def test_a_run_that_goes_on_is_no_seed_of_those_that_are_finished(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / f"{seed}", seed=seed, finished=seed < 2)) for seed in range(3)]
    assert [(group.name, group.seeds) for group in group_runs(runs)] == [("adapt", "0, 1"), ("adapt, unfinished", "2")]


def test_groups_have_different_names(tmp_path: Path) -> None:
    """Three keys are named at most, and the fourth differs."""
    runs = [
        read_run(write_run(tmp_path / f"{values}", resolved=dict(zip("abcd", values, strict=True))))
        for values in [(1, 1, 1, 1), (2, 2, 2, 2), (1, 1, 1, 2)]
    ]
    names = {group.name for group in group_runs(runs)}
    assert names == {"adapt, a=1, b=1, c=1 (1)", "adapt, a=2, b=2, c=2", "adapt, a=1, b=1, c=1 (2)"}


def test_what_differs_between_groups(tmp_path: Path) -> None:
    configs = {"a": {"optimizer": {"lr": 1, "beta": 1}}, "b": {"optimizer": {"lr": 2, "beta": 1}, "clip": 1}}
    runs = [read_run(write_run(tmp_path / name, strategy=name, resolved=keys)) for name, keys in configs.items()]
    groups = [Group(run.strategy, (run,)) for run in runs]
    assert differing_settings(groups) == {"strategy": ["a", "b"], "optimizer.lr": [1, 2], "clip": [None, 1]}


# ---- different tasks


def test_runs_over_different_tasks_are_compared_on_what_they_share(tmp_path: Path) -> None:
    runs = [
        read_run(write_run(tmp_path / "a", tasks=["x", "y", "z"], loss=lambda task, share: [9.0, 1.0, 2.0][task])),
        read_run(write_run(tmp_path / "b", tasks=["z", "w", "y"], loss=lambda task, share: [3.0, 8.0, 1.0][task])),
    ]
    shared, notes = on_shared_tasks(runs)
    assert [run.tasks for run in shared] == [("y", "z")] * 2
    assert [run.worst[-1] for run in shared] == [2.0, 3.0]
    assert notes == [
        "The runs are over different tasks. They are compared on the 2 they share; left out: w, x. "
        "Totals of tokens and time still include the tasks left out."
    ]
    same, notes = on_shared_tasks(runs[:1] * 2)
    assert same[0].tasks == ("x", "y", "z") and notes == []


def test_runs_that_share_no_task_are_refused(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / name, tasks=tasks)) for name, tasks in {"a": ["x"], "b": ["x", "y"]}.items()]
    runs.append(read_run(write_run(tmp_path / "c", tasks=["w"])))
    with pytest.raises(ValueError, match=r"/a and .*/c have no task in common"):
        on_shared_tasks(runs)


def test_many_tasks_left_out_are_counted(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / "a", tasks=["x", *(f"t{i}" for i in range(9))]))]
    runs.append(read_run(write_run(tmp_path / "b", tasks=["x"])))
    assert "on the 1 they share; left out: t0, t1, t2, t3, t4 and 4 more." in on_shared_tasks(runs)[1][0]


# ---- costs


def test_counters_of_a_finished_run_are_those_of_its_summary(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    summary = json.loads((folder / "summary.json").read_text())
    assert counters(read_run(folder)) == {key: summary[key] for key in COUNTERS}


@pytest.mark.parametrize("budget", [{"tokens": 2560, "fraction": None}, {"tokens": None, "fraction": 0.5}])
def test_counters_of_an_unfinished_run_are_what_its_log_says(tmp_path: Path, budget: dict) -> None:
    folder = write_run(tmp_path / "run", finished=False, resolved={"budget": budget})
    step, update = events(folder, "step")[-1], events(folder, "mixture")[-1]
    known = {key: step[key] for key in ("supervised_tokens", "tokens", "computed_tokens", "seconds")}
    known |= {key: update[key] for key in ("probe_tokens", "mixture_seconds")}
    known |= {"steps": 20, "mixture_updates": 3, "budget_tokens": budget["tokens"] or math.nan}
    expected = {key: known.get(key, math.nan) for key in COUNTERS}
    assert counters(read_run(folder)) == pytest.approx(expected, nan_ok=True)
