"""benchmarks/compare.py runs shipped configs and sums them up."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import yaml
from test_benchmarks import benchmark

from adapt_recipes.evaluation import records
from adapt_recipes.evaluation.records import Sample, Score


@pytest.fixture(scope="module")
def compare() -> ModuleType:
    return benchmark("compare")


@pytest.mark.slow
@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_comparison(
    compare: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], split: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words = ["budget.tokens=320", "validate_every=2", "tasks.noise=true", "tiny_uniform", "tiny_adapt_planned"]
    words += ["mixture_update_every=2", "tiny_dro", "strategy=mild", "mixture.sharpness=0.1"]
    if split == "test":
        words.insert(0, "tasks.test_examples=1")
    for _ in range(2):  # the second time everything is finished
        compare.main(["--out", str(tmp_path / "out"), "--seeds", "7", *words])
        lines = capsys.readouterr().out.splitlines()
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "---" not in line]
        assert [row[0] for row in cells] == ["", "tiny_uniform", "tiny_adapt_planned", "mild"]
        summary = json.loads((tmp_path / "out" / "tiny_uniform_7" / "summary.json").read_text())
        assert cells[0][1:3] == [f"worst {split} excess", f"mean {split} excess"]
        losses = summary[f"{split}_losses"]
        worst = max(loss - (math.log(16) if name == "noise" else 0) for name, loss in losses.items())
        assert (
            cells[1][1] == f"{worst:.3f}"
            and cells[1][4] == "0.12"
            and cells[1][7:9] == ["0", str(summary["total_tokens"])]
        )
        assert 0 < int(cells[1][3]) <= 320, "it reaches its own loss at the latest at the end"
        assert [row[5:7] for row in cells[1:3]] == [["5", "0"], ["5", "2"]]
        resolved = yaml.safe_load((tmp_path / "out" / "mild_7" / "resolved.yaml").read_text())
        assert resolved["mixture"]["sharpness"] == 0.1 and resolved["tasks"]["noise"]
    assert "finished already" in (tmp_path / "out" / "tiny_uniform_7.txt").read_text()


def write_finished(folder: Path, validation: dict[str, float], test: dict[str, float] | None) -> None:
    """What the table reads of a run."""
    folder.mkdir(parents=True)
    zeros = dict.fromkeys(("supervised_tokens", "probe_tokens", "mixture_seconds", "step"), 0)
    share = dict.fromkeys(validation, 0.5)
    lines = [{"event": "mixture", **zeros, "probabilities": share}]
    lines += [{"event": "validation", "supervised_tokens": spent, "losses": validation} for spent in (40, 80)]
    (folder / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    counts = {"budget_tokens": 80, "supervised_tokens": 80, "steps": 8, "mixture_updates": 0, "probe_tokens": 12}
    losses = {"validation_losses": validation, "test_losses": test}
    times = {"seconds": 2.0, "mixture_seconds": 0.5}
    summary = {**counts, "task_tokens": dict.fromkeys(validation, 40), **losses, **times}
    (folder / "summary.json").write_text(json.dumps(summary))


@pytest.mark.parametrize("has_test", [True, False])
def test_the_table_is_of_test_losses_if_all_runs_have_them(
    compare: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    has_test: bool,
) -> None:
    """The lowest possible loss of noise is subtracted from them as well; tokens to a loss stay those of validation."""
    monkeypatch.setattr(compare, "run", lambda *_: None)
    noise = math.log(16)
    write_finished(tmp_path / "tiny_uniform_0", {"a": 2.0, "noise": 1 + noise}, {"a": 5.0, "noise": 4 + noise})
    test = {"a": 1.0, "noise": 2 + noise} if has_test else None
    write_finished(tmp_path / "tiny_dro_0", {"a": 3.0, "noise": 1.5 + noise}, test)
    compare.main(["--out", str(tmp_path), "--seeds", "0", "tiny_uniform", "tiny_dro"])
    header, _, *rows = [[cell.strip() for cell in line.split("|")[1:]] for line in capsys.readouterr().out.splitlines()]
    split = "test" if has_test else "validation"
    assert header[1:4] == [f"worst {split} excess", f"mean {split} excess", "tokens to its loss"]
    expected = [["5.000", "4.500", "40"], ["2.000", "1.500", "never"]]
    if not has_test:
        expected = [["2.000", "1.500", "40"], ["3.000", "2.250", "never"]]
    assert [row[1:4] for row in rows] == expected


def write_scores(folder: Path, suite: str, right: dict[str, list[int]], family: str = "own tasks") -> None:
    """Exact match of each task's examples."""
    for task, values in right.items():
        samples = [
            Sample(id=f"{i:03}", prompt="", references=[], answer="", values={"exact_match": float(value)})
            for i, value in enumerate(values)
        ]
        score = Score(
            family=family,
            metric="exact_match",
            higher_is_better={"exact_match": True},
            values={"exact_match": float(np.mean(values))},
            stderrs={},
            num_examples=len(values),
            data="test",
            seconds=1.0,
            versions={},
        )
        records.add(folder, suite, task, score, samples, "model", "weights", {"limit": None})


@pytest.fixture
def compared(compare: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two rows of two seeds that are finished."""
    monkeypatch.setattr(compare, "run", lambda *_: None)
    folders = [tmp_path / f"{name}_{seed}" for name in ("tiny_uniform", "tiny_dro") for seed in (0, 1)]
    for folder in folders:
        write_finished(folder, {"a": 2.0}, None)
    return folders


RIGHT = {
    "tiny_uniform_0": {"a": [0, 0, 0, 1], "b": [1, 0] * 10},
    "tiny_uniform_1": {"a": [0, 0, 1, 1], "b": [1, 0] * 10},
    # The mean over seeds of every example of a is higher by a half, of b it is the same.
    "tiny_dro_0": {"a": [1, 1, 1, 1], "b": [1, 0] * 10},
    "tiny_dro_1": {"a": [0, 0, 1, 1], "b": [1, 0] * 10},
}


@pytest.mark.parametrize("status", [0, 1])
@pytest.mark.parametrize("suite", ["eval_tasks", "mine"])
def test_a_suite_measures_all_runs_and_makes_a_second_table(
    compare: ModuleType,
    compared: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    status: int,
    suite: str,
) -> None:
    """Once, with its overrides, under the name that they give it; a benchmark that is missing makes the status 1."""
    commands = []

    def measure(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        commands.append(command)
        for folder in compared:
            write_scores(folder, suite, RIGHT[folder.name])
            write_scores(folder, suite, {"arc": [1, 0]}, family="reasoning")
        return subprocess.CompletedProcess(command, status)

    monkeypatch.setattr(subprocess, "run", measure)
    words = ["limit=8", "only=[a,b]", *["suite=mine"] * (suite == "mine")]
    evaluate = ["--evaluate", " ".join(["eval_tasks", *words])]
    arguments = ["--out", str(tmp_path), "--seeds", "0,1", *evaluate, "tiny_uniform", "tiny_dro"]
    assert compare.main(arguments) == status
    (command,) = commands
    assert [Path(word).name for word in command[1:4]] == ["mixture_eval.py", "--config", "eval_tasks.yaml"]
    given = yaml.safe_load(command[4].removeprefix("runs="))
    assert command[4].startswith("runs=") and given == list(map(str, compared)) and command[5:] == words
    assert (tmp_path / "eval_tasks.txt").exists()

    _, second = capsys.readouterr().out.split("\n\n")
    header, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in second.splitlines()[:4]]
    means = ["mean of own tasks", "mean of reasoning", "mean over tasks"]
    assert header == ["", *means, "difference from tiny_uniform"]
    # (0.25 + 0.5) / 2 and (0.5 + 0.5) / 2; with arc, sum / 3.
    assert rows[0] == ["tiny_uniform", "0.438 (0.375 to 0.500)", "0.500", "0.458 (0.417 to 0.500)", "–"]
    # Of single examples of a: 0.5, 0.5, 0, 0.5.
    assert rows[1][:4] == ["tiny_dro", "0.625 (0.500 to 0.750)", "0.500", "0.583 (0.500 to 0.667)"]
    assert rows[1][4].startswith("+0.125 (+") and rows[1][4].endswith(" to +0.167)")
    assert ("Some benchmarks were not measured; " in second) == bool(status)


def test_what_could_not_be_measured_is_a_dash_with_a_reason(
    compare: ModuleType,
    compared: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--out", str(tmp_path), "--seeds", "0,1", "--evaluate", "eval_ood", "tiny_uniform", "tiny_dro"]
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1))
    assert compare.main(arguments) == 1
    assert "Not measured: tiny_uniform_0, tiny_uniform_1, tiny_dro_0, tiny_dro_1." in capsys.readouterr().out
    for folder in compared[:3]:
        write_scores(folder, "eval_ood", {"arc": [1, 0]})
    assert compare.main(arguments) == 1
    said = capsys.readouterr().out
    assert "| tiny_dro | – | – | – |" in said and "Not measured: tiny_dro_1." in said
    # An error is one: the config is refused, for instance.
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 2))
    with pytest.raises(subprocess.CalledProcessError):
        compare.main(arguments)


def test_overrides_are_for_all_or_for_one(compare: ModuleType) -> None:
    first, second, third = compare.rows(["a=1", "one", "two", "b=2", "two", "strategy=x", "c=3"])
    assert first == ("one", ["a=1"]) and second == ("two", ["a=1", "b=2"])
    assert third == ("two", ["a=1", "strategy=x", "c=3"])
    assert [first.name, second.name, third.name] == ["one", "two", "x"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("seed=1", "name a config"),
        ("tiny_uniforn", "there is no yaml/tiny_uniforn.yaml"),
        ("tiny_dro tiny_dro mixture.sharpness=1", "two rows have the name tiny_dro"),
        ("tiny_dro --evaluate eval_task", "--evaluate: yaml/ has no suite 'eval_task'; did you mean 'eval_tasks'?"),
        ("tiny_dro --evaluate tiny_dro", "yaml/ has no suite 'tiny_dro'; allowed: eval_mos, eval_ood"),
    ],
)
def test_what_cannot_be_compared(
    words: str, said: str, compare: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        compare.main(["--out", str(tmp_path / "out"), "--seeds", "0", *words.split()])
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_spread(compare: ModuleType) -> None:
    assert compare.cell([1.0, 2.0], 1) == "1.5 (1.0 to 2.0)"
    assert compare.cell([3.0, 3.0], 0) == "3"
    assert compare.cell([math.nan, math.nan], 0) == "never"
    assert compare.cell([math.nan, 2.0], 0) == "not always"
