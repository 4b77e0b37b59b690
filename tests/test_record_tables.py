"""benchmarks/records.py keeps what tables need of runs, and makes the tables from it."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml
from test_benchmarks import benchmark

from adapt_recipes.report.read import read_run

TASKS = ["a", "b", "noise"]
NOISE = math.log(16)
SPEC: dict[str, Any] = {
    "title": "Toy",
    "seeds": [0, 1, 2],
    "rows": {
        "learned": {"name": "Learned"},
        "shown": {"name": "Shown", "kind": "oracle"},
        "uniform": {"name": "Uniform", "kind": "static"},
        "never_run": {"name": "Never run"},
    },
    "baselines": ["uniform"],
    "columns": [
        "worst",
        "mean",
        "exact_match",
        "steps",
        "mixture_updates",
        "probe_tokens",
        "mixture_time",
        "noise_share",
    ],
    "floors": {"noise": NOISE},
    "noise_task": "noise",
}
# Test losses of a, b, noise.
LOSSES = {
    "uniform_0": [2.0, 1.0, NOISE + 0.5],
    "uniform_1": [2.4, 1.1, NOISE + 0.1],
    "uniform_2": [1.9, 0.7, NOISE + 0.3],
    "learned_0": [1.0, 1.5, NOISE + 0.25],
    "learned_2": [1.2, 1.1, NOISE + 1.6],
    "shown_1": [0.5, 0.75, NOISE + 0.25],
}


@pytest.fixture(scope="module")
def records() -> ModuleType:
    return benchmark("records")


def by_task(values: list[float]) -> dict[str, float]:
    return dict(zip(TASKS, values, strict=True))


def write_run(folder: Path, test: list[float] | None, *, finished: bool = True) -> Path:
    """A run of five steps with an update after each, as a recipe leaves it."""
    name, seed = folder.name.rsplit("_", 1)
    shift = float(np.mean(test or [3.0, 3.0, 3.0]))
    lines: list[dict[str, Any]] = []
    for step in range(6):
        counts = {"step": step, "supervised_tokens": 20 * step, "total_tokens": 90 * step, "seconds": 0.5 * step}
        if step:
            tokens = {"tokens": 60 * step, "computed_tokens": 50 * step, "task_tokens": by_task([8, 7, 5])}
            losses = {"task_losses": by_task([1.0, 2.0, 3.0])}
            lines.append({"event": "step", **counts, "loss": 1.0, "lr": 0.1, "grad_norm": 1.0, **tokens, **losses})
        share = {"probabilities": by_task([0.5, 0.3, 0.2]), "signals": by_task([1.0, 2.0, 3.0])}
        lines.append({"event": "mixture", **counts, "probe_tokens": 7 * step, "mixture_seconds": 0.1 * step, **share})
        if step in (0, 3, 5):
            losses = by_task([shift + 5 - step, 0.5 * shift, NOISE])
            lines.append({"event": "validation", **counts, "losses": losses, "exact_match": by_task([0.1, 0.2, 0.3])})
    lines.append({"event": "checkpoint", "folder": str(folder)})
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    config = {
        "strategy": name,
        "output_dir": str(folder.resolve()),
        "seed": int(seed),
        "model": {"_component_": "torchtune.models.llama3_2.llama3_2", "path": "/models/small", "layers": 2},
        "tasks": {"path": "data/own", "sources": [{"path": "/data/one.jsonl"}, {"files": ["/data/two", "three"]}]},
        "versions": {"adapt_recipes": "0.1.0"},
    }
    (folder / "resolved.yaml").write_text(yaml.safe_dump(config))
    if finished:
        summary: dict[str, Any] = {"strategy": name, "seed": int(seed), "budget_tokens": 100, "supervised_tokens": 100}
        summary |= {"task_tokens": by_task([40, 35, 25]), "validation_losses": by_task([shift, 0.5 * shift, NOISE])}
        summary |= {"test_losses": by_task(test) if test else None, "seconds": 2.5, "mixture_seconds": 0.5 + int(seed)}
        summary |= {"test_exact_match": by_task([0.25, 0.5, 0.0]), "steps": 5, "mixture_updates": 5, "probe_tokens": 35}
        (folder / "summary.json").write_text(json.dumps(summary, indent=2))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return [write_run(tmp_path / "runs" / name, test) for name, test in LOSSES.items()]


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    folder = tmp_path / "docs"
    (folder / "data" / "toy").mkdir(parents=True)
    (folder / "data" / "toy" / "table.yaml").write_text(yaml.safe_dump(SPEC, sort_keys=False))
    return folder


def make(records: ModuleType, docs: Path, runs: list[Path]) -> str:
    """Keeps the runs, and returns the page."""
    assert records.main(["keep", "--docs", str(docs), "toy", *map(str, runs)]) == 0
    assert records.main(["tables", "--docs", str(docs)]) == 0
    return (docs / "tables" / "toy.md").read_text(encoding="utf-8")


def tables(page: str) -> list[dict[str, list[str]]]:
    """The cells of each table by the first one of their line; of the header it is empty."""
    found: list[dict[str, list[str]]] = [{}]
    for line in page.splitlines():
        if line.startswith("|"):
            first, *cells = [cell.strip() for cell in line[1:-1].split("|")]
            if first != "---":
                found[-1][first] = cells
        elif found[-1]:
            found.append({})
    return [table for table in found if table]


def test_the_cells_are_those_of_the_runs(records: ModuleType, docs: Path, runs: list[Path]) -> None:
    """Kept runs make the same page as whole ones in their place, and their numbers are right."""
    page = make(records, docs, runs)
    for folder in runs:
        kept = docs / "data" / "toy" / folder.name
        shutil.rmtree(kept)
        shutil.copytree(folder, kept)
    assert records.main(["tables", "--docs", str(docs)]) == 0
    assert (docs / "tables" / "toy.md").read_text(encoding="utf-8") == page

    first, _, every = tables(page)
    assert list(first) == ["", "Uniform", "Learned", "*Shown*"], "static rows are first, oracles in italics"
    assert first[""][:4] == ["seeds", "worst test excess", "mean test excess", "exact match"]
    worst = np.array([2.0, 2.4, 1.9])
    mean = np.array([3.5, 3.6, 2.9]) / 3
    expected = [f"{v.mean():.3f} ± {v.std(ddof=1) / math.sqrt(3):.3f}" for v in (worst, mean)]
    # A mean of 0, 1, 2 with the standard error 1 / sqrt(3), in shares of 2.5 s.
    times = f"60.0 ± {100 / 2.5 / math.sqrt(3):.1f}"
    assert first["Uniform"] == ["3", *expected, "0.250", "5", "5", "35", times, "25.0"]
    assert first["*Shown*"] == ["1", "0.750", "0.500", "0.250", "5", "5", "35", "60.0", "25.0"]
    assert every["Learned"] == ["1.500 / 0.917", "–", "1.600 / 1.300"]


def test_differences_are_of_common_seeds(records: ModuleType, docs: Path, runs: list[Path]) -> None:
    _, paired, _ = tables(make(records, docs, runs))
    worst = np.array([1.5 - 2.0, 1.6 - 1.9])
    mean = np.array([2.75 - 3.5, 3.9 - 2.9]) / 3
    expected = [f"{v.mean():+.3f} ± {np.std(v, ddof=1) / np.sqrt(2):.3f} (2)" for v in (worst, mean)]
    assert paired["Learned"][:2] == expected and expected[0] == "-0.400 ± 0.100 (2)"
    assert paired["*Shown*"][:2] == ["-1.650 (1)", "-0.700 (1)"] and paired["Uniform"] == ["–", "–", "–"]


def test_tokens_to_the_worst_loss_of_a_baseline(records: ModuleType, docs: Path, runs: list[Path]) -> None:
    """Of the seeds that reach it, at a validation or at the end; the others are counted."""
    # The mean test loss shifts the validations: at 0, 60 and 100 tokens the worst is 5, 2 and 0 above it.
    higher, lower, same = ([each, each, each] for each in (5.0, 0.0, 2.0))
    for seed, (learned, uniform) in enumerate([(same, same), (lower, same), (higher, same)]):
        for row, losses in (("learned", learned), ("uniform", uniform)):
            shutil.rmtree(folder := runs[0].parent / f"{row}_{seed}", ignore_errors=True)
            write_run(folder, losses)
    folders = [runs[0].parent / f"{row}_{seed}" for row in ("learned", "uniform") for seed in range(3)]
    _, paired, _ = tables(make(records, docs, folders))
    assert paired[""][2] == "tokens to Uniform's worst"
    assert paired["Learned"][2] == "80.0 ± 20.0, 1 never"


def test_tables_in_documents_have_plots(records: ModuleType, docs: Path, runs: list[Path]) -> None:
    rows = ["uniform | 3.0 (2.9 to 3.1) | 1.5 | 9", "learned | 2.5 | 1.25 (1.2 to 1.3) | 8", "*oracle* | 2.0 | 1.0 | 7"]
    table = "".join(f"| {row} |\n" for row in ["| worst loss | mean loss | worst loss", "---|---|---|---", *rows])
    text = f"# How?\n\n{table}\n| | seconds |\n|---|---|\n| a | 1 |\n\n{table}"
    (docs / "results-some.md").write_text(text)
    make(records, docs, runs)
    assert sorted(path.name for path in (docs / "tables").glob("*.png")) == [
        "results-some-1.png",
        "results-some-2.png",
        "toy.png",
    ]
    plane = benchmark("plane")
    first, second = plane.points_of_document(text)
    assert first == second and [point.kind for point in first] == ["static", "learned", "oracle"]
    assert first[0].worst == (3.0, 2.9, 3.1) and first[1].worst == (2.5, 2.5, 2.5) and first[1].mean == (1.25, 1.2, 1.3)


def test_a_kept_run_is_small_and_can_be_read(records: ModuleType, docs: Path, runs: list[Path]) -> None:
    make(records, docs, runs)
    for folder in runs:
        kept = docs / "data" / "toy" / folder.name
        assert (kept / "summary.json").read_bytes() == (folder / "summary.json").read_bytes()
        events = [json.loads(line)["event"] for line in (kept / "log.jsonl").read_text().splitlines()]
        assert sorted(events) == ["mixture"] * 2 + ["step"] * 3 + ["validation"] * 3
        one, other = read_run(kept), read_run(folder)
        assert one.notes == other.notes == () and one.summary == other.summary and one.tasks == other.tasks
        for event in ("steps", "mixtures", "validations"):
            for ours, theirs in zip(getattr(one, event), getattr(other, event), strict=True):
                # Of steps those at validations as well.
                some = {"steps": [0, 2, -1], "mixtures": [0, -1], "validations": slice(None)}[event]
                np.testing.assert_array_equal(ours, theirs[some])


def test_the_steps_of_validations_are_kept(records: ModuleType, tmp_path: Path) -> None:
    """The first and the last step too, none twice, and in the order of the log, whichever steps are validated."""
    steps = range(1, 13)
    for validated in ([], [0], [1], [12], [0, 1, 5, 6, 12], [*range(13)]):
        lines = []
        for step in range(13):
            others = ["tokens", "computed_tokens", "seconds", "lr", "task_tokens"]
            others += ["probe_tokens", "mixture_seconds", "probabilities", "losses"]
            values = {"step": step, "supervised_tokens": 20 * step, **dict.fromkeys(others)}
            lines += [{"event": "step", **values}] * (step in steps) + [{"event": "mixture", **values}]
            lines += [{"event": "validation", **values}] * (step in validated)
        (tmp_path / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        kept: dict[str, list[int]] = {"mixture": [], "step": [], "validation": []}
        for line in records.short_log(tmp_path / "log.jsonl"):
            kept[line["event"]].append(line["supervised_tokens"])
        at = [20 * step for step in steps if step in {1, 12, *validated}]
        assert kept == {"mixture": [0, 240], "step": at, "validation": [20 * step for step in validated]}


def test_no_folder_of_the_machine_is_kept(records: ModuleType, docs: Path, runs: list[Path], tmp_path: Path) -> None:
    make(records, docs, runs)
    kept = docs / "data" / "toy" / "learned_0"
    for path in kept.iterdir():
        text = path.read_text()
        assert not any(word in text for word in (str(tmp_path), "/models", "/data/")), path
    config = yaml.safe_load((kept / "resolved.yaml").read_text())
    assert config["output_dir"] == "learned_0" and config["model"]["path"] == "small"
    assert config["tasks"] == {"path": "data/own", "sources": [{"path": "one.jsonl"}, {"files": ["two", "three"]}]}
    assert config["model"]["layers"] == 2 and config["seed"] == 0


def test_the_frontier_predicts_what_is_held_out(records: ModuleType, docs: Path, runs: list[Path]) -> None:
    """Its predictions are those of curves of the other runs only; it is on the page if a row is held out."""
    assert "Frontier" not in make(records, docs, runs)
    spec = docs / "data" / "toy" / "table.yaml"
    spec.write_text(yaml.safe_dump(SPEC | {"held_out": ["learned"]}, sort_keys=False))
    page = make(records, docs, runs)
    assert "\n## Frontier\n" in page and "validations of the other 4 runs" in page
    _, _, held_out, best, _ = tables(page)
    assert list(held_out) == ["", "Learned, seed 0", "Learned, seed 2"]
    assert list(best) == ["", *(f"risk {risk:g}" for risk in benchmark("frontier").RISKS)]

    others = [read_run(docs / "data" / "toy" / name) for name in LOSSES if not name.startswith("learned")]
    above = [replace(benchmark("common").above_floors(run, SPEC["floors"]), split="test") for run in others]
    fitted = benchmark("frontier").fit_frontier(above)
    predicted = fitted.losses(np.array([0.4, 0.35, 0.25]))
    for seed in (0, 2):
        measured = np.array(LOSSES[f"learned_{seed}"]) - [0, 0, NOISE]
        numbers = [predicted.mean(), measured.mean(), predicted.max(), measured.max()]
        numbers.append(np.abs(predicted - measured).mean())
        assert held_out[f"Learned, seed {seed}"] == [f"{number:.3f}" for number in numbers]


def test_what_is_missing_is_listed(records: ModuleType, docs: Path, runs: list[Path]) -> None:
    page = make(records, docs, runs)
    assert "\nMissing seeds: Learned 1; Shown 0, 2; Never run 0, 1, 2.\n" in page
    more = [f"{row}_{seed}" for row in ("learned", "shown", "never_run") for seed in range(3)]
    new = [write_run(runs[0].parent / name, [1.0, 1.0, NOISE]) for name in more if name not in LOSSES]
    assert "Missing" not in make(records, docs, new)


def test_twice_the_same_bytes(records: ModuleType, docs: Path, runs: list[Path]) -> None:
    make(records, docs, runs)
    before = {path: path.read_bytes() for path in docs.rglob("*") if path.is_file()}
    assert before[docs / "tables" / "toy.png"].startswith(b"\x89PNG")
    make(records, docs, runs[::-1])
    assert {path: path.read_bytes() for path in docs.rglob("*") if path.is_file()} == before


def test_validation_losses_if_one_run_has_no_test(records: ModuleType, docs: Path, runs: list[Path]) -> None:
    page = make(records, docs, [*runs, write_run(runs[0].parent / "shown_0", None)])
    first, *_ = tables(page)
    assert first[""][1:3] == ["worst validation excess", "mean validation excess"]
    assert first["Uniform"][3] == "–", "the exact match is of the test"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("learned_1", "the run was killed or is still running; only finished runs are kept"),
        ("learned", "a run folder has to be named ROW_SEED, such as uniform_0"),
        ("learned_7", "by its name the seed is 7, by its config 0"),
    ],
)
def test_what_is_not_kept(
    records: ModuleType, docs: Path, runs: list[Path], capsys: pytest.CaptureFixture[str], name: str, said: str
) -> None:
    """One line, and nothing of the other runs is kept either."""
    folder = runs[0].parent / name
    if name == "learned_1":
        write_run(folder, LOSSES["learned_0"], finished=False)
    else:
        shutil.copytree(runs[0].parent / "learned_0", folder)
    assert records.main(["keep", "--docs", str(docs), "toy", str(runs[0]), str(folder)]) == 1
    assert capsys.readouterr().err == f"{folder}: {said}\n"
    assert [path.name for path in (docs / "data" / "toy").iterdir()] == ["table.yaml"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"columns": ["wurst"]}, "table.yaml: columns: no 'wurst'; did you mean 'worst'?"),
        ({"baselines": ["unifrom"]}, "table.yaml: baselines: no 'unifrom'; did you mean 'uniform'?"),
        ({"held_out": ["lerned"]}, "table.yaml: held_out: no 'lerned'; did you mean 'learned'?"),
        ({"floors": {"nois": 1.0}}, "table.yaml: floors: no task 'nois'; did you mean 'noise'?"),
        ({"noise_task": "c"}, "table.yaml: noise_task: no task 'c'; allowed: a, b, noise"),
        ({"noise_task": None}, "table.yaml: columns: noise_share needs noise_task"),
        ({"tilte": "x"}, "table.yaml: unknown key 'tilte'; did you mean 'title'?"),
        ({"rows": {"uniform": {"name": "x"}}}, "learned_0: table.yaml has no row 'learned'; allowed: uniform"),
        ({"seeds": [0, 2]}, "shown_1: table.yaml has no seed 1"),
    ],
    ids=str,
)
def test_what_no_table_can_be_made_of(
    records: ModuleType,
    docs: Path,
    runs: list[Path],
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    said: str,
) -> None:
    assert records.main(["keep", "--docs", str(docs), "toy", *map(str, runs)]) == 0
    (docs / "data" / "toy" / "table.yaml").write_text(yaml.safe_dump(SPEC | change))
    assert records.main(["tables", "--docs", str(docs)]) == 1
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1
