"""``tune plan --pilot``: predictions from known curves, and the command on the toy tasks."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from adapt_recipes import commands, mixture
from adapt_recipes.mixture.curves import Curves, asymptote_prior, fit
from adapt_recipes.planning import Pilot, pilot, show_pilot
from adapt_recipes.planning.pilot import fit_ends, predict, spend

ROOT = Path(__file__).parents[1]
TINY = ["model.num_layers=1", "model.embed_dim=16", "model.intermediate_dim=24"]
PLANNED = ["adapt_full_finetune", "--config", str(ROOT / "yaml" / "tiny_adapt_forecast.yaml"), "output_dir=run", *TINY]
BUDGET = 12_000


def arguments(num_tasks: int, **changes: Any) -> dict[str, Any]:
    names = [f"task {i}" for i in range(num_tasks)]
    return {"task_names": names, "num_supervised_tokens": [1000] * num_tasks, "budget_tokens": BUDGET} | changes


def known(rates: list[float], *, last: float) -> Curves:
    """Curves through many points of exp(-rate x), x up to ``last`` fair shares."""
    x = torch.linspace(0.05, last, 60, dtype=torch.float64)[:, None].expand(-1, len(rates))
    y = torch.exp(-torch.tensor(rates, dtype=torch.float64) * x)
    return fit(x, y, torch.ones_like(y), y, y.min(0).values, asymptote_prior(4))


def test_static_mixtures_spend_the_budget_by_their_shares() -> None:
    curves = known([1.0, 3.0], last=2.0)
    shared = arguments(2, num_supervised_tokens=[1000, 3000])
    tokens, losses = spend(mixture.proportional(**shared), curves, BUDGET)
    torch.testing.assert_close(tokens, torch.tensor([3000.0, 9000.0], dtype=torch.float64))
    # 0.5 and 1.5 fair shares.
    torch.testing.assert_close(losses, torch.exp(torch.tensor([-0.5, -4.5], dtype=torch.float64)), atol=0.03, rtol=0)


def test_worlds_are_drawn_by_how_well_curves_fit() -> None:
    """The mean over worlds is that of the curves; where the curve is known, all worlds are alike."""
    curves = fit_ends(torch.tensor([[100, 150], [200, 300]]), torch.tensor([[2.0, 1.0], [1.6, 0.4]]), BUDGET)
    generator, x = torch.Generator().manual_seed(0), torch.tensor([1.0, 1.0], dtype=torch.float64)
    drawn = torch.stack([curves.draw(generator).mean(x) for _ in range(4000)])
    torch.testing.assert_close(drawn.mean(0), curves.mean(x), atol=0.02, rtol=0)
    assert (drawn.std(0) > 0.1).all()
    sure = known([1.0, 3.0], last=2.0)
    assert (torch.stack([sure.draw(generator).mean(x) for _ in range(50)]).std(0) < 0.03).all()


def test_predictions_of_known_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mean and worst, with an interval around them; one slow task is a reason for a learned mixture."""
    monkeypatch.setattr(pilot, "WORLDS", 4)
    predictions = predict(known([0.5, 8.0, 8.0, 8.0], last=1.0), arguments(4), seed=0)
    assert list(predictions) == ["uniform", "proportional", "GroupDRO", "AdaptForecast"]
    even = predictions["uniform"]
    assert even.worst[0] == pytest.approx(0.607, abs=0.05) and even.mean[0] == pytest.approx(0.152, abs=0.03)
    assert all(
        low <= center <= high for low, center, high in [(each[1], each[0], each[2]) for each in (even.mean, even.worst)]
    )
    assert even == predictions["proportional"]
    learned = predictions["AdaptForecast"]
    assert learned.worst[0] < 0.7 * even.worst[0] and learned.task_tokens["task 0"] > 1.5 * BUDGET / 4
    assert sum(learned.task_tokens.values()) == pytest.approx(BUDGET)
    assert predict(known([0.5, 8.0, 8.0, 8.0], last=1.0), arguments(4), seed=0) == predictions


def test_the_table() -> None:
    found = pilot.Prediction((1.0, 0.5, 1.5), (2.0, 1.0, 3.0), {"a": 30.0, "b": 90.0})
    out = io.StringIO()
    show_pilot(Pilot("runs/x_pilot", [800, 1600], {"uniform": found}, "uniform"), console=Console(file=out, width=120))
    text = out.getvalue()
    for part in (
        "800 and 1,600",
        "1.000 (0.500 to 1.500)",
        "2.000 (1.000 to 3.000)",
        "b 75%",
        "adapt_recipes.mixture.uniform",
    ):
        assert part in text


def plan(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tune_cli_ext", "plan", *PLANNED, *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    """Two runs with whole schedules, which are not repeated; another pilot does not replace them."""
    done = plan(tmp_path, "--pilot", "0.15", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["pilot"]
    assert found["tokens"] == [1920, 3840] and found["folder"] == "run_pilot"
    assert found["best"] in found["predictions"]
    summaries = [json.loads((tmp_path / f"run_pilot/tokens_{n}/summary.json").read_text()) for n in found["tokens"]]
    assert [each["supervised_tokens"] for each in summaries] == found["tokens"]
    assert not list(tmp_path.glob("run_pilot/*/model")) and not (tmp_path / "run").exists()
    before = (tmp_path / "run_pilot/tokens_3840/summary.json").stat().st_mtime_ns
    again = plan(tmp_path, "--pilot", "0.15")
    assert again.returncode == 0 and "adapt_recipes.mixture." in again.stdout and "facts_512" in again.stdout
    assert (tmp_path / "run_pilot/tokens_3840/summary.json").stat().st_mtime_ns == before
    other = plan(tmp_path, "--pilot", "0.15", "optimizer.lr=0.01")
    assert other.returncode == 2 and other.stderr.strip().endswith("remove run_pilot, or rename it"), other.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pilot", "1.5"], "--pilot: a share of the budget, above 0 and at most 1, not 1.5"),
        (["--pilot", "0.0001"], "--pilot: 1 supervised tokens are too few for 7 tasks"),
        (["--pilot", "0.1", "--nnodes", "2"], "--pilot: its runs are on one machine; leave --nnodes out"),
    ],
)
def test_what_cannot_be_run(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit) as stopped:
        commands.plan([*PLANNED, *words])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"tune plan: error: {message}"
    assert not list(tmp_path.iterdir())


def test_an_interrupt_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(subprocess, "run", interrupted)
    with pytest.raises(SystemExit) as stopped:
        commands.plan([*PLANNED, "--pilot", "0.2"])
    assert stopped.value.code == 130 and capsys.readouterr().err.splitlines()[-1] == "tune plan: interrupted"
