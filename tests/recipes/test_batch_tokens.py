"""Steps of so many supervised tokens: the same number of them whatever the mixture."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from conftest import Runner
from running import Runs, events, files, summary
from tiers import slow_but

TOKENS: dict[str, Any] = {"batch_size": "null", "batch_tokens": 24}
# Answers of the four tasks have 3 to 7 supervised tokens, with their end.
LONGEST = 7


@pytest.mark.parametrize(
    "words",
    slow_but(
        ["tiny_adapt_planned"],
        ["tiny_uniform", "tiny_adapt_planned", "tiny_mos_cossim", "tiny_mos_diff sampling=dataset"],
    ),
)
def test_tokens_are_examples_where_an_answer_is_one_token(run: Runner, words: str) -> None:
    """Bit for bit, the last step included, which is smaller."""
    runs = [
        run(*words.split(), f"{key}=64", "budget.tokens=1000", folder=key) for key in ("batch_size", "batch_tokens")
    ]
    assert len(runs[0].training()) == 16 and runs[0].training() == runs[1].training()
    assert summary(runs[0].folder) == summary(runs[1].folder)
    assert files(runs[0].folder / "model") == files(runs[1].folder / "model")


@pytest.mark.parametrize("strategy", slow_but(["dro", "mos_diff"], ["dro", "adapt_planned", "mos_diff", "exp3"]))
def test_every_strategy_makes_the_same_steps(runs: Runs, tmp_path: Path, strategy: str) -> None:
    """Where they make different ones of so many examples."""
    moving: dict[str, Any] = {"mixture_update_every": 2}
    if strategy == "dro":
        moving["mixture.sharpness"] = 100
    assert runs.run(strategy, tmp_path / "run", **TOKENS, **moving) == 0
    assert summary(tmp_path / "run")["steps"] == summary(runs.whole("uniform", **TOKENS))["steps"] == -(-330 // 24)
    if strategy == "dro":
        assert summary(tmp_path / "run")["task_tokens"] != summary(runs.whole("uniform", **TOKENS))["task_tokens"]


def test_what_a_step_takes_too_much_the_next_one_lacks(runs: Runs) -> None:
    """And the loss is the mean over the step's own tokens."""
    steps = [event for event in events(runs.whole("uniform", **TOKENS)) if event["event"] == "step"]
    before: dict[str, int] = dict.fromkeys(steps[0]["task_tokens"], 0)
    sizes = set()
    for step in steps:
        spent = {task: tokens - before[task] for task, tokens in step["task_tokens"].items()}
        total = sum(step["task_losses"][task] * tokens for task, tokens in spent.items() if tokens)
        assert step["loss"] == pytest.approx(total / sum(spent.values()), rel=1e-6)
        if step is not steps[-1]:
            assert 0 <= step["supervised_tokens"] - 24 * step["step"] < LONGEST
        before = step["task_tokens"]
        sizes.add(sum(spent.values()))
    assert steps[-1]["supervised_tokens"] == 330 and len(sizes) > 2


@pytest.mark.parametrize(
    ("batch_tokens", "reason"),
    [
        (24, "less than 8 mean answers of task 'd', 7.0 tokens each"),
        (6, "less than the longest answer, 7 supervised tokens of task 'd'"),
        (331, "more than the budget of 330 supervised tokens"),
    ],
)
def test_a_size_that_surprises_is_warned_about(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str], batch_tokens: int, reason: str
) -> None:
    """With about as many steps as there are then; as many, where no answer is longer than a step."""
    assert runs.run("uniform", tmp_path / "run", batch_size="null", batch_tokens=batch_tokens) == 0
    num_steps = summary(tmp_path / "run")["steps"]
    found = re.fullmatch(
        f"warning: batch_tokens: {batch_tokens} is {re.escape(reason)}; expect (\\d+) steps?\n", capsys.readouterr().err
    )
    assert found and abs(int(found[1]) - num_steps) <= (2 if batch_tokens < LONGEST else 0)
