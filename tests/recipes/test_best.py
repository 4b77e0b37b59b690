"""``keep_best`` and ``stop_after``: which weights are kept, and where a run ends, whether it was interrupted or not."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from running import RECIPES, Runs, assert_same_run, events, exit_status, files, load_checkpoint, summary
from safetensors.torch import load_file
from tiers import slow_but

from adapt_recipes.training.best import BestValidation
from adapt_recipes.training.checkpoint import Checkpoints

# The rate is so high that losses go up and down.
UNSTEADY: dict[str, Any] = {
    "optimizer.lr": 0.05,
    "lr_schedule": "adapt_recipes.training.schedule.constant",
    "budget.tokens": 600,
    "validate_every": 2,
    "checkpoint_every": 5,
}
BEST = UNSTEADY | {"keep_best": "worst"}
ONE_OF_EACH_RECIPE = ["uniform", "adapt_planned", "mos_diff"]


def worst_losses(folder: Path) -> dict[int, float]:
    """Of every validation after the first step, by step."""
    found = [event for event in events(folder) if event["event"] == "validation" and event["step"]]
    return {event["step"]: max(x for x in event["losses"].values() if x is not None) for event in found}


def bits(weight: torch.Tensor) -> tuple[torch.Size, bytes]:
    """Its numbers, in whatever order: Hugging Face permutes the rows of some."""
    return weight.shape, weight.flatten().sort().values.numpy().tobytes()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of a checkpoint."""
    found: dict[str, torch.Tensor] = load_checkpoint(folder)["model"]
    return found


def steps_saved(folder: Path) -> set[int]:
    return {int(path.name.removeprefix("step_")) for path in (folder / "checkpoints").glob("step_*")}


# ---- what is kept


@pytest.mark.parametrize("strategy", slow_but("uniform", ONE_OF_EACH_RECIPE))
def test_the_weights_of_the_lowest_loss(runs: Runs, tmp_path: Path, strategy: str) -> None:
    folder = runs.whole(strategy, **BEST)
    losses, end = worst_losses(folder), summary(folder)
    best = min(losses, key=lambda step: losses[step])
    assert best not in (min(losses), max(losses)) and end["best_step"] == best
    assert steps_saved(folder) == {best, end["steps"]}
    assert not end["stopped_early"] and end["unspent_tokens"] == 0

    # model_best/ has the weights of its checkpoint, and model/ those of the last step.
    for name, step in (("model_best", best), ("model", end["steps"])):
        trained = weights(folder / "checkpoints" / f"step_{step}").values()
        written = load_file(folder / name / "model.safetensors").values()
        assert Counter(map(bits, trained)) == Counter(map(bits, written))
    assert files(folder / "model")["model.safetensors"] != files(folder / "model_best")["model.safetensors"]

    # Nothing else depends on it.
    other = runs.whole(strategy, **UNSTEADY)
    assert files(folder / "model") == files(other / "model")
    kept = ("best_step",)
    assert {k: v for k, v in end.items() if k not in kept} == {k: v for k, v in summary(other).items() if k not in kept}


@pytest.mark.parametrize("strategy", slow_but("uniform", ONE_OF_EACH_RECIPE))
def test_stopped_and_resumed(runs: Runs, tmp_path: Path, strategy: str) -> None:
    """Before a step after the best one and before the end; also where the newest checkpoint is the best one."""
    changes = BEST | {"stop_after": 2}
    expected, folder = runs.whole(strategy, **changes), tmp_path / "run"
    best = summary(expected)["best_step"]
    for step in (1, best, best + 3):
        runs.stop(strategy, folder, after=step, **changes)
    for method in ("finish", "test", "load_best"):
        runs.stop(strategy, folder, method=method, **changes)
    assert runs.run(strategy, folder, **changes) == 0
    assert_same_run(folder, expected)
    assert files(folder / "model_best") == files(expected / "model_best")
    assert steps_saved(folder) == steps_saved(expected)


@pytest.mark.slow
def test_two_processes(runs: Runs, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    changes = BEST | {"stop_after": 2, "model.attn_dropout": 0}
    assert runs.finish_group("uniform", folder, **changes) == [0, 0]
    expected = runs.whole("uniform", **changes)
    assert summary(folder)["best_step"] == summary(expected)["best_step"]
    assert summary(folder)["unspent_tokens"] == summary(expected)["unspent_tokens"]
    best = f"step_{summary(folder)['best_step']}"
    for name, value in weights(expected / "checkpoints" / best).items():
        torch.testing.assert_close(weights(folder / "checkpoints" / best)[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("in_background", [False, True])
def test_pruning(tmp_path: Path, in_background: bool) -> None:
    """The best is kept beside the newest two, wherever it is; one that is no longer the best is not."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    checkpoints = Checkpoints(tmp_path, keep=2, asynchronous=in_background)
    kept = []
    for step, best in enumerate((1, 1, 1, 1, 5, 5, 5, 5), start=1):
        checkpoints.save(step, model, optimizer, shared={}, own=None, best=best)
        checkpoints.wait()
        kept.append(sorted(int(path.name.removeprefix("step_")) for path in tmp_path.iterdir()))
    checkpoints.close()
    assert kept == [[1], [1, 2], [1, 2, 3], [1, 3, 4], [4, 5], [5, 6], [5, 6, 7], [5, 7, 8]]


def test_the_best_stays_until_a_better_one_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    checkpoints = Checkpoints(tmp_path, keep=1, asynchronous=False)
    for step in (1, 2):
        checkpoints.save(step, model, optimizer, shared={}, own=None, best=1)

    def fail(*arguments: object) -> None:
        raise RuntimeError("interrupted")

    monkeypatch.setattr(checkpoints, "_publish", fail)
    with pytest.raises(RuntimeError, match="interrupted"):
        checkpoints.save(3, model, optimizer, shared={}, own=None, best=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_1", "step_2"]


def test_weights_of_a_damaged_checkpoint(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    checkpoints = Checkpoints(tmp_path, keep=1, asynchronous=False)
    checkpoints.save(3, model, torch.optim.SGD(model.parameters(), lr=0.1), shared={}, own=None)
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    torch.nn.init.zeros_(model.weight)
    checkpoints.load_weights(3, model)
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    with pytest.raises(
        ValueError, match=r"step_3, written by 1 process, cannot be loaded into this model on 1 process"
    ):
        checkpoints.load_weights(3, torch.nn.Linear(2, 3))
    with pytest.raises(ValueError, match=r"step_3, .* cannot be loaded into this model .*: 'no place for model.bias'"):
        checkpoints.load_weights(3, torch.nn.Linear(2, 2, bias=False))
    with pytest.raises(ValueError, match=r"damaged checkpoints in .*: step_4 "):
        checkpoints.load_weights(4, model)
    (tmp_path / "step_3" / "shared.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"damaged checkpoints in .*: step_3 \(.*\); it cannot be loaded"):
        checkpoints.load_weights(3, model)


# ---- when a run ends


def test_without_progress(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It ends at the first validation that is the second without a lower loss, with what it was up to there."""
    folder = tmp_path / "run"
    assert runs.run("uniform", folder, **BEST, stop_after=2) == 0
    losses, end = worst_losses(folder), summary(folder)
    best = min(losses, key=lambda step: losses[step])
    assert end["stopped_early"] and end["best_step"] == best and end["steps"] == best + 4
    assert 0 < end["unspent_tokens"] == end["budget_tokens"] - end["supervised_tokens"]
    assert sum(end["task_tokens"].values()) == end["supervised_tokens"]
    text = f"no progress in 2 validations after step {best}; the run ends with {end['unspent_tokens']:,} tokens of the "
    assert f"stop_after: {text}budget not spent" in capsys.readouterr().out
    assert [event["text"] for event in events(folder) if event["event"] == "note"] == [f"{text}budget not spent"]

    # Up to there it is the run that spends all, and the model is the one of the last step.
    whole = [event for event in events(runs.whole("uniform", **BEST)) if event["event"] == "step"]
    own = [event for event in events(folder) if event["event"] == "step"]
    assert [event["loss"] for event in own] == [event["loss"] for event in whole[: end["steps"]]]
    assert events(folder)[-1]["reason"] == "finished" and runs.run("uniform", folder, **BEST, stop_after=2) == 0


def test_objectives() -> None:
    """Against the definition, on random losses, some not measured."""
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(30, 3, generator=generator, dtype=torch.float64)
    losses[:, 1] = float("nan")
    targets = torch.rand(30, 2, generator=generator, dtype=torch.float64)
    by_objective = {"worst": losses.nan_to_num(0).amax(1), "mean": losses.nanmean(1), "target": targets.mean(1)}
    for objective, values in by_objective.items():
        best = BestValidation(objective, 4, num_validated=2, num_targets=2)  # type: ignore[arg-type]
        best.observe(0, torch.zeros(3), torch.zeros(2))
        assert best.step == 0 and not best.is_over
        for step in range(1, 30):
            best.observe(step, losses[step], targets[step])
            lowest = 1 + int(values[1 : step + 1].argmin())
            assert (best.step, best.num_since, best.is_over) == (lowest, step - lowest, step - lowest >= 4)
            assert best.loss == pytest.approx(float(values[lowest]), rel=1e-12)
            copy = BestValidation(objective, 4, num_validated=2, num_targets=2)  # type: ignore[arg-type]
            copy.load_state_dict(best.state_dict())
            assert vars(copy) == vars(best)


# ---- bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep_best": "worst", "validate_every": 0}, "keep_best: needs validate_every, the steps between"),
        ({"stop_after": 2}, "stop_after: needs keep_best, which says what progress is: worst, mean or target"),
        ({"keep_best": "wurst"}, "keep_best: has to be 'worst', 'mean' or 'target', not"),
        ({"stop_after": -1, "keep_best": "mean"}, "stop_after"),
        ({"keep_best": "target"}, "keep_best: target needs targets, in tasks.targets; worst and mean are over tasks"),
    ],
    ids=str,
)
def test_bad_input(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    assert exit_status(RECIPES["uniform"], runs.argv("uniform", tmp_path / "run", **changes)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and not (tmp_path / "run" / "log.jsonl").exists()


def test_no_task_is_validated() -> None:
    with pytest.raises(ValueError, match=r"^keep_best: mean is over tasks, and none of them has a validation split$"):
        BestValidation("mean", 0, num_validated=0, num_targets=1)
