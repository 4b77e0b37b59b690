"""Which files of a folder are read, and how their rows are found in any form of JSON, and in Parquet."""

from __future__ import annotations

import gzip
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapt_recipes.data.rows import Row, data_files, read_rows

A, B = {"a": 1}, {"b": "é\u2028", "c": [{}]}
LINES = [json.dumps(each, ensure_ascii=False) for each in (A, B)]


def rows_of(tmp_path: Path, raw: bytes, name: str = "t.jsonl") -> list[Row]:
    (tmp_path / name).write_bytes(raw)
    return list(read_rows(tmp_path / name))


def utf8(*parts: str) -> bytes:
    return "".join(parts).encode()


PRETTY = [json.dumps(each, indent=2, ensure_ascii=False) for each in (A, B)]


@pytest.mark.parametrize(
    ("raw", "lines"),
    [
        # A value per line.
        (utf8(LINES[0], "\n", LINES[1]), [1, 2]),
        (utf8("\n", LINES[0], "\r\n \r\n", LINES[1], "\r\n\n"), [2, 4]),
        (b"\xef\xbb\xbf" + utf8(LINES[0], "\n", LINES[1], "\n"), [1, 2]),
        (b"\xef\xbb\xbf" + utf8("\n", LINES[0], "\n", LINES[1], "\n"), [2, 3]),
        # An array.
        (utf8("[", LINES[0], ",", LINES[1], "]"), [1, 1]),
        (b"\xef\xbb\xbf" + utf8("\n[\n", LINES[0], "\n,", LINES[1], ",\n]\n\n"), [3, 4]),
        (utf8(json.dumps([A, B], indent=2, ensure_ascii=False)), [2, 5]),
        # Values over several lines.
        (utf8(*PRETTY), [1, 3]),
        (utf8("\n", PRETTY[0], "\r\n\n", PRETTY[1]), [2, 6]),
    ],
)
@pytest.mark.parametrize("name", ["t.jsonl", "t.json", "t.JSON", "t.jsonl.gz"])
def test_every_form_of_json(tmp_path: Path, raw: bytes, lines: list[int], name: str) -> None:
    rows = rows_of(tmp_path, gzip.compress(raw, mtime=0) if name.endswith("gz") else raw, name)
    assert rows == [Row(lines[0], A), Row(lines[1], B)]


values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=5),
    lambda each: st.lists(each, max_size=3) | st.dictionaries(st.text(max_size=5), each, max_size=3),
    max_leaves=5,
)


# None is empty: an empty object stays in its line, and what follows is read by line.
rows_lists = st.lists(st.dictionaries(st.text(max_size=5), values, min_size=1, max_size=3), min_size=1, max_size=5)


@given(rows_lists, st.booleans())
def test_the_same_rows_in_every_form(
    tmp_path_factory: pytest.TempPathFactory, given: list[Any], ensure_ascii: bool
) -> None:
    folder = tmp_path_factory.mktemp("rows")

    def dumped(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii)

    for text in (
        "\n".join(map(dumped, given)),
        dumped(given),
        dumped(given, indent=1),
        "\n".join(dumped(each, indent=1) for each in given),
    ):
        rows = rows_of(folder, text.encode())
        assert [row.value for row in rows] == given and all(row.error is None for row in rows)
        starts = [row.number for row in rows]
        assert starts == sorted(starts) and starts[-1] <= text.count("\n") + 1


@pytest.mark.parametrize(
    ("raw", "errors"),
    [
        (b"{oops", {1: r"not valid JSON \(Expecting property name enclosed in double quotes at column 2\)"}),
        (b'{"a": 1}\n{"b": 1},\n{"a": 1}', {2: r"not valid JSON \(Extra data at column 9\)"}),
        (b'{"a": "\n{"a": 1}\n"b"}', {1: r"not valid JSON \(Invalid control character at column 8\)", 3: "not"}),
        (b'{"a": 1} {"a": 2}\n{"b": 1}', {1: "not valid JSON .Extra data"}),
        (b'{"a": 1}\n\0\0\n{"a": 1}', {2: r"not valid JSON \(Expecting value at column 1\)"}),
        (b'{"a": 1}\n{"a": "\xff"}', {2: "not valid UTF-8"}),
        (b'\xff\n{"a": 1}', {1: "not valid UTF-8"}),
        (b'{"a": 1}\n' + b'{"a":' * 100_000, {2: r"not valid JSON \(nested too deeply\)"}),
        (b'{"a":' * 100_000, {1: r"not valid JSON \(nested too deeply\)"}),
        (b'{"a": 1}\n{"a": ' + b"1" * 5_000 + b"}", {2: r"not valid JSON \(a number is too long\)"}),
        ('{"a": 1}\n'.encode("utf-16-le"), {1: "not valid JSON", 2: "not valid JSON"}),
    ],
)  # fmt: skip
def test_bad_lines(tmp_path: Path, raw: bytes, errors: dict[int, str]) -> None:
    rows = rows_of(tmp_path, raw)
    assert {row.number for row in rows if row.error} == set(errors)
    for row in rows:
        assert re.match(errors[row.number], row.error) if row.error else row.value


@pytest.mark.parametrize(
    ("name", "raw", "expected"),
    [
        (
            "t.json",
            b'[\n{"a": 1},\n{"a": 2}',
            ", line 3: not valid JSON .the array has no comma or end here.; the rest",
        ),
        (
            "t.json",
            b'[\n{"a": 1},\n',
            ", line 3: not valid JSON .the array has no end.; the rest of the file cannot be",
        ),
        ("t.json", b'[\n{"a": 1}\n{"a": 2}]', ", line 3: not valid JSON .the array has no comma or end here.; "),
        ("t.json", b'[{"a": 1}]\n[{"a": 2}]', ", line 1: not valid JSON .there is text behind the array.; "),
        ("t.json", b"[{\"a\": 1},\n{\n'a'}]", ", line 3: not valid JSON .Expecting property name .* at column 1.; "),
        ("t.json", b'[{"a": 1},\n"\xff"]', ", line 2: not valid UTF-8; "),
        ("t.json", b"[" * 100_000, ", line 1: not valid JSON .nested too deeply.; "),
        ("t.json", b'{\n"a": 1}\n{\n"b": }', ", line 4: not valid JSON .Expecting value at column 6.; "),
        ("t.json", '{"a": 1}'.encode("utf-16"), ", line 1: is UTF-16, not UTF-8; "),
        ("t.json.gz", b'{"a": 1}', ": not a valid gzip file "),
        ("t.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:-9], ": not a valid gzip file "),
        ("t.parquet", b"PAR1", ": not a valid Parquet file "),
    ],
)
def test_a_broken_file(tmp_path: Path, name: str, raw: bytes, expected: str) -> None:
    """What stands behind the error cannot be read, so that the file is refused, not a row."""
    with pytest.raises(ValueError, match=f"^{tmp_path / name}{expected}") as error:
        rows_of(tmp_path, raw, name)
    assert "\n" not in str(error.value)


def test_rows_of_any_length(tmp_path: Path) -> None:
    long = {"a": "x" * 30_000_000}
    assert rows_of(tmp_path, utf8(json.dumps(long), "\n", LINES[0])) == [Row(1, long), Row(2, A)]
    assert rows_of(tmp_path, utf8("[", json.dumps(long), ",\n", LINES[0], "]")) == [Row(1, long), Row(2, A)]


def test_parquet_rows(tmp_path: Path) -> None:
    """A struct has the keys of all rows, null where a row does not have them."""
    rows = [{"a": [{"x": 1}, {"y": {"z": "b"}}], "b": None}, {"a": None, "b": "c"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.PARQUET")
    assert list(read_rows(tmp_path / "t.PARQUET")) == [Row(0, rows[0]), Row(1, rows[1])]


def folder(tmp_path: Path, *names: str) -> Path:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    return tmp_path


def found(path: Path, root: Path) -> dict[str, Any]:
    return {
        task: {split: [str(file.relative_to(root)) for file in files] for split, files in splits.items()}
        for task, splits in data_files(path).items()
    }


def test_the_files_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder(
        tmp_path,
        *("b.jsonl", "b.validation.jsonl", "b.dev.json", "b.test.parquet", "C.JSONL.GZ", "a/b.json", "a/d e/f.parquet"),
        *("p/train-00000-of-00002.parquet", "p/train-00001-of-00002.parquet", "p/val-00000-of-00001.parquet"),
        *("資料\u3000é.jsonl", ".hidden.jsonl", ".cache/x.jsonl", "notes.txt", "a/table.csv"),
    )
    (root / "link").symlink_to(root / "a")
    assert found(root, root) == {
        "C": {"train": ["C.JSONL.GZ"]},
        "a/b": {"train": ["a/b.json"]},
        "a/d e/f": {"train": ["a/d e/f.parquet"]},
        "b": {"train": ["b.jsonl"], "validation": ["b.dev.json", "b.validation.jsonl"], "test": ["b.test.parquet"]},
        "link/b": {"train": ["link/b.json"]},
        "link/d e/f": {"train": ["link/d e/f.parquet"]},
        "p/train": {
            "train": ["p/train-00000-of-00002.parquet", "p/train-00001-of-00002.parquet"],
            "validation": ["p/val-00000-of-00001.parquet"],
        },
        "資料\u3000é": {"train": ["資料\u3000é.jsonl"]},
    }
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.endswith("parquet: a/table.csv, link/table.csv, notes.txt")
    assert found(root / "b.jsonl", root)["b"].keys() == {"train", "validation", "test"}, "beside the file"
    assert found(root / "b.dev.json", root) == {"b.dev": {"train": ["b.dev.json"]}}, "as it is named"


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda root: folder(root, "a.csv"), r"/r has no file that ends in \.jsonl, "),
        (lambda root: folder(root, "a.csv") / "a.csv", r"/r/a.csv does not end in \.jsonl, "),
        (lambda root: root / "nowhere", "no folder .*/r/nowhere$"),
        (lambda root: folder(root, "a.json", "a.jsonl"), "a.json and .*/a.jsonl are both of the task 'a'; rename"),
        (lambda root: folder(root, "a.jsonl", "a.JSONL"), "/a.JSONL and .*/a.jsonl are both of the task 'a'; "),
        (lambda root: folder(root, "a.jsonl", "a-00000-of-00001.jsonl"), "are both of the task 'a'; rename one$"),
        (lambda root: folder(root, "a-00001-of-00003.jsonl"), "jsonl is one of 3 files, and 1 are there$"),
        (lambda root: folder(root, "a.jsonl", "b.val.jsonl"), "is a validation split, and there is no file of 'b'$"),
        (lambda root: folder(root, "x/test.jsonl"), "is a test split, and there is no file of 'x/train'$"),
        (lambda root: folder(root, "u.jsonl/a.txt"), "/u.jsonl is a folder, and its name is that of a file; "),
        (lambda root: folder(root, "a\nb.jsonl"), r"the file name b'.*/a\\nb.jsonl' has a control character"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_data(tmp_path: Path, make: Callable[[Path], Path], expected: str) -> None:
    with pytest.raises(ValueError, match=expected) as error:
        data_files(make(tmp_path / "r"))
    assert str(error.value).startswith("tasks.path: ") and "\n" not in str(error.value)


def test_links_and_names_that_cannot_be_read(tmp_path: Path) -> None:
    (folder(tmp_path, "a.jsonl") / "b.jsonl").symlink_to("nowhere")
    with pytest.raises(ValueError, match="/b.jsonl is a broken link; remove it$"):
        data_files(tmp_path)
    (tmp_path / "b.jsonl").unlink()
    (tmp_path / "circle").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="/circle is a link to a folder that it is in; remove it$"):
        data_files(tmp_path)
    (tmp_path / "circle").unlink()
    os.mkfifo(tmp_path / "c.jsonl")
    with pytest.raises(ValueError, match="/c.jsonl is neither a file nor a folder; remove it$"):
        data_files(tmp_path)
    (tmp_path / "c.jsonl").unlink()
    try:
        (Path(os.fsdecode(bytes(tmp_path) + b"/\xff.jsonl"))).write_text("{}")
    except OSError:
        pytest.skip("the file system takes no such name")
    with pytest.raises(ValueError, match=r"the file name b'.*\\xff.jsonl' has a control character, or"):
        data_files(tmp_path)
