"""Sources of several tasks become one task each."""

from __future__ import annotations

from typing import Any

import pytest

from adapt_recipes.data import Conversation, RawTask, task_per_source
from adapt_recipes.data.examples import BadRow


def rows(*texts: str) -> list[Conversation]:
    turns = [[{"role": "user", "content": text}, {"role": "assistant", "content": text}] for text in texts]
    return [Conversation(messages, (1,), origin=("file, line", i)) for i, messages in enumerate(turns)]


BAD = [BadRow("file, line", i, "bad") for i in range(3)]
FIRST = RawTask("a", rows("1", "2"), entropy=0.5, memorized=True, bad_rows=BAD[:1], unused_keys={"id": 2, "url": 1})
SECOND = RawTask("b", rows("3"), rows("4"), rows("5"), bad_rows=BAD[1:], unused_keys={"id": 1})
THIRD = RawTask("c", rows("6"), rows("7"), memorized=True)


def test_the_rows_of_all_tasks_of_a_source() -> None:
    alone, joined, validated = task_per_source(x=[FIRST], y=[FIRST, SECOND, THIRD], z=[FIRST, THIRD])
    assert alone == RawTask(**{**vars(FIRST), "name": "x", "bad_rows": BAD[:1]})
    assert joined == RawTask(
        "y",
        [*FIRST.conversations, *SECOND.conversations, *THIRD.conversations],
        rows("4") + rows("7"),
        rows("5"),
        bad_rows=BAD,
        unused_keys={"id": 3, "url": 1},
    )
    assert validated.validation == rows("7") and validated.test is None and validated.memorized


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({}, "^there is no source; "),
        ({"x": "path"}, "^x: must be a node with a _component_ that returns tasks$"),
        ({"x": [FIRST], "y": [3]}, "^y: must be a node with a _component_ that returns tasks$"),
        ({"x": {"path": "a"}}, "^x: must be a node with a _component_ that returns tasks$"),
    ],
)
def test_what_is_no_source(sources: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task_per_source(**sources)
