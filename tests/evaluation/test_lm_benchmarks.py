"""A benchmark on local rows has the scores of plain lm-eval, to the last digit."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from lm_tasks import manager, write_model, write_rows
from tiers import slow_but

from adapt_recipes.evaluation.benchmarks import Benchmark, load_task, local_parts, measure, parts_of, whole
from adapt_recipes.evaluation.model import open_model

ROOT = Path(__file__).parents[2]
STOCK = {
    name: Benchmark(**values)
    for suite in ("eval_ood", "eval_mos")
    for name, values in yaml.safe_load((ROOT / "yaml" / f"{suite}.yaml").read_text())["benchmarks"].items()
}
LOCAL = ["arc_challenge", "hellaswag", "winogrande", "bbh_fewshot", "gsm8k", "boolq", "drop", "mmlu"]
SEED = 1234


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = write_model(tmp_path_factory.mktemp("model"))
    cpu = torch.device("cpu")
    return open_model(folder, tokenizer=folder, device=cpu, dtype="fp32", batch_size=4, backend="hf")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


def plain(lm: Any, name: str, files: dict[str, Path], rows: Path, folder: Path, *, in_chat: bool) -> dict[str, Any]:
    """What lm-eval measures on tasks that include the stock ones, and name other files, as its users write them."""
    from lm_eval import simple_evaluate

    benchmark = STOCK[name]
    paths = []
    for part, file in files.items():
        entry = manager().task_index[part]
        splits = {
            key: entry.cfg.get(key) for key in ("test_split", "validation_split", "training_split", "fewshot_split")
        }
        measured = splits["test_split"] or splits["validation_split"]
        data = {measured: str(file)}
        if benchmark.fewshot_file:
            shots = rows / benchmark.fewshot_file.format(part=part.removeprefix(f"{name}_"))
            data[splits["fewshot_split"] or splits["training_split"]] = str(shots)
        else:
            # Not drawn from, but opened.
            data |= {split: str(file) for split in splits.values() if split}
        local = {"include": str(entry.yaml_path), "task": f"local_{part}", "tag": None, "dataset_path": "json"}
        local |= {"dataset_name": None, "dataset_kwargs": {"data_files": data}}
        paths.append(folder / f"{part}.yaml")
        paths[-1].write_text(yaml.safe_dump(local))
    results = simple_evaluate(
        lm,
        tasks=[str(path) for path in paths],
        task_manager=manager(),
        apply_chat_template=in_chat,
        fewshot_as_multiturn=in_chat,
        bootstrap_iters=1000,
    )
    return {part: results["results"][f"local_{part}"] for part in files}


@pytest.mark.parametrize("in_chat", [True, False])
@pytest.mark.parametrize("name", slow_but(["arc_challenge", "gsm8k", "mmlu"], LOCAL))
def test_the_scores_are_those_of_plain_lm_eval(
    name: str, in_chat: bool, lm: Any, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It lists installed packages in a process of its own.
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    benchmark = STOCK[name]
    parts = parts_of(manager(), name)
    files = local_parts(benchmark, name, parts, rows)
    assert len(files) == (1 if parts == [name] else 2)
    expected = plain(lm, name, files, rows, tmp_path, in_chat=in_chat)
    scores = {}
    for part, file in files.items():
        task = load_task(manager(), benchmark, name, part, file, rows)
        group = None if part == name else name
        scores[part], samples = measure(
            lm, task, benchmark, group=group, seed=SEED, limit=None, chat_template=in_chat, data="x"
        )
        theirs = {
            key.removesuffix(",none"): value
            for key, value in expected[part].items()
            if isinstance(value, float) and "_stderr" not in key and "," in key
        }
        ours = {key: value for key, value in scores[part].values.items() if key != "bits_per_byte"}
        assert ours == theirs and benchmark.metric in ours
        errors = {
            key.replace("_stderr,", ",").removesuffix(",none"): v
            for key, v in expected[part].items()
            if "_stderr" in key
        }
        assert {key: error for key, error in scores[part].stderrs.items() if key in ours} == errors
        assert scores[part].num_examples == len(samples) == len(file.read_text().splitlines())
        # The mean over samples is the score.
        for key, value in ours.items():
            assert math.fsum(sample.values[key] for sample in samples) / len(samples) == pytest.approx(value)
        assert scores[part].higher_is_better[benchmark.metric]
    if group:
        together = whole(manager(), name, benchmark, scores)
        sizes = [score.num_examples for score in scores.values()]
        values = [score.values[benchmark.metric] for score in scores.values()]
        expected_mean = sum(value * size for value, size in zip(values, sizes, strict=True)) / sum(sizes)
        assert together.values[benchmark.metric] == pytest.approx(expected_mean, abs=1e-12)
        assert together.num_examples == sum(sizes) and together.data == f"2 of {len(parts)} parts"


def test_the_likelihood_of_the_right_choice(lm: Any, rows: Path) -> None:
    """Bits per byte are those of the right choice: computed here from the logits."""
    task = load_task(
        manager(), STOCK["arc_challenge"], "arc_challenge", "arc_challenge", rows / "arc_challenge.jsonl", rows
    )
    score, samples = measure(
        lm, task, STOCK["arc_challenge"], group=None, seed=SEED, limit=2, chat_template=False, data="x"
    )
    for line, sample in zip((rows / "arc_challenge.jsonl").read_text().splitlines(), samples, strict=False):
        row = json.loads(line)
        right = row["choices"]["text"]["ABCD".index(row["answerKey"])]
        assert sample.references == [f" {right}"] or sample.references == [right]
        prompt = f"Question: {row['question']}\nAnswer:"
        ids = lm.tok_encode(prompt)
        both = torch.tensor([lm.tok_encode(f"{prompt} {right}")])
        with torch.no_grad():
            log_p = torch.log_softmax(lm.model(both).logits[0].double(), -1)
        nats = -sum(float(log_p[i - 1, both[0, i]]) for i in range(len(ids), both.shape[1]))
        assert sample.values["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(right.encode()), abs=1e-5)
    assert not score.higher_is_better["bits_per_byte"]


def test_an_unknown_benchmark_is_refused() -> None:
    with pytest.raises(ValueError, match=r"benchmarks\.arc_chalenge: .*; did you mean 'arc_challenge'\?"):
        parts_of(manager(), "arc_chalenge")


def test_a_metric_that_the_task_has_not_is_refused(lm: Any, rows: Path) -> None:
    benchmark = Benchmark(family="reading", metric="f1", file="boolq.jsonl")
    task = load_task(manager(), benchmark, "boolq", "boolq", rows / "boolq.jsonl", rows)
    with pytest.raises(ValueError, match=r"benchmarks\.boolq\.metric: no 'f1'; allowed: acc, bits_per_byte"):
        measure(lm, task, benchmark, group=None, seed=SEED, limit=1, chat_template=False, data="x")


def test_missing_solved_examples_are_named(rows: Path, tmp_path: Path) -> None:
    write_rows(tmp_path, ["gsm8k.jsonl"])
    with pytest.raises(FileNotFoundError, match=r"gsm8k_fewshot\.jsonl is missing"):
        load_task(manager(), STOCK["gsm8k"], "gsm8k", "gsm8k", tmp_path / "gsm8k.jsonl", tmp_path)
