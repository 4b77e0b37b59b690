"""Tokenizes tasks, drops examples that are too long, and splits off the validation examples.

The result does not depend on the number of workers, the order of the tasks, or the state of the cache. The steps:

1. Every conversation is tokenized, or read from the cache, whose entries depend on the conversations and the tokenizer
   alone.
2. Examples longer than ``max_seq_len`` are dropped and counted, never cut.
3. If a task has more than ``max_examples_per_task`` examples, those with the smallest hash of the whole conversation
   are kept.
4. Every task that is in the objective and has no validation split of its own holds out ``validation_examples`` of its
   prompts: those with the smallest hash. A prompt is everything before the last answer, as roles and texts, so its hash
   depends neither on the tokenizer nor on a seed.
5. A task that is split here validates on every example whose prompt is held out by any task, that is, on
   ``validation_examples`` prompts or more. No task trains on a prompt on which another task validates: a task that is
   not in the objective, or has its own validation split, loses such examples.

A task's own validation split is used unchanged except for step 2, and its prompts are held out from all *other* tasks.
Inside the task the split of the source is kept: rows that are meant to be memorized stay in both splits.

Of what is left to train on, every task in the objective then holds out the ``test_examples`` prompts with the smallest
hash for the test, unless it has its own test split.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch

from adapt_recipes.data.examples import Examples, RawTask, Task
from adapt_recipes.data.tokenize import ConversationTokenizer, Tokenized, tokenize
from adapt_recipes.errors import nearest


def prepare_tasks(
    raw_tasks: Sequence[RawTask],
    tokenizer: ConversationTokenizer,
    *,
    max_seq_len: int,
    validation_examples: int = 32,
    test_examples: int = 0,
    max_examples_per_task: int | None = None,
    no_validation: Collection[str] = (),
    num_workers: int | None = None,
    cache_dir: str | Path,
) -> list[Task]:
    """Tokenizes and splits tasks; see the module.

    Args:
        raw_tasks: the tasks, in the order of the result.
        tokenizer: see ``ConversationTokenizer``.
        max_seq_len: rendered tokens that an example may have at most.
        validation_examples: prompts that a task holds out, at least 1.
        test_examples: prompts that a task holds out for the test after the run; 0: none.
        max_examples_per_task: bound on a task's training and validation examples together (not counting a validation
            split of its own); None: all.
        no_validation: names of tasks that are not in the objective: their ``validation`` is None.
        num_workers: processes that tokenize; None: one per usable core.
        cache_dir: folder of the cache.

    Raises:
        ValueError: a task name is unknown or duplicated; a conversation is malformed or has no supervised token (it
            names task and example); a task has no example that is short enough, or too few prompts to hold some out.
    """
    names = [task.name for task in raw_tasks]
    _check_names(names, no_validation)
    for key, value in (("validation_examples", validation_examples), ("max_examples_per_task", max_examples_per_task)):
        if value is not None and value < 1:
            raise ValueError(f"tasks.{key}: {value} is not allowed; at least 1")

    # Step 1: tokenize the conversations, and the tasks' own validation splits.
    objective = [task for task in raw_tasks if task.name not in no_validation]
    sources = {_label(task.name): task.conversations for task in raw_tasks}
    own_splits = {task.name: task.validation for task in objective if task.validation is not None}
    sources |= {_label(name, "validation example"): conversations for name, conversations in own_splits.items()}
    sources |= {_label(task.name, "test example"): task.test for task in objective if task.test is not None}
    tokenized = tokenize(sources, tokenizer, num_workers=num_workers, cache_dir=Path(cache_dir).expanduser())

    # Steps 2 and 3: drop examples that are too long or too many. By task.
    available: dict[str, Examples] = {}
    own_validation: dict[str, Examples] = {}
    num_dropped: dict[str, int] = {}
    for name in names:
        available[name], num_dropped[name] = _fitting(_label(name), tokenized, max_seq_len, max_examples_per_task)
        if name in own_splits:
            own_validation[name], dropped = _fitting(_label(name, "validation example"), tokenized, max_seq_len, None)
            num_dropped[name] += dropped

    # Steps 4 and 5: hold out prompts, and split.
    validators = _validators([task.name for task in objective], available, own_validation, validation_examples)
    tasks = []
    for task in raw_tasks:
        train, held_out = _split(task.name, available[task.name], own_validation.get(task.name), validators)
        validation = None if task.name in no_validation else own_validation.get(task.name, held_out)
        test = None
        if task.test is not None and task in objective:
            test, dropped = _fitting(_label(task.name, "test example"), tokenized, max_seq_len, None)
            num_dropped[task.name] += dropped
        elif test_examples and task in objective:
            train, test = _split_test(task.name, train, test_examples)
        tasks.append(Task(task.name, train, validation, task.entropy, num_dropped[task.name], test))
    return tasks


def _check_names(names: Sequence[str], no_validation: Collection[str]) -> None:
    if not names:
        raise ValueError("tasks: there is no task")
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"tasks: two tasks have the name {twice[0]!r}")
    for name in no_validation:
        if name not in names:
            raise ValueError(f"tasks.no_validation: no task {name!r}{nearest(name, names)}")


def _validators(
    objective: Sequence[str],  # names of tasks
    available: Mapping[str, Examples],
    own_validation: Mapping[str, Examples],
    validation_examples: int,
) -> Counter[int]:
    """For the hash of every prompt that a task holds out, the number of tasks that validate on it."""
    held_out: set[int] = set()
    for name in objective:
        if name in own_validation:
            held_out.update(own_validation[name].prompt_hashes.tolist())
        else:
            held_out.update(_smallest_prompts(name, available[name], validation_examples))
    validators: Counter[int] = Counter()
    for name in objective:
        validators.update(held_out.intersection(own_validation.get(name, available[name]).prompt_hashes.tolist()))
    return validators


def _split(
    name: str, examples: Examples, own_validation: Examples | None, validators: Counter[int]
) -> tuple[Examples, Examples]:
    """The training examples of a task, and those with held-out prompts."""
    # A prompt in the task's own validation split is held out only if another task validates on it as well.
    own = set() if own_validation is None else set(own_validation.prompt_hashes.tolist())
    is_held = torch.tensor([validators[prompt] > (prompt in own) for prompt in examples.prompt_hashes.tolist()])
    if is_held.all():
        raise ValueError(
            f"task {name!r}: no example is left to train on, because other tasks validate on all of its prompts"
        )
    return examples.select((~is_held).nonzero().flatten()), examples.select(is_held.nonzero().flatten())


def _split_test(name: str, examples: Examples, test_examples: int) -> tuple[Examples, Examples]:
    """The training examples of a task that are left, and those of its test split."""
    prompts = sorted(set(examples.prompt_hashes.tolist()))
    if len(prompts) <= test_examples:
        raise ValueError(
            f"tasks.test_examples: {test_examples} is too many for task {name!r}, which has {len(prompts)} different "
            "prompts left and must train on at least one; lower it, or list the task in tasks.no_validation"
        )
    is_test = torch.isin(examples.prompt_hashes, torch.tensor(prompts[:test_examples]))
    return examples.select((~is_test).nonzero().flatten()), examples.select(is_test.nonzero().flatten())


def _label(name: str, kind: str = "example") -> str:
    """The name of an example of a task in an error; its number follows."""
    return f"task {name!r}, {kind}"


def _fitting(
    where: str, tokenized: dict[str, Tokenized], max_seq_len: int, at_most: int | None
) -> tuple[Examples, int]:
    """The examples that are short enough (the ``at_most`` with the smallest hash), and how many are too long."""
    examples, hashes = tokenized[where].examples, tokenized[where].content_hashes
    indices = (examples.lengths <= max_seq_len).nonzero().flatten()
    if not len(indices):
        shortest = int(examples.lengths.min())
        raise ValueError(
            f"{where}s: all {len(examples)} are longer than max_seq_len={max_seq_len}; the shortest has {shortest}"
        )
    smallest = hashes[indices].argsort(stable=True)[:at_most]
    return examples.select(indices[smallest.sort().values]), len(examples) - len(indices)


def _smallest_prompts(name: str, examples: Examples, validation_examples: int) -> list[int]:
    """The hashes of the prompts that task ``name`` holds out for validation."""
    prompts = sorted(set(examples.prompt_hashes.tolist()))
    if len(prompts) <= validation_examples:
        raise ValueError(
            f"tasks.validation_examples: {validation_examples} is too many for task {name!r}, which has {len(prompts)} "
            "different prompts and must train on at least one; lower it, or list the task in tasks.no_validation"
        )
    return prompts[:validation_examples]
