from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapt_recipes.data import (
    ByteTokenizer,
    Conversation,
    Examples,
    LeftOut,
    RawTask,
    Task,
    prepare_tasks,
    store,
    tokenize,
)
from adapt_recipes.data.conversations import content_hash
from adapt_recipes.data.examples import BadRow
from adapt_recipes.files import NoSpaceLeft

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
        tensors = [each for s in task.splits.values() for each in (s.tokens, s.supervised, s.offsets, s.prompt_hashes)]
        return [task.name, task.entropy, task.left_out, *(each.tolist() for each in tensors)]

    return [flat(task) for task in tasks] == [flat(task) for task in others]


def prepare(tmp_path: Path, *raw_tasks: RawTask, **options: Any) -> list[Task]:
    options = {"max_seq_len": 64, "validation_examples": 4, "cache_dir": tmp_path / "cache"} | options
    return prepare_tasks(raw_tasks, options.pop("tokenizer", ByteTokenizer()), **options)


def test_every_example_is_in_one_split(tmp_path: Path) -> None:
    raw = numbered("numbers")
    (task,) = prepare(tmp_path, raw)
    assert task.name == "numbers" and task.entropy == 0.5 and task.left_out == LeftOut()
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


# Questions are of small letters and answers of capitals, so that a conversation can be read off its tokens.
Turns = list[Pair]
pair = st.tuples(st.sampled_from("abc"), st.sampled_from("XY"))
conversations = st.lists(st.lists(pair, min_size=1, max_size=3), max_size=12)


def conversation(turns: Turns) -> list[dict[str, str]]:
    return [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


def answers_of(examples: Examples) -> list[list[tuple[Pair, bool]]]:
    """The turns of every example, and whether the answer of each counts."""
    result = []
    for i in range(len(examples)):
        span = slice(int(examples.offsets[i]), int(examples.offsets[i + 1]))
        tokens, supervised = examples.tokens[span].tolist(), examples.supervised[span].tolist()
        turns, start = [], 0
        for end in (position for position, token in enumerate(tokens) if token == 256):
            text = bytes(tokens[start:end]).decode()
            question = text.rstrip("XYZ ")
            assert len(set(supervised[start + len(question) : end + 1])) == 1 and not any(
                supervised[start : start + len(question)]
            )
            turns.append(((question.strip(), text[len(question) :].strip()), supervised[end]))
            start = end + 1
        result.append(turns)
    return result


@st.composite
def overlapping_tasks(draw: st.DrawFn) -> tuple[list[RawTask], list[str]]:
    """Tasks that share questions and answers, some with splits of their own, and which are not in the objective."""
    raw_tasks = []
    for name in "pqrs"[: draw(st.integers(1, 4))]:
        # Questions of its own as well, so that something is left to train on.
        train = draw(st.permutations([*draw(conversations), *([(f"{name}{i}", "Z")] for i in range(6))]))
        own = [
            draw(st.none() | conversations.map(lambda drawn, split=split: [*drawn, [(split, "Z")]])) for split in "vt"
        ]
        raw_tasks.append(
            RawTask(name, [*map(conversation, train)], *(each and [*map(conversation, each)] for each in own))
        )
    return raw_tasks, draw(st.lists(st.sampled_from([task.name for task in raw_tasks]), unique=True))


@given(overlapping_tasks(), st.integers(1, 2), st.integers(0, 2), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_held_out_is_never_learned(
    tmp_path: Path, drawn: tuple[list[RawTask], list[str]], validation_examples: int, test_examples: int, random: Any
) -> None:
    raw_tasks, no_validation = drawn
    options = {"validation_examples": validation_examples, "test_examples": test_examples}
    tasks = prepare(tmp_path, *raw_tasks, no_validation=no_validation, **options)
    validated = {
        each for task in tasks if task.validation for turns in answers_of(task.validation) for each, _ in turns
    }
    tested = {
        each for task in tasks if task.test for turns in answers_of(task.test) for each, counts in turns if counts
    }
    for raw, task in zip(raw_tasks, tasks, strict=True):
        # In training an answer counts unless it is held out, and an example is dropped if none counts.
        train = answers_of(task.train)
        for turns in train:
            assert all(counts == (each not in validated | tested) for each, counts in turns)
            assert any(counts for _, counts in turns)
        assert task.left_out.leaked_answers == sum(not counts for turns in train for _, counts in turns)
        own = [split for split, given in ((task.validation, raw.validation), (task.test, raw.test)) if given is None]
        in_splits = len(task.train) + sum(len(split) for split in own if split is not None)
        assert in_splits + task.left_out.leaked_examples == len(raw.conversations), "nothing else is lost"

        # The held-out splits.
        if task.name in no_validation:
            assert task.validation is None and task.test is None
            continue
        assert task.validation is not None
        assert all(counts for turns in answers_of(task.validation) for _, counts in turns)
        if raw.validation is None:
            assert len(set(task.validation.prompt_hashes.tolist())) == validation_examples
        if raw.test is None:
            assert (task.test is not None) == bool(test_examples)
            assert task.test is None or len(set(task.test.prompt_hashes.tolist())) == test_examples
        for turns in answers_of(task.test) if task.test else ():
            assert all(counts == (each not in validated) for each, counts in turns)

    # Neither the order of the tasks nor a test split changes what is validated on.
    shuffled = random.sample(raw_tasks, len(raw_tasks))
    by_name = {task.name: task for task in prepare(tmp_path, *shuffled, no_validation=no_validation, **options)}
    assert same([by_name[task.name] for task in tasks], tasks)
    without = prepare(tmp_path, *raw_tasks, no_validation=no_validation, **options | {"test_examples": 0})
    for task, other in zip(tasks, without, strict=True):
        assert task.validation is None or task.validation.tokens.tolist() == other.validation.tokens.tolist()


def test_a_target_is_validated_on_and_never_trained(tmp_path: Path) -> None:
    """It holds out the same prompts as if it were trained, and what it does not hold out is counted."""
    same_pairs = [(f"{i} = ", str(i)) for i in range(40, 80)]
    raw = [numbered("a"), numbered("b", start=40), raw_task("c", [*same_pairs, ("c", "c")])]
    options = {"test_examples": 2}
    as_tasks = {task.name: task for task in prepare(tmp_path, *raw, **options)}
    a, c, b = prepare(tmp_path, *raw, targets=["b"], **options)
    assert [a.name, c.name, b.name] == ["a", "c", "b"], "targets come last"
    assert b.is_target and not a.is_target and not c.is_target
    assert list(b.splits) == ["validation", "test"]
    for split in ("validation", "test"):
        assert pairs_of(b.splits[split]) == pairs_of(as_tasks["b"].splits[split])
    assert b.left_out == LeftOut(untrained=40 - 4 - 2) and b.left_out.examples == 34
    held_out = {*pairs_of(b.validation), *pairs_of(b.test)}
    assert held_out and not held_out & {*pairs_of(c.train)}, "a target's answers are learned in no task"
    assert same([a], [as_tasks["a"]])


def test_targets_of_a_source_of_their_own(tmp_path: Path) -> None:
    """Its splits are used as they are, and few prompts are all held out."""
    own = raw_task("own", [("x", "y"), ("y", "z")], [("p", "q")])
    few = raw_task("few", [("f", "g"), ("g", "h"), ("g", "i")])
    task, first, second = prepare(tmp_path, numbered("a"), raw_targets=[own, few])
    assert [task.name, first.name, second.name] == ["a", "own", "few"]
    assert pairs_of(first.validation) == [("p", "q")] and first.left_out == LeftOut(untrained=2)
    assert sorted(pairs_of(second.validation)) == [("f", "g"), ("g", "h"), ("g", "i")]
    assert second.left_out == LeftOut()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ["c"]}, "tasks.targets: no task 'c'; allowed: a, b"),
        ({"targets": ["a", "a"]}, "tasks.targets: two targets have the name 'a'"),
        ({"targets": ["a", "b"]}, "tasks.targets: it names every task; leave at least one to train on"),
        (
            {"raw_targets": [numbered("a")]},
            "tasks.targets: 'a' is a task to train on as well; call one of them differently",
        ),
        (
            {"targets": ["a"], "no_validation": ["a"]},
            "tasks.no_validation: 'a' is a target, and nothing but validated on",
        ),
        (
            {"targets": ["a"], "test_examples": 37},
            "tasks.test_examples: 37 is too many for task 'a', which has 36 different prompts that no task validates "
            "on; lower it",
        ),
    ],
)
def test_wrong_targets_are_named_in_one_line(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message) + "$"):
        prepare(tmp_path, numbered("a"), numbered("b", 100), **options)


def test_a_pair_is_a_leak_in_any_turn_whatever_is_around_it(tmp_path: Path) -> None:
    """The answer alone is none, and neither is the question alone."""
    held = raw_task("held", [("own", "Y")], [("a", "X")])
    rows: list[Turns] = [
        [("a", "X")],
        [(" a\n", "\tX ")],
        [("b", "Y"), ("a", "X")],
        [("a", "X"), ("b", "Y")],
        [("b", "X")],
        [("a", "Y")],
    ]
    system = [{"role": "system", "content": "briefly"}, *conversation([("a", "X")])]
    _, task = prepare(tmp_path, held, RawTask("task", [*map(conversation, rows), system]), no_validation=["task"])
    assert answers_of(task.train) == [
        [(("b", "Y"), True), (("a", "X"), False)],
        [(("a", "X"), False), (("b", "Y"), True)],
        [(("b", "X"), True)],
        [(("a", "Y"), True)],
    ]
    assert (task.left_out.leaked_answers, task.left_out.leaked_examples, task.left_out.examples) == (2, 3, 3)
    assert task.train.num_answer_bytes.tolist() == [1, 1, 1, 1], "those that are context do not count"


def test_conversations_that_all_end_alike_are_not_all_leaks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Else a task of dialogues that end in thanks would be lost; the same turns before are a leak nevertheless."""
    rows = [conversation([(f"{i}?", "X"), ("thanks", "Y")]) for i in range(8)]
    (task,) = prepare(tmp_path, RawTask("A", [*rows, rows[0]]), reading=tokenize.Reading(supervise="last"))
    assert len(task.train) + len(task.validation or ()) == 9 and len(prompts_of_last(task)) == 8
    assert "warning: task 'A': all its conversations end in the same question and answer" in capsys.readouterr().err
    other = RawTask("B", [rows[0], conversation([("thanks", "Y")]), conversation([("b", "Y"), ("thanks", "Y")])])
    held = RawTask("A", [conversation([("own", "X")])], rows[:1])
    options = {"reading": tokenize.Reading(supervise="last"), "no_validation": ["B"]}
    _, task = prepare(tmp_path, held, other, **options)
    assert answers_of(task.train) == [[(("thanks", "Y"), True)], [(("b", "Y"), False), (("thanks", "Y"), True)]]


def prompts_of_last(task: Task) -> set[int]:
    return {prompt for split in task.splits.values() for prompt in split.prompt_hashes.tolist()}


def test_splits_that_share_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are named, and their rows stay in the held-out split; a table to memorize keeps them in both."""
    rows, own = [("a", "X"), ("b", "Y"), ("c", "Y"), ("a", "X")], [("a", "X"), ("c", "Y"), ("long " * 20, "X")]
    (task,) = prepare(tmp_path, raw_task("table", rows, own))
    assert pairs_of(task.train) == [("b", "Y")] and pairs_of(task.validation) == own[:2]
    assert task.left_out == LeftOut(too_long=1, leaked_examples=3)
    said = (
        "warning: task 'table': 3 of its 4 training answers are in the validation or test split of its source as well"
    )
    assert said in capsys.readouterr().err
    (task,) = prepare(tmp_path, replace(raw_task("table", rows, own), memorized=True))
    assert pairs_of(task.train) == rows and task.left_out == LeftOut(too_long=1)
    assert not capsys.readouterr().err


def test_a_test_split_of_the_source_loses_what_is_validated_on(tmp_path: Path) -> None:
    raw = RawTask(
        "A", *([turns(*pair) for pair in pairs] for pairs in ([("a", "X")], [("b", "X")], [("b", "X"), ("c", "X")]))
    )
    (task,) = prepare(tmp_path, raw)
    assert pairs_of(task.test) == [("c", "X")]


def test_bad_rows(tmp_path: Path) -> None:
    """Refused with their number and the first five, or left out and counted, from the cache as well."""
    origin = [Conversation(turns(f"{i}?", "X" if i % 2 else ""), (1,), origin=("f.jsonl, line", i)) for i in range(20)]
    raw = RawTask("A", origin, bad_rows=[BadRow("g.jsonl, line", 7, "no good")])
    with pytest.raises(ValueError, match=r"^g.jsonl, line 7: no good$"):
        prepare(tmp_path, raw)
    empty = "message 1: the assistant's answer is empty"
    for _ in range(2):
        with pytest.raises(ValueError) as error:
            prepare(tmp_path, replace(raw, bad_rows=()))
        shown = "; ".join(f"line {i}: {empty}" for i in range(0, 10, 2))
        advice = "tasks.on_bad_rows: skip leaves them out"
        assert str(error.value) == f"f.jsonl: 10 bad rows: {shown}; and 5 more; {advice}"
        (task,) = prepare(tmp_path, raw, on_bad_rows="skip")
        assert task.left_out == LeftOut(bad_rows=11) and len(task.train) == 6
    with pytest.raises(ValueError, match=r"^task 'A': no row is an example: g.jsonl, line 7: no good$"):
        prepare(tmp_path, replace(raw, conversations=[]), on_bad_rows="skip")
    with pytest.raises(ValueError, match=r"^task 'A', example 0: message 1: the assistant's answer is empty"):
        prepare(tmp_path, RawTask("A", [turns("a", ""), *(turns(f"{i}", "X") for i in range(9))]))


def test_which_answers_count(tmp_path: Path) -> None:
    """Context is neither learned nor validated on, and an example of context alone is left out."""
    rows = [Conversation(conversation([("a", "X"), (f"b{i}", "Y")]), supervised=(3,)) for i in range(9)]
    (task,) = prepare(tmp_path, RawTask("A", [*rows, replace(rows[0], supervised=())]), validation_examples=1)
    assert task.left_out == LeftOut(unlabeled=1)
    counted = [[counts for _, counts in turns] for split in task.splits.values() for turns in answers_of(split)]
    assert counted == [[False, True]] * 9
    last = tokenize.Reading(supervise="last")
    first = [replace(row, supervised=(1,)) for row in rows]
    (task,) = prepare(tmp_path, RawTask("A", [*rows, *first]), validation_examples=1, reading=last)
    assert task.left_out == LeftOut(unlabeled=9), "the last answer is context there"
    with pytest.raises(ValueError, match=r"^task 'A': all 9 train examples have the weight 0$"):
        prepare(tmp_path, RawTask("A", first), reading=last)


def test_the_system_message_in_front_of_the_first_user(tmp_path: Path) -> None:
    """The model reads it there; the split and the leaks are those of the rows as they are."""
    system = {"role": "system", "content": "s"}
    rows = [[system, *conversation([(f"{i}?", "X"), ("b", "Y")])] for i in range(9)]
    merged = [[{"role": "user", "content": f"s\n\n{row[1]['content']}"}, *row[2:]] for row in rows]
    options = {"validation_examples": 2, "on_bad_rows": "refuse"}
    (task,) = prepare(tmp_path, RawTask("A", rows), reading=tokenize.Reading(system="merge_into_user"), **options)
    (plain,) = prepare(tmp_path, RawTask("A", rows), **options)
    texts = {bytes(t for t in conversation_tokens if t < 256).decode() for conversation_tokens in tokens_of(task)}
    assert texts == {"".join(message["content"] for message in row) for row in merged}
    assert [split.prompt_hashes.tolist() for split in task.splits.values()] == [
        s.prompt_hashes.tolist() for s in plain.splits.values()
    ]


def tokens_of(task: Task) -> list[list[int]]:
    return [
        split.tokens[int(split.offsets[i]) : int(split.offsets[i + 1])].tolist()
        for split in task.splits.values()
        for i in range(len(split))
    ]


@given(st.permutations([(f"{i}?", "x" * (i % 9 + 1)) for i in range(30)]), st.integers(8, 12), st.integers(6, 12))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_drops_and_subsets_do_not_depend_on_the_order(
    tmp_path: Path, pairs: list[Pair], max_seq_len: int, at_most: int
) -> None:
    options = {"max_seq_len": max_seq_len, "max_examples_per_task": at_most}
    (task,) = prepare(tmp_path, raw_task("A", pairs), **options)
    kept = pairs_of(task.train) + pairs_of(task.validation)
    fitting = [pair for pair in pairs if len("".join(pair)) + 1 <= max_seq_len]
    assert task.left_out.too_long == task.left_out.examples == len(pairs) - len(fitting)
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


class Counting(ByteTokenizer):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def encode(self, conversation: Conversation) -> Any:
        self.calls += 1
        return super().encode(conversation)


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
    assert {file.suffix for file in (tmp_path / "cache").rglob("*") if file.is_file()} == {".arrow", ".json"}


@pytest.mark.parametrize("ending", ["arrow", "json"])
@pytest.mark.parametrize("damage", ["empty", "cut short", "one bit", "another format"])
def test_a_damaged_cache_is_computed_again(tmp_path: Path, damage: str, ending: str) -> None:
    tasks = prepare(tmp_path, numbered("A"))
    (file,) = (tmp_path / "cache" / "store").glob(f"*.{ending}")
    whole = file.read_bytes()
    bit = bytes([whole[-1] ^ 1])
    damaged = {"empty": b"", "cut short": whole[:-9], "one bit": whole[:-1] + bit, "another format": b"x" * 500}[damage]
    # Not in place: what is mapped must stay.
    file.unlink()
    file.write_bytes(damaged)
    tokenizer = Counting()
    assert same(prepare(tmp_path, numbered("A"), tokenizer=tokenizer), tasks) and tokenizer.calls == 40
    assert len(file.read_bytes()) == len(whole) and (ending == "json" or file.read_bytes() == whole)
    assert same(prepare(tmp_path, numbered("A"), tokenizer=tokenizer), tasks) and tokenizer.calls == 40


def test_a_copy_of_a_cache_is_used(tmp_path: Path) -> None:
    """As one from another machine; its checksum is right, though its files are not those that were written."""
    tasks = prepare(tmp_path, numbered("A"))
    shutil.copytree(tmp_path / "cache", tmp_path / "copy")
    tokenizer = Counting()
    assert same(prepare(tmp_path, numbered("A"), tokenizer=tokenizer, cache_dir=tmp_path / "copy"), tasks)
    assert tokenizer.calls == 0


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(file: Path) -> int:
        assert file.stat().st_size
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(store, "_checksum", fail)
    with pytest.raises(NoSpaceLeft, match="^no space left while writing .*arrow$"):
        prepare(tmp_path, numbered("A"))
    assert not [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        ValueError, match=r"^tasks.cache_dir: .*/file cannot be written \(Not a directory\); name another$"
    ):
        prepare(tmp_path, numbered("A"), cache_dir=tmp_path / "file")


def test_workers_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw_tasks = [numbered("A", 700), numbered("B", 3, start=5000), numbered("C", 513, start=1000)]
    options = {"validation_examples": 2}
    expected = prepare(tmp_path, *raw_tasks, num_workers=1, **options)
    monkeypatch.setattr(tokenize, "_MIN_PARALLEL_BYTES", 100)
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

    def encode(self, conversation: Conversation) -> Any:
        return [os.getpid() % 2**31, 1], [(1, 2)]


def test_few_conversations_need_no_process(tmp_path: Path) -> None:
    (task,) = prepare(tmp_path, numbered("A"), tokenizer=WithProcess(), num_workers=2)
    assert task.train.tokens[0] == os.getpid() % 2**31


@pytest.mark.parametrize(
    ("raw_tasks", "options", "message"),
    [
        ([], {}, "^tasks: there is no task$"),
        ([numbered("A"), numbered("B"), numbered("A")], {}, "^tasks: two tasks have the name 'A'$"),
        ([raw_task("A", [])], {}, "^task 'A': there is no train example$"),
        ([raw_task("A", [("a", "b")], [])], {}, "^task 'A': there is no validation example$"),
        (
            [numbered("Summaries")],
            {"no_validation": ["Summary"]},
            "^tasks.no_validation: no task 'Summary'; did you mean",
        ),
        (
            [numbered("A", 9)],
            {"test_examples": 5},
            "^tasks.test_examples: 5 is too many for task 'A', which has 5 different prompts that no task validates on",
        ),
        (
            [numbered("A", 4)],
            {},
            "^tasks.validation_examples: 4 is too many for task 'A', which has 4 different prompts",
        ),
        ([raw_task("A", [("a", "b")] * 40)], {}, "which has 1 different prompts"),
        ([numbered("A")], {"max_seq_len": 4}, "^task 'A': all 40 train examples .* max_seq_len=4; the shortest has 6$"),
        (
            [raw_task("A", [("", "b"), ("c" * 9, "\t")])],
            {},
            "^task 'A', example 1: message 1: the assistant's answer is",
        ),
        ([RawTask("A", [[{"role": "user", "content": "a"}]])], {}, "^task 'A', example 0: the last message must be"),
        ([RawTask("A", [None])], {}, "^task 'A', example 0: must be a Conversation or a list of"),  # type: ignore[list-item]
        ([raw_task("A", [("a", "b")], [("a", "")])], {}, "^task 'A', validation example 0: message 1: "),
        (
            [RawTask("A", [[*turns("a", "b")[:1], turns("a", "b")[1] | {"weight": 0}]])],
            {},
            "^task 'A', example 0: message 1 has the key 'weight'; allowed: content, name, ",
        ),
        (
            [raw_task("A", [("", "b")])],
            {"tokenizer": ByteTokenizer(supervise_end=False)},
            "^task 'A', example 0: has an answer without a supervised token$",
        ),
        (
            [raw_task("A", [("a", "b"), ("b", "b")], [("c", "d")]), raw_task("B", [("c", "d")])],
            {"no_validation": ["B"]},
            "^task 'B': no train example is left, because other splits hold out all of its answers$",
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
