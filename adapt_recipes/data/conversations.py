"""Checks conversations, and computes hashes that identify a conversation and its prompt."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

from adapt_recipes.data.examples import Conversation
from adapt_recipes.errors import nearest


def text_of(value: Any, what: str) -> str:
    """Returns ``value`` if it is a string that UTF-8 can encode; ``what`` names it in the error."""
    if not isinstance(value, str):
        raise ValueError(f"{what} must be a string, not {type(value).__name__}")
    try:
        # JSON can express half a surrogate pair, which no tokenizer accepts.
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{what} is not valid Unicode: it contains half a surrogate pair") from None
    return value


def checked_conversation(messages: Any) -> Conversation:
    """A conversation of roles and contents alone: an optional system message, then user, assistant, user, ...

    Raises:
        ValueError: it names the message. The caller adds file and line with ``error_prefix``.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages must be a list of {role, content} with at least a user's and an assistant's message")
    conversation: Conversation = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise ValueError(f"message {index} must have the keys role and content")
        role, content = message["role"], text_of(message["content"], f"the content of message {index}")
        turn = len(conversation) - (conversation[0]["role"] == "system" if conversation else 0)
        expected = ("user", "assistant")[turn % 2]
        if role != expected and not (role == "system" and index == 0):
            raise ValueError(f"message {index} has the role {role!r}, expected {expected!r} (system only at the start)")
        if role == "assistant" and not content.strip():
            raise ValueError(f"message {index}: the assistant's answer is empty")
        conversation.append({"role": role, "content": content})
    if conversation[-1]["role"] != "assistant":
        raise ValueError(f"the last message must be the assistant's, not the {conversation[-1]['role']}'s")
    return conversation


def conversation_of(
    record: Any, *, messages: str = "messages", prompt: str = "prompt", response: str = "response"
) -> Conversation:
    """The conversation in a record that has either messages, or a prompt and its response, under the given keys."""
    if not isinstance(record, Mapping):
        raise ValueError(f"must be an object with the key {messages!r}, or {prompt!r} and {response!r}")
    if messages in record:
        return checked_conversation(record[messages])
    for key in (prompt, response):
        if key not in record:
            hint = nearest(key, map(str, record)) if record else ""
            raise ValueError(f"neither the key {messages!r} nor both {prompt!r} and {response!r}: no {key!r}{hint}")
    user, answer = text_of(record[prompt], repr(prompt)), text_of(record[response], repr(response))
    return checked_conversation([{"role": "user", "content": user}, {"role": "assistant", "content": answer}])


@contextmanager
def error_prefix(where: str) -> Iterator[None]:
    """Adds the prefix ``where: `` to the message of a ``ValueError``."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def content_hash(conversation: Conversation) -> int:
    """A 63-bit hash of the messages, the same on every machine and for every tokenizer.

    ``content_hash(conversation[:-1])`` is the hash of the prompt: everything before the last answer.
    """
    text = json.dumps([[message["role"], message["content"]] for message in conversation])
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest()) >> 1


def folder_of(path: str | Path) -> Path:
    """``path`` with ``~`` expanded, which has to be a folder."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ValueError(f"tasks.path: no folder {folder}")
    return folder
