"""The store of prepared data: memory-mapped files of tokenized examples and their texts, which processes share.

There is an entry for every source file (or list of conversations): an Arrow file with a row per example, and a small
JSON file beside it, written last, which says what the Arrow file has to be and what of the source is no example. The
name of an entry is a hash of all that decides its content, so an entry is never changed and is valid forever.

Contents of source files are not hashed at every start: ``Digests`` keeps the hash of a file with its size, times and
inode, as git does.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow
import torch

from adapt_recipes.files import atomic_file

# A file that was changed so shortly before its hash was recorded may have been changed again within the resolution of
# its times (2 s on FAT), so its record is not trusted.
_RESOLUTION_NS = 2_000_000_000
_BLOCK = 1 << 20

_ANSWER = pyarrow.struct(
    [
        pyarrow.field("first", pyarrow.int32()),
        pyarrow.field("end", pyarrow.int32()),
        pyarrow.field("pair_hash", pyarrow.int64()),
        pyarrow.field("whole_hash", pyarrow.int64()),
        pyarrow.field("num_bytes", pyarrow.int32()),
    ]
)
TASK = pyarrow.dictionary(pyarrow.int32(), pyarrow.string())
_SCHEMA = pyarrow.schema(
    [
        pyarrow.field("row", pyarrow.int64()),
        pyarrow.field("tokens", pyarrow.large_list(pyarrow.int32())),
        pyarrow.field("max_token", pyarrow.int32()),
        pyarrow.field("prompt_hash", pyarrow.int64()),
        pyarrow.field("content_hash", pyarrow.int64()),
        pyarrow.field("answers", pyarrow.large_list(_ANSWER)),
        pyarrow.field("prompt", pyarrow.large_string()),
        pyarrow.field("references", pyarrow.large_list(pyarrow.large_string())),
        pyarrow.field("task", TASK),
    ]
)


class Columns(NamedTuple):
    """Examples of one source, as arrays that may be memory maps.

    Attributes:
        tokens: (num_tokens,) int32, the rendered examples, concatenated.
        offsets: (num_examples + 1,) int64, the start of each example in ``tokens``, and the end of the last.
        max_tokens: (num_examples,) int32, the highest token id of each example.
        rows: (num_examples,) int64, the number of each example's row in the source.
        prompt_hashes: (num_examples,) int64, of everything before the last answer.
        content_hashes: (num_examples,) int64, of prompt and answer.
        answer_offsets: (num_examples + 1,) int64, each example's first answer in the following arrays.
        firsts, ends: (num_answers,) int32, the span of each supervised answer: its first token and its last + 1,
            counted from the start of its example.
        pair_hashes, whole_hashes: (num_answers,) int64, see ``answer_hashes``.
        num_bytes: (num_answers,) int32, the UTF-8 length of each answer's text.
        prompts: (num_examples,) strings, the messages before the last answer and the tools, as JSON.
        references: (num_examples,) lists of strings, the answers that are right.
        tasks: (num_examples,) strings, the value of the column that makes the tasks; null where none does.
        key: of the entry of the store, whose content it decides; empty: there is none.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    max_tokens: np.ndarray
    rows: np.ndarray
    prompt_hashes: np.ndarray
    content_hashes: np.ndarray
    answer_offsets: np.ndarray
    firsts: np.ndarray
    ends: np.ndarray
    pair_hashes: np.ndarray
    whole_hashes: np.ndarray
    num_bytes: np.ndarray
    prompts: pyarrow.LargeStringArray
    references: pyarrow.LargeListArray
    tasks: pyarrow.DictionaryArray
    key: str = ""


@dataclass(frozen=True)
class Facts:
    """What else is known of a source.

    Attributes:
        bad_rows: (number, reason, task) of rows that are no conversations; the task is the value of the column that
            makes the tasks, or None.
        bad_conversations: the same of conversations that cannot be tokenized.
        num_empty: rows that are left out because they have no answer, which the source allows.
        unused_keys: by task, for each key of the rows that is not used, the number of rows that have it.
    """

    bad_rows: list[tuple[int, str, str | None]] = field(default_factory=list)
    bad_conversations: list[tuple[int, str, str | None]] = field(default_factory=list)
    num_empty: int = 0
    unused_keys: dict[str | None, Counter[str]] = field(default_factory=dict)


class Entry(NamedTuple):
    """What the store has of one source."""

    columns: Columns
    facts: Facts

    def __len__(self) -> int:
        return len(self.columns.rows)


def write_entry(folder: Path, key: str, columns: Columns, facts: Facts) -> None:
    """Adds an entry, complete or not at all.

    Raises:
        NoSpaceLeft: see ``atomic_file``.
    """
    answers = pyarrow.StructArray.from_arrays(
        [columns.firsts, columns.ends, columns.pair_hashes, columns.whole_hashes, columns.num_bytes],
        fields=list(_ANSWER),
    )
    arrays = [
        columns.rows,
        pyarrow.LargeListArray.from_arrays(columns.offsets, columns.tokens),
        columns.max_tokens,
        columns.prompt_hashes,
        columns.content_hashes,
        pyarrow.LargeListArray.from_arrays(columns.answer_offsets, answers),
        columns.prompts,
        columns.references,
        columns.tasks,
    ]
    batch = pyarrow.RecordBatch.from_arrays([pyarrow.array(each) for each in arrays], schema=_SCHEMA)
    file = folder / f"{key}.arrow"
    with atomic_file(file, shared=True) as partial:
        with pyarrow.OSFile(str(partial), "wb") as sink, pyarrow.ipc.new_file(sink, _SCHEMA) as writer:
            writer.write_batch(batch)
        checksum = _checksum(partial)
    unused_keys = [(task, sorted(counts.items())) for task, counts in facts.unused_keys.items()]
    text = json.dumps([facts.bad_rows, facts.bad_conversations, facts.num_empty, unused_keys])
    _write_about(folder, key, checksum, text)


def read_entry(folder: Path, key: str) -> Entry | None:
    """An entry, memory-mapped; None if there is none, or it is damaged.

    The checksum is computed only if the file is not the one that was written here, as in a copy of a cache.
    """
    file = folder / f"{key}.arrow"
    try:
        about = json.loads((folder / f"{key}.json").read_bytes())
        checksum, facts = about["checksum"], about["facts"]
        if about["facts_checksum"] != zlib.crc32(facts.encode()):
            return None
        if about["stat"] != _identity(os.stat(file)):
            if _checksum(file) != checksum:
                return None
            _write_about(folder, key, checksum, facts)
        bad_rows, bad_conversations, num_empty, unused_keys = json.loads(facts)
        bad = [[(number, reason, task) for number, reason, task in rows] for rows in (bad_rows, bad_conversations)]
        counts = {task: Counter(dict(keys)) for task, keys in unused_keys}
        return Entry(_mapped(file), Facts(bad[0], bad[1], num_empty, counts))
    except (OSError, ValueError, KeyError, TypeError):
        # pyarrow's exceptions are ValueErrors as well.
        return None


def _write_about(folder: Path, key: str, checksum: int, facts: str) -> None:
    stat = _identity(os.stat(folder / f"{key}.arrow"))
    about = {"checksum": checksum, "stat": stat, "facts": facts, "facts_checksum": zlib.crc32(facts.encode())}
    with atomic_file(folder / f"{key}.json", shared=True) as partial:
        partial.write_text(json.dumps(about))


def _mapped(file: Path) -> Columns:
    # torch's map keeps no file descriptor, unlike pyarrow's and Python's: there may be more files than those allowed.
    mapped = torch.from_file(str(file), shared=False, size=file.stat().st_size, dtype=torch.uint8)
    batch = pyarrow.ipc.open_file(pyarrow.py_buffer(mapped.numpy())).get_batch(0)
    if batch.schema != _SCHEMA:
        raise ValueError("another schema")
    tokens, answers = batch.column("tokens"), batch.column("answers")
    # Those of an array without rows may be missing.
    flat = answers.values
    return Columns(
        tokens=tokens.values.to_numpy(),
        offsets=tokens.offsets.to_numpy(),
        max_tokens=batch.column("max_token").to_numpy(),
        rows=batch.column("row").to_numpy(),
        prompt_hashes=batch.column("prompt_hash").to_numpy(),
        content_hashes=batch.column("content_hash").to_numpy(),
        answer_offsets=answers.offsets.to_numpy(),
        firsts=flat.field("first").to_numpy(),
        ends=flat.field("end").to_numpy(),
        pair_hashes=flat.field("pair_hash").to_numpy(),
        whole_hashes=flat.field("whole_hash").to_numpy(),
        num_bytes=flat.field("num_bytes").to_numpy(),
        prompts=batch.column("prompt"),
        references=batch.column("references"),
        tasks=batch.column("task"),
        key=file.stem,
    )


def _checksum(file: Path) -> int:
    checksum = 0
    with open(file, "rb") as opened:
        while block := opened.read(_BLOCK):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _identity(stat: os.stat_result) -> list[int]:
    """Differs between a file and a later state of it."""
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


class Digests:
    """Hashes of the contents of files, recorded beside what the file system says of them.

    Args:
        folder: of the records, one per path.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def recorded(self, file: Path) -> str | None:
        """The hash of a file that has not changed since it was recorded; None: it has to be computed."""
        try:
            stat = os.stat(file)
            record = json.loads(self._record(file).read_bytes())
            digest = record["digest"]
            is_same = record["stat"] == _identity(stat)
            is_old = max(stat.st_mtime_ns, stat.st_ctime_ns) + _RESOLUTION_NS <= record["began_ns"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return digest if is_same and is_old and isinstance(digest, str) else None

    @contextmanager
    def reading(self, file: Path) -> Iterator[str]:
        """Hashes a file and yields the hash; records it at the end of the block, which reads the file as well.

        Raises:
            ValueError: the file changed meanwhile.
            OSError: it cannot be read.
        """
        began_ns, before = time.time_ns(), _identity(os.stat(file))
        digest = blake2b(digest_size=16)
        with open(file, "rb") as opened:
            while block := opened.read(_BLOCK):
                digest.update(block)
        failed = False
        try:
            yield digest.hexdigest()
        except ValueError:
            # It may be half written.
            failed = True
            if _identity(os.stat(file)) == before:
                raise
        if failed or _identity(os.stat(file)) != before:
            raise ValueError(f"{file}: changed while it was read; start again when it is complete")
        record = {"stat": before, "began_ns": began_ns, "digest": digest.hexdigest()}
        with atomic_file(self._record(file), shared=True) as partial:
            partial.write_text(json.dumps(record))

    def _record(self, file: Path) -> Path:
        name = blake2b(os.fsencode(os.path.realpath(file)), digest_size=16).hexdigest()
        return self._folder / f"{name}.json"


@contextmanager
def lock(file: Path, *, wait: bool) -> Iterator[bool]:
    """Holds a lock for the block; yields whether it has it. Without ``wait``, False if another process holds it.

    The kernel releases the lock of a process that is killed. Where the file system has no locks the block runs without:
    then two processes may do the same work, and nothing worse.
    """
    descriptor = os.open(file, os.O_CREAT | os.O_RDWR, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                yield False
                return
        try:
            yield True
        finally:
            with suppress(OSError):
                os.unlink(file)
    finally:
        os.close(descriptor)


def concatenated(columns: Sequence[Columns], name: str) -> np.ndarray:
    """A column without offsets of several sources, copied."""
    return np.concatenate([getattr(each, name) for each in columns])
