"""Tokenizes conversations once, in parallel processes, into a cache on disk that is memory-mapped afterwards."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from adapt_recipes.data.conversations import (
    answer_hashes,
    checked_conversation,
    merge_system,
    prompt_and_content_hash,
)
from adapt_recipes.data.examples import Conversation, Examples, Message
from adapt_recipes.files import atomic_file

# Incremented whenever the same conversations would give other tokens, spans or hashes.
_CACHE_FORMAT = 2
# Conversations per work item of a process.
_CHUNK = 256
# With fewer conversations, starting processes takes longer than it saves.
_MIN_PARALLEL = 2_000
# Bad rows whose reasons are kept.
_REASONS = 5


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


class Tokenized(NamedTuple):
    """Tokenized conversations as the cache stores them: of any length, without bad rows.

    Attributes:
        tokens: (num_tokens,) int32, the rendered examples, concatenated.
        supervised: (num_tokens,) bool, True for a token that counts in the loss; never the first of an example.
        offsets: (num_examples + 1,) int64, the start of each example, and the end of the last.
        prompt_hashes: (num_examples,) int64, of everything before the last answer.
        content_hashes: (num_examples,) int64, of prompt and answer.
        answers: (num_answers, 5) int64, of each supervised answer: the index of its example, its first token and its
            last + 1 in ``tokens``, and its ``answer_hashes``.
        bad_rows: (num_bad_rows,) int64, indices of conversations that are no examples.
        reasons: what is wrong with the first of ``bad_rows``.
    """

    tokens: Tensor
    supervised: Tensor
    offsets: Tensor
    prompt_hashes: Tensor
    content_hashes: Tensor
    answers: Tensor
    bad_rows: Tensor
    reasons: list[str]

    @property
    def examples(self) -> Examples:
        return Examples(self.tokens, self.supervised, self.offsets, self.prompt_hashes)


_TENSORS = Tokenized._fields[:-1]
Conversations = Sequence[Conversation | list[Message]]


class _Chunk(NamedTuple):
    start: int
    conversations: Conversations


def tokenize(
    sources: Mapping[Any, Conversations],
    tokenizer: ConversationTokenizer,
    *,
    reading: Reading = AS_WRITTEN,
    num_workers: int | None,
    cache_dir: Path,
) -> dict[Any, Tokenized]:
    """Tokenizes lists of conversations, or reads them from the cache.

    Args:
        sources: the lists, by a key of the caller's.
        tokenizer: sent to every worker once.
        reading: what is supervised, and where the system message goes.
        num_workers: processes; None: one per usable core. A few conversations are tokenized in this process.
        cache_dir: folder of the cache. The name of an entry is a hash of the conversations, of ``reading`` and of the
            tokenizer's fingerprint. It is written to a temporary file and renamed, has a checksum, and is computed
            again if that is wrong.
    """
    files = {key: cache_dir / f"{_key(each, tokenizer, reading)}.safetensors" for key, each in sources.items()}
    done = {key: read for key, file in files.items() if (read := _read(file)) is not None}
    missing = {key: conversations for key, conversations in sources.items() if key not in done}
    chunks = [
        _Chunk(start, conversations[start : start + _CHUNK])
        for conversations in missing.values()
        for start in range(0, len(conversations), _CHUNK)
    ]
    with _workers(tokenizer, reading, num_workers, sum(map(len, missing.values()))) as apply:
        parts = iter(apply(chunks))
        for key, conversations in missing.items():
            done[key] = _joined(islice(parts, -(-len(conversations) // _CHUNK)))
            _write(files[key], done[key])
    return done


class _Part(NamedTuple):
    """A chunk's examples. Numpy, because torch would use shared memory to send them."""

    tokens: np.ndarray
    # (num_examples, 3): length, prompt hash, content hash
    examples: np.ndarray
    # (num_answers, 5): index of the example, first and last + 1 within it, and ``answer_hashes``
    answers: np.ndarray
    bad_rows: list[tuple[int, str]]


def _tokenize_chunk(tokenizer: ConversationTokenizer, reading: Reading, chunk: _Chunk) -> _Part:
    tokens: list[int] = []
    examples: list[tuple[int, ...]] = []
    answers: list[tuple[int, ...]] = []
    bad_rows = []
    for row, given in enumerate(chunk.conversations, start=chunk.start):
        try:
            conversation = checked_conversation(given)
            if reading.supervise == "last":
                last = len(conversation.messages) - 1
                conversation = replace(conversation, supervised=(last,) * (last in conversation.supervised))
            # Hashes are of the messages as they are: the same whatever the template or the setting.
            messages, tools, supervised = conversation.messages, conversation.tools, conversation.supervised
            hashes = [answer_hashes(messages, answer) for answer in supervised]
            if reading.system == "merge_into_user":
                conversation = merge_system(conversation)
            ids, spans = tokenizer.encode(conversation)
            # Nothing precedes the first token, so the model cannot predict it.
            spans = [(max(1, first), end) for first, end in spans]
            if any(first >= end for first, end in spans):
                raise ValueError("has an answer without a supervised token")
        except ValueError as error:
            bad_rows.append((row, str(error)))
            continue
        tokens += ids
        answers += [(len(examples), *span, *each) for span, each in zip(spans, hashes, strict=True)]
        examples.append((len(ids), *prompt_and_content_hash(messages, tools)))
    return _Part(np.array(tokens, dtype=np.int32), _table(examples, 3), _table(answers, 5), bad_rows)


def _table(rows: list[tuple[int, ...]], width: int) -> np.ndarray:
    return np.array(rows, dtype=np.int64).reshape(-1, width)


def _joined(parts: Iterable[_Part]) -> Tokenized:
    parts = list(parts) or [_Part(np.zeros(0, np.int32), _table([], 3), _table([], 5), [])]
    tokens, table = np.concatenate([each.tokens for each in parts]), np.concatenate([each.examples for each in parts])
    offsets = np.concatenate([[0], table[:, 0].cumsum()])
    # From indices in a chunk and positions in an example to those in the whole.
    before = np.cumsum([0, *(len(each.examples) for each in parts)])
    answers = np.concatenate([each.answers + [[n, 0, 0, 0, 0]] for n, each in zip(before[:-1], parts, strict=True)])
    answers[:, 1:3] += offsets[answers[:, :1]]
    # +1 where an answer begins, -1 behind its end.
    changes = np.zeros(len(tokens) + 1, dtype=np.int8)
    np.add.at(changes, answers[:, 1], 1)
    np.add.at(changes, answers[:, 2], -1)
    bad_rows = [each for part in parts for each in part.bad_rows]
    return Tokenized(
        tokens=torch.from_numpy(tokens),
        supervised=torch.from_numpy(changes[:-1].cumsum() > 0),
        offsets=torch.from_numpy(offsets),
        prompt_hashes=torch.from_numpy(table[:, 1].copy()),
        content_hashes=torch.from_numpy(table[:, 2].copy()),
        answers=torch.from_numpy(answers),
        bad_rows=torch.tensor([row for row, _ in bad_rows], dtype=torch.int64),
        reasons=[reason for _, reason in bad_rows[:_REASONS]],
    )


@contextmanager
def _workers(
    tokenizer: ConversationTokenizer, reading: Reading, num_workers: int | None, num_conversations: int
) -> Iterator[Callable[[list[_Chunk]], Iterable[_Part]]]:
    """Yields a function that maps chunks to arrays, in order: in parallel processes if there are many conversations."""
    if num_workers is None:
        num_workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if num_workers <= 1 or num_conversations < _MIN_PARALLEL:
        yield partial(map, partial(_tokenize_chunk, tokenizer, reading))
        return
    # Fork where that is safe: a spawned process imports torch first, and needs a guarded main module.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    num_workers = min(num_workers, -(-num_conversations // _CHUNK))
    with ProcessPoolExecutor(num_workers, context, _start_worker, (tokenizer, reading)) as pool:
        yield partial(pool.map, _tokenize_in_worker)


# Only in a worker process: a tokenizer is too large to send with every chunk.
_worker: Callable[[_Chunk], _Part]


def _start_worker(tokenizer: ConversationTokenizer, reading: Reading) -> None:
    global _worker
    _worker = partial(_tokenize_chunk, tokenizer, reading)


def _tokenize_in_worker(chunk: _Chunk) -> _Part:
    return _worker(chunk)


def _key(conversations: Conversations, tokenizer: ConversationTokenizer, reading: Reading) -> str:
    digest = blake2b(f"{_CACHE_FORMAT} {tokenizer.fingerprint} {reading}\n".encode(), digest_size=16)
    for each in conversations:
        parts = (each.messages, each.supervised, each.tools) if isinstance(each, Conversation) else each
        digest.update(json.dumps(parts, default=repr).encode() + b"\n")
    return digest.hexdigest()


def _checksum(tokenized: Tokenized) -> str:
    checksum = zlib.crc32(json.dumps(tokenized.reasons).encode())
    for name in _TENSORS:
        checksum = zlib.crc32(getattr(tokenized, name).numpy().data, checksum)
    return f"{checksum:08x}"


def _read(file: Path) -> Tokenized | None:
    """An entry of the cache, memory-mapped; None if there is none or it is damaged."""
    try:
        with safe_open(file, framework="pt") as stored:
            notes = json.loads((stored.metadata() or {}).get("notes", "{}"))
            tensors: dict[str, Any] = {name: stored.get_tensor(name) for name in _TENSORS}
            tokenized = Tokenized(**tensors, reasons=notes.get("reasons", []))
    except (OSError, SafetensorError):
        return None
    return tokenized if notes.get("checksum") == _checksum(tokenized) else None


def _write(file: Path, tokenized: Tokenized) -> None:
    """Writes a temporary file and renames it: another process sees a complete entry or none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    # In one value, because several are stored in any order.
    metadata = {"notes": json.dumps({"checksum": _checksum(tokenized), "reasons": tokenized.reasons})}
    with atomic_file(file, shared=True) as partial_file:
        save_file({name: getattr(tokenized, name) for name in _TENSORS}, partial_file, metadata=metadata)
