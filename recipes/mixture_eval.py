"""What a mixture is worth: measures finished runs, and a base model, on their own tasks, on unseen ones, on benchmarks.

    tune run mixture_eval --config yaml/eval_tasks.yaml runs=[runs/a,runs/b] model=models/SmolLM2-135M-Instruct
    tune report runs/base runs/a runs/b

lm-eval computes everything on the run's ``model/``. Each folder gets ``evaluation.json`` and the answers; a second call
measures what is missing. With several processes (``tune run --nproc_per_node N``) each takes the next task. Needs the
extra ``eval``. docs/evaluation.md says which suite answers what, and what it costs.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import field
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass
from rich.console import Console

from adapt_recipes.data import ChatTokenizer
from adapt_recipes.data.conversations import error_prefix
from adapt_recipes.errors import nearest
from adapt_recipes.evaluation import records
from adapt_recipes.evaluation.benchmarks import Benchmark, file_hash, load_task, local_parts, measure, parts_of, whole
from adapt_recipes.evaluation.model import Backend, check_backend, open_model, weights_fingerprint
from adapt_recipes.evaluation.mt_bench import answer_mt_bench, read_mt_bench
from adapt_recipes.evaluation.progress import shows
from adapt_recipes.evaluation.questions import ask, questions_of
from adapt_recipes.evaluation.records import Sample, Score
from adapt_recipes.evaluation.sharing import SharedWork
from adapt_recipes.evaluation.subjects import Split, Subject, chat_tokenizer, own_tasks, subjects_of, unseen_tasks
from adapt_recipes.evaluation.table import score_table
from adapt_recipes.strict import STRICT, Component, command_line
from adapt_recipes.training.process_group import get_device


@dataclass(kw_only=True, config=STRICT)
class Config:
    """All keys of this recipe's config. What a suite measures is under ``benchmarks``, ``own_tasks``, ``unseen_tasks``
    and ``mt_bench``."""

    recipe: str | None = None
    suite: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    """the name of the scores in evaluation.json and in reports"""
    runs: list[str] = field(default_factory=list)
    """run directories; the runs have to be finished"""
    model: str | None = None
    """a Hugging Face folder that is measured as well, such as that of the base model"""
    output_dir: str | None = None
    """where the scores of ``model`` go; those of runs go into their directories"""
    only: list[str] | None = None
    """names of tasks of the suite; null: all"""

    backend: Backend = "hf"
    """of lm-eval"""
    device: str | None = None
    """cpu, cuda, ...; default: the best available"""
    dtype: Literal["fp32", "bf16"] = "bf16"
    batch_size: PositiveInt = 16
    """sequences in a forward pass"""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1234
    """of the solved examples in prompts; lm-eval's own is 1234"""
    limit: PositiveInt | None = None
    """examples per task; null: all"""

    own_tasks: bool = False
    """the run's own tasks and targets: the test split, or validation where there is none"""
    unseen_tasks: Component | None = None
    """a source of tasks, of which those are measured whose files and prompts the run has not trained on"""
    max_answer_tokens: PositiveInt = 128
    """after which an answer to a question of own or unseen tasks is cut"""
    benchmarks: dict[str, Benchmark] = field(default_factory=dict)
    """tasks or groups of lm-eval"""
    chat_template: bool = True
    """ask benchmarks as in a chat; own and unseen tasks always are"""
    data_dir: str | None = None
    """folder with the files of ``benchmarks`` and ``mt_bench``; a file that is not there comes from the hub"""
    allow_code_execution: bool = False
    """measure benchmarks that execute code of the model; without it they are left out"""
    mt_bench: str | None = None
    """the file of MT-bench's questions, in ``data_dir``: answers for its judges"""

    def __post_init__(self) -> None:
        if (self.model is None) != (self.output_dir is None):
            raise ValueError("model, output_dir: give both, or neither; output_dir is where the scores of model go")
        if not (self.own_tasks or self.unseen_tasks or self.benchmarks or self.mt_bench):
            raise ValueError("benchmarks, own_tasks, unseen_tasks, mt_bench: the suite measures nothing; give one")
        if self.mt_bench and self.data_dir is None:
            raise ValueError(f"data_dir: mt_bench needs it, the folder that has {self.mt_bench}")


class Job(NamedTuple):
    """A task to measure on one model, which ``measure`` gets as lm-eval has opened it."""

    subject: Subject
    task: str
    measure: Callable[[Any], tuple[Score, list[Sample]]]
    benchmark: str | None = None
    """of which the task is the whole or a part; if its data is missing, the others go on"""


class Recipe:
    """One evaluation: ``setup`` finds what to measure, and ``measure`` does it, task by task."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.data_dir = None if config.data_dir is None else Path(config.data_dir)
        # Of each model: what decides its scores. A suite is not continued with other settings.
        self.settings: dict[Subject, dict[str, Any]] = {}
        # Benchmarks that cannot be measured, and why.
        self.failed: dict[str, str] = {}

    def setup(self) -> None:
        """Finds the models and their tasks, and refuses what cannot be measured or continued."""
        config = self.config
        if not config.runs and config.model is None:
            raise ValueError(
                "runs, model: give at least one: runs=[runs/a,runs/b], or model=FOLDER output_dir=runs/base"
            )
        check_backend(config.backend)
        self.device = get_device(config.device)
        # Before lm-eval is imported, which would share each task between the processes.
        self.work = SharedWork()
        self.subjects = subjects_of(config.runs, config.model, config.output_dir)
        self.weights = {subject: weights_fingerprint(subject.model) for subject in self.subjects}
        jobs = [job for subject in self.subjects for job in self.jobs(subject)]

        pairs = [(job.subject, job.task) for job in jobs]
        if twice := [task for subject, task in dict.fromkeys(pairs) if pairs.count((subject, task)) > 1]:
            raise ValueError(f"{config.suite}: two of its tasks have the name {twice[0]!r}; measure them as two suites")

        # Those that are asked for, by task or by benchmark.
        names = list(dict.fromkeys(name for job in jobs for name in (job.benchmark, job.task) if name))
        for name in config.only or ():
            if name not in names:
                raise ValueError(f"only: {config.suite} has no task {name!r}{nearest(name, names)}")
        self.all_jobs = [job for job in jobs if not config.only or {job.benchmark, job.task} & {*config.only}]
        for subject in self.subjects:
            records.check(subject.folder, config.suite, self.weights[subject], self.settings[subject])

    def jobs(self, subject: Subject) -> Iterator[Job]:
        """All that the suite measures on one model."""
        config = self.config
        in_chat = config.own_tasks or config.unseen_tasks or config.mt_bench or config.chat_template
        tokenizer = chat_tokenizer(subject) if in_chat else None
        settings = self.settings[subject] = {
            "seed": config.seed,
            "limit": config.limit,
            "dtype": config.dtype,
            "backend": config.backend,
            "chat_template": tokenizer.fingerprint if tokenizer else None,
        }

        # Questions of the run's own tasks, and of others.
        found = []
        if tokenizer and config.own_tasks:
            found.append(own_tasks(subject, tokenizer))
        if tokenizer and config.unseen_tasks:
            found.append(unseen_tasks(subject, tokenizer, config.unseen_tasks))
        for each in found:
            assert tokenizer is not None
            settings |= {"max_answer_tokens": config.max_answer_tokens, each.family: each.fingerprint}
            for split in each.splits:
                yield Job(subject, split.task, partial(self.ask, tokenizer, split, each.family))

        # Benchmarks of lm-eval.
        for name, benchmark in config.benchmarks.items():
            if benchmark.executes_code and not config.allow_code_execution:
                continue
            parts = parts_of(self.lm_tasks, name)
            files = local_parts(benchmark, name, parts, self.data_dir)
            for part in files or parts:
                yield Job(subject, part, partial(self.run_benchmark, name, part, files.get(part)), name)

        # Answers for the judges of MT-bench.
        if config.mt_bench:
            assert self.data_dir is not None
            file = self.data_dir / config.mt_bench
            yield Job(subject, "mt_bench", partial(self.answer_mt_bench, subject, file, read_mt_bench(file)))

    def measure(self) -> int:
        """Measures what is missing. Returns the exit status: 0, or 1 if a benchmark could not be measured."""
        suite, opened, lm = self.config.suite, None, None
        for number, job in self.work.taken(list(enumerate(self.all_jobs, start=1))):
            folder = job.subject.folder
            if job.task in records.scores_of(folder, suite) or (job.benchmark in self.failed):
                continue
            if job.subject != opened:
                # The former one first, so that there is never memory for two.
                lm = None
                lm, opened = self.open(job.subject), job.subject
            try:
                with shows(f"{folder}: {job.task} ({number} of {len(self.all_jobs)})"):
                    score, samples = job.measure(lm)
            except Exception as error:
                if job.benchmark is None or isinstance(error, MemoryError | torch.OutOfMemoryError):
                    raise
                self.fail(job.benchmark, job.task, error)
                continue
            settings, weights = self.settings[job.subject], self.weights[job.subject]
            records.add(folder, suite, job.task, score, samples, str(job.subject.model), weights, settings)
            print(f"{folder}: {job.task}: {score.summary}", flush=True)
        self.work.wait()
        if self.work.is_first:
            self.finish()
        return 1 if self.failed else 0

    def ask(self, tokenizer: ChatTokenizer, split: Split, family: str, lm: Any) -> tuple[Score, list[Sample]]:
        """Questions of one task, answered greedily, and the likelihood of the right answers."""
        questions, num_unasked = questions_of(split.examples, tokenizer, limit=self.config.limit)
        left_out = {"trained on": split.num_seen, "last answer is no text or not supervised": num_unasked}
        tokens = self.config.max_answer_tokens
        with error_prefix(f"task {split.task!r}"):
            return ask(lm, questions, max_answer_tokens=tokens, family=family, data=split.name, left_out=left_out)

    def run_benchmark(self, name: str, part: str, file: Path | None, lm: Any) -> tuple[Score, list[Sample]]:
        """One task of lm-eval, with its stock prompts and metrics."""
        config, benchmark = self.config, self.config.benchmarks[name]
        if benchmark.executes_code:
            # As the metric of the hub demands.
            os.environ["HF_ALLOW_CODE_EVAL"] = "1"
        task = load_task(self.lm_tasks, benchmark, name, part, file, self.data_dir)
        return measure(
            lm,
            task,
            benchmark,
            group=None if part == name else name,
            seed=config.seed,
            limit=config.limit,
            chat_template=config.chat_template,
            data="hub" if file is None else f"{file.name} {file_hash(file)}",
        )

    def answer_mt_bench(
        self, subject: Subject, file: Path, questions: list[dict[str, Any]], lm: Any
    ) -> tuple[Score, list[Sample]]:
        """Answers to the questions of MT-bench, in the form that its judges read."""
        config, name, data = self.config, subject.folder.resolve().name, f"{file.name} {file_hash(file)}"
        score, samples, answers = answer_mt_bench(
            lm, questions[: config.limit], model_name=name, seed=config.seed, data=data
        )
        records.write_lines(subject.folder / records.SAMPLES / self.config.suite / "mt_bench_answers.jsonl", answers)
        return score, samples

    def open(self, subject: Subject) -> Any:
        """The model in lm-eval."""
        config = self.config
        with shows(f"{subject.folder}: opening {subject.model}"):
            return open_model(
                subject.model,
                tokenizer=subject.tokenizer,
                device=self.device,
                dtype=config.dtype,
                batch_size=config.batch_size,
                backend=config.backend,
            )

    def fail(self, benchmark: str, task: str, error: Exception) -> None:
        """Says why a benchmark cannot be measured; its other parts and models are not tried."""
        if os.environ.get("ADAPT_TRACEBACK"):
            traceback.print_exc()
        needs = self.config.benchmarks[benchmark].needs
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        self.failed[benchmark] = f"{task}: cannot be measured: {why}" + (f"; it needs {needs}" if needs else "")
        print(f"error: {self.failed[benchmark]}", file=sys.stderr, flush=True)

    def finish(self) -> None:
        """Scores of whole groups, and a table of all."""
        suite, benchmarks = self.config.suite, self.config.benchmarks
        for subject in self.subjects:
            found = records.scores_of(subject.folder, suite)
            for name, benchmark in benchmarks.items():
                if parts := {task: score for task, score in found.items() if score.group == name}:
                    records.add_group(subject.folder, suite, name, whole(self.lm_tasks, name, benchmark, parts))
        Console(width=None if sys.stdout.isatty() else 160).print(
            score_table(suite, [subject.folder for subject in self.subjects])
        )
        skipped = [
            name for name, each in benchmarks.items() if each.executes_code and not self.config.allow_code_execution
        ]
        if skipped:
            print(f"left out, because they execute code of the model: {', '.join(skipped)}; allow_code_execution=true")
        for name in self.failed:
            print(f"not measured: {name}")

    @cached_property
    def lm_tasks(self) -> Any:
        """lm-eval's index of its tasks, which takes seconds to read."""
        from lm_eval.tasks import TaskManager

        with shows("reading lm-eval's tasks"):
            return TaskManager()


def main(config: Config) -> int:
    recipe = Recipe(config)
    recipe.setup()
    return recipe.measure()


if __name__ == "__main__":
    command_line(main, Config)
