"""What is measured: finished runs and a base model, and the questions of the tasks of a run and of unseen ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import yaml

from adapt_recipes import data
from adapt_recipes.data.chat import ChatTokenizer
from adapt_recipes.data.examples import Examples, RawTask
from adapt_recipes.data.load import TasksConfig
from adapt_recipes.data.prepare import prepare_tasks
from adapt_recipes.data.source_files import ColumnTasks, FileTask
from adapt_recipes.data.tokenize import Reading
from adapt_recipes.run_directory import MODEL, RESOLVED, SUMMARY, has_model, has_run, is_finished
from adapt_recipes.strict import Component

# More prompts than any task has: an unseen task without a limit is measured on all.
_ALL = 10**12


class Subject(NamedTuple):
    """A model to measure.

    Attributes:
        folder: gets the scores.
        model: Hugging Face folder.
        tokenizer: folder of the tokenizer and the chat template; that of the first run for a base model.
        run: directory of the run whose tasks are asked; None: there is none.
    """

    folder: Path
    model: Path
    tokenizer: Path
    run: Path | None


class Split(NamedTuple):
    """The examples of a task on which it is measured."""

    task: str
    name: str
    examples: Examples
    num_seen: int = 0


class Splits(NamedTuple):
    """What is measured of all tasks, and a hash of what they consist of."""

    family: str
    splits: list[Split]
    fingerprint: str


def subjects_of(runs: Sequence[str], model: str | None, output_dir: str | None) -> list[Subject]:
    """The base model first, then the runs.

    Raises:
        ValueError: a run is not finished, or a folder holds no model.
    """
    subjects = []
    for run in map(Path, dict.fromkeys(runs)):
        if not has_run(run):
            raise ValueError(f"runs: {run} holds no run")
        if not is_finished(run) or not has_model(run):
            recipe = yaml.safe_load((run / RESOLVED).read_text(encoding="utf-8")).get("recipe")
            raise ValueError(
                f"runs: {run} is not finished, so it has no {MODEL}/; tune run {recipe} --config {run / RESOLVED} "
                "resume=true finishes it"
            )
        subjects.append(Subject(run, run / MODEL, run / MODEL, run))
    if model is None or output_dir is None:
        return subjects
    base = Path(model)
    if not (base / "config.json").is_file():
        raise ValueError(f"model: {base} is no Hugging Face folder: it has no config.json")
    if any(Path(output_dir).resolve() == subject.folder.resolve() for subject in subjects):
        raise ValueError(f"output_dir: {output_dir} is one of the runs; choose another folder for the scores of model")
    first = subjects[0] if subjects else None
    return [Subject(Path(output_dir), base, first.tokenizer if first else base, first and first.run), *subjects]


def chat_tokenizer(subject: Subject) -> ChatTokenizer:
    """The tokenizer and chat template with which a model is asked.

    Raises:
        ValueError: the folder has none, or its template does not end answers.
    """
    try:
        tokenizer = ChatTokenizer(subject.tokenizer)
    except ValueError as error:
        raise ValueError(f"{subject.tokenizer}: {str(error).removeprefix('tokenizer.path: ')}") from error
    if not tokenizer.end_ids:
        raise ValueError(
            f"{subject.tokenizer}: its chat template ends no answer with a special token, so the model does not stop; "
            "runs of the toy tasks have their losses alone"
        )
    return tokenizer


def own_tasks(subject: Subject, tokenizer: ChatTokenizer) -> Splits:
    """The run's tasks and targets: their test splits, or those of validation if not all have a test split.

    Raises:
        ValueError: there is no run, or the data or the template are not those of the training any more.
    """
    run = _run_of(subject, "own_tasks")
    config, max_seq_len = _tasks_config(run)
    tasks = data.load_tasks(config, tokenizer=tokenizer, max_seq_len=max_seq_len)
    fingerprint = data.fingerprint(tasks, cache_dir=config.cache_folder)
    trained_on = json.loads((run / SUMMARY).read_text(encoding="utf-8"))["data_fingerprint"]
    if fingerprint != trained_on:
        raise ValueError(
            f"own_tasks: the data of {run}, or the chat template in {subject.tokenizer}, is not what it was trained "
            "with any more; put it back"
        )
    measured = [task for task in tasks if task.validation is not None]
    name = "test" if all(task.test is not None for task in measured) else "validation"
    return Splits("own tasks", [Split(task.name, name, task.splits[name]) for task in measured], fingerprint)


def unseen_tasks(subject: Subject, tokenizer: ChatTokenizer, source: Component) -> Splits:
    """Tasks of a source without the files and the prompts on which the run has trained.

    Raises:
        ValueError: there is no run, or nothing is left.
    """
    run = _run_of(subject, "unseen_tasks")
    config, max_seq_len = _tasks_config(run)
    targets = config.targets if isinstance(config.targets, list) else []
    trained = {
        file.path.resolve()
        for task in config.build()
        if getattr(task, "name", None) not in targets
        for file in getattr(task, "files", ())
    }
    unseen = [kept for task in source.build() if (kept := _without(task, trained)) is not None]
    if not unseen:
        raise ValueError(f"unseen_tasks: {run} has trained on all files of this source")
    seen = [
        task.train.prompt_hashes.numpy()
        for task in data.load_tasks(config, tokenizer=tokenizer, max_seq_len=max_seq_len)
        if not task.is_target
    ]
    splits = []
    tasks = prepare_tasks(
        [],
        tokenizer,
        raw_targets=unseen,
        max_seq_len=max_seq_len,
        validation_examples=_ALL,
        reading=Reading(config.supervise, config.system),
        on_bad_rows=config.on_bad_rows,
        cache_dir=config.cache_folder,
    )
    for task in tasks:
        assert task.validation is not None
        is_seen = np.isin(task.validation.prompt_hashes.numpy(), np.concatenate(seen))
        if not is_seen.all():
            examples = task.validation.select(torch.from_numpy((~is_seen).nonzero()[0]))
            splits.append(Split(task.name, "unseen", examples, int(is_seen.sum())))
    if not splits:
        raise ValueError(f"unseen_tasks: {run} has trained on all prompts of this source")
    return Splits("unseen tasks", splits, data.fingerprint(tasks, cache_dir=config.cache_folder))


def _run_of(subject: Subject, key: str) -> Path:
    if subject.run is None:
        raise ValueError(f"{key}: needs a run, whose tasks it asks; give runs=[...] beside model")
    return subject.run


def _tasks_config(run: Path) -> tuple[TasksConfig, int]:
    """The ``tasks`` node of a run, and its ``max_seq_len``."""
    resolved = yaml.safe_load((run / RESOLVED).read_text(encoding="utf-8"))
    config = TasksConfig(**resolved["tasks"])
    config._key = "tasks"
    return config, resolved["max_seq_len"]


def _without(task: RawTask | FileTask | ColumnTasks, trained: set[Path]) -> RawTask | FileTask | ColumnTasks | None:
    """The task without the files on which a run has trained; None: nothing is left."""
    if isinstance(task, RawTask):
        return task
    files = [file for file in task.files if file.path.resolve() not in trained]
    return replace(task, files=files) if files else None
