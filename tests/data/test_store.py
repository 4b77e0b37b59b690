"""What stands in the store is never computed again, and what changed is; whatever interrupts, it stays right."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adapt_recipes.data import ByteTokenizer, Conversation, Task, fingerprint, natural_instructions, prepare_tasks
from adapt_recipes.data import tokenize as tokenize_module
from adapt_recipes.data.examples import IGNORE_INDEX, Examples
from adapt_recipes.data.progress import Progress
from adapt_recipes.data.store import Digests, lock

NUM_FILES, NUM_ROWS = 4, 20


def write_file(folder: Path, number: int, *, answer: str = "yes", category: str = "A") -> Path:
    """A file of Natural Instructions, as old as one that nobody changes."""
    (folder / "tasks").mkdir(parents=True, exist_ok=True)
    instances = [{"input": f"{number} {i}?", "output": [answer, "ja"]} for i in range(NUM_ROWS)]
    content = {"Categories": [category], "Definition": ["Say it."], "Instances": instances}
    file = folder / "tasks" / f"task{number}.json"
    file.write_text(json.dumps(content))
    return file


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder, whose files count as settled at once: a ctime cannot be set back."""
    monkeypatch.setattr("adapt_recipes.data.store._RESOLUTION_NS", 0)
    for number in range(NUM_FILES):
        write_file(tmp_path / "data", number)
    return tmp_path / "data"


class Counting(ByteTokenizer):
    """Counts conversations, and calls a function before each."""

    def __init__(self, before: Callable[[int], None] = lambda calls: None) -> None:
        super().__init__()
        self.calls = 0
        self._before = before

    def encode(self, conversation: Conversation) -> Any:
        self._before(self.calls)
        self.calls += 1
        return super().encode(conversation)


def prepare(data: Path, tokenizer: ByteTokenizer | None = None, **options: Any) -> list[Task]:
    options = {"max_seq_len": 64, "validation_examples": 2, "cache_dir": data.parent / "cache"} | options
    return prepare_tasks(natural_instructions(data), tokenizer or ByteTokenizer(), **options)


def uncached(data: Path, **options: Any) -> str:
    return fingerprint(prepare(data, cache_dir=data.parent / f"cache{time.monotonic_ns()}", **options))


def test_a_warm_start_reads_no_file(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint(prepare(data))

    def refuse(*_: object) -> None:
        raise AssertionError("a file was read")

    # The package has a function of the same name.
    monkeypatch.setattr(sys.modules["adapt_recipes.data.natural_instructions"], "_read", refuse)
    monkeypatch.setattr(Digests, "reading", refuse)
    assert fingerprint(prepare(data)) == before


def test_a_changed_file_costs_that_file_alone(data: Path) -> None:
    tokenizer = Counting()
    prepare(data, tokenizer)
    assert tokenizer.calls == NUM_FILES * NUM_ROWS
    write_file(data, 1, answer="no!")
    changed = fingerprint(prepare(data, tokenizer))
    assert tokenizer.calls == (NUM_FILES + 1) * NUM_ROWS and changed == uncached(data)
    # The same length, within the resolution of the times, and with the times set back.
    file, stat = write_file(data, 2, answer="yea"), os.stat(data / "tasks" / "task1.json")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert fingerprint(prepare(data, tokenizer)) == uncached(data) != changed
    # A file is the same whatever its name and its times.
    calls = tokenizer.calls
    os.rename(data / "tasks" / "task3.json", data / "tasks" / "task9.json")
    os.utime(data / "tasks" / "task0.json")
    assert fingerprint(prepare(data, tokenizer)) == uncached(data)
    assert tokenizer.calls == calls


def test_a_fingerprint_is_looked_up_where_entries_and_selection_are_the_same(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = data.parent / "cache"
    options: list[dict[str, Any]] = [{}, {"validation_examples": 3}, {"max_examples_per_task": 9}, {"test_examples": 2}]
    computed = [fingerprint(prepare(data, **each)) for each in options]
    assert [fingerprint(prepare(data, **each), cache_dir=cache) for each in options] == computed
    assert len(set(computed)) == len(options)
    (record := next((cache / "fingerprints").iterdir())).write_text("half of one")
    assert [fingerprint(prepare(data, **each), cache_dir=cache) for each in options] == computed
    assert record.read_text() in computed

    def refuse(self: Examples) -> None:
        raise AssertionError("tokens were read")

    monkeypatch.setattr(Examples, "token_blocks", refuse)
    assert [fingerprint(prepare(data, **each), cache_dir=cache) for each in options] == computed
    write_file(data, 1, answer="no!")
    with pytest.raises(AssertionError, match="tokens were read"):
        fingerprint(prepare(data), cache_dir=cache)


def test_a_file_changed_just_now_is_hashed_again(tmp_path: Path) -> None:
    """Within the resolution of the file system's times it may have been changed again."""
    file, digests = tmp_path / "file", Digests(tmp_path)
    file.write_text("a")
    with digests.reading(file) as digest:
        pass
    assert digest and digests.recorded(file) is None


def test_an_interrupted_preparation_goes_on(data: Path) -> None:
    def interrupt(calls: int) -> None:
        if calls == 2 * NUM_ROWS + 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(data, Counting(interrupt))
    tokenizer = Counting()
    assert fingerprint(prepare(data, tokenizer)) == uncached(data)
    assert tokenizer.calls == 2 * NUM_ROWS


def test_a_killed_worker_leaves_a_right_store(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenize_module, "_MIN_PARALLEL_BYTES", 1)

    def kill(calls: int) -> None:
        if calls == NUM_ROWS + 3:
            os._exit(9)

    with pytest.raises(ValueError, match="^tasks: a process that tokenized was killed, perhaps for lack of memory;"):
        prepare(data, Counting(kill), num_workers=2)
    tokenizer = Counting()
    assert fingerprint(prepare(data, tokenizer)) == uncached(data)
    assert tokenizer.calls < NUM_FILES * NUM_ROWS


def test_a_file_that_changes_while_it_is_read_is_named(data: Path) -> None:
    def change(calls: int) -> None:
        if calls == NUM_ROWS + 1:
            write_file(data, 1, answer="different")

    with pytest.raises(
        ValueError, match=r"^.*task1\.json: changed while it was read; start again when it is complete$"
    ):
        prepare(data, Counting(change))
    assert fingerprint(prepare(data)) == uncached(data)


def _prepare_and_send(data: Path, queue: Any) -> None:
    tokenizer = Counting(lambda calls: time.sleep(0.01))
    queue.put((fingerprint(prepare(data, tokenizer)), tokenizer.calls))


def test_two_that_prepare_at_once_share_the_work(data: Path) -> None:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_prepare_and_send, args=(data, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    results = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert {result for result, _ in results} == {uncached(data)}
    assert sum(calls for _, calls in results) == NUM_FILES * NUM_ROWS
    assert not [*(data.parent / "cache").rglob("*.lock")]


def test_a_lock_of_another_process_is_seen(tmp_path: Path) -> None:
    with lock(tmp_path / "x", wait=False) as first, lock(tmp_path / "x", wait=False) as second:
        assert first and not second


def test_what_a_killed_process_left_is_removed(data: Path) -> None:
    """A day later; a younger file may be one that is being written."""
    store = data.parent / "cache" / "store"
    store.mkdir(parents=True)
    for name in ("old", "young"):
        (store / f"{name}.arrow.partial").write_bytes(b"half")
    os.utime(store / "old.arrow.partial", (0, time.time() - 25 * 3600))
    prepare(data)
    assert [file.name for file in store.glob("*.partial")] == ["young.arrow.partial"]


def test_texts_and_lengths_are_kept(data: Path) -> None:
    write_file(data, 0, answer="né")
    (task,) = prepare(data)
    for split in task.splits.values():
        for i in range(len(split)):
            messages, tools = split.prompt(i)
            answer = split.references(i)[0]
            tokens, labels = split.example(i)
            learned = bytes(labels[labels != IGNORE_INDEX].tolist()[:-1]).decode()
            assert bytes(tokens.tolist()).decode() == messages[0]["content"] + learned and learned == answer
            assert tools is None and split.references(i) == [answer, "ja"]
            assert split.answer_bytes(i) == [len(answer.encode())]
        assert split.num_answer_bytes.tolist() == [sum(split.answer_bytes(i)) for i in range(len(split))]
    # The end of each answer is a token.
    num_bytes, num_examples = int(task.train.num_answer_bytes.sum()), len(task.train)
    assert task.train.tokens_per_byte == (num_bytes + num_examples) / num_bytes
    assert task.train.max_token == int(task.train.tokens.max()) == 256
    assert torch.equal(task.train.offsets.diff(), task.train.lengths)


def test_tokens_are_a_map_of_the_file(data: Path) -> None:
    (task,) = prepare(data)
    maps = Path("/proc/self/maps").read_text()
    assert all(str(file) in maps for file in (data.parent / "cache" / "store").glob("*.arrow"))
    blocks = [block for split in task.splits.values() for block in split.token_blocks()]
    assert blocks and not any(block.flags.owndata or block.flags.writeable for block in blocks)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal a bar, elsewhere a line every ten seconds."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr("adapt_recipes.data.progress._LINE_SECONDS", 10.0)
    monkeypatch.setenv("TERM", "xterm")
    for stream in (io.StringIO(), Terminal()):
        now[0] = 100.0
        with Progress("tokenizing", total_bytes=1000, stream=stream) as progress:
            for step in range(1, 41):
                now[0] = 100 + 2.5 * step
                progress.update(bytes_done=step * 10, examples=step, tokens=step * 250)
        said = stream.getvalue()
        assert "40%" in said and "40 examples, 100 tokens/s" in said
        # 40 % took 100 seconds.
        assert stream.isatty() or (said.count("\n") == 10 and said.endswith(", 0:02:30 left\n"))
