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

A target is a task that is validated on and never trained: what it does not hold out is counted and not used, and one
with fewer prompts than ``validation_examples`` holds out all of them.

Splits that a source brings are used unchanged but for steps 1, 2 and 6. Tasks to memorize (``RawTask.memorized``) are
the exception: they train, and may test, on what they validate on.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

from adapt_recipes.data.examples import BadRow, Examples, LeftOut, RawTask, Task, bad_rows_error, ranges
from adapt_recipes.data.rows import Split
from adapt_recipes.data.source_files import ColumnTasks, FileTask, SourceFile
from adapt_recipes.data.store import Columns, Entry, concatenated
from adapt_recipes.data.tokenize import AS_WRITTEN, ConversationTokenizer, Reading, Source, sources_of, tokenize
from adapt_recipes.errors import nearest, warn


def prepare_tasks(
    raw_tasks: Sequence[RawTask | FileTask | ColumnTasks],
    tokenizer: ConversationTokenizer,
    *,
    max_seq_len: int,
    validation_examples: int = 32,
    test_examples: int = 0,
    max_examples_per_task: int | None = None,
    no_validation: Collection[str] = (),
    targets: Collection[str] = (),
    raw_targets: Sequence[RawTask | FileTask | ColumnTasks] = (),
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
        targets: names of tasks that are validated on and never trained.
        raw_targets: further tasks, all of them targets; there may be no others.
        reading: what is supervised, and where the system message goes.
        on_bad_rows: whether a bad row is an error, or is left out and counted.
        num_workers: processes that tokenize; None: one per usable core.
        cache_dir: folder of the cache.

    Returns:
        The tasks to train on, and then the targets.

    Raises:
        ValueError: a task name is unknown or duplicated; no task is left to train on; there are bad rows (it names the
            first, and their number); a task has no example that can be used, or too few prompts to hold some out.
    """
    # The names of a column's tasks are known when its files have been read.
    num_raw_tasks, raw_tasks = len(raw_tasks), [*raw_tasks, *raw_targets]
    named = [task.name for task in raw_tasks if not isinstance(task, ColumnTasks)]
    if len(named) == len(raw_tasks):
        _check_names(named[:num_raw_tasks], named[num_raw_tasks:], no_validation, targets)
    _check_bad_rows([row for task in raw_tasks if isinstance(task, RawTask) for row in task.bad_rows], on_bad_rows)

    # Steps 1 to 3. A task that is not in the objective has one split.
    sources = [
        [
            (split, source)
            for split, source in sources_of(task)
            if split == "train" or not (isinstance(task, RawTask) and task.name in no_validation)
        ]
        for task in raw_tasks
    ]
    entries = iter(
        tokenize(
            [source for some in sources for _, source in some],
            tokenizer,
            reading=reading,
            num_workers=num_workers,
            cache_dir=Path(cache_dir).expanduser(),
        )
    )
    read = [[_Read(split, source, next(entries)) for split, source in some] for some in sources]
    _warn_about_empty([each for some in read for each in some])
    in_each = [_tasks_in(task, some, no_validation) for task, some in zip(raw_tasks, read, strict=True)]
    own_targets = [task.name for some in in_each[num_raw_tasks:] for task in some]
    _check_names([task.name for some in in_each[:num_raw_tasks] for task in some], own_targets, no_validation, targets)
    targets = {*targets, *own_targets}
    found = sorted(chain.from_iterable(in_each), key=lambda task: task.name in targets)
    _check_bad_rows([row for task in found for row in task.bad_rows], on_bad_rows)
    _check_bad_rows([row for task in found for rows in task.bad_conversations.values() for row in rows], on_bad_rows)
    for task in found:
        skipped = [*task.bad_rows, *task.bad_conversations["train"]]
        if skipped and not len(task.splits["train"].rows):
            raise ValueError(f"task {task.name!r}: no row is an example: {bad_rows_error(skipped)}")
    splits = {
        (task.name, split): _Rows.usable((task.name, split), each, max_seq_len)
        for task in found
        for split, each in task.splits.items()
    }
    for task in found:
        splits[task.name, "train"].limit(max_examples_per_task)

    # Step 4: hold out prompts to validate on.
    objective = [task.name for task in found if task.name not in no_validation]
    for name in objective:
        if (name, "validation") not in splits:
            train = splits[name, "train"]
            number = min(validation_examples, len(train.prompts())) if name in targets else validation_examples
            prompts = _smallest_prompts(name, train, number, "validation_examples", is_target=name in targets)
            splits[name, "validation"] = splits[name, "train"].take(prompts)
    validated = _HeldOut.union([_NOTHING, *(splits[name, "validation"].answers for name in objective)])

    # Step 5: hold out prompts to test on, out of those on which nobody validates.
    memorized = {task.name for task in found if task.memorized}
    for name in objective if test_examples else ():
        if (name, "test") not in splits:
            without = None if name in memorized else validated.pairs
            prompts = _smallest_prompts(
                name, splits[name, "train"], test_examples, "test_examples", without, is_target=name in targets
            )
            splits[name, "test"] = splits[name, "train"].take(prompts)
    tested = [splits[name, "test"].answers for name in objective if (name, "test") in splits]

    # Step 6: no leaks.
    held_out = _HeldOut.union([validated, *tested])
    names: tuple[Split, ...] = ("train", "validation", "test")
    return [
        _without_leaks(
            task,
            {split: splits[task.name, split] for split in names if (task.name, split) in splits},
            validated,
            held_out,
            is_target=task.name in targets,
        )
        for task in found
    ]


class _Read(NamedTuple):
    """What the store has of a source."""

    split: Split
    source: Source
    entry: Entry


class _Found(NamedTuple):
    """A task that was read.

    Attributes:
        name, entropy, memorized: as of a ``RawTask``.
        splits: those that the source brings, as far as they are used.
        bad_rows: rows of all its splits that are no conversations.
        bad_conversations: those of ``splits`` that cannot be tokenized.
        unused_keys: for each key of the rows that is not used, the number of rows that have it.
    """

    name: str
    entropy: float | None
    memorized: bool
    splits: dict[Split, _Index]
    bad_rows: list[BadRow]
    bad_conversations: dict[Split, list[BadRow]]
    unused_keys: Mapping[str, int]


def _tasks_in(
    task: RawTask | FileTask | ColumnTasks, read: Sequence[_Read], no_validation: Collection[str]
) -> list[_Found]:
    """The task; or those of a column, one for each value."""
    # By value of the column; all is under None where no column makes tasks.
    values: set[str | None] = set()
    bad_rows: defaultdict[str | None, list[BadRow]] = defaultdict(list)
    bad_conversations: defaultdict[tuple[str | None, Split], list[BadRow]] = defaultdict(list)
    unused_keys: defaultdict[str | None, Counter[str]] = defaultdict(Counter)
    if isinstance(task, RawTask):
        bad_rows[None] += task.bad_rows
        unused_keys[None].update(task.unused_keys)
    for split, source, entry in read:
        values.update(entry.columns.tasks.dictionary.to_pylist())
        for number, reason, value in entry.facts.bad_rows:
            assert isinstance(source, SourceFile)
            bad_rows[value].append(source.bad_row(number, reason))
        for number, reason, value in entry.facts.bad_conversations:
            bad_conversations[value, split].append(_bad_conversation(task, split, source, number, reason))
        for value, counts in entry.facts.unused_keys.items():
            unused_keys[value].update(counts)
    values |= {*bad_rows, *(value for value, _ in bad_conversations)}
    names = sorted(value for value in values if value is not None)

    # The values of each task. Rows without a value are the first one's.
    owned: dict[str, list[str | None]]
    if isinstance(task, ColumnTasks):
        if not names:
            raise ValueError(bad_rows_error(bad_rows[None]))
        owned = {name: [name] for name in names}
        owned[names[0]].append(None)
    else:
        owned = {task.name: [*names, None]}

    splits: defaultdict[str, dict[Split, _Index]] = defaultdict(dict)
    for split in dict.fromkeys(each.split for each in read):
        indices = _indices([each.entry.columns for each in read if each.split == split], [*owned.values()])
        for (name, some), index in zip(owned.items(), indices, strict=True):
            is_there = len(index.rows) or any((value, split) in bad_conversations for value in some)
            if split == "train" or (name not in no_validation and (is_there or not isinstance(task, ColumnTasks))):
                splits[name][split] = index
    return [
        _Found(
            name,
            task.entropy if isinstance(task, RawTask) else None,
            isinstance(task, RawTask) and task.memorized,
            splits[name],
            [row for value in some for row in bad_rows[value]],
            {split: [row for value in some for row in bad_conversations[value, split]] for split in splits[name]},
            sum((unused_keys[value] for value in some), Counter()),
        )
        for name, some in owned.items()
    ]


def _bad_conversation(
    task: RawTask | FileTask | ColumnTasks, split: Split, source: Source, number: int, reason: str
) -> BadRow:
    """A conversation that cannot be tokenized, by where it is from."""
    if isinstance(source, SourceFile):
        return BadRow(source.source, source.first_row + number, reason)
    assert isinstance(task, RawTask)
    origin = getattr(source.conversations[number - source.start], "origin", None)
    unnamed = f"task {task.name!r}, {'' if split == 'train' else split + ' '}example"
    where, number = origin or (unnamed, number)
    return BadRow(where, number, reason)


def _without_leaks(
    task: _Found, rows: dict[Split, _Rows], validated: _HeldOut, held_out: _HeldOut, *, is_target: bool
) -> Task:
    """Step 6 for one task, with the rows of its splits; ``held_out`` are all answers of validation and test."""
    train, answers, examples, untrained = rows["train"], 0, 0, 0
    if is_target:
        untrained = int(train.kept.sum())
        train.kept = np.zeros_like(train.kept)
    if not task.memorized:
        own = [each for split, each in rows.items() if split != "train" and split in task.splits]
        if own and not is_target:
            _warn_about_own_splits(task.name, train, own)
        if "test" in rows:
            rows["test"].hide(validated, task.name)
        if not is_target:
            answers, examples = train.hide(held_out, task.name)
    for split, each in rows.items():
        if not each.kept.any() and not (is_target and each is train):
            raise ValueError(
                f"task {task.name!r}: no {split} example is left, because other splits hold out all of its answers"
            )
    left_out = LeftOut(
        too_long=sum(each.too_long for each in rows.values()),
        bad_rows=len(task.bad_rows) + sum(map(len, task.bad_conversations.values())),
        unlabeled=sum(each.unlabeled for each in rows.values()),
        leaked_answers=answers,
        leaked_examples=examples,
        untrained=untrained,
        unused_keys=dict(sorted(task.unused_keys.items())),
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
    """What decides on the examples of one split of one task."""

    sources: Sequence[Columns]
    # of each example; the first is its number over all sources
    rows: np.ndarray
    lengths: np.ndarray
    prompt_hashes: np.ndarray
    content_hashes: np.ndarray
    # of each answer; the first is its number over all sources
    answers: np.ndarray
    example_of: np.ndarray
    pair_of: np.ndarray
    whole_of: np.ndarray


def _indices(sources: Sequence[Columns], groups: Sequence[Sequence[str | None]]) -> Iterator[_Index]:
    """The examples of each group of values of the column, one value after the other."""
    num_answers = np.concatenate([np.diff(each.answer_offsets) for each in sources])
    lengths = np.concatenate([np.diff(each.offsets) for each in sources])
    prompts, contents = concatenated(sources, "prompt_hashes"), concatenated(sources, "content_hashes")
    pairs, wholes = concatenated(sources, "pair_hashes"), concatenated(sources, "whole_hashes")
    answer_ends = num_answers.cumsum()

    # The examples in the order of the groups, and where each group ends.
    position = {value: number for number, value in enumerate(value for group in groups for value in group)}
    codes = []
    for each in sources:
        # The last one is of the index -1, that of null.
        of_index = np.array([position[value] for value in (*each.tasks.dictionary.to_pylist(), None)])
        codes.append(of_index[each.tasks.indices.fill_null(-1).to_numpy(zero_copy_only=False)])
    of_example = np.concatenate(codes)
    order = of_example.argsort(kind="stable")
    ends = np.searchsorted(of_example[order], np.cumsum([len(group) for group in groups]))
    for rows in np.split(order, ends[:-1]):
        answers = ranges(answer_ends[rows] - num_answers[rows], answer_ends[rows])
        yield _Index(
            sources,
            rows,
            lengths[rows],
            prompts[rows],
            contents[rows],
            answers,
            np.arange(len(rows)).repeat(num_answers[rows]),
            pairs[answers],
            wholes[answers],
        )


class _Rows:
    """The examples of one split of one task, while it is decided which of them are used.

    Attributes:
        kept: (num_examples,) bool, those in the split.
        hidden: (num_answers,) bool, answers that are context.
        too_long, unlabeled: numbers of examples that are not kept for that.
    """

    def __init__(self, index: _Index, kept: np.ndarray, *, too_long: int = 0, unlabeled: int = 0) -> None:
        self._index = index
        self.kept = kept
        self.too_long, self.unlabeled = too_long, unlabeled
        self._example_of, self._pair_of, self._whole_of = index.example_of, index.pair_of, index.whole_of
        self.hidden = np.zeros(len(index.example_of), dtype=bool)

    @classmethod
    def usable(cls, key: tuple[str, Split], index: _Index, max_seq_len: int) -> _Rows:
        """The examples with an answer to learn that are short enough."""
        name, split = key
        lengths = index.lengths
        if not len(lengths):
            raise ValueError(f"task {name!r}: there is no {split} example")
        labeled = np.bincount(index.example_of, minlength=len(lengths)) > 0
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
        return cls(index, kept, too_long=num_too_long, unlabeled=num_unlabeled)

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
        return _Rows(self._index, taken)

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
        rows, hidden = self._index.rows[self.kept], np.sort(self._index.answers[self.hidden])
        return Examples(self._index.sources, torch.from_numpy(rows), torch.from_numpy(hidden))


def _check_names(
    names: Sequence[str], own_targets: Sequence[str], no_validation: Collection[str], targets: Collection[str]
) -> None:
    """Checks the names of the tasks of the source, and of the targets that have a source of their own."""
    if not (names or own_targets):
        raise ValueError("tasks: there is no task")
    for name in own_targets:
        if name in names:
            raise ValueError(f"tasks.targets: {name!r} is a task to train on as well; call one of them differently")
    for key, several in (
        ("tasks: two tasks have", [*names, *own_targets]),
        ("tasks.targets: two targets have", targets),
    ):
        name, number = Counter(several).most_common(1)[0] if several else ("", 0)
        if number > 1:
            raise ValueError(f"{key} the name {name!r}")
    for key, some in (("no_validation", no_validation), ("targets", targets)):
        for name in some:
            if name not in names:
                raise ValueError(f"tasks.{key}: no task {name!r}{nearest(name, names)}")
            if key == "targets" and name in no_validation:
                raise ValueError(f"tasks.no_validation: {name!r} is a target, and nothing but validated on")
    if names and set(names) <= set(targets):
        raise ValueError("tasks.targets: it names every task; leave at least one to train on")


def _check_bad_rows(bad_rows: Sequence[BadRow], on_bad_rows: str) -> None:
    if bad_rows and on_bad_rows == "refuse":
        advice = "" if len(bad_rows) == 1 else "; tasks.on_bad_rows: skip leaves them out"
        raise ValueError(bad_rows_error(bad_rows) + advice)


def _warn_about_empty(read: Iterable[_Read]) -> None:
    """Says how many rows of which files have no answer, which their source allows."""
    counts = {
        source.path: entry.facts.num_empty
        for _, source, entry in read
        if isinstance(source, SourceFile) and entry.facts.num_empty
    }
    if counts:
        of_files = [f"{file.name}: {number}" for file, number in sorted(counts.items())]
        named = ", ".join(of_files[:5]) + (f", and {len(of_files) - 5} more files" if len(of_files) > 5 else "")
        number = sum(counts.values())
        warn(f"tasks.path: instances with only empty outputs, which are left out: {number:,} ({named})")


def _smallest_prompts(
    name: str, rows: _Rows, number: int, key: str, without: np.ndarray | None = None, *, is_target: bool
) -> np.ndarray:
    """The hashes of the prompts that task ``name`` holds out."""
    prompts, num_left = rows.prompts(without), len(rows.prompts())
    if len(prompts) < number or (num_left <= number and not is_target):
        free = "" if without is None else " that no task validates on"
        more = "" if is_target else " and must train on at least one"
        advice = "" if is_target else ", or list the task in tasks.no_validation"
        raise ValueError(
            f"tasks.{key}: {number} is too many for task {name!r}, which has {len(prompts)} different prompts{free}"
            f"{more}; lower it{advice}"
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
