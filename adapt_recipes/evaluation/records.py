"""``evaluation.json`` and the files of samples: what ``mixture_eval`` measured on one model.

The file of a folder has one entry per suite, and that one per task. It is written after every task, so that an
interrupted evaluation goes on where it stopped; several processes may write to it in turn.
"""

from __future__ import annotations

import fcntl
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from adapt_recipes.files import atomic_file
from adapt_recipes.run_directory import EVALUATION, SAMPLES

# Incremented when a file of the former version cannot be read as one of this.
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Score:
    """What was measured on one task of a suite.

    Attributes:
        family: of the task, over which means are taken.
        group: the benchmark of which the task is a part; None: it is none.
        metric: the one of ``values`` that stands in tables and means; None: there is none, only answers.
        higher_is_better: of each metric.
        values: of each metric, the mean over examples.
        stderrs: standard errors of ``values`` over examples; without those that are not known.
        num_examples: that were measured.
        num_fewshot: solved examples in each prompt.
        task_version: of the task in lm-eval; None: it is not one of lm-eval's.
        data: where the examples are from.
        left_out: numbers of examples that were not measured, by reason.
        seconds: that the measurement took.
        versions: of the packages with which it was measured.
    """

    family: str
    group: str | None = None
    metric: str | None
    higher_is_better: dict[str, bool]
    values: dict[str, float]
    stderrs: dict[str, float]
    num_examples: int
    num_fewshot: int = 0
    task_version: str | None = None
    data: str
    left_out: dict[str, int] = field(default_factory=dict)
    seconds: float
    versions: dict[str, str]

    @property
    def summary(self) -> str:
        """In a few words."""
        size = f"{self.num_examples:,} example{'' if self.num_examples == 1 else 's'}, {self.seconds:.0f} s"
        if self.metric is None:
            return size
        error = self.stderrs.get(self.metric)
        return f"{self.metric} {self.values[self.metric]:.3f}{'' if error is None else f' ± {error:.3f}'} ({size})"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One example of a task, as asked and answered.

    Attributes:
        id: the same for the same example, whatever the model.
        prompt: as the model got it.
        references: right answers.
        answer: of the model: generated, or the most likely choice.
        values: the metrics of this example, of which those of the task are the means.
    """

    id: str
    prompt: str
    references: list[str]
    answer: str
    values: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class SuiteScores:
    """What was measured of one suite.

    Attributes:
        settings: that decide the scores; a suite is not continued with others.
        scores: by task.
    """

    settings: dict[str, Any]
    scores: dict[str, Score] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The content of ``evaluation.json``.

    Attributes:
        model: the folder that was measured.
        weights: a hash of its weights.
        suites: by name.
    """

    model: str
    weights: str
    suites: dict[str, SuiteScores] = field(default_factory=dict)


def read_evaluation(folder: Path) -> Evaluation | None:
    """What has been measured so far; None: nothing.

    Raises:
        ValueError: the file is malformed, or of another version.
    """
    path = folder / EVALUATION
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); move it, and the scores are measured again") from None
    version = content.get("format") if isinstance(content, dict) else None
    if version != FORMAT:
        raise ValueError(
            f"{path}: has the format {version}, and this version reads {FORMAT}; move it, and the scores are measured "
            "again"
        )
    try:
        suites = {
            name: SuiteScores(
                settings=suite["settings"],
                scores={task: _score(score) for task, score in suite["scores"].items()},
            )
            for name, suite in content["suites"].items()
        }
        return Evaluation(model=content["model"], weights=content["weights"], suites=suites)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: is not what mixture_eval writes ({error}); move it to measure again") from None


def _score(written: Mapping[str, Any]) -> Score:
    """A score as it was written, with null as NaN."""
    values = {key: math.nan if value is None else value for key, value in written["values"].items()}
    score = Score(**{**written, "values": values})
    if score.metric is not None and score.metric not in values:
        raise KeyError(score.metric)
    return score


def scores_of(folder: Path, suite: str) -> dict[str, Score]:
    """What has been measured of a suite so far, by task."""
    found = read_evaluation(folder)
    return found.suites[suite].scores if found and suite in found.suites else {}


def check(folder: Path, suite: str, weights: str, settings: Mapping[str, Any]) -> None:
    """Refuses to add to what was measured of another model, or with other settings.

    Raises:
        ValueError: it names the first setting that differs.
    """
    found, path = read_evaluation(folder), folder / EVALUATION
    if found is None:
        return
    if found.weights != weights:
        raise ValueError(f"{path}: is of other weights than {found.model} has now; move it to measure again")
    before = found.suites[suite].settings if suite in found.suites else settings
    for key in dict.fromkeys((*before, *settings)):
        if before.get(key) != settings.get(key):
            raise ValueError(
                f"{key}: {suite} was measured with {before.get(key)} ({path}), not with {settings.get(key)}; change it "
                "back, give the suite another name (suite=NAME), or move the file to measure again"
            )


def add(
    folder: Path,
    suite: str,
    task: str,
    score: Score,
    samples: Sequence[Sample],
    model: str,
    weights: str,
    settings: Mapping[str, Any],
) -> None:
    """Writes the samples of a task, and then its score.

    Raises:
        OSError: they cannot be written; what was written before is as it was.
    """
    write_lines(samples_file(folder, suite, task), [asdict(sample) for sample in samples])
    with _locked(folder):
        found = read_evaluation(folder) or Evaluation(model=model, weights=weights)
        found.suites.setdefault(suite, SuiteScores(settings=dict(settings))).scores[task] = score
        _write(folder, found)


def add_group(folder: Path, suite: str, name: str, score: Score) -> None:
    """Writes the score of a group whose parts have been measured."""
    with _locked(folder):
        found = read_evaluation(folder)
        assert found is not None
        found.suites[suite].scores[name] = score
        _write(folder, found)


def _write(folder: Path, evaluation: Evaluation) -> None:
    with atomic_file(folder / EVALUATION) as partial:
        text = json.dumps({"format": FORMAT, **_plain(asdict(evaluation))}, indent=2, ensure_ascii=False)
        partial.write_text(text + "\n", encoding="utf-8")


def samples_file(folder: Path, suite: str, task: str) -> Path:
    """The samples of a task, one JSON object per line."""
    return folder / SAMPLES / suite / f"{task.replace('/', '_')}.jsonl"


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes JSON Lines, all or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial, open(partial, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(_plain(row), ensure_ascii=False) + "\n" for row in rows)


def read_samples(folder: Path, suite: str, task: str) -> list[Sample]:
    """The samples of a task; empty if the file is gone.

    Raises:
        ValueError: the file is malformed; it names the line.
    """
    path = samples_file(folder, suite, task)
    if not path.exists():
        return []
    names = [each.name for each in fields(Sample)]
    samples = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                values = json.loads(line)
                samples.append(Sample(**{name: values[name] for name in names}))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: is no sample ({error})") from None
    return samples


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time reads the file and writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f".{EVALUATION}.lock", "w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def _plain(value: Any) -> Any:
    """The value with null for numbers that are not finite."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
