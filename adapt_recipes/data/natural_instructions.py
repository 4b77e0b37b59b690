"""Super-NaturalInstructions v2: one JSON file per task, which also names the type (category) of the task."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

from adapt_recipes.data.conversations import error_prefix, text_of
from adapt_recipes.data.examples import Conversation
from adapt_recipes.data.rows import after_space, folder_of, walk
from adapt_recipes.data.source_files import FileRow, FileTask, SourceFile
from adapt_recipes.errors import closest, nearest

_DECODER = json.JSONDecoder()
# Bytes of a file in which its categories are looked for.
_BEGINNING = 1 << 16


def natural_instructions(
    path: str | Path,
    *,
    types: list[str] | None = None,
    task_per: Literal["type", "file"] = "type",
    num_positive_examples: int = 0,
    all_outputs: bool = False,
) -> list[FileTask]:
    """Tasks from a folder in the layout of Super-NaturalInstructions v2 (Wang et al. 2022), ``path/tasks/*.json``.

    The user's message is the definition, an empty line and the input. With positive examples it has the form on which
    the collection's own models were trained (Tk-Instruct). The assistant's message is the output. All texts are
    stripped, and of several definitions the first is used. Empty outputs, which the collection allows, are left out,
    and a warning counts the instances that have no other output.

    Args:
        path: the folder that contains ``tasks/``.
        types: which categories, in which order; None: all, in alphabetical order. A file is in each category it lists.
        task_per: ``type``: one task per category; ``file``: one task per file of these categories, named by its stem
            (each file once, in the order of the types and then of the names).
        num_positive_examples: worked examples of the file before the input; fewer if it has fewer.
        all_outputs: one example for every different output of an instance; false: the first output only.

    Returns:
        The tasks, whose files are read when their rows are asked for. Their examples are in the order of the files'
        names, and in a file in the order of its instances.

    Raises:
        ValueError: a folder, file or instance does not have the layout (it is named), or a type is unknown.
    """
    folder = folder_of(path) / "tasks"
    files = [file for file in walk(folder) if file.suffix == ".json"] if folder.is_dir() else []
    if not files:
        raise ValueError(f"tasks.path: no files {folder}/*.json")
    if task_per not in ("type", "file"):
        raise ValueError(f"tasks.task_per: {task_per!r} is not allowed{nearest(str(task_per), ('type', 'file'))}")
    if num_positive_examples < 0:
        raise ValueError(f"tasks.num_positive_examples: {num_positive_examples} is not allowed; at least 0")
    by_type: dict[str, list[Path]] = {}
    for file in files:
        with error_prefix(str(file)):
            for category in _categories(file):
                by_type.setdefault(category, []).append(file)

    # A task per type, or per file.
    types = sorted(by_type) if types is None else types
    for name in types:
        if name not in by_type:
            raise ValueError(f"tasks.types: no task in {path} is of type {name!r}{nearest(name, sorted(by_type))}")
    if not types or len(set(types)) < len(types):
        raise ValueError("tasks.types: name at least one type, and each only once")
    if task_per == "type":
        files_of = {name: by_type[name] for name in types}
    else:
        chosen = dict.fromkeys(file for name in types for file in by_type[name])
        files_of = {str(file.relative_to(folder).with_suffix("")): [file] for file in chosen}
    reader = partial(_rows, num_positive_examples=num_positive_examples, all_outputs=all_outputs)
    return [
        FileTask(name, [SourceFile(file, reader, f"{file}, instance") for file in files])
        for name, files in files_of.items()
    ]


def _categories(file: Path) -> list[str]:
    """The categories of a file, of which no more is read than its beginning if they are there."""
    found = _from_beginning(file, "Categories")
    content = {"Categories": found} if found is not None else _read(file)
    categories = _texts(content, "Categories")
    if "" in categories:
        raise ValueError("a category is blank")
    return categories


def _from_beginning(file: Path, key: str) -> Any:
    """The value of a key in the beginning of a file; None if it is not found there."""
    try:
        with open(file, "rb") as opened:
            # Incremental, because part of a character may be at the end.
            text = codecs.getincrementaldecoder("utf-8-sig")().decode(opened.read(_BEGINNING))
        position, separator = after_space(text, 0), "{"
        while text[position : position + 1] == separator:
            name, position = _DECODER.raw_decode(text, after_space(text, position + 1))
            position = after_space(text, position)
            if text[position : position + 1] != ":":
                return None
            value, position = _DECODER.raw_decode(text, after_space(text, position + 1))
            if name == key:
                return value
            position, separator = after_space(text, position), ","
    except (OSError, ValueError, RecursionError):
        # What is wrong is said when the whole file is read.
        pass
    return None


def _rows(file: Path, *, num_positive_examples: int, all_outputs: bool) -> Iterator[FileRow]:
    """What is in a file."""
    with error_prefix(str(file)):
        yield from _instances(_read(file), num_positive_examples, all_outputs)


def _read(file: Path) -> Any:
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from None
    if not raw.strip():
        raise ValueError("the file is empty")
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line}: not valid UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno}: not valid JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else "a number is too long"
        raise ValueError(f"not valid JSON ({why})") from None


def _list(content: Any, key: str, *, or_empty: bool = False) -> list[Any]:
    """The list under ``key``; a value that is not a list counts as a list of one."""
    if not isinstance(content, dict):
        raise ValueError(f"must be an object with the key {key!r}, not {type(content).__name__}")
    if key not in content:
        close = closest(key, list(content))
        raise ValueError(f"no key {key!r}" + (f"; it has {close!r}" if close else ""))
    values = content[key] if isinstance(content[key], list) else [content[key]]
    if not values and not or_empty:
        raise ValueError(f"{key!r} is an empty list")
    return values


def _texts(content: Any, key: str, *, or_empty: bool = False) -> list[str]:
    """The texts under ``key``, stripped and without duplicates."""
    values = _list(content, key, or_empty=or_empty)
    return list(dict.fromkeys(text_of(value, repr(key)).strip() for value in values))


def _instances(content: dict[str, Any], num_positive_examples: int, all_outputs: bool) -> Iterator[FileRow]:
    """One conversation per instance, or one per output."""
    opening, closing = _texts(content, "Definition")[0] + "\n\n", ""
    if num_positive_examples:
        examples = _list(content, "Positive Examples", or_empty=True)[:num_positive_examples]
        for index, example in enumerate(examples):
            with error_prefix(f"positive example {index}"):
                shown, output = _texts(example, "input")[0], _texts(example, "output")[0]
            opening += f"Positive Example {index + 1} -\nInput: {shown}\nOutput: {output}\n\n"
        opening, closing = f"{opening}Now complete the following example -\nInput: ", "\nOutput:"
    for index, instance in enumerate(_list(content, "Instances")):
        try:
            prompt = (opening + _texts(instance, "input")[0] + closing).strip()
            outputs = tuple(output for output in _texts(instance, "output", or_empty=True) if output)
        except ValueError as error:
            yield FileRow(index, error=str(error))
            continue
        if not outputs:
            yield FileRow(index, is_empty=True)
        for output in outputs[: None if all_outputs else 1]:
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": output}]
            yield FileRow(index, Conversation(messages, supervised=(1,), references=outputs))
