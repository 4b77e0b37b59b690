"""Tokenizes tasks, drops what cannot be used, and splits off the examples to validate and to test on.

The result does not depend on the number of workers, the order of the tasks, or the state of the cache. The steps:

1. Every conversation is tokenized, or read from the cache. Bad rows end the run, or are skipped and counted.
2. Examples longer than ``max_seq_len``, or without an answer to learn, are dropped and counted, never cut.
3. If a task has more than ``max_examples_per_task`` examples, those with the smallest hash of the whole conversation
   are kept.
4. Every task that is in the objective and has no validation split of its own holds out ``validation_examples`` of its
   prompts: those with the smallest hash. A prompt is everything before the last answer, as roles and texts, so its hash
   depends neither on the tokenizer nor on a seed. All examples with such a prompt are validated on.
5. In the same way it holds out the next ``test_examples`` prompts, without those that have an answer on which any task
   validates.
6. No leaks: a pair of a user's message and its answer that any task validates or tests on is not supervised in
   training, in whatever turn of whatever conversation of whatever task; nor in a test if any task validates on it. The
   answer becomes context. An example without another answer is dropped. Both are counted. If this left nothing of a
   task, because its conversations all end alike ("Thanks!", "You're welcome."), pairs from later turns are leaks in
   this task only after the same turns, and a warning says so.

Splits that a source brings are used unchanged but for steps 1, 2 and 6. Tasks to memorize (``RawTask.memorized``) are
the exception: they train, and may test, on what they validate on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

from adapt_recipes.data.examples import BadRow, Examples, LeftOut, RawTask, Task
from adapt_recipes.data.raw_tasks import Split, bad_rows_error
from adapt_recipes.data.source_files import FileTask, SourceFile, total
from adapt_recipes.data.store import Columns, Entry, concatenated
from adapt_recipes.data.tokenize import AS_WRITTEN, ConversationTokenizer, Reading, Source, sources_of, tokenize
from adapt_recipes.errors import nearest, warn


def prepare_tasks(
    raw_tasks: Sequence[RawTask | FileTask],
    tokenizer: ConversationTokenizer,
    *,
    max_seq_len: int,
    validation_examples: int = 32,
    test_examples: int = 0,
    max_examples_per_task: int | None = None,
    no_validation: Collection[str] = (),
    reading: Reading = AS_WRITTEN,
    on_bad_rows: Literal["refuse", "skip"] = "refuse",
    num_workers: int | None = None,
    cache_dir: str | Path,
) -> list[Task]:
    """Tokenizes and splits tasks; see the module.

    Args:
        raw_tasks: the tasks, in the order of the result.
        tokenizer: see ``ConversationTokenizer``.
        max_seq_len: rendered tokens that an example may have at most.
        validation_examples: prompts that a task holds out, at least 1.
        test_examples: prompts that a task holds out for a test; 0: none.
        max_examples_per_task: bound on a task's examples of all splits together (not counting splits of its own);
            None: all.
        no_validation: names of tasks that are not in the objective: they have neither validation nor test.
        reading: what is supervised, and where the system message goes.
        on_bad_rows: whether a bad row is an error, or is left out and counted.
        num_workers: processes that tokenize; None: one per usable core.
        cache_dir: folder of the cache.

    Raises:
        ValueError: a task name is unknown or duplicated; there are bad rows (it names the first, and their number); a
            task has no example that can be used, or too few prompts to hold some out.
    """
    _check_names([task.name for task in raw_tasks], no_validation)
    _check_bad_rows([row for task in raw_tasks for row in _own_bad_rows(task)], on_bad_rows)

    # Steps 1 to 3. By task and split; a task that is not in the objective has one split.
    sources = {
        (task.name, split): each
        for task in raw_tasks
        for split, each in sources_of(task).items()
        if split == "train" or task.name not in no_validation
    }
    entries = iter(
        tokenize(
            [each for some in sources.values() for each in some],
            tokenizer,
            reading=reading,
            num_workers=num_workers,
            cache_dir=Path(cache_dir).expanduser(),
        )
    )
    prepared = {key: list(islice(entries, len(some))) for key, some in sources.items()}
    _warn_about_empty(sources, prepared)
    bad = {key: _bad_rows(key, sources[key], some) for key, some in prepared.items()}
    _check_bad_rows([row for rows in bad.values() for row in rows], on_bad_rows)
    for task in raw_tasks:
        skipped = [*_own_bad_rows(task), *bad[task.name, "train"]]
        if skipped and not sum(map(len, prepared[task.name, "train"])):
            raise ValueError(f"task {task.name!r}: no row is an example: {bad_rows_error(skipped)}")
    splits = {key: _Rows.usable(key, [each.columns for each in some], max_seq_len) for key, some in prepared.items()}
    for task in raw_tasks:
        splits[task.name, "train"].limit(max_examples_per_task)

    # Step 4: hold out prompts to validate on.
    objective = [task.name for task in raw_tasks if task.name not in no_validation]
    for name in objective:
        if (name, "validation") not in splits:
            prompts = _smallest_prompts(name, splits[name, "train"], validation_examples, "validation_examples")
            splits[name, "validation"] = splits[name, "train"].take(prompts)
    validated = _HeldOut.union([_NOTHING, *(splits[name, "validation"].answers for name in objective)])

    # Step 5: hold out prompts to test on, out of those on which nobody validates.
    memorized = {task.name for task in raw_tasks if task.memorized}
    for name in objective if test_examples else ():
        if (name, "test") not in splits:
            without = None if name in memorized else validated.pairs
            prompts = _smallest_prompts(name, splits[name, "train"], test_examples, "test_examples", without)
            splits[name, "test"] = splits[name, "train"].take(prompts)
    tested = [splits[name, "test"].answers for name in objective if (name, "test") in splits]

    # Step 6: no leaks.
    held_out = _HeldOut.union([validated, *tested])
    tasks = []
    for task in raw_tasks:
        names: tuple[Split, ...] = ("train", "validation", "test")
        rows = {split: splits[task.name, split] for split in names if (task.name, split) in splits}
        num_bad_rows = len(_own_bad_rows(task)) + sum(len(bad.get((task.name, split), ())) for split in rows)
        facts = [each.facts.unused_keys for split in rows for each in prepared.get((task.name, split), ())]
        unused_keys = total([task.unused_keys] if isinstance(task, RawTask) else facts)
        tasks.append(
            _without_leaks(task, rows, validated, held_out, num_bad_rows=num_bad_rows, unused_keys=unused_keys)
        )
    return tasks


def _without_leaks(
    task: RawTask | FileTask,
    rows: dict[Split, _Rows],
    validated: _HeldOut,
    held_out: _HeldOut,
    *,
    num_bad_rows: int,
    unused_keys: dict[str, int],
) -> Task:
    """Step 6 for one task, with the rows of its splits; ``held_out`` are all answers of validation and test."""
    train, answers, examples = rows["train"], 0, 0
    if not task.memorized:
        if own := [each for split, each in rows.items() if split != "train" and getattr(task, split) is not None]:
            _warn_about_own_splits(task.name, train, own)
        if "test" in rows:
            rows["test"].hide(validated, task.name)
        answers, examples = train.hide(held_out, task.name)
    for split, each in rows.items():
        if not each.kept.any():
            raise ValueError(
                f"task {task.name!r}: no {split} example is left, because other splits hold out all of its answers"
            )
    left_out = LeftOut(
        too_long=sum(each.too_long for each in rows.values()),
        bad_rows=num_bad_rows,
        unlabeled=sum(each.unlabeled for each in rows.values()),
        leaked_answers=answers,
        leaked_examples=examples,
        unused_keys=unused_keys,
    )
    selected = {split: each.examples() for split, each in rows.items()}
    validation, test = selected.get("validation"), selected.get("test")
    return Task(task.name, selected["train"], validation, test, entropy=task.entropy, left_out=left_out)


class _HeldOut(NamedTuple):
    """Hashes of answers (see ``answer_hashes``), ascending where they are looked up."""

    pairs: np.ndarray
    wholes: np.ndarray

    @classmethod
    def union(cls, each: Iterable[_HeldOut]) -> _HeldOut:
        pairs, wholes = zip(*each, strict=True)
        return cls(np.unique(np.concatenate(pairs)), np.unique(np.concatenate(wholes)))


_NOTHING = _HeldOut(*np.zeros((2, 0), dtype=np.int64))


class _Index(NamedTuple):
    """What decides on the examples of one split of one task: columns of all its sources, concatenated."""

    lengths: np.ndarray
    prompt_hashes: np.ndarray
    content_hashes: np.ndarray
    # of each answer
    example_of: np.ndarray
    pair_of: np.ndarray
    whole_of: np.ndarray


class _Rows:
    """The examples of one split of one task, while it is decided which of them are used.

    Attributes:
        kept: (num_examples,) bool, those in the split.
        hidden: (num_answers,) bool, answers that are context.
        too_long, unlabeled: numbers of examples that are not kept for that.
    """

    def __init__(
        self, sources: Sequence[Columns], index: _Index, kept: np.ndarray, *, too_long: int = 0, unlabeled: int = 0
    ) -> None:
        self._sources = sources
        self._index = index
        self.kept = kept
        self.too_long, self.unlabeled = too_long, unlabeled
        self._example_of, self._pair_of, self._whole_of = index.example_of, index.pair_of, index.whole_of
        self.hidden = np.zeros(len(index.example_of), dtype=bool)

    @classmethod
    def usable(cls, key: tuple[str, Split], sources: Sequence[Columns], max_seq_len: int) -> _Rows:
        """The examples with an answer to learn that are short enough."""
        name, split = key
        if not sum(len(each.rows) for each in sources):
            raise ValueError(f"task {name!r}: there is no {split} example")
        num_answers = np.concatenate([np.diff(each.answer_offsets) for each in sources])
        lengths = np.concatenate([np.diff(each.offsets) for each in sources])
        index = _Index(
            lengths,
            concatenated(sources, "prompt_hashes"),
            concatenated(sources, "content_hashes"),
            np.arange(len(lengths)).repeat(num_answers),
            concatenated(sources, "pair_hashes"),
            concatenated(sources, "whole_hashes"),
        )
        labeled = num_answers > 0
        kept = labeled & (lengths <= max_seq_len)
        if not labeled.any():
            raise ValueError(f"task {name!r}: all {len(lengths)} {split} examples have the weight 0")
        if not kept.any():
            shortest = int(lengths[labeled].min())
            raise ValueError(
                f"task {name!r}: all {int(labeled.sum())} {split} examples are longer than max_seq_len={max_seq_len}; "
                f"the shortest has {shortest}"
            )
        num_too_long, num_unlabeled = int((labeled & ~kept).sum()), int((~labeled).sum())
        return cls(sources, index, kept, too_long=num_too_long, unlabeled=num_unlabeled)

    @property
    def answers(self) -> _HeldOut:
        """The hashes of all answers to learn."""
        used = self.kept[self._example_of]
        return _HeldOut(self._pair_of[used], self._whole_of[used])

    def limit(self, at_most: int | None) -> None:
        """Keeps the examples with the smallest hash of the whole conversation."""
        indices = self.kept.nonzero()[0]
        smallest = self._index.content_hashes[indices].argsort(kind="stable")[:at_most]
        self.kept = np.zeros_like(self.kept)
        self.kept[indices[smallest]] = True

    def prompts(self, without: np.ndarray | None = None) -> np.ndarray:
        """The hashes of all prompts, ascending, without those that have one of the pairs ``without``."""
        prompts = self._index.prompt_hashes
        found = np.unique(prompts[self.kept])
        if without is None:
            return found
        excluded = prompts[self._example_of[self.kept[self._example_of] & _in(self._pair_of, without)]]
        return found[~np.isin(found, excluded)]

    def take(self, prompts: np.ndarray) -> _Rows:
        """Moves the examples with these prompts to another split."""
        taken = self.kept & np.isin(self._index.prompt_hashes, prompts)
        self.kept = self.kept & ~taken
        return _Rows(self._sources, self._index, taken)

    def hide(self, held_out: _HeldOut, name: str) -> tuple[int, int]:
        """Makes answers that are held out context; returns their number, and that of examples without another."""
        used = self.kept[self._example_of]
        leaks = used & _in(self._pair_of, held_out.pairs)
        if leaks.sum() == used.sum():
            leaks = used & (_in(self._pair_of, held_out.wholes) | _in(self._whole_of, held_out.wholes))
            if leaks.sum() < used.sum():
                warn(
                    f"task {name!r}: all its conversations end in the same question and answer as held-out ones; these "
                    "are trained on after other turns"
                )
        self.hidden |= leaks
        labeled = np.bincount(self._example_of[~self.hidden], minlength=len(self.kept)) > 0
        num_examples = int((self.kept & ~labeled).sum())
        self.kept = self.kept & labeled
        return int((leaks & self.kept[self._example_of]).sum()), num_examples

    def examples(self) -> Examples:
        rows, hidden = (torch.from_numpy(each.nonzero()[0]) for each in (self.kept, self.hidden))
        return Examples(self._sources, rows, hidden)


def _check_names(names: Sequence[str], no_validation: Collection[str]) -> None:
    if not names:
        raise ValueError("tasks: there is no task")
    name, number = Counter(names).most_common(1)[0]
    if number > 1:
        raise ValueError(f"tasks: two tasks have the name {name!r}")
    for name in no_validation:
        if name not in names:
            raise ValueError(f"tasks.no_validation: no task {name!r}{nearest(name, names)}")


def _check_bad_rows(bad_rows: Sequence[BadRow], on_bad_rows: str) -> None:
    if bad_rows and on_bad_rows == "refuse":
        advice = "" if len(bad_rows) == 1 else "; tasks.on_bad_rows: skip leaves them out"
        raise ValueError(bad_rows_error(bad_rows) + advice)


def _own_bad_rows(task: RawTask | FileTask) -> Sequence[BadRow]:
    """Those known before a task is prepared."""
    return task.bad_rows if isinstance(task, RawTask) else ()


def _bad_rows(key: tuple[str, Split], sources: Sequence[Source], entries: Sequence[Entry]) -> list[BadRow]:
    """The rows that are no examples, by where they are from."""
    name, split = key
    unnamed = f"task {name!r}, {'' if split == 'train' else split + ' '}example"
    rows = []
    for source, entry in zip(sources, entries, strict=True):
        for row, reason in entry.facts.bad_rows:
            where, number = unnamed, row
            if isinstance(source, SourceFile):
                where = source.source
            elif origin := getattr(source.conversations[row - source.start], "origin", None):
                where, number = origin
            rows.append(BadRow(where, number, reason))
    return rows


def _warn_about_empty(
    sources: dict[tuple[str, Split], list[Source]], prepared: dict[tuple[str, Split], list[Entry]]
) -> None:
    """Says how many rows of which files have no answer, which their source allows."""
    counts = {
        source.path: entry.facts.num_empty
        for key, some in sources.items()
        for source, entry in zip(some, prepared[key], strict=True)
        if isinstance(source, SourceFile) and entry.facts.num_empty
    }
    if counts:
        of_files = [f"{file.name}: {number}" for file, number in sorted(counts.items())]
        named = ", ".join(of_files[:5]) + (f", and {len(of_files) - 5} more files" if len(of_files) > 5 else "")
        number = sum(counts.values())
        warn(f"tasks.path: instances with only empty outputs, which are left out: {number:,} ({named})")


def _smallest_prompts(name: str, rows: _Rows, number: int, key: str, without: np.ndarray | None = None) -> np.ndarray:
    """The hashes of the prompts that task ``name`` holds out."""
    prompts, num_left = rows.prompts(without), len(rows.prompts())
    if len(prompts) < number or num_left <= number:
        free = "" if without is None else " that no task validates on"
        raise ValueError(
            f"tasks.{key}: {number} is too many for task {name!r}, which has {len(prompts)} different prompts{free} "
            "and must train on at least one; lower it, or list the task in tasks.no_validation"
        )
    return prompts[:number]


def _warn_about_own_splits(name: str, train: _Rows, others: Sequence[_Rows]) -> None:
    """Says how many answers of a source's training split are in its other splits as well."""
    answers = train.answers.pairs
    if shared := int(_in(answers, _HeldOut.union(each.answers for each in others).pairs).sum()):
        warn(
            f"task {name!r}: {shared:,} of its {len(answers):,} training answers are in the validation or test "
            "split of its source as well; they are not trained on"
        )


def _in(values: np.ndarray, ascending: np.ndarray) -> np.ndarray:
    """Which of the values are among others that are sorted: ``np.isin`` without sorting them for every task."""
    if not len(ascending):
        return np.zeros(len(values), dtype=bool)
    positions = np.searchsorted(ascending, values).clip(max=len(ascending) - 1)
    return ascending[positions] == values
