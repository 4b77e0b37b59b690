"""Conversations to tokens: once, in parallel processes, into a cache on disk that is memory-mapped from then on."""

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

_CACHE_FORMAT = 1  # counted up whenever the same conversations would give other tokens, masks or hashes
_CHUNK = 256  # conversations a piece of work
_MIN_PARALLEL = 2_000  # conversations below which starting processes takes longer than it saves


class ConversationTokenizer(Protocol):
    """What ``ChatTokenizer`` and ``ByteTokenizer`` have in common; anything of the kind can be named in a config.

    Attributes:
        fingerprint: changes with whatever changes what ``encode`` gives.
    """

    fingerprint: str

    def encode(self, messages: Conversation) -> tuple[list[int], list[bool]]:
        """Ids (num_tokens,) and, as long, whether each is supervised."""


class Tokenised(NamedTuple):
    """Tokenised conversations, as the cache holds them: all of them, whatever their length.

    Attributes:
        content_hashes: (num_examples,) int64, of prompt and answer; the others are those of ``Examples``.
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


def tokenise(
    sources: dict[str, list[Conversation]],
    tokenizer: ConversationTokenizer,
    *,
    num_workers: int | None,
    cache_dir: Path,
) -> dict[str, Tokenised]:
    """Tokenises lists of conversations, or reads them from the cache.

    Args:
        sources: the lists, by what an error calls their members ("task 'x', example").
        tokenizer: sent to every worker once.
        num_workers: processes; None: as many as there are usable cores. Few conversations are done in this process.
        cache_dir: folder of the cache. An entry's name is a hash of the conversations and the tokenizer's fingerprint;
            it is written beside and renamed, carries a checksum, and is made anew where that is wrong.

    Raises:
        ValueError: an empty list; a conversation that is malformed or has no supervised token.
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
            done[where] = Tokenised(tokens, supervised, offsets, prompts, contents)
            _write(files[where], done[where])
    return done


def _tokenise_chunk(tokenizer: ConversationTokenizer, chunk: _Chunk) -> tuple[np.ndarray, ...]:
    """Tokens, supervised, lengths, prompt and content hashes; numpy, as torch sends tensors through shared memory."""
    tokens: list[int] = []
    supervised: list[bool] = []
    lengths, prompts, contents = [], [], []
    for index, messages in enumerate(chunk.conversations, start=chunk.start):
        with error_prefix(f"{chunk.where} {index}"):
            conversation = checked_conversation(messages)
            ids, mask = tokenizer.encode(conversation)
            mask[:1] = [False]  # nothing precedes the first token, so nothing predicts it
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
    """What maps chunks to arrays, in their order: processes where there is enough to do, else this one."""
    if num_workers is None:
        num_workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if num_workers <= 1 or num_conversations < _MIN_PARALLEL:
        yield partial(map, partial(_tokenise_chunk, tokenizer))
        return
    # Forked where that is safe: a spawned process imports torch first, and needs a guarded main module.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    num_workers = min(num_workers, -(-num_conversations // _CHUNK))
    with ProcessPoolExecutor(num_workers, context, initializer=_start_worker, initargs=(tokenizer,)) as pool:
        yield partial(pool.map, _tokenise_in_worker)


_worker_tokenizer: ConversationTokenizer  # of a worker process alone: a tokenizer is too large to send with every chunk


def _start_worker(tokenizer: ConversationTokenizer) -> None:
    global _worker_tokenizer
    _worker_tokenizer = tokenizer


def _tokenise_in_worker(chunk: _Chunk) -> tuple[np.ndarray, ...]:
    return _tokenise_chunk(_worker_tokenizer, chunk)


def _key(conversations: list[Conversation], tokenizer: ConversationTokenizer) -> str:
    digest = blake2b(f"{_CACHE_FORMAT} {tokenizer.fingerprint}\n".encode(), digest_size=16)
    for conversation in conversations:
        digest.update(json.dumps(conversation, default=repr).encode() + b"\n")
    return digest.hexdigest()


def _checksum(tokenised: Tokenised) -> str:
    checksum = 0
    for tensor in tokenised:
        checksum = zlib.crc32(tensor.numpy().data, checksum)
    return f"{checksum:08x}"


def _read(file: Path) -> Tokenised | None:
    """An entry of the cache, memory-mapped; None where there is none, or a damaged one."""
    try:
        with safe_open(file, framework="pt") as stored:
            tokenised = Tokenised(*(stored.get_tensor(name) for name in Tokenised._fields))
            metadata = stored.metadata() or {}
    except (OSError, SafetensorError):
        return None
    return tokenised if metadata.get("checksum") == _checksum(tokenised) else None


def _write(file: Path, tokenised: Tokenised) -> None:
    """Beside, then renamed: another process sees the whole entry or none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(file, shared=True) as partial:
        save_file(tokenised._asdict(), partial, metadata={"checksum": _checksum(tokenised)})
