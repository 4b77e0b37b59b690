"""Tasks in files are those that the same rows make in memory, and their files are read only when they are new."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import random
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from adapt_recipes.data import (
    ByteTokenizer,
    Conversation,
    RawTask,
    Task,
    fingerprint,
    hf_tasks,
    jsonl_tasks,
    prepare_tasks,
    task_per_source,
)
from adapt_recipes.data import tokenize as tokenize_module
from adapt_recipes.data.source_files import ColumnTasks, FileTask
from adapt_recipes.data.store import Digests

Tasks = Sequence[RawTask | FileTask | ColumnTasks]
COLUMN: Any = {"task_per": "column", "column": "source"}


def rows(seed: str, number: int = 40, *, bad: bool = True) -> list[Any]:
    """Rows of all kinds: too long, without a label, with unused keys; and bad ones, some after they are read."""
    rng = random.Random(seed)
    made: list[Any] = []
    for i in range(number):
        row = {"prompt": f"{rng.randrange(2 * number)}", "response": rng.choice(["b" * 200, *"abcdefg"])}
        kinds = [{}, {}, {"id": i}, {"id": i, "url": "u"}, {"url": "u"}, {"weight": 0}]
        made.append(row | {"source": rng.choice("wxyz")} | rng.choice(kinds))
    for i in range(0, number, 7) if bad else ():
        empty: Any = {"prompt": "p", "response": "", "source": rng.choice("wxyz")}
        made[i] = rng.choice([3, empty, {"response": "a", "source": "w"}, empty | {"source": None, "response": "r"}])
    return made


def lines(made: list[Any]) -> str:
    return "\n".join(json.dumps(row) for row in made) + "\n"


def write_folder(folder: Path, *, bad: bool) -> Path:
    folder.mkdir()
    (folder / "b.jsonl").write_text(lines(rows("b", bad=bad)))
    (folder / "b.validation.json").write_text(json.dumps(rows("bv", 30, bad=bad), indent=1))
    (folder / "b.test.jsonl").write_text(lines(rows("bt", 30, bad=bad)))
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines(rows("a", bad=bad)).encode()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows("c", bad=False)), folder / "c.parquet")
    for shard in range(2):
        (folder / f"s-0000{shard}-of-00002.jsonl").write_text(lines(rows(f"s{shard}", bad=bad)))
    return folder


def write_dataset(folder: Path, *, bad: bool) -> Path:
    """Splits of several Arrow files; the format is known from the second on, and some rows have another."""
    rng = random.Random("hf")
    keys = ("prompt", "response", "question", "answer", "source")
    made: list[dict[str, Any]] = [
        dict.fromkeys(keys) | {"prompt": f"{rng.randrange(30)}", "response": "a", "source": rng.choice("xy"), "id": i}
        for i in range(60)
    ]
    for i in [*range(14), 30, 45, 52] if bad else ():
        other: Any = {"question": "q", "answer": "a", "source": rng.choice("xy")}
        made[i] = dict.fromkeys(keys) | rng.choice([{}, {"source": "x"}, *([other] * (i > 14))])
    splits = {"train": made, "validation": made[40:50]}
    saved = datasets.DatasetDict({name: datasets.Dataset.from_list(some) for name, some in splits.items()})
    saved.save_to_disk(folder, num_shards={"train": 6, "validation": 2})
    return folder


SOURCES: dict[str, Callable[[Path, Path], Tasks]] = {
    "files": lambda folder, dataset: jsonl_tasks(folder),
    "one format": lambda folder, dataset: jsonl_tasks(folder, format="prompt_response"),
    "column": lambda folder, dataset: jsonl_tasks(folder, **COLUMN),
    "no such column": lambda folder, dataset: jsonl_tasks(folder, task_per="column", column="sources"),
    "splits": lambda folder, dataset: hf_tasks(dataset),
    "column of splits": lambda folder, dataset: hf_tasks(dataset, **COLUMN),
    "one per source": lambda folder, dataset: task_per_source(
        files=jsonl_tasks(folder), column=jsonl_tasks(folder, **COLUMN), splits=hf_tasks(dataset)
    ),
}


def in_memory(tasks: Tasks) -> list[RawTask]:
    raw_tasks = []
    for task in tasks:
        raw_tasks += (
            task.raw_tasks()
            if isinstance(task, ColumnTasks)
            else [task if isinstance(task, RawTask) else task.raw_task]
        )
    return raw_tasks


def described(tasks: Sequence[Task]) -> list[Any]:
    """All that there is to know of tasks."""
    return [
        [task.name, task.left_out]
        + [
            [name, split.lengths.tolist(), split.num_supervised.tolist(), split.prompt_hashes.tolist(), split.max_token]
            + [split.tokens.tolist(), split.supervised.tolist()]
            + [[split.prompt(i), split.references(i), split.answer_bytes(i)] for i in range(len(split))]
            + [[each.tolist() for each in split.example(i)] for i in range(len(split))]
            for name, split in task.splits.items()
        ]
        for task in tasks
    ]


def result(tasks: Callable[[], Tasks], cache_dir: Path, **options: Any) -> Any:
    """The tasks, or why there are none."""
    options = {"max_seq_len": 64, "validation_examples": 2} | options
    try:
        return described(prepare_tasks(tasks(), ByteTokenizer(), cache_dir=cache_dir, **options))
    except ValueError as error:
        return str(error)


Data = dict[bool, tuple[Path, Path]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """The folder and the dataset, with bad rows and without."""
    folders = {bad: tmp_path_factory.mktemp("data") for bad in (True, False)}
    return {
        bad: (write_folder(folder / "files", bad=bad), write_dataset(folder / "set", bad=bad))
        for bad, folder in folders.items()
    }


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("bad", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"on_bad_rows": "refuse"},
        {"on_bad_rows": "skip"},
        {"on_bad_rows": "skip", "no_validation": ["b", "x", "train"], "test_examples": 1, "max_examples_per_task": 25},
    ],
)
def test_files_are_the_tasks_that_they_are_in_memory(
    data: Data, tmp_path: Path, source: str, bad: bool, options: Any
) -> None:
    def tasks() -> Tasks:
        return SOURCES[source](*data[bad])

    known = {"b", "x", "train"} & {task.name for task in in_memory(tasks())} if source != "no such column" else set()
    options = options | ({"no_validation": sorted(known)} if "no_validation" in options else {})
    expected = result(lambda: in_memory(tasks()), tmp_path / "memory", **options)
    assert isinstance(expected, str) == (source == "no such column" or (bad and options["on_bad_rows"] == "refuse")), (
        expected
    )
    for _ in ("cold", "warm"):
        assert result(tasks, tmp_path / "cache", **options) == expected


def test_advice_names_the_source(tmp_path: Path) -> None:
    """Where it is about the source's arguments, however they are nested, but not where it is about those of all."""
    (tmp_path / "a.jsonl").write_text(lines([{"prompt": "a", "response": "b", "completion": "c"}] * 2))
    nested = task_per_source(outer=task_per_source(inner=jsonl_tasks(tmp_path)))
    expected = r"name one in tasks\.outer\.inner\.format; line 2: .*; tasks\.on_bad_rows: skip leaves them out$"
    with pytest.raises(ValueError, match=expected):
        prepare_tasks(nested, ByteTokenizer(), max_seq_len=64, cache_dir=tmp_path / "cache")


class Counting(ByteTokenizer):
    """Counts conversations."""

    calls = 0

    def encode(self, conversation: Conversation) -> Any:
        self.calls += 1
        return super().encode(conversation)


def prepared(tasks: Tasks, cache: Path, tokenizer: ByteTokenizer | None = None, **options: Any) -> list[Task]:
    options = {"max_seq_len": 64, "validation_examples": 2, "cache_dir": cache} | options
    return prepare_tasks(tasks, tokenizer or ByteTokenizer(), **options)


@pytest.mark.parametrize("source", ["files", "column", "splits", "column of splits", "one per source"])
def test_a_warm_start_reads_no_file(data: Data, tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what it has is a map of the store's files."""
    monkeypatch.setattr("adapt_recipes.data.store._RESOLUTION_NS", 0)
    folder, dataset = data[False]
    before = fingerprint(prepared(SOURCES[source](folder, dataset), tmp_path / "cache"))

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a file was read")

    for module, name in (("jsonl", "read_rows"), ("hf", "_in_memory")):
        monkeypatch.setattr(sys.modules[f"adapt_recipes.data.{module}"], name, refuse)
    monkeypatch.setattr(Digests, "reading", refuse)
    tasks = prepared(SOURCES[source](folder, dataset), tmp_path / "cache")
    assert fingerprint(tasks) == before
    with pytest.raises(AssertionError, match="a file was read"):
        prepared(SOURCES[source](folder, dataset), tmp_path / "another")
    maps = Path("/proc/self/maps").read_text()
    assert all(str(file) in maps for file in (tmp_path / "cache" / "store").glob("*.arrow"))
    blocks = [block for task in tasks for split in task.splits.values() for block in split.token_blocks()]
    assert blocks and not any(block.flags.owndata or block.flags.writeable for block in blocks)


@pytest.mark.parametrize("options", [{}, COLUMN])
def test_a_changed_file_costs_that_file_alone(tmp_path: Path, options: Any) -> None:
    folder, tokenizer = write_folder(tmp_path / "data", bad=False), Counting()
    prepared(jsonl_tasks(folder, **options), tmp_path / "cache", tokenizer)
    calls = tokenizer.calls
    assert calls == 5 * 40 + 2 * 30
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines(rows("changed", 33, bad=False)).encode()))
    changed = prepared(jsonl_tasks(folder, **options), tmp_path / "cache", tokenizer)
    assert tokenizer.calls == calls + 33
    assert fingerprint(changed) == fingerprint(prepared(jsonl_tasks(folder, **options), tmp_path / "another"))


def test_a_changed_shard_costs_that_shard_alone(tmp_path: Path) -> None:
    for name, answer in (("set", "a"), ("changed", "b")):
        made = [{"prompt": f"{i}", "response": answer} for i in range(60)]
        datasets.Dataset.from_list(made).save_to_disk(tmp_path / name, num_shards=6)
    tokenizer = Counting()
    prepared(hf_tasks(tmp_path / "set"), tmp_path / "cache", tokenizer)
    shard = "data-00002-of-00006.arrow"
    os.replace(tmp_path / "changed" / shard, tmp_path / "set" / shard)
    (task,) = prepared(hf_tasks(tmp_path / "set"), tmp_path / "cache", tokenizer)
    assert tokenizer.calls == 70 and len(task.train) == 58


def test_a_file_of_another_kind_is_another_file(tmp_path: Path) -> None:
    """Even with the same content."""
    (tmp_path / "data").mkdir()
    file = tmp_path / "data" / "a.jsonl"
    file.write_text(lines(rows("a", bad=False)))
    prepared(jsonl_tasks(tmp_path / "data"), tmp_path / "cache")
    file.rename(file.with_suffix(".parquet"))
    with pytest.raises(ValueError, match=r"a\.parquet: not a valid Parquet file"):
        prepared(jsonl_tasks(tmp_path / "data"), tmp_path / "cache")


class InAnyWorker(ByteTokenizer):
    """Writes which process has tokenized."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self._file = file

    def encode(self, conversation: Conversation) -> Any:
        with open(self._file, "a") as opened:
            opened.write(f"{os.getpid()}\n")
        return super().encode(conversation)


def entries(cache: Path) -> dict[str, Any]:
    """The contents of the entries of a store, by key."""
    files = {file.name: file.read_bytes() for file in (cache / "store").iterdir()}
    # All that a copy has as well.
    about = {name: json.loads(raw) for name, raw in files.items() if name.endswith(".json")}
    return files | {name: {key: each[key] for key in ("checksum", "facts")} for name, each in about.items()}


@pytest.mark.parametrize("options", [{}, COLUMN])
def test_a_large_file_is_tokenized_by_all_workers(
    tmp_path: Path, options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its entry is the same, bit for bit, and those of small files beside it."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name, number in (("large", 3_000), ("small", 30), ("also_small", 50)):
        (folder / f"{name}.jsonl").write_text(lines(rows(name, number)))
    expected = prepared(
        jsonl_tasks(folder, **options), tmp_path / "one", num_workers=1, on_bad_rows="skip", max_examples_per_task=20
    )
    monkeypatch.setattr(tokenize_module, "_MIN_PARALLEL_BYTES", 1)
    tokenizer = InAnyWorker(tmp_path / "processes")
    tasks = prepared(
        jsonl_tasks(folder, **options),
        tmp_path / "many",
        tokenizer,
        num_workers=3,
        on_bad_rows="skip",
        max_examples_per_task=20,
    )
    assert described(tasks) == described(expected)
    assert entries(tmp_path / "many") == entries(tmp_path / "one") and len(entries(tmp_path / "one")) == 6
    processes = Counter((tmp_path / "processes").read_text().split())
    assert len(processes) > 1 and str(os.getpid()) not in processes


def test_a_large_file_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong is said by this process; a worker that is killed leaves the store right."""
    monkeypatch.setattr(tokenize_module, "_MIN_PARALLEL_BYTES", 1)
    file = tmp_path / "a.json"
    file.write_text(json.dumps(rows("a", 2_000, bad=False))[:-1])
    with pytest.raises(ValueError, match=r"a\.json, line 1: not valid JSON \(the array has no comma"):
        prepared(jsonl_tasks(file), tmp_path / "cache", num_workers=2)
    file.write_text(json.dumps(rows("a", 2_000, bad=False)))

    class Killed(ByteTokenizer):
        def encode(self, conversation: Conversation) -> Any:
            os._exit(9)

    with pytest.raises(ValueError, match="^tasks: a process that tokenized was killed, perhaps for lack of memory;"):
        prepared(jsonl_tasks(file), tmp_path / "cache", Killed(), num_workers=2)
    with pytest.raises(ValueError, match=r"a\.json: changed while it was read"):
        prepared(jsonl_tasks(file), tmp_path / "cache", Changing(file), num_workers=2)
    tasks = prepared(jsonl_tasks(file), tmp_path / "cache", num_workers=2)
    assert fingerprint(tasks) == fingerprint(prepared(jsonl_tasks(file), tmp_path / "other", num_workers=1))
    assert not [*(tmp_path / "cache").rglob("*.lock")]


class Changing(ByteTokenizer):
    """Touches a file."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self._file = file

    def encode(self, conversation: Conversation) -> Any:
        os.utime(self._file)
        return super().encode(conversation)


def _prepare_and_send(folder: Path, cache: Path, processes: Path, queue: Any) -> None:
    tokenizer = InAnyWorker(processes)
    tasks = prepared(jsonl_tasks(folder), cache, tokenizer, num_workers=2)
    queue.put(fingerprint(tasks))


def test_two_that_prepare_large_files_at_once_share_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenize_module, "_MIN_PARALLEL_BYTES", 1)
    folder = tmp_path / "data"
    folder.mkdir()
    for name, number in (("large", 3_000), ("a", 300), ("b", 500), ("c", 200)):
        (folder / f"{name}.jsonl").write_text(lines(rows(name, number, bad=False)))
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    arguments = (folder, tmp_path / "cache", tmp_path / "processes", queue)
    processes = [context.Process(target=_prepare_and_send, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    results = {queue.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    assert results == {fingerprint(prepared(jsonl_tasks(folder), tmp_path / "other"))}
    assert len((tmp_path / "processes").read_text().split()) == 4_000


def test_progress_is_shown_of_a_large_file_and_small_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tokenize_module, "_MIN_PARALLEL_BYTES", 1)
    monkeypatch.setattr("adapt_recipes.data.progress._LINE_SECONDS", 0)
    folder = tmp_path / "data"
    folder.mkdir()
    for name, number in (("large", 2_000), ("small", 30)):
        (folder / f"{name}.jsonl").write_text(lines(rows(name, number, bad=False)))
    prepared(jsonl_tasks(folder), tmp_path / "cache", num_workers=2)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("preparing data: ")]
    shares = [int(line.removeprefix("preparing data: ").partition("%")[0]) for line in said]
    assert shares == sorted(shares) and len({*shares}) > 3
    assert shares[-1] in (99, 100) and " 2,030 examples, " in said[-1]
