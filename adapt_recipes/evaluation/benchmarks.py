"""lm-eval's own tasks, with their stock prompts and metrics, on data of the hub or of local files."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from pydantic.dataclasses import dataclass

from adapt_recipes.errors import nearest
from adapt_recipes.evaluation.model import set_seeds, versions
from adapt_recipes.evaluation.questions import means_of
from adapt_recipes.evaluation.records import Sample, Score
from adapt_recipes.strict import STRICT

# Resampled means, for the metrics of which lm-eval has no formula of the standard error.
_BOOTSTRAP_ITERATIONS = 1000


@dataclass(kw_only=True, config=STRICT)
class Benchmark:
    """A task of lm-eval, or a group of tasks, by its name there."""

    family: Annotated[str, Field(min_length=1)]
    """over which means are taken"""
    metric: Annotated[str, Field(min_length=1)]
    """the one of its metrics for tables and means: ``acc``, or with a filter ``exact_match,flexible-extract``"""
    file: str | None = None
    """the examples, in ``data_dir``, as JSON Lines; ``{part}`` stands for what a task's name has behind that of its
    group; null: they come from the hub"""
    fewshot_file: str | None = None
    """the solved examples of the prompts, in the same way; null: the task has none, or has them itself"""
    scale: Annotated[float, Field(gt=0)] = 1.0
    """by which the metric is multiplied, so that all scores are between 0 and 1"""
    executes_code: bool = False
    """measuring it executes code that the model writes: only with ``allow_code_execution``"""
    needs: str | None = None
    """what it needs besides its data, for the error if that is missing"""


def parts_of(manager: Any, name: str) -> list[str]:
    """The tasks of which a benchmark consists: itself, or those of the group.

    Args:
        manager: ``lm_eval.tasks.TaskManager``.
        name: of a task, group or tag.

    Raises:
        ValueError: lm-eval has none of this name.
    """
    entry = manager.task_index.get(name)
    if entry is None:
        raise ValueError(f"benchmarks.{name}: lm-eval has no task of this name{_similar(name, manager.all_tasks)}")
    if entry.cfg is None:
        return sorted(entry.tags)
    members = entry.cfg.get("task")
    if not isinstance(members, list):
        return [name]
    names = [each if isinstance(each, str) else each.get("group") or each["task"] for each in members]
    return [part for each in names for part in parts_of(manager, each)]


def _similar(name: str, names: Sequence[str]) -> str:
    hint = nearest(name, names)
    return hint if "did you mean" in hint else "; `lm_eval ls tasks` lists them"


def local_parts(benchmark: Benchmark, name: str, parts: Sequence[str], data_dir: Path | None) -> dict[str, Path]:
    """The parts of which ``data_dir`` has the examples, with their files."""
    if data_dir is None or benchmark.file is None:
        return {}
    files = {part: data_dir / benchmark.file.format(part=part.removeprefix(f"{name}_")) for part in parts}
    return {part: file for part, file in files.items() if file.is_file()}


def load_task(
    manager: Any, benchmark: Benchmark, name: str, part: str, file: Path | None, data_dir: Path | None
) -> Any:
    """A task of lm-eval; with the rows of a local file in place of those of the hub.

    Raises:
        Exception: whatever lm-eval raises where data or packages are missing.
    """
    spec: Any = part
    if file is not None:
        # A task in a group is the stock one, with what stands beside its name replaced.
        source = _local_data(manager.task_index[part].cfg, benchmark, name, part, file, data_dir)
        spec = {"group": "local", "task": [{"task": part, **source}]}
    (task,) = manager.load([spec])["tasks"].values()
    return task


def _local_data(
    config: dict[str, Any], benchmark: Benchmark, name: str, part: str, file: Path, data_dir: Path | None
) -> dict[str, Any]:
    """What replaces the source of a task's rows."""
    measured = config.get("test_split") or config["validation_split"]
    files = {measured: str(file)}
    if benchmark.fewshot_file is not None:
        assert data_dir is not None
        shots = data_dir / benchmark.fewshot_file.format(part=part.removeprefix(f"{name}_"))
        if not shots.is_file():
            raise FileNotFoundError(f"{shots} is missing, the solved examples of its prompts")
        files[config.get("fewshot_split") or config["training_split"]] = str(shots)
    # lm-eval opens every split that a task names.
    splits = {key: None for key in ("training_split", "validation_split", "test_split") if config.get(key) not in files}
    return splits | {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}


def measure(
    lm: Any,
    task: Any,
    benchmark: Benchmark,
    *,
    group: str | None,
    seed: int,
    limit: int | None,
    chat_template: bool,
    data: str,
) -> tuple[Score, list[Sample]]:
    """Measures a model on a task of lm-eval.

    Args:
        lm: see ``open_model``.
        task: see ``load_task``.
        benchmark: of which the task is the whole or a part.
        group: the name of the benchmark if the task is a part of it.
        seed: of the choice of solved examples.
        limit: the first examples that are measured; None: all.
        chat_template: ask as in a chat, solved examples as earlier turns.
        data: see ``Score``.

    Raises:
        ValueError: the task has no such metric.
    """
    from lm_eval.evaluator import evaluate

    began = time.monotonic()
    name = task.task_name
    set_seeds(seed)
    task.set_fewshot_seed(seed)
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    results = evaluate(
        lm,
        {"tasks": {name: task}},
        limit=limit,
        bootstrap_iters=_BOOTSTRAP_ITERATIONS,
        apply_chat_template=chat_template,
        fewshot_as_multiturn=chat_template,
        # The recipe has asked.
        confirm_run_unsafe_code=benchmark.executes_code,
    )
    found = results["results"][name]
    values = {key.removesuffix(",none"): float(value) for key, value in found.items() if _is_metric(key, value)}
    stderrs = {
        key.replace("_stderr,", ",").removesuffix(",none"): float(value)
        for key, value in found.items()
        if "_stderr," in key and isinstance(value, float)
    }
    better = results["higher_is_better"][name]
    samples = _samples(task, results["samples"][name])
    # Of examples whose right choice is known.
    if all("bits_per_byte" in sample.values for sample in samples):
        means, errors = means_of(samples)
        values["bits_per_byte"] = means["bits_per_byte"]
        stderrs |= {key: value for key, value in errors.items() if key == "bits_per_byte"}
    if benchmark.metric not in values:
        raise ValueError(
            f"benchmarks.{group or name}.metric: no {benchmark.metric!r}{nearest(benchmark.metric, values)}"
        )
    for of_metric in (values, stderrs):
        if benchmark.metric in of_metric:
            of_metric[benchmark.metric] *= benchmark.scale
    score = Score(
        family=benchmark.family,
        group=group,
        metric=benchmark.metric,
        higher_is_better={key: better.get(key.partition(",")[0], key != "bits_per_byte") for key in values},
        values=values,
        stderrs=stderrs,
        num_examples=len(samples),
        num_fewshot=int(results["n-shot"][name]),
        task_version=str(results["versions"][name]),
        data=data,
        seconds=time.monotonic() - began,
        versions=versions(),
    )
    return score, samples


def _is_metric(key: str, value: Any) -> bool:
    return "," in key and "_stderr," not in key and isinstance(value, int | float)


def _samples(task: Any, logged: Sequence[dict[str, Any]]) -> list[Sample]:
    """lm-eval's record of each example; it has one of every filter of the answers."""
    by_doc: dict[int, list[dict[str, Any]]] = {}
    for each in logged:
        by_doc.setdefault(each["doc_id"], []).append(each)
    samples = []
    for records in by_doc.values():
        first = records[0]
        values = {
            name if record["filter"] == "none" else f"{name},{record['filter']}": float(record[name])
            for record in records
            for name in record["metrics"]
            if isinstance(record[name], int | float)
        }
        references, answer = [str(first["target"])], str(first["resps"][0][0])
        if task.OUTPUT_TYPE == "multiple_choice":
            # A choice is the end of a request; for some tasks (WinoGrande) the choices differ in its beginning.
            gold = task.doc_to_text(first["doc"]) if task.multiple_input else task.doc_to_target(first["doc"])
            choices = [arguments[0] if task.multiple_input else arguments[1] for arguments in first["arguments"]]
            # resps: of each request, of each repetition, the log-likelihood and whether it is the greedy answer.
            likelihoods = [float(responses[0][0]) for responses in first["resps"]]
            answer = choices[likelihoods.index(max(likelihoods))]
            if isinstance(gold, int) and 0 <= gold < len(choices):
                references = [choices[gold]]
                num_bytes = len(first["arguments"][gold][1].strip().encode())
                values["bits_per_byte"] = -likelihoods[gold] / math.log(2) / num_bytes
        samples.append(
            Sample(
                id=first["doc_hash"][:16],
                prompt=str(first["arguments"][0][0]),
                references=references,
                answer=answer.strip(),
                values=values,
            )
        )
    return samples


def whole(manager: Any, name: str, benchmark: Benchmark, parts: dict[str, Score]) -> Score:
    """The score of a group from those of its parts, aggregated as lm-eval does.

    Args:
        manager: ``lm_eval.tasks.TaskManager``.
        name: of the group.
        benchmark: its settings.
        parts: those that have been measured.
    """
    from lm_eval.api.metrics import aggregate_subtask_metrics, pooled_sample_stderr, unweighted_mean_stderr

    aggregated = (manager.task_index[name].cfg or {}).get("aggregate_metric_list") or []
    by_size = all(each.get("weight_by_size", True) for each in aggregated)
    scores = [*parts.values()]
    sizes = [score.num_examples for score in scores]
    values, stderrs = {}, {}
    for metric in scores[0].values:
        if all(metric in score.values for score in scores):
            values[metric] = float(aggregate_subtask_metrics([s.values[metric] for s in scores], sizes, by_size))
        if all(metric in score.stderrs for score in scores):
            errors = [score.stderrs[metric] for score in scores]
            stderrs[metric] = float(pooled_sample_stderr(errors, sizes) if by_size else unweighted_mean_stderr(errors))
    return replace(
        scores[0],
        group=None,
        metric=benchmark.metric,
        values=values,
        stderrs=stderrs,
        num_examples=sum(sizes),
        data=f"{len(parts)} of {len(parts_of(manager, name))} parts",
        seconds=sum(score.seconds for score in scores),
    )


def file_hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:16]
