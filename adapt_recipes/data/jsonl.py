"""Tasks from a folder with one JSON Lines file per task."""

from __future__ import annotations

import json
from pathlib import Path

from adapt_recipes.data.conversations import conversation_of, error_prefix, folder_of
from adapt_recipes.data.examples import Conversation, RawTask


def jsonl_tasks(path: str | Path) -> list[RawTask]:
    """One task for every ``path/NAME.jsonl``, called NAME, in alphabetical order.

    A line is ``{"messages": [{"role": ..., "content": ...}, ...]}`` or ``{"prompt": ..., "response": ...}``. Other keys
    are ignored, and so are empty lines.

    Raises:
        ValueError: there is no folder or no file, a file is empty, or a line is malformed; it names file and line.
    """
    folder = folder_of(path)
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise ValueError(f"tasks.path: no files {folder}/*.jsonl")
    return [RawTask(file.stem, _conversations(file)) for file in files]


def _conversations(file: Path) -> list[Conversation]:
    conversations = []
    # Bytes: so only \n ends a line, and an encoding error has a line number.
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                with error_prefix(f"{file}, line {number}"):
                    try:
                        record = json.loads(line.decode())
                    except UnicodeDecodeError:
                        raise ValueError("not valid UTF-8") from None
                    except json.JSONDecodeError as error:
                        raise ValueError(f"not valid JSON ({error.msg} at column {error.colno})") from None
                    conversations.append(conversation_of(record))
    if not conversations:
        raise ValueError(f"{file}: the file is empty")
    return conversations
