"""Super-NaturalInstructions v2: one JSON file per task, which also names the type (category) of the task."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from adapt_recipes.data.conversations import error_prefix, text_of
from adapt_recipes.data.examples import BadRow, Conversation, RawTask
from adapt_recipes.data.rows import folder_of, walk
from adapt_recipes.errors import closest, nearest, warn


def natural_instructions(
    path: str | Path,
    *,
    types: list[str] | None = None,
    task_per: Literal["type", "file"] = "type",
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
        task_per: ``type``: one task per category; ``file``: one task per file of these categories, named by its stem
            (each file once, in the order of the types and then of the names).
        num_positive_examples: worked examples of the file before the input; fewer if it has fewer.
        all_outputs: one example for every different output of an instance; false: the first output only.

    Returns:
        The tasks. Their examples are in the order of the files' names, and in a file in the order of its instances.

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
    by_type, read = _read_files(files, types, num_positive_examples, all_outputs)

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
    return [
        RawTask(
            name,
            [each for file in files for each in read[file].conversations],
            bad_rows=[each for file in files for each in read[file].bad_rows],
        )
        for name, files in files_of.items()
    ]


class _Instances(NamedTuple):
    """The instances of a file; ``num_empty`` have only empty outputs."""

    conversations: list[Conversation]
    bad_rows: list[BadRow]
    num_empty: int


def _read_files(
    files: Sequence[Path], types: Collection[str] | None, num_positive_examples: int, all_outputs: bool
) -> tuple[dict[str, list[Path]], dict[Path, _Instances]]:
    """The files of each type, and the instances of each file that has one of ``types``."""
    by_type: dict[str, list[Path]] = {}
    read: dict[Path, _Instances] = {}
    for file in files:
        with error_prefix(str(file)):
            content = _read(file)
            categories = _texts(content, "Categories")
            if "" in categories:
                raise ValueError("a category is blank")
            for category in categories:
                by_type.setdefault(category, []).append(file)
            if types is None or set(categories) & set(types):
                read[file] = _instances(file, content, num_positive_examples, all_outputs)
    if of_files := [f"{file.name}: {each.num_empty}" for file, each in read.items() if each.num_empty]:
        number = sum(each.num_empty for each in read.values())
        named = ", ".join(of_files[:5]) + (f", and {len(of_files) - 5} more files" if len(of_files) > 5 else "")
        warn(f"tasks.path: instances with only empty outputs, which are left out: {number:,} ({named})")
    return by_type, read


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


def _instances(file: Path, content: dict[str, Any], num_positive_examples: int, all_outputs: bool) -> _Instances:
    """One conversation per instance, or one per output."""
    opening, closing = _texts(content, "Definition")[0] + "\n\n", ""
    if num_positive_examples:
        examples = _list(content, "Positive Examples", or_empty=True)[:num_positive_examples]
        for index, example in enumerate(examples):
            with error_prefix(f"positive example {index}"):
                shown, output = _texts(example, "input")[0], _texts(example, "output")[0]
            opening += f"Positive Example {index + 1} -\nInput: {shown}\nOutput: {output}\n\n"
        opening, closing = f"{opening}Now complete the following example -\nInput: ", "\nOutput:"
    conversations: list[Conversation] = []
    bad_rows, num_empty, source = [], 0, f"{file}, instance"
    for index, instance in enumerate(_list(content, "Instances")):
        try:
            prompt = (opening + _texts(instance, "input")[0] + closing).strip()
            outputs = [output for output in _texts(instance, "output", or_empty=True) if output]
        except ValueError as error:
            bad_rows.append(BadRow(source, index, str(error)))
            continue
        num_empty += not outputs
        for output in outputs[: None if all_outputs else 1]:
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": output}]
            conversations.append(Conversation(messages, supervised=(1,), origin=(source, index)))
    return _Instances(conversations, bad_rows, num_empty)
