"""Rows of every format become conversations; what a model would miss is refused."""

from __future__ import annotations

import json
from collections import Counter
from copy import deepcopy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapt_recipes.data import Conversation
from adapt_recipes.data.conversations import answers, checked_conversation
from adapt_recipes.data.formats import FORMATS, RowReader

ORIGIN = ("chat.jsonl, line", 7)
CALL = {"type": "function", "function": {"name": "look", "arguments": {"x": None}}}
TOOL = {"type": "function", "function": {"name": "look"}}
Turn = tuple[str, Any]


def message(role: str, content: Any, **other: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **other}


def chat(*turns: Turn) -> list[dict[str, Any]]:
    return [message(*turn) for turn in turns]


def sharegpt(*turns: Turn) -> list[dict[str, Any]]:
    return [{"from": role, "value": value} for role, value in turns]


ASK, OK = ("user", "q"), ("assistant", "a")
PAIR = chat(ASK, OK)
CALLING = message(*OK, tool_calls=[CALL])
SYSTEM = message("system", "s")


def read(row: Any, used: tuple[str, ...] = (), **columns: str) -> tuple[Conversation, Counter[str]]:
    unused: Counter[str] = Counter()
    return RowReader(**columns).conversation(row, origin=ORIGIN, unused_keys=unused, used=used), unused


def pair(**other: Any) -> dict[str, Any]:
    return {"prompt": "q", "response": "a", **other}


def talk(*messages: Any, **other: Any) -> dict[str, Any]:
    return {"messages": list(messages) or PAIR, **other}


def call(value: str) -> dict[str, Any]:
    return talk(PAIR[0], {"from": "function_call", "value": value})


def parts(*contents: Any) -> dict[str, Any]:
    return talk(message("user", list(contents)), PAIR[1])


def answer(**other: Any) -> dict[str, Any]:
    """A row with an answer of these keys."""
    return talk(PAIR[0], PAIR[1] | other)


@pytest.mark.parametrize(
    ("row", "messages", "supervised"),
    [
        # Each format.
        (talk(), PAIR, (1,)),
        ({"conversations": sharegpt(("human", "q"), ("gpt", "a"))}, PAIR, (1,)),
        ({"instruction": "q", "input": "", "output": "a"}, PAIR, (1,)),
        ({"instruction": "q", "context": "c", "response": "a"}, chat(("user", "q\n\nc"), OK), (1,)),
        (pair(), PAIR, (1,)),
        ({"prompt": "q", "completion": "a<|endoftext|>"}, PAIR, (1,)),
        ({"question": "q", "answer": "a"}, PAIR, (1,)),
        ({"inputs_pretokenized": "q", "targets_pretokenized": "a"}, PAIR, (1,)),
        # Texts are as they are.
        (pair(response=" a<|endoftext|>"), chat(ASK, ("assistant", " a<|endoftext|>")), (1,)),
        ({"prompt": "q ", "completion": " a\n"}, chat(("user", "q "), ("assistant", " a\n")), (1,)),
        # What belongs to the prompt.
        (pair(system="s", history=[["b", "c"]]), [SYSTEM, *chat(("user", "b"), ("assistant", "c")), *PAIR], (2, 4)),
        (pair(system="", system_prompt="s", history=None), [SYSTEM, *PAIR], (2,)),
        (pair(input="i"), chat(("user", "q\n\ni"), OK), (1,)),
        (pair(reasoning_content="r"), [PAIR[0], message(*OK, reasoning_content="r")], (1,)),
        (talk(system="s"), [SYSTEM, *PAIR], (2,)),
        (talk(SYSTEM, *PAIR, system="s"), [SYSTEM, *PAIR], (2,)),
        # Conversational prompts: only the response counts.
        ({"prompt": PAIR + PAIR[:1], "completion": PAIR[1:]}, PAIR + PAIR, (3,)),
        ({"prompt": PAIR[:1], "response": [*PAIR[1:], *PAIR], "system": "s"}, [SYSTEM, *PAIR, *PAIR], (2, 4)),
        # Other names of roles and contents.
        (talk({"role": "human", "value": "q"}, {"from": "chatgpt", "content": "a"}), PAIR, (1,)),
        (parts({"type": "text", "text": "q"}), PAIR, (1,)),
        (parts(*({"type": "text", "text": each} for each in "ab")), chat(("user", "ab"), OK), (1,)),
        # Calls, and what the tools return.
        (
            {"conversations": sharegpt(ASK, ("function_call", json.dumps(CALL["function"])), ("observation", "o"), OK)},
            [PAIR[0], CALLING | {"content": ""}, message("tool", "o"), PAIR[1]],
            (1, 3),
        ),
        (
            talk(PAIR[0], {"from": "function_call", "value": json.dumps([CALL["function"]] * 2), "tool_calls": [CALL]}),
            [PAIR[0], message("assistant", "", tool_calls=[CALL] * 3)],
            (1,),
        ),
        (answer(content=None, tool_calls=[CALL]), [PAIR[0], CALLING | {"content": None}], (1,)),
        (answer(tool_calls=json.dumps([CALL])), [PAIR[0], CALLING], (1,)),
        (
            talk(PAIR[0], CALLING, message("tool", "o", tool_call_id="1", name="look"), PAIR[1]),
            [PAIR[0], CALLING, message("tool", "o", tool_call_id="1", name="look"), PAIR[1]],
            (1, 3),
        ),
        (answer(reasoning_content="r", tool_calls=[], name=None), [PAIR[0], message(*OK, reasoning_content="r")], (1,)),
        # Weights.
        (talk(*PAIR, PAIR[0], message(*OK, weight=0)), PAIR + PAIR, (1,)),
        (talk(PAIR[0], message(*OK, train=False), message(*ASK, weight=0), PAIR[1]), PAIR + PAIR, (3,)),
        (talk(*PAIR, PAIR[0], message(*OK, weight=1.0, train=True)), PAIR + PAIR, (1, 3)),
        (pair(weight=0), PAIR, ()),
        (pair(train=False, weight=None), PAIR, ()),
        (talk(train=True), PAIR, (1,)),
    ],
)  # fmt: skip
def test_a_row(row: dict[str, Any], messages: list[Any], supervised: tuple[int, ...]) -> None:
    conversation, unused = read(row)
    assert conversation == Conversation(messages, supervised, origin=ORIGIN) and not unused


@pytest.mark.parametrize(
    ("tools", "expected"), [([TOOL], [TOOL]), (json.dumps([TOOL]), [TOOL]), ("", None), ("[]", None), ([], None)]
)
def test_tools(tools: Any, expected: Any) -> None:
    for row in (talk(tools=tools), pair(tools=tools)):
        assert read(row)[0].tools == expected


def test_keys_that_are_not_used_are_counted() -> None:
    rows: list[Any] = [pair(id=1, url="u", images=[]), talk(message(*ASK, id=1), PAIR[1], id=None), pair(source="s")]
    reader, unused = RowReader(), Counter[str]()
    for row in rows:
        reader.conversation(row, origin=ORIGIN, unused_keys=unused, used=("source",))
    assert unused == {"id": 2, "url": 1, "messages.id": 1}
    with pytest.raises(ValueError):
        reader.conversation(pair(id=1, response=""), origin=ORIGIN, unused_keys=unused)
    assert unused["id"] == 2, "of rows that are conversations alone"
    assert read(pair(**{"a\nb": 1, "\ud800": 2}))[1] == {r"'a\nb'": 1, r"'\ud800'": 1}, "each in one line"


WITHOUT_PROMPT = {"history": [["q", "a"]], "input": "i", "context": "c", "reasoning_content": "r"}
NOWHERE = {"instruction": "i", "images": ["x"], "image": {"bytes": "x"}, "functions": [TOOL], "tool_calls": [CALL]}
IN_ANSWER = {"images": ["x"], "tools": [TOOL], "system": "s", "function_call": {"name": "f"}, "thinking": "t"}


@pytest.mark.parametrize(
    ("row", "key"),
    [
        *((talk(**{key: value}), key) for key, value in (NOWHERE | WITHOUT_PROMPT).items()),
        *(({"prompt": PAIR[:1], "completion": PAIR[1:], key: value}, key) for key, value in WITHOUT_PROMPT.items()),
        *(({"question": "q", "answer": "a", key: value}, key) for key, value in NOWHERE.items()),
        *((answer(**{key: value}), key) for key, value in IN_ANSWER.items()),
        (talk(message(*ASK, reasoning_content="r"), PAIR[1]), "reasoning_content"),
        (talk(message(*ASK, tool_calls=[CALL]), PAIR[1]), "tool_calls"),
    ],
)
def test_content_that_a_model_would_miss_is_refused(row: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match=f"the key {key!r} cannot be used here, and a model would miss it"):
        read(row)


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        # No object, or no format.
        (3, "must be an object, not int$"),
        (None, "must be an object, not null$"),
        (["a"], "must be an object, not list$"),
        ({}, "fits no format; it has no keys. The formats are messages .messages., sharegpt"),
        ({"text": "a"}, "fits no format; its keys are text. The formats are .*tasks.prompt and tasks.response$"),
        ({str(i): i for i in range(50)}, r"its keys are 0, 1, .*, 11, \.\.\.\. The"),
        ({"question": "q", "response": "a"}, "fits no format; its keys are question, response. "),
        ({"prompt": "q", "respons": "a"}, "no 'response', which the format prompt_response needs; it has 'respons'$"),
        ({"Question": "q", "Answer": "a"}, "no 'question', which the format question_answer needs; it has 'Question'$"),
        ({"prompt": "q", "response": None}, "^'response' is null$"),
        # Two formats.
        (pair(completion="a"), "fits the formats prompt_response and prompt_completion; name one in tasks.format$"),
        (talk(**pair()), "fits the formats messages and prompt_response; "),
        # Texts.
        (pair(prompt=1), "^'prompt' must be a string, not int$"),
        (pair(response=" \n"), "^message 1: the assistant's answer is empty$"),
        (pair(prompt="\ud800"), "^'prompt' is not valid Unicode: it contains half a surrogate pair$"),
        ({"prompt": "q", "completion": "<|endoftext|>"}, "the assistant's answer is empty$"),
        (pair(input=0), "^'input' must be a string, not int$"),
        (pair(input="i", context="c"), "^has 'input' and 'context'; one of them can follow the prompt$"),
        (pair(history="q"), r"^'history' must be a list of \[user, assistant\]$"),
        (pair(history=[["q"]]), r"^'history' must be a list of \[user, assistant\]$"),
        (pair(history=[["q", 1]]), "^a text of 'history' must be a string, not int$"),
        (pair(system=1), "^'system' must be a string, not int$"),
        (talk(SYSTEM, *PAIR, system="t"), "^'system' is not the text of the first message, which is a system message"),
        (pair(system="s", system_prompt="t"), "^'system_prompt' is not the text of the first message"),
        # Messages.
        ({"messages": []}, "^'messages' must be a list of messages, not an empty one$"),
        ({"messages": {"role": ["user"]}}, "^'messages' must be a list of messages, not object$"),
        ({"prompt": PAIR[:1], "completion": "a"}, "^'completion' must be a list of messages, not str$"),
        (talk("a"), "^message 0: must be an object, not str$"),
        (talk({"content": "q"}), "^message 0: 'role' must be a string, not NoneType$"),
        (talk(message(["user"], "q")), "^message 0: 'role' must be a string, not list$"),
        (talk({"role": "user"}, PAIR[1]), "^the content of message 0 must be a string, not NoneType$"),
        (talk(message("user", {"a": 1}), PAIR[1]), "^the content of message 0 must be a string, not dict$"),
        (parts("a"), "^message 0: a part of its content is 'str'; only 'text' can be used$"),
        (parts({"type": "image_url"}), "^message 0: a part of its content is 'image_url'; only 'text'"),
        (parts({"type": "text"}), "^message 0: a part of its content must be a string, not NoneType$"),
        (talk({"from": "human", "role": "user", "value": "q"}), "^message 0: has 'role' and 'from'; remove one$"),
        (talk({"from": "human", "content": "p", "value": "q"}), "^message 0: has 'content' and 'value'; remove one$"),
        (talk(PAIR[1]), r"^message 0 has the role 'assistant', expected 'user' \(system only"),
        (talk(PAIR[0], PAIR[0]), "^message 1 has the role 'user', expected 'assistant'"),
        (talk(PAIR[0], SYSTEM), "^message 1 has the role 'system', expected 'assistant'"),
        (talk(message("developer", "s"), *PAIR), "^message 0 has the role 'developer', expected 'user'"),
        (talk(PAIR[0]), "^the last message must be the assistant's, not the user's$"),
        (talk(PAIR[0], message("assistant", "")), "^message 1: the assistant's answer is empty$"),
        (talk(*PAIR, message("tool", "o"), PAIR[1]), "^message 2 has the role 'tool', expected 'user'"),
        # Tools.
        (pair(tools="{"), "^'tools' is a string, but not valid JSON$"),
        (pair(tools=DEEP), "^'tools' is a string, but not valid JSON$"),
        (pair(tools={"name": "f"}), "^'tools' must be a list of objects$"),
        (answer(tool_calls="[1]"), "^message 1: 'tool_calls' must be a list of objects$"),
        (answer(tool_calls=[{"function": "f"}]), "^message 1: a call must be an object with the name of a function"),
        (call("look()"), "^message 1: a function_call is a string, but not"),
        (call("[{}]"), "^message 1: a call must be an object with the name"),
        (call("3"), "^message 1: a call must be an object with the name"),
        (call(DEEP), "^message 1: a function_call is a string, but not"),
        # Weights.
        (pair(weight=0.5), "^'weight' is 0.5; allowed: 0 .an answer is context only., 1 .to train on it.$"),
        (answer(train="false"), "^message 1: 'train' is 'false'; allowed: 0"),
        (answer(weight=[1]), r"^message 1: 'weight' is \[1\]; allowed: 0"),
        (answer(weight=1, train=False), "^message 1: 'weight' and 'train' contradict each other$"),
        (talk(message(*ASK, train=True), PAIR[1]), "^message 0: only answers are trained on, not a message of the"),
    ],
)  # fmt: skip
def test_a_bad_row(row: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as error:
        read(row)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_a_file_has_one_format() -> None:
    def formats(*rows: dict[str, Any]) -> None:
        reader = RowReader()
        for row in rows:
            reader.conversation(row, origin=ORIGIN, unused_keys=Counter())

    asked = {"question": "q", "answer": "a"}
    formats(pair(), talk(), pair())
    with pytest.raises(
        ValueError, match="^has the format question_answer, and the rows before have the format messages$"
    ):
        formats(talk(), pair(), asked)
    with pytest.raises(
        ValueError, match="^no 'question', which the format question_answer needs; its keys are prompt$"
    ):
        formats(asked, {"prompt": "q"})


@pytest.mark.parametrize(
    ("columns", "row"),
    [
        ({"format": "alpaca"}, {"instruction": "q", "output": "a", "response": "b"}),
        ({"prompt": "ask", "response": "say"}, {"ask": "q", "say": "a", "prompt": "b"}),
        ({"response": "say"}, {"prompt": "q", "say": "a"}),
        ({"messages": "turns"}, {"turns": PAIR, "messages": []}),
        ({"format": "sharegpt", "messages": "turns"}, {"turns": PAIR}),
        ({"format": "prompt_completion", "response": "say"}, {"prompt": "q", "say": "a<|endoftext|>"}),
        ({"prompt": "input", "response": "context"}, {"input": "q", "context": "a"}),
    ],
)
def test_a_format_and_columns_can_be_named(columns: dict[str, str], row: dict[str, Any]) -> None:
    assert read(row, **columns)[0].messages == PAIR


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"format": "alpacca"}, r"^tasks.format: 'alpacca' is not a format; did you mean 'alpaca'\?$"),
        ({"format": "xml"}, f"^tasks.format: 'xml' is not a format; allowed: {', '.join(FORMATS)}$"),
        (
            {"messages": "a", "prompt": "b"},
            "^tasks.messages: is one column, and tasks.prompt and tasks.response are two",
        ),
        ({"format": "messages", "response": "a"}, "^tasks.response: the format messages has no such column$"),
        ({"format": "alpaca", "messages": "a"}, "^tasks.messages: the format alpaca has no such column$"),
        ({"prompt": "a", "response": "a"}, "^tasks.prompt: 'a' is the column of the response as well$"),
    ],
)
def test_columns_that_contradict_each_other(columns: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RowReader(**columns)


def test_a_column_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="^no 'ask', which the format prompt_response needs; it has 'asks'$"):
        read({"asks": "q", "say": "a"}, prompt="ask", response="say")


keys = st.sampled_from(
    [
        "role",
        "from",
        "content",
        "value",
        "tools",
        "tool_calls",
        "weight",
        "train",
        "system",
        "history",
        "input",
        "context",
    ]
    + ["name", "tool_call_id", "reasoning_content", "function", "arguments", "type", "text", "id"]
    + [key for format in FORMATS.values() for key in format.required]
)
scalars = st.none() | st.booleans() | st.integers(0, 2) | st.floats() | st.text(max_size=3)
words = st.sampled_from(
    ["user", "assistant", "gpt", "human", "function_call", "observation", "tool", "text", "[{}]", ""]
)
anything = st.recursive(
    scalars | words, lambda each: st.lists(each, max_size=3) | st.dictionaries(keys, each, max_size=4), max_leaves=12
)
ROWS = [
    talk(PAIR[0], CALLING, message("tool", "o"), PAIR[1], tools=[TOOL]),
    {"conversations": sharegpt(("human", "q"), ("function_call", json.dumps(CALL["function"])))},
    {"prompt": PAIR[:1], "completion": PAIR[1:]},
    *({format.prompt: "q", format.response: "a", "system": "s"} for format in FORMATS.values() if format.response),
]


@st.composite
def changed_rows(draw: st.DrawFn) -> dict[Any, Any]:
    """A good row with up to three values that may be anything, in the row itself or in its messages."""
    row: dict[Any, Any] = deepcopy(draw(st.sampled_from(ROWS)))
    messages = [each for value in row.values() if isinstance(value, list) for each in value]
    for _ in range(draw(st.integers(0, 3))):
        draw(st.sampled_from([row, *messages]))[draw(keys)] = draw(anything)
    return row


@given(changed_rows(), st.sampled_from([None, None, *FORMATS]))
@settings(max_examples=300)
def test_any_row_is_a_conversation_or_refused(row: dict[str, Any], format: str | None) -> None:
    before = repr(row)
    try:
        conversation, _ = read(row, **({} if format is None else {"format": format}))
    except ValueError as error:
        assert str(error) and "\n" not in str(error)
    else:
        assert checked_conversation(conversation) == conversation
        assert set(conversation.supervised) <= set(answers(conversation.messages))
        json.dumps([conversation.messages, conversation.tools])
    assert repr(row) == before, "the row is not changed"
