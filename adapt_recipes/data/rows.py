"""Rows of JSON Lines, JSON and Parquet files, each with its number, and the files of a folder."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow
import pyarrow.parquet

from adapt_recipes.errors import warn

Split = Literal["train", "validation", "test"]
# What the splits are called that are not trained on.
SPLITS: dict[str, Split] = {
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
# The files of one split on the hub: train-00000-of-00002.parquet, in older datasets with a hash behind it.
_SHARD = re.compile(r"-(\d{5}-of-(\d{5}))(-[0-9a-f]{16})?$")
# Control characters, and bytes that are not UTF-8 as Python decodes the names of files.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")
_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"\s*")


class Row(NamedTuple):
    """A row of a file, or why it cannot be read.

    Attributes:
        number: of its line in a JSON file, from 1; of its row in a Parquet file, from 0.
        value: what it holds.
        error: why there is no value; None: there is one.
    """

    number: int
    value: Any
    error: str | None = None


def data_files(path: str | Path) -> dict[str, dict[Split, list[Path]]]:
    """The files of every split of every task in a folder and its subfolders, in alphabetical order.

    ``a/b.jsonl`` is the task ``a/b``; ``a/b.validation.jsonl`` and ``a/b.test.jsonl`` are its other splits, as are
    ``validation.jsonl`` and ``test.jsonl`` those of ``train.jsonl``. Hidden files are ignored; a warning names others
    that are not read.

    Args:
        path: the folder; or a file, which is the only task, with the splits beside it.

    Raises:
        ValueError: there is none, a file cannot be one of data, two are of one task, shards are missing, or a split has
            no task.
    """
    root = Path(path).expanduser()
    if not root.exists():
        raise ValueError(f"tasks.path: no folder {root}")
    if not root.is_dir():
        return _splits_of_file(root)
    by_name: dict[str, list[Path]] = {}
    ignored = []
    for file in walk(root):
        if _ending(file):
            by_name.setdefault(_name(file, root), []).append(file)
        else:
            ignored.append(str(file.relative_to(root)))
    if ignored:
        named = ", ".join(ignored[:5]) + (f" and {len(ignored) - 5} more" if len(ignored) > 5 else "")
        warn(f"tasks.path: {root}: not read, because they do not end in {', '.join(ENDINGS)}: {named}")
    if not by_name:
        raise ValueError(f"tasks.path: {root} has no file that ends in {', '.join(ENDINGS)}")
    for name, files in by_name.items():
        _check_shards(name, files)

    # Tasks before their other splits.
    tasks: dict[str, dict[Split, list[Path]]] = {}
    for name in sorted(by_name, key=lambda name: (_split_of(name)[1] is not None, name)):
        task, split = _split_of(name)
        if split is None:
            tasks[name] = {"train": by_name[name]}
        elif task in tasks:
            tasks[task].setdefault(split, []).extend(by_name[name])
        else:
            raise ValueError(f"tasks.path: {by_name[name][0]} is a {split} split, and there is no file of {task!r}")
    return tasks


def read_rows(file: Path) -> Iterator[Row]:
    """The rows of a file of any of ``ENDINGS``.

    Raises:
        ValueError: the file, or the rest of it, cannot be read; it names the file.
    """
    ending = _ending(file).lower()
    try:
        with open(file, "rb") as raw:
            if ending == ".parquet":
                yield from arrow_rows(pyarrow.parquet.ParquetFile(raw).iter_batches(batch_size=1024))
            elif ending.endswith(".gz"):
                yield from _json(gzip.GzipFile(fileobj=raw))
            else:
                yield from _json(raw)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{file}: not a valid Parquet file ({' '.join(str(error).split())})") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{file}: not a valid gzip file ({error})") from None
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror or error})") from None
    except _Broken as error:
        line, reason = error.args
        raise ValueError(f"{file}, line {line}: {reason}; the rest of the file cannot be read") from None


def arrow_rows(tables: Iterable[pyarrow.RecordBatch | pyarrow.Table]) -> Iterator[Row]:
    """The rows of Arrow tables as they were before: JSON is parsed, and keys that a struct has for other rows left out.

    A struct of Arrow has all keys that one of its column has, null where there was none. Nothing else is decoded, such
    as an image.
    """
    number = 0
    for table in tables:
        types = {field.name: field.type for field in table.schema}
        for row in table.to_pylist():
            yield Row(number, {key: _from_arrow(value, types[key]) for key, value in row.items()})
            number += 1


def walk(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """All files below a folder, without hidden ones, in alphabetical order."""
    above = (*above, folder.resolve())
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise ValueError(f"tasks.path: {folder} cannot be read ({error.strerror})") from None
    for entry in entries:
        path = Path(entry.path)
        if entry.name.startswith("."):
            continue
        if UNPRINTABLE.search(entry.name):
            what = "has a control character, or is not valid UTF-8"
            raise ValueError(f"tasks.path: the file name {os.fsencode(path)!r} {what}; rename it")
        if entry.is_dir():
            if _ending(path):
                raise ValueError(f"tasks.path: {path} is a folder, and its name is that of a file; rename it")
            if path.resolve() in above:
                raise ValueError(f"tasks.path: {path} is a link to a folder that it is in; remove it")
            yield from walk(path, above)
        elif not entry.is_file():
            what = "is a broken link" if entry.is_symlink() else "is neither a file nor a folder"
            raise ValueError(f"tasks.path: {path} {what}; remove it")
        else:
            yield path


def folder_of(path: str | Path) -> Path:
    """``path`` with ``~`` expanded, which has to be a folder."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ValueError(f"tasks.path: no folder {folder}")
    return folder


def _splits_of_file(file: Path) -> dict[str, dict[Split, list[Path]]]:
    """A file to train on, and the other splits beside it."""
    if not _ending(file):
        raise ValueError(f"tasks.path: {file} does not end in {', '.join(ENDINGS)}")
    name = _name(file, file.parent)
    splits: dict[Split, list[Path]] = {"train": [file]}
    for other in sorted(file.parent.iterdir()):
        if _ending(other) and other.is_file() and other != file:
            task, split = _split_of(_name(other, file.parent))
            if task == name and split is not None:
                splits.setdefault(split, []).append(other)
    return {name: splits}


def _ending(file: Path) -> str:
    """The one of ``ENDINGS`` that a name has, in its own spelling; empty if it has none."""
    ending = next((each for each in ENDINGS if file.name.lower().endswith(each)), "")
    return file.name[len(file.name) - len(ending) :] if len(file.name) > len(ending) else ""


def _name(file: Path, root: Path) -> str:
    """The path of a file below ``root``, without its ending and the number of a shard."""
    return _SHARD.sub("", str(file.relative_to(root))[: -len(_ending(file))])


def _split_of(name: str) -> tuple[str, Split | None]:
    """The task of a file's name, and which split it is; None: the one to train on."""
    folder, _, stem = name.rpartition("/")
    task, _, split = stem.rpartition(".")
    if split not in SPLITS:
        return name, None
    return f"{folder}/{task or 'train'}".lstrip("/"), SPLITS[split]


def _check_shards(name: str, files: list[Path]) -> None:
    """Refuses files of one name that are not all shards of one file."""
    shards = [_SHARD.search(file.name[: -len(_ending(file))]) for file in files]
    numbers = [shard[1] for shard in shards if shard]
    if len(files) > 1 and len(set(numbers)) < len(files):
        raise ValueError(f"tasks.path: {files[0]} and {files[1]} are both of the task {name!r}; rename one")
    for shard in shards[:1]:
        if shard and len(numbers) != int(shard[2]):
            raise ValueError(f"tasks.path: {files[0]} is one of {int(shard[2])} files, and {len(numbers)} are there")


def _from_arrow(value: Any, type: pyarrow.DataType) -> Any:
    if isinstance(type, pyarrow.JsonType) and isinstance(value, str):
        return json.loads(value)
    if pyarrow.types.is_struct(type) and isinstance(value, dict):
        present = ((field, value[field.name]) for field in type if value[field.name] is not None)
        return {field.name: _from_arrow(each, field.type) for field, each in present}
    if isinstance(value, list) and hasattr(type, "value_type"):
        return [_from_arrow(each, type.value_type) for each in value]
    return value


class _Broken(Exception):
    """Line and reason why the rest of a file cannot be read."""


def _json(file: io.BufferedIOBase) -> Iterator[Row]:
    """The rows of an open file: a value per line; or an array of them, or values over several lines."""
    head = file.read(3)
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise _Broken(1, "is UTF-16, not UTF-8")
    start = 3 if head == codecs.BOM_UTF8 else 0
    file.seek(start)
    first = next((line for line in file if line.strip()), b"")
    is_array = first.lstrip().startswith(b"[")
    file.seek(start)
    if is_array or (_parsed(0, first).error and _spans_lines(file.read())):
        file.seek(start)
        yield from _values(file.read(), is_array)
        return
    file.seek(start)
    # Bytes, so that only \n ends a line.
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield _parsed(number, line)


def _parsed(number: int, line: bytes) -> Row:
    """The value in a line."""
    try:
        return Row(number, json.loads(line.decode()))
    except (ValueError, RecursionError) as error:
        return Row(number, None, _reason(error))


def _spans_lines(raw: bytes) -> bool:
    """Whether a file begins with a value that does not end in its line."""
    try:
        text = raw.decode()
        start = after_space(text, 0)
        return "\n" in text[start : _DECODER.raw_decode(text, start)[1]]
    except (ValueError, RecursionError):
        return False


def _values(raw: bytes, is_array: bool) -> Iterator[Row]:
    """The elements of an array, or values that follow each other, each with the line in which it begins."""
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise _Broken(raw.count(b"\n", 0, error.start) + 1, _reason(error)) from None
    line, counted, position = 1, 0, after_space(text, 0)
    if is_array:
        position = after_space(text, position + 1)
    while position < len(text) and not (is_array and text[position] == "]"):
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, position = _DECODER.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise _Broken(getattr(error, "lineno", line), _reason(error)) from None
        yield Row(line, value)
        position = after_space(text, position)
        # A comma behind the last element does no harm.
        if is_array and text[position : position + 1] == ",":
            position = after_space(text, position + 1)
        elif is_array and text[position : position + 1] != "]":
            raise _Broken(text.count("\n", 0, position) + 1, "not valid JSON (the array has no comma or end here)")
    if is_array and (position == len(text) or after_space(text, position + 1) < len(text)):
        where = "the array has no end" if position == len(text) else "there is text behind the array"
        raise _Broken(text.count("\n", 0, position) + 1, f"not valid JSON ({where})")


def after_space(text: str, position: int) -> int:
    """The position of the next character that is no white space."""
    match = _SPACE.match(text, position)
    assert match
    return match.end()


def _reason(error: Exception) -> str:
    """Why a text is no JSON."""
    if isinstance(error, UnicodeDecodeError):
        return "not valid UTF-8"
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON ({error.msg.removesuffix(' at')} at column {error.colno})"
    # Python refuses numbers of more than 4,300 digits.
    return f"not valid JSON ({'nested too deeply' if isinstance(error, RecursionError) else 'a number is too long'})"
