from __future__ import annotations

import json
from pathlib import Path

import pytest

from adapt_recipes.data import jsonl_tasks

GOOD = '{"prompt": "a", "response": "b"}'


def message(role: str, content: object = "x") -> dict[str, object]:
    return {"role": role, "content": content}


def line(*messages: object) -> str:
    return json.dumps({"messages": messages})


def test_both_forms_one_task_a_file(tmp_path: Path) -> None:
    messages = [
        message("system"),
        message("user", ""),
        message("assistant"),
        message("user"),
        message("assistant", "é"),
    ]
    (tmp_path / "b.jsonl").write_text(GOOD + "\n\n" + line(*messages) + "\n")
    (tmp_path / "a.jsonl").write_text(json.dumps({"id": 1, "prompt": "p\u2028", "response": " r"}, ensure_ascii=False))
    (tmp_path / "notes.txt").write_text("no task")
    first, second = jsonl_tasks(tmp_path)
    assert (first.name, second.name) == ("a", "b")
    assert first.conversations == [[message("user", "p\u2028"), message("assistant", " r")]]
    assert second.conversations == [[message("user", "a"), message("assistant", "b")], messages]


@pytest.mark.parametrize(
    ("broken", "expected"),
    [
        ("{oops", r"not valid JSON \(.* at column 2\)$"),
        (b'{"prompt": "\xff", "response": "b"}', "not valid UTF-8$"),
        ("[]", "must be an object with the key 'messages', or 'prompt' and 'response'$"),
        ('{"prompt": "a", "respons": "b"}', r"no 'response'; did you mean 'respons'\?$"),
        ('{"prompt": 1, "response": "b"}', "'prompt' must be a string, not int$"),
        ('{"prompt": "a", "response": " \\n"}', "message 1: the assistant's answer is empty$"),
        ('{"prompt": "\\ud800", "response": "b"}', "'prompt' is not valid Unicode: it contains half a surrogate pair$"),
        ('{"messages": []}', "messages must be a list of .role, content. with at least a user's and an assistant's"),
        ('{"messages": "a"}', "messages must be a list"),
        (line("a"), "message 0 must have the keys role and content$"),
        (line({"role": "user"}), "message 0 must have the keys role and content$"),
        (line(message("user", ["a"])), "the content of message 0 must be a string, not list$"),
        (
            line(message("assistant")),
            r"message 0 has the role 'assistant', expected 'user' \(system only",
        ),
        (line(message("user"), message("user")), "message 1 has the role 'user', expected 'assistant'"),
        (line(message("user"), message("system")), "message 1 has the role 'system', expected 'assistant'"),
        (line(message("system"), message("assistant")), "message 1 has the role 'assistant', expected 'user'"),
        (line(message("user")), "the last message must be the assistant's, not the user's$"),
        (line(message("system")), "the last message must be the assistant's, not the system's$"),
        (line(message("user"), message("assistant", "")), "message 1: the assistant's answer is empty$"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, broken: str | bytes, expected: str) -> None:
    raw = broken if isinstance(broken, bytes) else broken.encode()
    (tmp_path / "quiz.jsonl").write_bytes(GOOD.encode() + b"\n\n" + raw + b"\n" + GOOD.encode())
    with pytest.raises(ValueError, match=expected) as error:
        jsonl_tasks(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / 'quiz.jsonl'}, line 3: ") and "\n" not in str(error.value)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^tasks.path: no folder .*nowhere$"):
        jsonl_tasks(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"^tasks.path: no files .*/\*\.jsonl$"):
        jsonl_tasks(tmp_path)
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"a.jsonl: the file is empty$"):
        jsonl_tasks(tmp_path)
