"""`tune report --schedule`: the run of an exported schedule draws and learns what the run that learned it did."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from running import RECIPES, Runs, events, files, load_recipe, summary
from tiers import slow_but

from adapt_recipes.config import load
from adapt_recipes.report.schedule import write_schedule

FAST: dict[str, Any] = {"mixture_update_every": 2, "batch_size": 4}


def steps(folder: Path) -> list[dict[str, Any]]:
    times = ("seconds", "total_tokens")
    return [
        {key: value for key, value in event.items() if key not in times}
        for event in events(folder)
        if event["event"] == "step"
    ]


@pytest.mark.parametrize("strategy", slow_but("adapt_planned", ["adapt_planned", "adapt", "mos_diff", "exp3"]))
def test_it_repeats_the_run(runs: Runs, tmp_path: Path, strategy: str) -> None:
    learned, out = runs.whole(strategy, **FAST), tmp_path / "schedule" / "learned.yaml"
    write_schedule(learned, out)
    recipe = load_recipe(RECIPES[strategy])
    config = load(recipe.Config, out, [f"output_dir={tmp_path / 'run'}"])
    assert config.strategy == f"{summary(learned)['strategy']}_schedule"
    assert recipe.main(config) == 0
    assert steps(tmp_path / "run") == steps(learned)
    assert files(tmp_path / "run" / "model") == files(learned / "model")
    assert summary(tmp_path / "run")["probe_tokens"] == 0 < summary(learned)["probe_tokens"] or strategy == "exp3"
    stages = yaml.safe_load(out.read_text())["mixture"]["stages"]
    assert len(stages) > 2 and sum(stage["share"] for stage in stages) == pytest.approx(1)
    # One line per stage's weights, and the recipe's command above.
    assert out.read_text().count("weights: {") == len(stages)
    assert out.read_text().startswith(f"# tune run {RECIPES[strategy]} --config {out}\n")


def test_what_has_no_schedule(runs: Runs, tmp_path: Path) -> None:
    learned, out = tmp_path / "run", tmp_path / "x.yaml"
    shutil.copytree(runs.whole("adapt_planned", **FAST), learned)
    for folder, message in (
        (tmp_path / "none", "is no run directory"),
        (runs.whole("uniform"), "the probabilities of .* have never changed"),
    ):
        with pytest.raises(ValueError, match=message):
            write_schedule(folder, out)
    with pytest.raises(ValueError, match=r"^--schedule .*x\.txt: has to end in \.yaml$"):
        write_schedule(learned, tmp_path / "x.txt")
    resolved = yaml.safe_load((learned / "resolved.yaml").read_text())
    resolved["tasks"]["targets"] = ["t"]
    (learned / "resolved.yaml").write_text(json.dumps(resolved))
    with pytest.raises(ValueError, match=r"^--schedule: .* has tasks\.targets"):
        write_schedule(learned, out)
    (learned / "summary.json").unlink()
    with pytest.raises(ValueError, match="is not finished; resume=true finishes it"):
        write_schedule(learned, out)
    assert not out.exists()
