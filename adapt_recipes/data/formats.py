"""The formats of instruction data: recognizes the format of a row by its keys, and makes a conversation of it.

Every key of a row that can change what a model reads or learns is honored or refused. Other keys are counted.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping
from functools import lru_cache
from reprlib import repr as short
from typing import Any, NamedTuple

from adapt_recipes.data.conversations import answers, check_turns, error_prefix, text_of
from adapt_recipes.data.examples import Conversation, Message
from adapt_recipes.errors import closest, nearest


class Format(NamedTuple):
    """The keys of a format.

    Attributes:
        prompt: of the user's message, or of the list of messages.
        response: of the answer; None: the format is a list of messages.
    """

    prompt: str
    response: str | None = None

    @property
    def required(self) -> tuple[str, ...]:
        return (self.prompt,) if self.response is None else (self.prompt, self.response)


FORMATS = {
    # OpenAI's, and that of chat templates.
    "messages": Format("messages"),
    "sharegpt": Format("conversations"),
    "alpaca": Format("instruction", "output"),
    "dolly": Format("instruction", "response"),
    "prompt_response": Format("prompt", "response"),
    "prompt_completion": Format("prompt", "completion"),
    "question_answer": Format("question", "answer"),
    # The texts of P3 and T0.
    "p3": Format("inputs_pretokenized", "targets_pretokenized"),
}
# May be in one file.
_MIXED = {"messages", "prompt_response"}

# Honored in a row with messages: the system message, the functions that the model may call, and whether to train on it.
_WITH_MESSAGES = ("system", "system_prompt", "tools", "weight", "train")
# In a row with a prompt also what belongs to the prompt and to the answer: ``history`` is a list of earlier [user,
# assistant] texts, whose answers count as well; ``input`` or ``context`` follows the prompt after an empty line.
_WITH_PROMPT = (*_WITH_MESSAGES, "history", "input", "context", "reasoning_content")
# Honored in a message beside its role and content.
_IN_MESSAGE = ("name", "tool_call_id", "weight", "train")
_IN_ANSWER = (*_IN_MESSAGE, "tool_calls", "reasoning_content")
# What changes what a model reads or learns: where it is not honored, it is refused.
_CONTENT = {*_WITH_PROMPT, *_IN_ANSWER, "instruction", "functions", "function_call", "documents"} - {"name"}
_CONTENT |= {"image", "images", "audio", "audios", "video", "videos"}
_CONTENT_OF_MESSAGE = _CONTENT | {"thinking", "reasoning"}

# The names of chat templates for ShareGPT's roles. A ``function_call`` becomes an answer with ``tool_calls``.
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"}
_ROLES |= {"function_call": "assistant", "observation": "tool"}
# Self-instruct data, such as MedInstruct, have it where there is no input.
_NO_INPUT = "<noinput>"
# Completions of older fine-tuning data end with it. The chat template has an end of its own.
_END_OF_COMPLETION = "<|endoftext|>"


class RowReader:
    """Makes conversations of the rows of one file or split, which all have one format.

    Args:
        format: name of the format; None: it is recognized by the keys of the first row that fits one.
        messages, prompt, response: names of the columns in place of the format's keys.
        before: the format of the rows before the first, if there are some; not with a named format.

    Raises:
        ValueError: there is no such format, or it has no such column.
    """

    def __init__(
        self,
        format: str | None = None,
        *,
        messages: str | None = None,
        prompt: str | None = None,
        response: str | None = None,
        before: str | None = None,
    ) -> None:
        if format is not None and format not in FORMATS:
            raise ValueError(f"tasks.format: {format!r} is not a format{nearest(str(format), FORMATS)}")
        if messages is not None and (prompt is not None or response is not None):
            raise ValueError("tasks.messages: is one column, and tasks.prompt and tasks.response are two; name either")
        if format is None and messages is not None:
            format = "messages"
        if format is None and (prompt is not None or response is not None):
            format = "prompt_response"

        # The format of the rows before, or the one named, with the columns named.
        self._name = format or before
        self._named: Format | None = None
        if format is not None:
            own = FORMATS[format]
            for key, column in (("messages", messages), ("prompt", prompt), ("response", response)):
                if column is not None and (key == "messages") != (own.response is None):
                    raise ValueError(f"tasks.{key}: the format {format} has no such column")
            self._named = Format(messages or prompt or own.prompt, response or own.response)
            if self._named.prompt == self._named.response:
                raise ValueError(f"tasks.prompt: {prompt!r} is the column of the response as well")

    @property
    def format(self) -> str | None:
        """The format of the rows read so far; None: it is not known yet."""
        return self._name

    def conversation(
        self, row: Any, *, origin: tuple[str, int] | None, unused_keys: Counter[str], used: Collection[str] = ()
    ) -> Conversation:
        """The conversation in a row.

        Args:
            row: a mapping of keys to values; a value None counts as missing.
            origin: source and number of the row, for the conversation.
            unused_keys: the row is counted there under every key that is not used.
            used: other keys that the caller uses.

        Raises:
            ValueError: the row is no conversation. The caller adds where it is from.
        """
        if not isinstance(row, Mapping):
            raise ValueError(f"must be an object, not {_kind(row)}")
        prompt, response = format = self._format_of(row)
        unused: set[str] = set()
        if response is None:
            messages, supervised = _messages(row[prompt], prompt, unused)
            honored: tuple[str, ...] = _WITH_MESSAGES
        elif isinstance(row[prompt], list) or isinstance(row[response], list):
            # Conversational, as in TRL: only the response is learned.
            before, _ = _messages(row[prompt], prompt, unused)
            after, learned = _messages(row[response], response, unused)
            messages, supervised = before + after, [len(before) + index for index in learned]
            honored = _WITH_MESSAGES
        else:
            messages = self._pair(row, prompt, response)
            supervised = list(answers(messages))
            honored = _WITH_PROMPT
        unused |= _unused(row, {*format.required, *honored, *used}, _CONTENT)

        # The row's own system message and weight.
        for key in ("system", "system_prompt"):
            if _is_there(row.get(key)):
                system = {"role": "system", "content": text_of(row[key], repr(key))}
                if messages[0]["role"] != "system":
                    messages.insert(0, system)
                    supervised = [index + 1 for index in supervised]
                elif messages[0] != system:
                    raise ValueError(f"{key!r} is not the text of the first message, which is a system message too")
        if not _counts(row):
            supervised = []
        check_turns(messages)
        tools = _objects(row.get("tools"), "'tools'") or None
        unused_keys.update(unused)
        return Conversation(messages, tuple(supervised), tools=tools, origin=origin)

    def _format_of(self, row: Mapping[str, Any]) -> Format:
        """The format of a row, which has to be that of the rows before."""
        keys, not_null = tuple(row), frozenset(key for key, value in row.items() if value is not None)
        if self._named is not None:
            if not not_null.issuperset(self._named.required):
                raise ValueError(_missing(str(self._name), self._named, keys, not_null))
            return self._named
        fitting = [name for name, format in FORMATS.items() if not_null.issuperset(format.required)]
        if len(fitting) > 1:
            raise ValueError(f"fits the formats {' and '.join(fitting)}; name one in tasks.format")
        if not fitting and self._name is not None:
            raise ValueError(_missing(self._name, FORMATS[self._name], keys, not_null))
        if not fitting:
            raise ValueError(_fits_no_format(keys, not_null))
        (name,) = fitting
        self._name = self._name or name
        if name != self._name and not {name, self._name} <= _MIXED:
            raise ValueError(f"has the format {name}, and the rows before have the format {self._name}")
        return FORMATS[name]

    def _pair(self, row: Mapping[str, Any], prompt_key: str, response_key: str) -> list[Message]:
        """The messages of a row with the texts of a prompt and its answer."""
        prompt, answer = text_of(row[prompt_key], repr(prompt_key)), text_of(row[response_key], repr(response_key))
        added = [key for key in ("input", "context") if key not in (prompt_key, response_key)]
        added = [key for key in added if _is_there(row.get(key)) and row[key] != _NO_INPUT]
        if len(added) == 2:
            raise ValueError("has 'input' and 'context'; one of them can follow the prompt")
        for key in added:
            prompt = f"{prompt}\n\n{text_of(row[key], repr(key))}"
        if self._name == "prompt_completion":
            answer = answer.removesuffix(_END_OF_COMPLETION)

        messages: list[Message] = []
        history = row["history"] if _is_there(row.get("history")) else []
        if not isinstance(history, list) or any(not isinstance(pair, list) or len(pair) != 2 for pair in history):
            raise ValueError("'history' must be a list of [user, assistant]")
        for pair in [*history, (prompt, answer)]:
            for role, text in zip(("user", "assistant"), pair, strict=True):
                messages.append({"role": role, "content": text_of(text, "a text of 'history'")})
        if _is_there(row.get("reasoning_content")):
            messages[-1]["reasoning_content"] = text_of(row["reasoning_content"], "'reasoning_content'")
        return messages


def _messages(given: Any, key: str, unused: set[str]) -> tuple[list[Message], list[int]]:
    """The messages under ``key`` as chat templates take them, and the indices of the answers to learn."""
    if not isinstance(given, list) or not given:
        raise ValueError(f"{key!r} must be a list of messages, not {'an empty one' if given == [] else _kind(given)}")
    messages, learned = [], []
    for index, each in enumerate(given):
        with error_prefix(f"message {index}"):
            if not isinstance(each, Mapping):
                raise ValueError(f"must be an object, not {_kind(each)}")
            message, counts, ignored = _message({name: value for name, value in each.items() if value is not None})
        unused |= {f"{key}.{name}" for name in ignored}
        messages.append(message)
        if counts:
            learned.append(index)
    return messages, learned


def _message(given: Mapping[str, Any]) -> tuple[Message, bool, set[str]]:
    """A message as chat templates take it, whether it is an answer to learn, and the keys that are not used."""
    role_key, content_key = _one_of(given, "role", "from"), _one_of(given, "content", "value")
    named = text_of(given.get(role_key), f"{role_key!r}")
    role = _ROLES.get(named, named)
    message: Message = {"role": role, "content": _text(given.get(content_key))}

    # What belongs to an answer, and to a message of any role.
    honored = _IN_ANSWER if role == "assistant" else _IN_MESSAGE
    ignored = _unused(given, {role_key, content_key, *honored}, _CONTENT_OF_MESSAGE)
    for key in ("name", "tool_call_id", "reasoning_content"):
        if _is_there(given.get(key)):
            message[key] = text_of(given[key], repr(key))
    calls = _objects(given.get("tool_calls"), "'tool_calls'")
    if named == "function_call":
        call = _parsed(message["content"], "a function_call")
        message["content"] = ""
        calls += [{"type": "function", "function": each} for each in (call if isinstance(call, list) else [call])]
    for call in calls:
        function = call.get("function", call)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError("a call must be an object with the name of a function, and its arguments")
    if calls:
        message["tool_calls"] = calls

    # Only answers can count.
    counts = _counts(given)
    if role != "assistant" and counts and (given.get("weight") or given.get("train")):
        raise ValueError(f"only answers are trained on, not a message of the {role}")
    return message, counts and role == "assistant", ignored


def _one_of(message: Mapping[str, Any], *names: str) -> str:
    """Which of two names of the same key a message has; the first if it has neither."""
    found = [name for name in names if name in message]
    if len(found) > 1:
        raise ValueError(f"has {' and '.join(map(repr, found))}; remove one")
    return found[0] if found else names[0]


def _text(content: Any) -> Any:
    """The content of a message; parts that are all texts become one."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, Mapping) else _kind(part)
            raise ValueError(f"a part of its content is {short(kind)}; only 'text' can be used")
    return "".join(text_of(part.get("text"), "a part of its content") for part in content)


def _counts(values: Mapping[str, Any]) -> bool:
    """Whether to train on a row or a message: its weight is 1, or it has none; ``train`` is another name for it."""
    weights = {key: values[key] for key in ("weight", "train") if values.get(key) is not None}
    for key, weight in weights.items():
        if weight not in (0, 1):
            raise ValueError(f"{key!r} is {short(weight)}; allowed: 0 (an answer is context only), 1 (to train on it)")
    if len(set(map(bool, weights.values()))) > 1:
        raise ValueError("'weight' and 'train' contradict each other")
    return all(weights.values())


def _unused(values: Mapping[str, Any], used: Collection[str], content: Collection[str]) -> set[str]:
    """The keys that are not used; one of ``content``, which changes what a model reads or learns, is refused."""
    unused = set()
    for key, value in values.items():
        if key not in used and key not in content:
            unused.add(_printable(key))
        elif key not in used and _is_there(value):
            raise ValueError(f"the key {key!r} cannot be used here, and a model would miss it; remove or convert it")
    return unused


def _objects(value: Any, what: str) -> list[dict[str, Any]]:
    """A list of objects, which may be JSON in a string."""
    value = _parsed(value, what)
    if not _is_there(value):
        return []
    if not isinstance(value, list) or not all(isinstance(each, Mapping) for each in value):
        raise ValueError(f"{what} must be a list of objects")
    return list(value)


def _parsed(value: Any, what: str) -> Any:
    """The value of JSON in a string; any other value as it is."""
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise ValueError(f"{what} is a string, but not valid JSON") from None


def _is_there(value: Any) -> bool:
    """Whether a value is neither missing nor empty."""
    return value is not None and value != [] and value != {} and not (isinstance(value, str) and not value.strip())


def _kind(value: Any) -> str:
    return {"dict": "object", "NoneType": "null"}.get(type(value).__name__, type(value).__name__)


# Rows of a file mostly have the same keys; to find the nearest takes longer than to read a row.
@lru_cache
def _missing(name: str, format: Format, keys: tuple[str, ...], not_null: frozenset[str]) -> str:
    """Which key of a format is missing in a row, and what it has in its place."""
    key = next(key for key in format.required if key not in not_null)
    if key in keys:
        return f"{key!r} is null"
    close = closest(key, keys)
    return f"no {key!r}, which the format {name} needs; " + (f"it has {close!r}" if close else _keys(keys))


@lru_cache
def _fits_no_format(keys: tuple[str, ...], not_null: frozenset[str]) -> str:
    """Why a row fits no format: a key is null or misspelled; else all formats."""
    free = [key for key in keys if not any(key in format.required for format in FORMATS.values())]
    for name, format in FORMATS.items():
        if all(key in keys or closest(key, free) for key in format.required):
            return _missing(name, format, keys, not_null)
    formats = ", ".join(f"{name} ({', '.join(format.required)})" for name, format in FORMATS.items())
    columns = "tasks.messages, or in tasks.prompt and tasks.response"
    return f"fits no format; {_keys(keys)}. The formats are {formats}; or name columns in {columns}"


def _keys(keys: Collection[str], most: int = 12) -> str:
    """The keys of a row, for an error."""
    names = [*map(_printable, keys)][:most] + (["..."] if len(keys) > most else [])
    return f"its keys are {', '.join(names)}" if names else "it has no keys"


def _printable(key: str) -> str:
    return key if key.isprintable() else ascii(key)
