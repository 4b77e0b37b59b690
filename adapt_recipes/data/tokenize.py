"""Tokenizes conversations once, in parallel processes, into a cache on disk that is memory-mapped afterwards."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from adapt_recipes.data.conversations import checked_conversation, content_hash, error_prefix
from adapt_recipes.data.examples import Conversation, Examples
from adapt_recipes.files import atomic_file

# Incremented whenever the same conversations would give other tokens, masks or hashes.
_CACHE_FORMAT = 1
# Conversations per work item of a process.
_CHUNK = 256
# With fewer conversations, starting processes takes longer than it saves.
_MIN_PARALLEL = 2_000


class ConversationTokenizer(Protocol):
    """The interface of ``ChatTokenizer`` and ``ByteTokenizer``. A config may name any class that has it.

    Attributes:
        fingerprint: differs between tokenizers whose ``encode`` may return other results.
    """

    fingerprint: str

    def encode(self, messages: Conversation) -> tuple[list[int], list[bool]]:
        """Token ids, and for each whether it is supervised; two lists of the same length."""


class Tokenized(NamedTuple):
    """Tokenized conversations as the cache stores them: all of them, of any length.

    Attributes:
        content_hashes: (num_examples,) int64, of prompt and answer. The other fields are those of ``Examples``.
    """

    tokens: Tensor
    supervised: Tensor
    offsets: Tensor
    prompt_hashes: Tensor
    content_hashes: Tensor

    @property
    def examples(self) -> Examples:
        return Examples(self.tokens, self.supervised, self.offsets, self.prompt_hashes)


class _Chunk(NamedTuple):
    where: str
    start: int
    conversations: list[Conversation]


def tokenize(
    sources: dict[str, list[Conversation]],
    tokenizer: ConversationTokenizer,
    *,
    num_workers: int | None,
    cache_dir: Path,
) -> dict[str, Tokenized]:
    """Tokenizes lists of conversations, or reads them from the cache.

    Args:
        sources: the lists, by the name of their members in an error ("task 'x', example").
        tokenizer: sent to every worker once.
        num_workers: processes; None: one per usable core. A few conversations are tokenized in this process.
        cache_dir: folder of the cache. The name of an entry is a hash of the conversations and of the tokenizer's
            fingerprint. It is written to a temporary file and renamed, has a checksum, and is computed again if that is
            wrong.

    Raises:
        ValueError: a list is empty; a conversation is malformed or has no supervised token.
    """
    if empty := [where for where, conversations in sources.items() if not conversations]:
        raise ValueError(f"{empty[0]}s: there are none")
    files = {
        where: cache_dir / f"{_key(conversations, tokenizer)}.safetensors" for where, conversations in sources.items()
    }
    done = {where: read for where, file in files.items() if (read := _read(file)) is not None}
    missing = {where: conversations for where, conversations in sources.items() if where not in done}
    chunks = [
        _Chunk(where, start, conversations[start : start + _CHUNK])
        for where, conversations in missing.items()
        for start in range(0, len(conversations), _CHUNK)
    ]
    with _workers(tokenizer, num_workers, sum(map(len, missing.values()))) as apply:
        arrays = iter(apply(chunks))
        for where, conversations in missing.items():
            parts = list(islice(arrays, -(-len(conversations) // _CHUNK)))
            tokens, supervised, lengths, prompts, contents = (
                torch.from_numpy(np.concatenate(each)) for each in zip(*parts, strict=True)
            )
            offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
            done[where] = Tokenized(tokens, supervised, offsets, prompts, contents)
            _write(files[where], done[where])
    return done


def _tokenize_chunk(tokenizer: ConversationTokenizer, chunk: _Chunk) -> tuple[np.ndarray, ...]:
    """Tokens, supervised, lengths, prompt and content hashes; numpy, because torch would use shared memory."""
    tokens: list[int] = []
    supervised: list[bool] = []
    lengths, prompts, contents = [], [], []
    for index, messages in enumerate(chunk.conversations, start=chunk.start):
        with error_prefix(f"{chunk.where} {index}"):
            conversation = checked_conversation(messages)
            ids, mask = tokenizer.encode(conversation)
            # Nothing precedes the first token, so the model cannot predict it.
            mask[:1] = [False]
            if not any(mask):
                raise ValueError("has no supervised token")
        tokens += ids
        supervised += mask
        lengths.append(len(ids))
        prompts.append(content_hash(conversation[:-1]))
        contents.append(content_hash(conversation))
    int64s = (np.array(column, dtype=np.int64) for column in (lengths, prompts, contents))
    return np.array(tokens, dtype=np.int32), np.array(supervised, dtype=np.bool_), *int64s


@contextmanager
def _workers(
    tokenizer: ConversationTokenizer, num_workers: int | None, num_conversations: int
) -> Iterator[Callable[[list[_Chunk]], Iterable[tuple[np.ndarray, ...]]]]:
    """Yields a function that maps chunks to arrays, in order: in parallel processes if there are many conversations."""
    if num_workers is None:
        num_workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if num_workers <= 1 or num_conversations < _MIN_PARALLEL:
        yield partial(map, partial(_tokenize_chunk, tokenizer))
        return
    # Fork where that is safe: a spawned process imports torch first, and needs a guarded main module.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    num_workers = min(num_workers, -(-num_conversations // _CHUNK))
    with ProcessPoolExecutor(num_workers, context, initializer=_start_worker, initargs=(tokenizer,)) as pool:
        yield partial(pool.map, _tokenize_in_worker)


# Only in a worker process: a tokenizer is too large to send with every chunk.
_worker_tokenizer: ConversationTokenizer


def _start_worker(tokenizer: ConversationTokenizer) -> None:
    global _worker_tokenizer
    _worker_tokenizer = tokenizer


def _tokenize_in_worker(chunk: _Chunk) -> tuple[np.ndarray, ...]:
    return _tokenize_chunk(_worker_tokenizer, chunk)


def _key(conversations: list[Conversation], tokenizer: ConversationTokenizer) -> str:
    digest = blake2b(f"{_CACHE_FORMAT} {tokenizer.fingerprint}\n".encode(), digest_size=16)
    for conversation in conversations:
        digest.update(json.dumps(conversation, default=repr).encode() + b"\n")
    return digest.hexdigest()


def _checksum(tokenized: Tokenized) -> str:
    checksum = 0
    for tensor in tokenized:
        checksum = zlib.crc32(tensor.numpy().data, checksum)
    return f"{checksum:08x}"


def _read(file: Path) -> Tokenized | None:
    """An entry of the cache, memory-mapped; None if there is none or it is damaged."""
    try:
        with safe_open(file, framework="pt") as stored:
            tokenized = Tokenized(*(stored.get_tensor(name) for name in Tokenized._fields))
            metadata = stored.metadata() or {}
    except (OSError, SafetensorError):
        return None
    return tokenized if metadata.get("checksum") == _checksum(tokenized) else None


def _write(file: Path, tokenized: Tokenized) -> None:
    """Writes a temporary file and renames it: another process sees a complete entry or none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(file, shared=True) as partial:
        save_file(tokenized._asdict(), partial, metadata={"checksum": _checksum(tokenized)})
