"""Checks conversations, and computes hashes that identify a conversation, its prompt and its answers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from hashlib import blake2b
from typing import Any

from adapt_recipes.data.examples import Conversation, Message

# What a chat template may read of a message. Other keys of rows, such as a weight, are turned into something else.
_KEYS = {"role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content"}
# Roles that may follow a role. A system message may only be the first; a tool's turn needs a call.
_NEXT = {None: ("system", "user"), "system": ("user",), "user": ("assistant",), "assistant": ("user",)}
_NEXT_OF_CALL = ("tool", "user")
_NEXT_OF_TOOL = ("tool", "assistant")


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


def checked_conversation(conversation: Any) -> Conversation:
    """A conversation that a source made, or a list of messages as one, whose turns are in order.

    Raises:
        ValueError: it names the message. The caller adds where the conversation is from.
    """
    if not isinstance(conversation, Conversation):
        if not isinstance(conversation, list):
            raise ValueError(f"must be a Conversation or a list of messages, not {type(conversation).__name__}")
        conversation = Conversation(conversation, supervised=answers(conversation))
    check_turns(conversation.messages)
    return conversation


def answers(messages: Sequence[Any]) -> tuple[int, ...]:
    """Indices of the assistant's messages."""
    return tuple(i for i, each in enumerate(messages) if isinstance(each, Mapping) and each.get("role") == "assistant")


def check_turns(messages: Sequence[Message]) -> None:
    """Refuses messages that are not an optional system message, then user, assistant, ..., assistant.

    Raises:
        ValueError: it names the message.
    """
    if not messages:
        raise ValueError("there must be at least a user's and an assistant's message")
    allowed = _NEXT[None]
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or "role" not in message:
            raise ValueError(f"message {index} must have the keys role and content")
        if unknown := sorted(map(str, message.keys() - _KEYS)):
            raise ValueError(f"message {index} has the key {unknown[0]!r}; allowed: {', '.join(sorted(_KEYS))}")
        role, content, calls = message["role"], message.get("content"), message.get("tool_calls")
        if role not in allowed:
            # A system message may be missing.
            expected = " or ".join(repr(each) for each in allowed if each != "system")
            raise ValueError(f"message {index} has the role {role!r}, expected {expected} (system only at the start)")
        if content is not None or not calls:
            text_of(content, f"the content of message {index}")
        if role == "assistant" and not calls and not str(content).strip():
            raise ValueError(f"message {index}: the assistant's answer is empty")
        allowed = _NEXT_OF_TOOL if role == "tool" else _NEXT_OF_CALL if calls else _NEXT[role]
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"the last message must be the assistant's, not the {messages[-1]['role']}'s")


def merge_system(conversation: Conversation) -> Conversation:
    """The system message, an empty line and the first user's message, as one message of the user."""
    first, *rest = conversation.messages
    if first["role"] != "system":
        return conversation
    user = rest[0] | {"content": f"{first['content']}\n\n{rest[0]['content']}"}
    supervised = tuple(index - 1 for index in conversation.supervised)
    return replace(conversation, messages=[user, *rest[1:]], supervised=supervised)


@contextmanager
def error_prefix(where: str) -> Iterator[None]:
    """Adds the prefix ``where: `` to the message of a ``ValueError``."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def content_hash(messages: Sequence[Message], tools: Sequence[Any] | None = None) -> int:
    """A 63-bit hash of the messages, the same on every machine and for every tokenizer.

    ``content_hash(messages[:-1], tools)`` is the hash of the prompt: everything before the last answer.
    """
    return _hash_of_parts([_part(message) for message in messages], tools)


def prompt_and_content_hash(messages: Sequence[Message], tools: Sequence[Any] | None = None) -> tuple[int, int]:
    """``content_hash`` of the prompt, and of all messages, in less time than one after the other."""
    parts = [_part(message) for message in messages]
    return _hash_of_parts(parts[:-1], tools), _hash_of_parts(parts, tools)


def answer_hashes(messages: Sequence[Message], answer: int) -> tuple[int, int]:
    """Two 63-bit hashes of the message at index ``answer``, which tell where else it would be a leak.

    Returns:
        The hash of the pair, the last user's message and the answer, without the white space around them. And the hash
        of the whole, everything up to the answer; for the first answer of a conversation it is the pair's.
    """
    question = next(each["content"] for each in reversed(messages[:answer]) if each["role"] == "user")
    content, calls = messages[answer].get("content") or "", messages[answer].get("tool_calls")
    pair = _hash([question.strip(), content.strip(), *([calls] if calls else [])])
    is_first = all(each["role"] != "assistant" for each in messages[:answer])
    return pair, pair if is_first else content_hash(messages[: answer + 1])


def _part(message: Message) -> str:
    """What is hashed of a message, as JSON."""
    if message.keys() == {"role", "content"}:
        return json.dumps([message["role"], message["content"]])
    other = {key: value for key, value in sorted(message.items()) if key not in ("role", "content")}
    return json.dumps([message["role"], message.get("content"), *([other] if other else [])])


def _hash_of_parts(parts: Sequence[str], tools: Sequence[Any] | None) -> int:
    return _hash_of_json(f"[{', '.join([*parts, json.dumps(tools)] if tools else parts)}]")


def _hash(value: Any) -> int:
    return _hash_of_json(json.dumps(value))


def _hash_of_json(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest()) >> 1
