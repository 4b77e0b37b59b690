"""Super-NaturalInstructions v2: one JSON file per task, which also names the type (category) of the task."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal

from adapt_recipes.data.conversations import error_prefix, folder_of, text_of
from adapt_recipes.data.examples import Conversation, RawTask
from adapt_recipes.errors import nearest, warn


def natural_instructions(
    path: str | Path,
    *,
    types: list[str] | None = None,
    group_by: Literal["type", "file"] = "type",
    num_positive_examples: int = 0,
    all_outputs: bool = False,
) -> list[RawTask]:
    """Tasks from a folder in the layout of Super-NaturalInstructions v2 (Wang et al. 2022), ``path/tasks/*.json``.

    The user's message is the definition, an empty line and the input. With positive examples it has the form on which
    the collection's own models were trained (Tk-Instruct). The assistant's message is the output. All texts are
    stripped, and of several definitions the first is used. Empty outputs, which the collection allows, are left out,
    and a warning counts the instances that have no other output.

    Args:
        path: the folder that contains ``tasks/``.
        types: which categories, in which order; None: all, in alphabetical order. A file is in each category it lists.
        group_by: ``type``: one task per category; ``file``: one task per file of these categories, named by its stem
            (each file once, in the order of the types and then of the names).
        num_positive_examples: worked examples of the file before the input; fewer if it has fewer.
        all_outputs: one example for every different output of an instance; false: the first output only.

    Returns:
        The tasks. Their examples are in the order of the files' names, and in a file in the order of its instances.

    Raises:
        ValueError: a folder, file or instance does not have the layout (it is named), or a type is unknown.
    """
    folder = folder_of(path)
    files = sorted((folder / "tasks").glob("*.json"))
    if not files:
        raise ValueError(f"tasks.path: no files {folder}/tasks/*.json")
    if group_by not in ("type", "file"):
        raise ValueError(f"tasks.group_by: {group_by!r} is not allowed{nearest(str(group_by), ('type', 'file'))}")
    if num_positive_examples < 0:
        raise ValueError(f"tasks.num_positive_examples: {num_positive_examples} is not allowed; at least 0")
    by_type, conversations = _read_files(files, types, num_positive_examples, all_outputs)

    # Group by type or by file.
    types = sorted(by_type) if types is None else types
    for name in types:
        if name not in by_type:
            raise ValueError(f"tasks.types: no task in {folder} is of type {name!r}{nearest(name, sorted(by_type))}")
    if not types or len(set(types)) < len(types):
        raise ValueError("tasks.types: name at least one type, and each only once")
    if group_by == "type":
        return [RawTask(name, [each for file in by_type[name] for each in conversations[file]]) for name in types]
    chosen = dict.fromkeys(file for name in types for file in by_type[name])
    return [RawTask(file.stem, conversations[file]) for file in chosen]


def _read_files(
    files: Sequence[Path], types: Collection[str] | None, num_positive_examples: int, all_outputs: bool
) -> tuple[dict[str, list[Path]], dict[Path, list[Conversation]]]:
    """The files of each type, and the conversations of each file that has one of ``types``."""
    by_type: dict[str, list[Path]] = {}
    conversations: dict[Path, list[Conversation]] = {}
    num_empty: dict[Path, int] = {}
    for file in files:
        with error_prefix(str(file)):
            content = _read(file)
            categories = _texts(content, "Categories")
            for category in categories:
                by_type.setdefault(category, []).append(file)
            if types is None or set(categories) & set(types):
                conversations[file], num_empty[file] = _conversations(content, num_positive_examples, all_outputs)
    if of_files := [f"{file.name}: {number}" for file, number in num_empty.items() if number]:
        reason = "instances have only empty outputs and are left out"
        warn(f"tasks.path: {sum(num_empty.values())} {reason} ({', '.join(of_files)})")
    return by_type, conversations


def _read(file: Path) -> Any:
    raw = file.read_bytes()
    if not raw.strip():
        raise ValueError("the file is empty")
    try:
        return json.loads(raw.decode())
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line}: not valid UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno}: not valid JSON ({error.msg})") from None


def _list(content: Any, key: str, *, or_empty: bool = False) -> list[Any]:
    """The list under ``key``; a value that is not a list counts as a list of one."""
    if not isinstance(content, dict):
        raise ValueError(f"must be an object with the key {key!r}, not {type(content).__name__}")
    if key not in content:
        raise ValueError(f"no key {key!r}{nearest(key, content)}")
    values = content[key] if isinstance(content[key], list) else [content[key]]
    if not values and not or_empty:
        raise ValueError(f"{key!r} is an empty list")
    return values


def _texts(content: Any, key: str) -> list[str]:
    """The texts under ``key``, stripped and without duplicates."""
    return list(dict.fromkeys(text_of(value, repr(key)).strip() for value in _list(content, key)))


def _conversations(
    content: dict[str, Any], num_positive_examples: int, all_outputs: bool
) -> tuple[list[Conversation], int]:
    """One conversation per instance, or one per output; and the number of instances with only empty outputs."""
    opening, closing = _texts(content, "Definition")[0] + "\n\n", ""
    if num_positive_examples:
        examples = _list(content, "Positive Examples", or_empty=True)[:num_positive_examples]
        for index, example in enumerate(examples):
            with error_prefix(f"positive example {index}"):
                shown, output = _texts(example, "input")[0], _texts(example, "output")[0]
            opening += f"Positive Example {index + 1} -\nInput: {shown}\nOutput: {output}\n\n"
        opening, closing = f"{opening}Now complete the following example -\nInput: ", "\nOutput:"
    conversations, num_empty = [], 0
    for index, instance in enumerate(_list(content, "Instances")):
        with error_prefix(f"instance {index}"):
            prompt = (opening + _texts(instance, "input")[0] + closing).strip()
            outputs = [output for output in _texts(instance, "output") if output]
            num_empty += not outputs
            for output in outputs[: None if all_outputs else 1]:
                conversations.append([{"role": "user", "content": prompt}, {"role": "assistant", "content": output}])
    return conversations, num_empty
