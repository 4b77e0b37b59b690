from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapt_recipes.data import ByteTokenizer, Examples, RawTask, Task, prepare_tasks, tokenize
from adapt_recipes.data.conversations import content_hash

Pair = tuple[str, str]


def turns(prompt: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def raw_task(name: str, pairs: Iterable[Pair], validation: Iterable[Pair] | None = None) -> RawTask:
    own = None if validation is None else [turns(*pair) for pair in validation]
    return RawTask(name, [turns(*pair) for pair in pairs], own, entropy=0.5)


def numbered(name: str, number: int = 40, start: int = 0) -> RawTask:
    return raw_task(name, [(f"{i} = ", str(i)) for i in range(start, start + number)])


def pairs_of(examples: Examples | None) -> list[Pair]:
    """The (prompt, answer) texts of examples that ``ByteTokenizer()`` tokenized."""
    assert examples is not None
    pairs = []
    for i in range(len(examples)):
        span = slice(int(examples.offsets[i]), int(examples.offsets[i + 1]))
        tokens, supervised = examples.tokens[span], examples.supervised[span]
        assert tokens[-1] == 256
        prompt, answer = bytes(tokens[~supervised].tolist()).decode(), bytes(tokens[supervised][:-1].tolist()).decode()
        assert examples.prompt_hashes[i] == content_hash(turns(prompt, answer)[:-1])
        pairs.append((prompt, answer))
    return pairs


def prompts_of(examples: Examples | None) -> set[str]:
    return {prompt for prompt, _ in pairs_of(examples)}


def same(tasks: list[Task], others: list[Task]) -> bool:
    def flat(task: Task) -> list[Any]:
        splits = [task.train, task.validation]
        tensors = [each for s in splits if s for each in (s.tokens, s.supervised, s.offsets, s.prompt_hashes)]
        return [task.name, task.entropy, task.num_dropped, *(each.tolist() for each in tensors)]

    return [flat(task) for task in tasks] == [flat(task) for task in others]


def prepare(tmp_path: Path, *raw_tasks: RawTask, **options: Any) -> list[Task]:
    options = {"max_seq_len": 64, "validation_examples": 4, "cache_dir": tmp_path / "cache"} | options
    return prepare_tasks(raw_tasks, options.pop("tokenizer", ByteTokenizer()), **options)


def test_every_example_is_in_one_split(tmp_path: Path) -> None:
    raw = numbered("numbers")
    (task,) = prepare(tmp_path, raw)
    assert task.name == "numbers" and task.entropy == 0.5 and task.num_dropped == 0
    train, validation = pairs_of(task.train), pairs_of(task.validation)
    assert len(validation) == 4
    assert sorted(train + validation) == sorted((f"{i} = ", str(i)) for i in range(40))
    assert train == sorted(train, key=lambda pair: int(pair[1])), "in the source's order"
    smallest = sorted((content_hash(messages[:-1]), messages[0]["content"]) for messages in raw.conversations)[:4]
    assert prompts_of(task.validation) == {prompt for _, prompt in smallest}
    tokens, labels = task.train.example(0)
    assert len(tokens) == len(labels) == int(task.train.lengths[0]) - 1


FIRST_HASH = 2729601725961170390


def test_the_hash_of_a_prompt_is_for_ever() -> None:
    """Another hash would be another split: results of earlier runs could no longer be compared."""
    assert content_hash([{"role": "user", "content": "2 + 2 = é"}]) == FIRST_HASH
    assert content_hash([{"content": "2 + 2 = é", "role": "user"}]) == FIRST_HASH
    assert content_hash([{"role": "system", "content": "2 + 2 = é"}]) != FIRST_HASH


letters = st.lists(st.tuples(st.sampled_from("abcdefghijkl"), st.sampled_from("xyz")), min_size=1, max_size=16)


@st.composite
def overlapping_tasks(draw: st.DrawFn) -> tuple[list[RawTask], list[str]]:
    """Tasks that share prompts, some of which bring a validation split, and which of them are not in the objective."""
    raw_tasks = []
    for name in "ABCD"[: draw(st.integers(1, 4))]:
        own = draw(st.none() | letters)
        # Prompts of its own as well, so that something is left to train on.
        pairs = draw(letters) + [(name + letter, "x") for letter in "123"]
        raw_tasks.append(raw_task(name, draw(st.permutations(pairs)), own))
    return raw_tasks, draw(st.lists(st.sampled_from([task.name for task in raw_tasks]), unique=True))


@given(overlapping_tasks(), st.integers(1, 2), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_prompt_is_on_one_side_in_every_task(
    tmp_path: Path, drawn: tuple[list[RawTask], list[str]], validation_examples: int, random: Any
) -> None:
    raw_tasks, no_validation = drawn
    options = {"validation_examples": validation_examples, "no_validation": no_validation}
    tasks = prepare(tmp_path, *raw_tasks, **options)
    given = {raw.name for raw in raw_tasks if raw.validation is not None} - set(no_validation)
    for raw, task in zip(raw_tasks, tasks, strict=True):
        sources = sorted((messages[0]["content"], messages[1]["content"]) for messages in raw.conversations)
        assert len(task.train)
        if task.name in no_validation:
            assert task.validation is None
        elif task.name in given:
            assert raw.validation is not None
            assert pairs_of(task.validation) == [(m[0]["content"], m[1]["content"]) for m in raw.validation]
        else:
            assert sorted(pairs_of(task.train) + pairs_of(task.validation)) == sources, "nothing is lost"
            assert len(prompts_of(task.validation)) >= validation_examples
            assert not prompts_of(task.train) & prompts_of(task.validation)
        held = set().union(*(prompts_of(other.validation) for other in tasks if other.validation and other is not task))
        assert not prompts_of(task.train) & held
        if task.name in given | set(no_validation):
            assert sorted(pair for pair in sources if pair[0] not in held) == sorted(pairs_of(task.train))

    shuffled = random.sample(raw_tasks, len(raw_tasks))
    by_name = {task.name: task for task in prepare(tmp_path, *shuffled, **options)}
    assert same([by_name[task.name] for task in tasks], tasks), "whatever the order of the tasks"


@given(st.permutations([(f"{i}?", "x" * (i % 9 + 1)) for i in range(30)]), st.integers(8, 12), st.integers(6, 12))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_drops_and_subsets_do_not_depend_on_the_order(
    tmp_path: Path, pairs: list[Pair], max_seq_len: int, at_most: int
) -> None:
    options = {"max_seq_len": max_seq_len, "max_examples_per_task": at_most}
    (task,) = prepare(tmp_path, raw_task("A", pairs), **options)
    kept = pairs_of(task.train) + pairs_of(task.validation)
    fitting = [pair for pair in pairs if len("".join(pair)) + 1 <= max_seq_len]
    assert task.num_dropped == len(pairs) - len(fitting)
    by_hash = sorted(fitting, key=lambda pair: content_hash(turns(*pair)))
    assert sorted(kept) == sorted(by_hash[:at_most])
    assert pairs_of(task.train) == [pair for pair in pairs if pair in pairs_of(task.train)], "in the source's order"


def test_the_split_depends_on_no_seed_tokenizer_or_length(tmp_path: Path) -> None:
    torch.manual_seed(1)
    (task,) = prepare(tmp_path, numbered("A"))
    torch.manual_seed(2)
    (other,) = prepare(tmp_path, numbered("A"), tokenizer=ByteTokenizer(supervise_end=False), max_seq_len=32)
    assert task.validation is not None and other.validation is not None
    assert task.validation.prompt_hashes.tolist() == other.validation.prompt_hashes.tolist()
    assert int(task.train.num_supervised.sum()) - int(other.train.num_supervised.sum()) == len(task.train)


def test_a_validation_split_that_is_brought(tmp_path: Path) -> None:
    """It is used as it is, its own task may train on its prompts, and other tasks may not."""
    rows = [("a", "x"), ("b", "y"), ("c", "y"), ("a", "x")]
    table = raw_task("table", rows, [("a", "x"), ("c", "y"), ("long " * 20, "x")])
    other = raw_task("other", [("c", "z"), *((str(i), "x") for i in range(9))])
    (alone,) = prepare(tmp_path, table)
    assert pairs_of(alone.train) == rows and pairs_of(alone.validation) == [("a", "x"), ("c", "y")]
    assert alone.num_dropped == 1
    first, second = prepare(tmp_path, table, other)
    assert pairs_of(first.validation) == pairs_of(alone.validation)
    assert ("c", "z") in pairs_of(second.validation) and len(prompts_of(second.validation)) in (4, 5)
    assert pairs_of(first.train) == [row for row in rows if row[0] != "c"], "the other task validates on it"
    left_out, second = prepare(tmp_path, table, other, no_validation=["table"])
    assert left_out.validation is None and len(prompts_of(second.validation)) == 4


class Counting(ByteTokenizer):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def encode(self, messages: Any) -> Any:
        self.calls += 1
        return super().encode(messages)


def test_the_cache_is_read_and_its_key_is_content_and_tokenizer_alone(tmp_path: Path) -> None:
    tokenizer = Counting()
    tasks = prepare(tmp_path, numbered("A"), numbered("B", start=100), tokenizer=tokenizer)
    assert tokenizer.calls == 80
    assert same(prepare(tmp_path, numbered("A"), numbered("B", start=100), tokenizer=tokenizer), tasks)
    for options in (
        {"max_seq_len": 7},
        {"validation_examples": 9},
        {"max_examples_per_task": 9},
        {"no_validation": ["A"]},
    ):
        prepare(tmp_path, numbered("A"), tokenizer=tokenizer, **options)
    prepare(tmp_path, numbered("another name"), tokenizer=tokenizer)
    assert tokenizer.calls == 80, "nothing of all that is in the key"
    prepare(tmp_path, numbered("A", 41), tokenizer=tokenizer)
    assert tokenizer.calls == 121
    tokenizer.fingerprint = "another"
    prepare(tmp_path, numbered("A", 41), tokenizer=tokenizer)
    assert tokenizer.calls == 162
    assert not [file for file in (tmp_path / "cache").iterdir() if file.suffix != ".safetensors"]


@pytest.mark.parametrize("damage", ["empty", "cut short", "one bit", "another format"])
def test_a_damaged_cache_is_made_anew(tmp_path: Path, damage: str) -> None:
    tasks = prepare(tmp_path, numbered("A"))
    (file,) = (tmp_path / "cache").iterdir()
    whole = file.read_bytes()
    bit = bytes([whole[-1] ^ 1])
    damaged = {"empty": b"", "cut short": whole[:-9], "one bit": whole[:-1] + bit, "another format": b"x" * 500}[damage]
    file.write_bytes(damaged)
    assert same(prepare(tmp_path, numbered("A")), tasks)
    assert file.read_bytes() == whole


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(tensors: Any, file: Path, **_: Any) -> None:
        Path(file).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(tokenize, "save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        prepare(tmp_path, numbered("A"))
    assert list((tmp_path / "cache").iterdir()) == []


def test_workers_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw_tasks = [numbered("A", 700), numbered("B", 3, start=5000), numbered("C", 513, start=1000)]
    options = {"validation_examples": 2}
    expected = prepare(tmp_path, *raw_tasks, num_workers=1, **options)
    monkeypatch.setattr(tokenize, "_MIN_PARALLEL", 100)
    tokenizer = Counting()
    for number in (2, 3):
        folder = tmp_path / str(number)
        assert same(prepare(folder, *raw_tasks, num_workers=number, tokenizer=tokenizer, **options), expected)
    assert tokenizer.calls == 0, "other processes have tokenized"
    broken = [*raw_tasks, raw_task("D", [("a", "b"), ("", "")])]
    with pytest.raises(ValueError, match=r"^task 'D', example 1: message 1: the assistant's answer is empty$"):
        prepare(tmp_path / "broken", *broken, num_workers=2, **options)


class WithProcess(ByteTokenizer):
    """Says in a token which process has tokenized."""

    def encode(self, messages: Any) -> Any:
        return [os.getpid() % 2**31, 1], [False, True]


def test_few_conversations_need_no_process(tmp_path: Path) -> None:
    (task,) = prepare(tmp_path, numbered("A"), tokenizer=WithProcess(), num_workers=2)
    assert task.train.tokens[0] == os.getpid() % 2**31


@pytest.mark.parametrize(
    ("raw_tasks", "options", "message"),
    [
        ([], {}, "^tasks: there is no task$"),
        ([numbered("A"), numbered("B"), numbered("A")], {}, "^tasks: two tasks have the name 'A'$"),
        ([raw_task("A", [])], {}, "^task 'A', examples: there are none$"),
        ([raw_task("A", [("a", "b")], [])], {}, "^task 'A', validation examples: there are none$"),
        (
            [numbered("Summaries")],
            {"no_validation": ["Summary"]},
            "^tasks.no_validation: no task 'Summary'; did you mean",
        ),
        ([numbered("A")], {"validation_examples": 0}, "^tasks.validation_examples: 0 is not allowed; at least 1$"),
        ([numbered("A")], {"max_examples_per_task": 0}, "^tasks.max_examples_per_task: 0 is not allowed; at least 1$"),
        (
            [numbered("A", 4)],
            {},
            "^tasks.validation_examples: 4 is too many for task 'A', which has 4 different prompts",
        ),
        ([raw_task("A", [("a", "b")] * 40)], {}, "which has 1 different prompts"),
        ([numbered("A")], {"max_seq_len": 4}, "^task 'A', examples: all 40 .* max_seq_len=4; the shortest has 6$"),
        (
            [raw_task("A", [("", "b"), ("c" * 9, "\t")])],
            {},
            "^task 'A', example 1: message 1: the assistant's answer is",
        ),
        ([RawTask("A", [[{"role": "user", "content": "a"}]])], {}, "^task 'A', example 0: the last message must be"),
        ([RawTask("A", [None])], {}, "^task 'A', example 0: messages must be a list"),  # type: ignore[list-item]
        ([raw_task("A", [("a", "b")], [("a", "")])], {}, "^task 'A', validation example 0: message 1: "),
        (
            [raw_task("A", [("", "b")])],
            {"tokenizer": ByteTokenizer(supervise_end=False)},
            "^task 'A', example 0: has no supervised token$",
        ),
        (
            [raw_task("A", [("a", "b"), ("b", "b")], [("c", "d")]), raw_task("B", [("c", "d")])],
            {"no_validation": ["B"]},
            "^task 'B': no example is left to train on, because other tasks validate on all of its prompts$",
        ),
    ],
)
def test_what_is_refused(tmp_path: Path, raw_tasks: list[RawTask], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        prepare(tmp_path, *raw_tasks, **options)
    assert "\n" not in str(error.value)


def test_the_first_token_never_counts(tmp_path: Path) -> None:
    (task,) = prepare(tmp_path, raw_task("A", [("", "bc")], [("a", "b")]))
    assert task.train.supervised.tolist() == [False, True, True]
