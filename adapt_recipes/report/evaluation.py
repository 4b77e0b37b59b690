"""What ``evaluation.json`` says of several models, side by side: scores, differences beyond chance, and answers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from adapt_recipes.evaluation.records import Sample, Score, read_evaluation, read_samples
from adapt_recipes.evaluation.table import measured
from adapt_recipes.report.read import Array
from adapt_recipes.report.tables import Spread, spread

RESAMPLES = 10_000
# Of the resampled means.
INTERVAL = (2.5, 97.5)
# Examples of each task on the page.
NUM_EXAMPLES = 20
# Of a prompt on the page, its last characters.
MAX_PROMPT_LENGTH = 4000
# Numbers that are drawn at once.
_CHUNK = 2**22
_SEED = 0
# Of a score and the mean over its samples.
_TOLERANCE = 1e-6
# Beside the metric of a score, in this order.
OTHER_METRICS = ("rouge_l", "answer_tokens", "unstopped")


class SampleKey(NamedTuple):
    """The same for the same example on every model: several of a task may have the same text, hence the same id."""

    id: str
    part: str
    repetition: int


@dataclass(frozen=True)
class Measured:
    """What was measured of a suite on one model; nothing yet if ``scores`` is empty."""

    name: str
    folder: Path
    suite: str
    scores: Mapping[str, Score]
    settings: Mapping[str, Any]

    def samples(self, task: str) -> dict[SampleKey, Sample]:
        """The samples of a task, or of the parts of a group; empty if the files are gone.

        Raises:
            ValueError: a file is malformed; it names the line.
        """
        found: dict[SampleKey, Sample] = {}
        for part in [part for part, score in self.scores.items() if score.group == task] or [task]:
            seen: Counter[str] = Counter()
            for sample in read_samples(self.folder, self.suite, part):
                found[SampleKey(sample.id, part, seen[sample.id])] = sample
                seen[sample.id] += 1
        return found


@dataclass(frozen=True)
class Column:
    """Models that differ only in seed, or one model."""

    name: str
    models: tuple[Measured, ...]


class Row(NamedTuple):
    """A task, or several over which the mean is taken."""

    name: str
    tasks: tuple[str, ...]
    family: str
    metric: str
    higher_is_better: bool | None
    """None: of some tasks it is, of others not"""


class Difference(NamedTuple):
    """Of a mean over examples from another, with its 95 % interval."""

    mean: float
    low: float
    high: float

    @property
    def is_beyond_chance(self) -> bool:
        return self.low > 0 or self.high < 0


def suites_of(folders: Iterable[Path]) -> list[str]:
    """The suites that any of the folders has scores of.

    Raises:
        ValueError: a file is malformed, or of another version.
    """
    found = [evaluation for folder in folders if (evaluation := read_evaluation(folder))]
    return list(dict.fromkeys(suite for evaluation in found for suite in evaluation.suites))


def read_measured(name: str, folder: Path, suite: str) -> Measured:
    """What a folder has of a suite.

    Raises:
        ValueError: the file is malformed, or of another version.
    """
    found = read_evaluation(folder)
    of_suite = found.suites.get(suite) if found else None
    if of_suite is None:
        return Measured(name, folder, suite, {}, {})
    return Measured(name, folder, suite, of_suite.scores, of_suite.settings)


def by_metric(columns: Sequence[Column], metric: str) -> list[Column]:
    """The same models, with the tasks that have another metric, as if it were theirs."""

    def scores_of(model: Measured) -> dict[str, Score]:
        return {task: replace(score, metric=metric) for task, score in model.scores.items() if metric in score.values}

    return [
        Column(column.name, tuple(replace(model, scores=scores_of(model)) for model in column.models))
        for column in columns
    ]


# ---- scores


def task_rows(columns: Sequence[Column]) -> list[Row]:
    """The tasks with a metric that were measured on any model, by family; a group is one task."""
    by_task: dict[str, list[Score]] = {}
    for model in _models(columns):
        for task, score in measured(model.scores).items():
            by_task.setdefault(task, []).append(score)
    rows = [
        Row(
            name=task,
            tasks=(task,),
            family=scores[0].family,
            metric=" / ".join(dict.fromkeys(str(score.metric) for score in scores)),
            higher_is_better=_only({score.higher_is_better[str(score.metric)] for score in scores}),
        )
        for task, scores in by_task.items()
    ]
    families = list(dict.fromkeys(row.family for row in rows))
    return sorted(rows, key=lambda row: families.index(row.family))


def mean_rows(rows: Sequence[Row]) -> tuple[list[Row], Row]:
    """The unweighted means over the tasks of each family, and over all."""
    families = list(dict.fromkeys(row.family for row in rows))
    of_families = [_mean_row(f"mean of {name}", [row for row in rows if row.family == name]) for name in families]
    return of_families, _mean_row("mean over tasks", rows)


def with_means(rows: Sequence[Row]) -> list[Row]:
    """Tasks, with the mean of each family of several tasks below them, and the mean over several families last."""
    of_families, overall = mean_rows(rows)
    found: list[Row] = []
    for mean in of_families:
        found += [row for row in rows if row.family == mean.family]
        found += [mean] * (len(mean.tasks) > 1)
    return [*found, *[overall] * (len(of_families) > 1)]


def _mean_row(name: str, rows: Sequence[Row]) -> Row:
    tasks = tuple(task for row in rows for task in row.tasks)
    return Row(name, tasks, rows[0].family if rows else "", "", _only({row.higher_is_better for row in rows}))


def row_score(column: Column, row: Row) -> Spread:
    """Mean and range over the models of a column; NaN if one of the tasks was not measured on all of them."""
    if not row.tasks:
        return spread([math.nan])
    return spread(float(np.mean([_value(model.scores.get(task)) for task in row.tasks])) for model in column.models)


def row_stderr(column: Column, row: Row) -> float:
    """The standard error over examples; NaN for several models, or if that of a task is not known.

    That of a mean over tasks is of independent tasks: sqrt(sum_t se_t^2) / num_tasks.
    """
    if len(column.models) > 1:
        return math.nan
    scores = [column.models[0].scores.get(task) for task in row.tasks]
    errors = [_float(score.stderrs.get(str(score.metric))) if score else math.nan for score in scores]
    return math.hypot(*errors) / len(errors)


def best_columns(scores: Sequence[Spread], row: Row) -> list[int]:
    """The columns with the best mean; none if all are equal."""
    means = [score.mean for score in scores if not math.isnan(score.mean)]
    if row.higher_is_better is None or len(set(means)) < 2:
        return []
    best = max(means) if row.higher_is_better else min(means)
    return [i for i, score in enumerate(scores) if score.mean == best]


def other_metrics(columns: Sequence[Column]) -> dict[tuple[str, str], list[Spread]]:
    """Of each metric and task: the other metrics, the numbers of examples and the seconds, of every column.

    Without parts of groups, and without those that no model has.
    """
    models = _models(columns)
    tasks = list(dict.fromkeys(task for model in models for task, score in model.scores.items() if score.group is None))
    reasons = dict.fromkeys(reason for model in models for score in model.scores.values() for reason in score.left_out)

    def of_score(score: Score, metric: str) -> float:
        if metric in ("num_examples", "seconds"):
            return float(getattr(score, metric))
        if metric.startswith("left out: "):
            return float(score.left_out.get(metric.removeprefix("left out: "), 0))
        return math.nan if metric == score.metric else _float(score.values.get(metric))

    found = {}
    for metric in [*OTHER_METRICS, "num_examples", *(f"left out: {reason}" for reason in reasons), "seconds"]:
        for task in tasks:
            values = [
                spread(
                    of_score(model.scores[task], metric) if task in model.scores else math.nan for model in each.models
                )
                for each in columns
            ]
            if any(value.high > 0 or (metric in OTHER_METRICS and not math.isnan(value.mean)) for value in values):
                found[metric, task] = values
    return found


def _value(score: Score | None) -> float:
    return math.nan if score is None or score.metric is None else _float(score.values[score.metric])


def _float(value: float | None) -> float:
    """Null becomes NaN."""
    return math.nan if value is None else float(value)


def _only(values: set[Any]) -> Any:
    return next(iter(values)) if len(values) == 1 else None


def _models(columns: Sequence[Column]) -> list[Measured]:
    return [model for column in columns for model in column.models]


# ---- differences


def resampled_means(values: Array, generator: np.random.Generator) -> Array:
    """(examples,) to (RESAMPLES,): the means of as many examples, drawn with replacement.

    Examples with equal values are the same to a mean, so it is drawn how often each distinct value is.
    """
    distinct, counts = np.unique(values, return_counts=True)
    size = max(1, _CHUNK // len(distinct))
    drawn = [
        generator.multinomial(len(values), counts / len(values), min(size, RESAMPLES - start)) @ distinct
        for start in range(0, RESAMPLES, size)
    ]
    return np.concatenate(drawn) / len(values)


def differences(rows: Sequence[Row], columns: Sequence[Column]) -> tuple[list[list[Difference | None]], list[str]]:
    """How every column differs from the first: a paired bootstrap over the examples of each task.

    An example's value is its mean over the models of a column. For a mean over tasks, the examples are resampled inside
    each task.

    Returns:
        Of each row, the differences of all columns but the first, None where the examples are not the same; and notes
        that say why.

    Raises:
        ValueError: a file of samples is malformed.
    """
    first, *others = columns
    tasks = list(dict.fromkeys(task for row in rows for task in row.tasks))
    # One generator for each, so that an interval does not depend on the other columns.
    generators = [np.random.default_rng(_SEED) for _ in others]
    observed: list[dict[str, float]] = [{} for _ in others]
    resampled: list[dict[str, Array]] = [{} for _ in others]
    reasons: dict[tuple[str, str], list[str]] = {}
    for task in tasks:
        baseline = _example_values(first, task)
        for i, column in enumerate(others):
            pairs = _paired(first, baseline, column, task)
            if isinstance(pairs, str):
                reasons.setdefault((column.name, pairs), []).append(task)
            elif pairs is not None:
                observed[i][task] = float(pairs.mean())
                resampled[i][task] = resampled_means(pairs, generators[i])

    def difference(i: int, row: Row) -> Difference | None:
        if not row.tasks or not set(row.tasks) <= observed[i].keys():
            return None
        low, high = np.percentile(np.mean([resampled[i][task] for task in row.tasks], axis=0), INTERVAL)
        return Difference(float(np.mean([observed[i][task] for task in row.tasks])), float(low), float(high))

    notes = [
        f"No difference of {name} from {first.name} in {_some(of_tasks)}: {reason}."
        for (name, reason), of_tasks in reasons.items()
    ]
    return [[difference(i, row) for i in range(len(others))] for row in rows], notes


def _example_values(column: Column, task: str) -> dict[SampleKey, float] | str | None:
    """The metric of each example, as its mean over the models; or why there is none, None if it was not measured."""
    found = []
    for model in column.models:
        score = measured(model.scores).get(task)
        if score is None:
            return None
        samples = model.samples(task)
        values = {key: _float(sample.values.get(str(score.metric))) for key, sample in samples.items()}
        if not values:
            return f"the answers of {model.name} are gone"
        mean = float(np.mean([*values.values()]))
        if math.isnan(mean):
            return f"{score.metric} is known of the task alone, not of its examples"
        if abs(mean - _value(score)) > _TOLERANCE:
            return f"the score of {model.name} is not the mean over its examples"
        found.append(values)
    if any(values.keys() != found[0].keys() for values in found):
        return f"the runs of {column.name} were not measured on the same examples"
    return {key: float(np.mean([values[key] for values in found])) for key in found[0]}


def _paired(
    first: Column, baseline: dict[SampleKey, float] | str | None, column: Column, task: str
) -> Array | str | None:
    """(examples,): the differences of the examples of a task; or why there are none."""
    values = _example_values(column, task)
    if not isinstance(baseline, dict):
        return baseline
    if not isinstance(values, dict):
        return values
    scores = [model.scores[task] for each in (first, column) for model in each.models]
    for what in ("metric", "data", "num_fewshot", "task_version"):
        if len(given := {str(getattr(score, what)) for score in scores}) > 1:
            return f"their {what} is not the same ({', '.join(sorted(given))})"
    if baseline.keys() != values.keys():
        common = len(baseline.keys() & values.keys())
        return f"they have {common:,} examples in common of {len(baseline):,} and {len(values):,}"
    if len(values) == 1:
        return "it has one example only"
    return np.array([values[key] - baseline[key] for key in baseline])


# ---- notes


def notes_of(columns: Sequence[Column]) -> list[str]:
    """What was not measured on some models, and the settings that are not the same."""
    models = _models(columns)
    tasks = [row.name for row in task_rows(columns)]
    notes = []
    if unmeasured := [model.name for model in models if not model.scores]:
        notes.append(f"Not measured: {_some(unmeasured)}.")
    for model in models:
        if model.scores and (missing := [task for task in tasks if task not in measured(model.scores)]):
            notes.append(f"Not measured on {model.name}: {_some(missing)}.")
    with_scores = [model for model in models if model.scores]
    for key in dict.fromkeys(key for model in with_scores for key in model.settings):
        by_value: dict[str, list[str]] = {}
        for model in with_scores:
            value = model.settings.get(key)
            # Hashes are long.
            by_value.setdefault("null" if value is None else str(value)[:12], []).append(model.name)
        if len(by_value) > 1:
            said = "; ".join(f"{value} of {_some(names)}" for value, names in by_value.items())
            notes.append(f"The setting '{key}' is not the same: {said}.")
    return notes


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


# ---- answers


class Example(NamedTuple):
    """One example, with what every model has answered; None if a model was not asked."""

    task: str
    prompt: str
    references: list[str]
    answers: list[Sample | None]
    metrics: list[str]
    """of each answer, as text"""


def examples(columns: Sequence[Column]) -> list[Example]:
    """Up to ``NUM_EXAMPLES`` of each task: of those that most models were asked, the ones with the smallest ids.

    Raises:
        ValueError: a file of samples is malformed.
    """
    models, found = _models(columns), []
    tasks = dict.fromkeys(task for model in models for task, score in model.scores.items() if score.group is None)
    for task in tasks:
        asked = [model if task in model.scores else None for model in models]
        # The files are read twice, so that there is never memory for those of all models.
        num_models = Counter(key for model in asked if model for key in model.samples(task))
        chosen = sorted(num_models, key=lambda key: (-num_models[key], key))[:NUM_EXAMPLES]
        of_models: list[dict[SampleKey, Sample]] = []
        for model in asked:
            samples = model.samples(task) if model else {}
            of_models.append({key: samples[key] for key in chosen if key in samples})
        for key in chosen:
            answers = [samples.get(key) for samples in of_models]
            one = next(answer for answer in answers if answer)
            metrics = [_said(model, task, answer) for model, answer in zip(asked, answers, strict=True)]
            found.append(Example(task, _end_of(one.prompt), one.references, answers, metrics))
    return found


def _end_of(prompt: str) -> str:
    """A prompt without its beginning, which for most long ones are solved examples."""
    left_out = len(prompt) - MAX_PROMPT_LENGTH
    return f"[without the first {left_out:,} characters]\n{prompt[left_out:]}" if left_out > 0 else prompt


def _said(model: Measured | None, task: str, sample: Sample | None) -> str:
    metric = model.scores[task].metric if model else None
    value = sample.values.get(metric) if sample and metric else None
    return "" if value is None else f"{metric} {value:.3g}"


# ---- against the loss


def own_exact_match(model: Measured, tasks: Sequence[str]) -> float:
    """The mean exact match over those of ``tasks`` that were measured as the run's own; NaN if there are none."""
    found = [
        _float(score.values["exact_match"])
        for task in tasks
        if (score := model.scores.get(task)) and score.family == "own tasks" and "exact_match" in score.values
    ]
    return float(np.mean(found)) if found else math.nan
