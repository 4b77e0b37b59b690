"""Reads and tokenizes sources once, in parallel processes, into the store."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor
from concurrent.futures import wait as futures_wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import replace
from functools import partial
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import pyarrow

from adapt_recipes.data.chat import ChatTokenizer
from adapt_recipes.data.conversations import (
    answer_hashes,
    checked_conversation,
    merge_system,
    prompt_and_content_hash,
)
from adapt_recipes.data.examples import Conversation, Message, RawTask
from adapt_recipes.data.progress import Progress
from adapt_recipes.data.rows import Split
from adapt_recipes.data.source_files import ColumnTasks, FileRow, FileTask, SourceFile
from adapt_recipes.data.store import Columns, Digests, Entry, Facts, lock, read_entry, write_entry
from adapt_recipes.files import PARTIAL, NoSpaceLeft, is_no_space

# Incremented whenever the same sources would give other conversations, tokens, spans or hashes, or other columns.
_FORMAT = 4
# Conversations between two reports of progress.
_CHUNK = 256
# Conversations of a list that have an entry of their own, and are tokenized by one process.
_PART = 4096
# With less, starting processes takes longer than it saves.
_MIN_PARALLEL_BYTES = 1_000_000
_BYTES_PER_CONVERSATION = 500
# Between looks at what other processes have done.
_POLL_SECONDS = 0.5
# After this a temporary file is not being written any more.
_ABANDONED_SECONDS = 24 * 3600

Conversations = Sequence[Conversation | list[Message]]


class ConversationTokenizer(Protocol):
    """The interface of ``ChatTokenizer`` and ``ByteTokenizer``. A config may name any class that has it.

    Attributes:
        fingerprint: differs between tokenizers whose ``encode`` may return other results.
    """

    fingerprint: str

    def encode(self, conversation: Conversation) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids; and for each answer in ``conversation.supervised`` the first and the last + 1 of its tokens.

        Raises:
            ValueError: the conversation cannot be rendered as it is. The caller adds where it is from.
        """


class Reading(NamedTuple):
    """How conversations are read; the config's ``tasks`` documents the values."""

    supervise: Literal["all", "last"] = "all"
    system: Literal["merge_into_user"] | None = None


AS_WRITTEN = Reading()


class Given(NamedTuple):
    """Conversations in memory: a part of a list, which has an entry of the store of its own.

    Attributes:
        conversations: of the part.
        start: index of the first in the list.
    """

    conversations: Conversations
    start: int

    def read(self) -> Iterator[FileRow]:
        return (FileRow(number, each) for number, each in enumerate(self.conversations, start=self.start))


Source = SourceFile | Given


def sources_of(task: RawTask | FileTask | ColumnTasks) -> list[tuple[Split, Source]]:
    """What the splits of a task, or of tasks of a column, consist of."""
    if not isinstance(task, RawTask):
        return [(file.split, file) for file in task.files]
    splits: dict[Split, Conversations | None] = {
        "train": task.conversations,
        "validation": task.validation,
        "test": task.test,
    }
    return [
        (split, Given(rows[start : start + _PART], start))
        for split, rows in splits.items()
        if rows is not None
        # A list without conversations has a part as well.
        for start in range(0, max(1, len(rows)), _PART)
    ]


def tokenize(
    sources: Iterable[Source],
    tokenizer: ConversationTokenizer,
    *,
    reading: Reading = AS_WRITTEN,
    num_workers: int | None,
    cache_dir: Path,
) -> list[Entry]:
    """Reads and tokenizes what the store does not have yet.

    Args:
        sources: files, or conversations in memory.
        tokenizer: sent to every worker once.
        reading: what is supervised, and where the system message goes.
        num_workers: processes; None: one per usable core. A few conversations are tokenized in this process.
        cache_dir: folder of the store. The key of an entry is a hash of the content of the file (or of the
            conversations), of how it is read, of ``reading`` and of the tokenizer's fingerprint. Processes that need
            the same entries at the same time share the work.

    Returns:
        The entry of each source.

    Raises:
        ValueError: a file cannot be read, or changed while it was read; or the folder cannot be written.
        NoSpaceLeft: the disk is full; entries that are complete stay.
    """
    sources = list(sources)
    store = Store(cache_dir)
    # A file may be in several tasks.
    unique: dict[Any, Source] = {_identity(each): each for each in sources}
    done: dict[Any, Entry] = {}
    missing: dict[Any, Source] = {}
    for name, source in unique.items():
        digest = store.digests.recorded(source.path) if isinstance(source, SourceFile) else None
        if isinstance(source, Given):
            digest = _digest(source.conversations)
        entry = digest and read_entry(store.entries, _key(source, digest, tokenizer, reading))
        if entry:
            done[name] = entry
        else:
            missing[name] = source
    if missing:
        store.create()
        keys = _prepare_all(list(missing.values()), _Work(store, tokenizer, reading), num_workers)
        for name, key in zip(missing, keys, strict=True):
            entry = read_entry(store.entries, key)
            if entry is None:
                raise ValueError(f"tasks.cache_dir: {store.entries / key} was removed or changed while it was used")
            done[name] = entry
    return [done[_identity(each)] for each in sources]


class Store(NamedTuple):
    """The folders of the store.

    Attributes:
        cache_dir: the folder that has them.
    """

    cache_dir: Path

    @property
    def entries(self) -> Path:
        return self.cache_dir / "store"

    @property
    def digests(self) -> Digests:
        return Digests(self.cache_dir / "files")

    def create(self) -> None:
        """Creates the folders, and removes what killed processes have left there.

        Raises:
            ValueError: they cannot be created or written.
        """
        try:
            for folder in (self.entries, self.cache_dir / "files"):
                folder.mkdir(parents=True, exist_ok=True)
                with TemporaryFile(dir=folder):
                    pass
                for file in folder.glob(f"*{PARTIAL}"):
                    # A younger one may be of a process that is writing it.
                    with suppress(FileNotFoundError):
                        if time.time() - file.stat().st_mtime > _ABANDONED_SECONDS:
                            file.unlink()
        except OSError as error:
            if is_no_space(error):
                raise NoSpaceLeft(f"tasks.cache_dir: no space left in {self.cache_dir}") from error
            reason = error.strerror or error
            raise ValueError(f"tasks.cache_dir: {self.cache_dir} cannot be written ({reason}); name another") from None


class _Work(NamedTuple):
    store: Store
    tokenizer: ConversationTokenizer
    reading: Reading

    def prepare(
        self, source: Source, counts: _Counts, *, wait: bool, submit: Callable[[list[FileRow]], Pending] | None = None
    ) -> str | None:
        """Adds the entry of a source; returns its key, or None if another process is at it and ``wait`` is false.

        Args:
            source: a file, or conversations in memory.
            counts: of what is done, to be increased.
            wait: for another process that adds the same entry.
            submit: starts to tokenize a chunk in another process; None: this one tokenizes.
        """
        if isinstance(source, SourceFile):
            try:
                with self.store.digests.reading(source.path) as digest:
                    return self._add(source, digest, counts, wait, submit or self._later)
            except OSError as error:
                if error.filename is None or Path(error.filename) != source.path:
                    raise
                raise ValueError(f"{source.path}: cannot be read ({error.strerror})") from None
        return self._add(source, _digest(source.conversations), counts, wait, submit or self._later)

    def _add(
        self, source: Source, digest: str, counts: _Counts, wait: bool, submit: Callable[[list[FileRow]], Pending]
    ) -> str | None:
        folder, size = self.store.entries, _size(source)
        key = _key(source, digest, self.tokenizer, self.reading)
        if read_entry(folder, key) is None:
            with lock(folder / f"{key}.lock", wait=wait) as is_ours:
                if not is_ours:
                    return None
                # Another process may have added it meanwhile.
                if read_entry(folder, key) is None:
                    pending = [submit(chunk) for chunk in _chunks(source)]
                    parts = []
                    for tokenized in pending:
                        parts.append(tokenized())
                        counts.add(size // len(pending), len(parts[-1].examples), len(parts[-1].tokens))
                    write_entry(folder, key, *_joined(parts))
                    return key
        counts.add(size)
        return key

    def tokenize(self, rows: list[FileRow]) -> _Part:
        return _tokenize_chunk(self.tokenizer, self.reading, rows)

    def _later(self, rows: list[FileRow]) -> Pending:
        return partial(self.tokenize, rows)


class _Counts(Protocol):
    """Bytes of sources, examples and tokens that are done."""

    def add(self, num_bytes: int, num_examples: int = 0, num_tokens: int = 0) -> None: ...


class _SharedCounts:
    """Those of all workers."""

    def __init__(self, shared: Any) -> None:
        self._shared = shared

    def add(self, num_bytes: int, num_examples: int = 0, num_tokens: int = 0) -> None:
        with self._shared.get_lock():
            for i, number in enumerate((num_bytes, num_examples, num_tokens)):
                self._shared[i] += number


class _ShownCounts:
    """Those of the process that shows them. It takes no lock, which a worker that is killed may hold.

    Args:
        progress: shows them.
        shared: what the workers count.
    """

    def __init__(self, progress: Progress, shared: Any = (0, 0, 0)) -> None:
        self._progress, self._shared, self._own = progress, shared, (0, 0, 0)

    def add(self, num_bytes: int, num_examples: int = 0, num_tokens: int = 0) -> None:
        own = self._own
        self._own = own[0] + num_bytes, own[1] + num_examples, own[2] + num_tokens
        self.show()

    def show(self) -> None:
        num_bytes, examples, tokens = (own + other for own, other in zip(self._own, self._shared, strict=True))
        self._progress.update(bytes_done=num_bytes, examples=examples, tokens=tokens)


def _prepare_all(sources: list[Source], work: _Work, num_workers: int | None) -> list[str]:
    """Adds the entries of all sources, in parallel processes if they are large; returns their keys.

    A process prepares one source at a time. A file that is larger than the share of a process is read by this process,
    and its chunks are tokenized by all.
    """
    if num_workers is None:
        num_workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    sizes = [*map(_size, sources)]
    total_bytes = sum(sizes)
    is_large = [
        isinstance(each, SourceFile) and size * num_workers > total_bytes
        for each, size in zip(sources, sizes, strict=True)
    ]
    if not any(is_large):
        num_workers = min(num_workers, len(sources))
    keys: dict[int, str] = {}
    # Shuffled, because texts of similar size often follow each other, and then what is done says little about how long
    # the rest takes. The largest come first, so that no process is left alone with one at the end.
    order = random.Random(0).sample(range(len(sources)), len(sources))
    order.sort(key=lambda i: sizes[i] * 4 * num_workers < total_bytes)

    def left(*, large: bool) -> list[int]:
        return [i for i in order if i not in keys and is_large[i] == large]

    with Progress("preparing data", total_bytes=total_bytes) as progress:
        if num_workers <= 1 or total_bytes < _MIN_PARALLEL_BYTES:
            counts = _ShownCounts(progress)
            for wait in (False, True):
                for i in [i for i in order if i not in keys]:
                    if wait:
                        _say_waiting(sources[i])
                    if (key := work.prepare(sources[i], counts, wait=wait)) is not None:
                        keys[i] = key
            return [keys[i] for i in range(len(sources))]

        # Fork where that is safe: a spawned process imports torch first, and needs a guarded main module.
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        shared = context.Array("q", 3)
        counts = _ShownCounts(progress, shared)
        futures: dict[Future[str | None], int] = {}

        def gather(*, seconds: float = 0) -> None:
            """Takes the keys of sources that are done, for which it waits at most so long."""
            for future in futures_wait(futures, timeout=seconds, return_when=FIRST_COMPLETED).done:
                index = futures.pop(future)
                if (key := future.result()) is not None:
                    keys[index] = key
            counts.show()

        def submit(rows: list[FileRow]) -> Pending:
            return partial(result, pool.submit(_tokenize_in_worker, rows))

        def result(future: Future[_Part]) -> _Part:
            while not futures_wait([future], timeout=_POLL_SECONDS).done:
                gather()
            return future.result()

        arguments = (work, sources, shared)
        try:
            with ProcessPoolExecutor(num_workers, context, _start_worker, arguments) as pool:
                try:
                    for wait in (False, True):
                        futures |= {pool.submit(_prepare_in_worker, i, wait): i for i in left(large=False)}
                        if wait and (others := left(large=False) + left(large=True)):
                            _say_waiting(sources[others[0]])
                        # While workers wait for another process, which may wait for this one, it holds no lock.
                        while wait and futures:
                            gather(seconds=_POLL_SECONDS)
                        for i in left(large=True):
                            if (key := work.prepare(sources[i], counts, wait=wait, submit=submit)) is not None:
                                keys[i] = key
                        while futures:
                            gather(seconds=_POLL_SECONDS)
                except BaseException:
                    # What has begun is completed, and kept.
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
        except BrokenProcessPool:
            raise ValueError(
                "tasks: a process that tokenized was killed, perhaps for lack of memory; start again to go on"
            ) from None
    return [keys[i] for i in range(len(sources))]


def _say_waiting(source: Source) -> None:
    what = source.path if isinstance(source, SourceFile) else "the same conversations"
    print(f"waiting for another process that tokenizes {what}", file=sys.stderr, flush=True)


# Only in a worker process: a tokenizer is too large to send with every source.
_worker: tuple[_Work, list[Source], _Counts]


def _start_worker(work: _Work, sources: list[Source], shared: Any) -> None:
    global _worker
    _worker = work, sources, _SharedCounts(shared)


def _prepare_in_worker(index: int, wait: bool) -> str | None:
    work, sources, counts = _worker
    return work.prepare(sources[index], counts, wait=wait)


def _tokenize_in_worker(rows: list[FileRow]) -> _Part:
    return _worker[0].tokenize(rows)


def _identity(source: Source) -> Any:
    """The same for sources that are read in the same way from the same place."""
    return (source.path, source.settings) if isinstance(source, SourceFile) else id(source)


def _size(source: Source) -> int:
    """Of a source, in bytes; for conversations a guess."""
    if isinstance(source, SourceFile):
        try:
            return source.path.stat().st_size
        except OSError:
            # It is named when it is read.
            return 0
    return _BYTES_PER_CONVERSATION * len(source.conversations)


def _digest(conversations: Conversations) -> str:
    digest = blake2b(digest_size=16)
    for each in conversations:
        parts: Any = each
        if isinstance(each, Conversation):
            parts = each.messages, each.supervised, each.tools, each.references
        digest.update(json.dumps(parts, default=repr).encode() + b"\n")
    return digest.hexdigest()


def _key(source: Source, digest: str, tokenizer: ConversationTokenizer, reading: Reading) -> str:
    settings = source.settings if isinstance(source, SourceFile) else f"given from {source.start}"
    text = "\n".join([str(_FORMAT), settings, digest, tokenizer.fingerprint, str(reading)])
    return blake2b(text.encode(), digest_size=16).hexdigest()


def _chunks(source: Source) -> Iterator[list[FileRow]]:
    rows = iter(source.read())
    while chunk := list(islice(rows, _CHUNK)):
        yield chunk


class _Part(NamedTuple):
    """A chunk's examples."""

    # (num_tokens,) int32
    tokens: np.ndarray
    # (num_examples, 6) int64: row, length, highest token, prompt hash, content hash, number of answers
    examples: np.ndarray
    # (num_answers, 5) int64: first and last + 1 within the example, ``answer_hashes``, UTF-8 length
    answers: np.ndarray
    prompts: list[str]
    references: list[list[str]]
    # of each example the value of the column that makes the tasks
    tasks: list[str | None]
    facts: Facts


# Waits for a part that another process tokenizes, or tokenizes it.
Pending = Callable[[], _Part]


class _Checked(NamedTuple):
    """A conversation that is ready to be tokenized, and what is kept of it as it is in its source."""

    conversation: Conversation
    # of each supervised answer
    answer_hashes: list[tuple[int, int]]
    num_bytes: list[int]
    prompt_and_content_hash: tuple[int, int]
    prompt: str
    references: list[str]


def _checked(given: Any, reading: Reading) -> _Checked:
    conversation = checked_conversation(given)
    if reading.supervise == "last":
        last = len(conversation.messages) - 1
        conversation = replace(conversation, supervised=(last,) * (last in conversation.supervised))
    # Hashes are of the messages as they are: the same whatever the template or the setting.
    messages, tools, supervised = conversation.messages, conversation.tools, conversation.supervised
    return _Checked(
        merge_system(conversation) if reading.system == "merge_into_user" else conversation,
        [answer_hashes(messages, answer) for answer in supervised],
        [len((messages[answer].get("content") or "").encode()) for answer in supervised],
        prompt_and_content_hash(messages, tools),
        json.dumps([messages[:-1], tools]),
        list(conversation.references) or [messages[-1].get("content") or ""],
    )


def _encode_all(
    tokenizer: ConversationTokenizer, conversations: Sequence[Conversation]
) -> Iterable[tuple[list[int], list[tuple[int, int]]] | ValueError]:
    """What ``encode`` returns for each conversation, or the error that it raises."""
    if isinstance(tokenizer, ChatTokenizer):
        yield from tokenizer.encode_all(conversations)
        return
    for each in conversations:
        try:
            yield tokenizer.encode(each)
        except ValueError as error:
            yield error


def _tokenize_chunk(tokenizer: ConversationTokenizer, reading: Reading, rows: Sequence[FileRow]) -> _Part:
    unused_keys: dict[str | None, Counter[str]] = {}
    checked: list[tuple[FileRow, _Checked | ValueError]] = []
    for row in rows:
        if row.unused_keys:
            unused_keys.setdefault(row.task, Counter()).update(row.unused_keys)
        if row.error is None and not row.is_empty:
            try:
                checked.append((row, _checked(row.conversation, reading)))
            except ValueError as error:
                checked.append((row, error))
    encoded = iter(_encode_all(tokenizer, [each.conversation for _, each in checked if isinstance(each, _Checked)]))

    tokens: list[int] = []
    examples: list[tuple[int, ...]] = []
    answers: list[tuple[int, ...]] = []
    prompts, references, tasks, bad_conversations = [], [], [], []
    for row, each in checked:
        result = each if isinstance(each, ValueError) else next(encoded)
        if isinstance(each, ValueError) or isinstance(result, ValueError):
            bad_conversations.append((row.number, str(result), row.task))
            continue
        ids, spans = result
        # Nothing precedes the first token, so the model cannot predict it.
        spans = [(max(1, first), end) for first, end in spans]
        if any(first >= end for first, end in spans):
            bad_conversations.append((row.number, "has an answer without a supervised token", row.task))
            continue
        tokens += ids
        for span, hashes, num_bytes in zip(spans, each.answer_hashes, each.num_bytes, strict=True):
            answers.append((*span, *hashes, num_bytes))
        examples.append((row.number, len(ids), max(ids), *each.prompt_and_content_hash, len(spans)))
        prompts.append(each.prompt)
        references.append(each.references)
        tasks.append(row.task)
    bad_rows = [(row.number, row.error, row.task) for row in rows if row.error is not None]
    facts = Facts(bad_rows, bad_conversations, sum(row.is_empty for row in rows), unused_keys)
    return _Part(
        np.array(tokens, dtype=np.int32), _table(examples, 6), _table(answers, 5), prompts, references, tasks, facts
    )


def _table(rows: list[tuple[int, ...]], width: int) -> np.ndarray:
    return np.array(rows, dtype=np.int64).reshape(-1, width)


def _joined(parts: Sequence[_Part]) -> tuple[Columns, Facts]:
    """The parts of a source, in their order."""
    parts = list(parts) or [_Part(np.zeros(0, np.int32), _table([], 6), _table([], 5), [], [], [], Facts())]
    examples, answers = (np.concatenate([each[i] for each in parts]) for i in (1, 2))
    tasks = pyarrow.array([each for part in parts for each in part.tasks], pyarrow.string())
    columns = Columns(
        tokens=np.concatenate([each.tokens for each in parts]),
        offsets=np.concatenate([[0], examples[:, 1].cumsum()]),
        max_tokens=examples[:, 2].astype(np.int32),
        rows=examples[:, 0].copy(),
        prompt_hashes=examples[:, 3].copy(),
        content_hashes=examples[:, 4].copy(),
        answer_offsets=np.concatenate([[0], examples[:, 5].cumsum()]),
        firsts=answers[:, 0].astype(np.int32),
        ends=answers[:, 1].astype(np.int32),
        pair_hashes=answers[:, 2].copy(),
        whole_hashes=answers[:, 3].copy(),
        num_bytes=answers[:, 4].astype(np.int32),
        prompts=pyarrow.array([each for part in parts for each in part.prompts], pyarrow.large_string()),
        references=pyarrow.array(
            [each for part in parts for each in part.references], pyarrow.large_list(pyarrow.large_string())
        ),
        tasks=tasks.dictionary_encode(),
    )
    unused_keys: dict[str | None, Counter[str]] = {}
    for part in parts:
        for task, counts in part.facts.unused_keys.items():
            unused_keys.setdefault(task, Counter()).update(counts)
    facts = Facts(
        [row for part in parts for row in part.facts.bad_rows],
        [row for part in parts for row in part.facts.bad_conversations],
        sum(part.facts.num_empty for part in parts),
        unused_keys,
    )
    return columns, facts
