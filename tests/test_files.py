"""Files and folders are there whole or not at all, and one that is there already stays until then."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from torch import ones

from adapt_recipes.files import NoSpaceLeft, atomic_file, atomic_folder, is_no_space, remove_folder

OLD, NEW = "old", "a new and longer text"
NO_SPACE = [errno.ENOSPC, errno.EDQUOT, errno.EFBIG]

KINDS: dict[str, Callable[[Path], AbstractContextManager[Path]]] = {
    "file": atomic_file,
    "shared file": lambda path: atomic_file(path, shared=True),
    "folder": atomic_folder,
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def put(path: Path, kind: str, text: str) -> None:
    """A file, or a folder with one file in a folder."""
    if kind == "folder":
        path = path / "deeper" / "file"
        path.parent.mkdir(parents=True)
    path.write_text(text)


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def holds(kind: str, text: str) -> dict[str, str]:
    return {"it/deeper/file" if kind == "folder" else "it": text}


@every_kind
@pytest.mark.parametrize("exists", [False, True])
def test_it_takes_its_place_at_the_end_of_the_block(tmp_path: Path, kind: str, exists: bool) -> None:
    path = tmp_path / "it"
    if exists:
        put(path, kind, OLD)
    before = contents(tmp_path)
    with KINDS[kind](path) as partial:
        put(partial, kind, NEW)
        assert partial.parent == tmp_path and partial.name.endswith(".partial")
        assert {name: text for name, text in contents(tmp_path).items() if ".partial" not in name} == before
    assert contents(tmp_path) == holds(kind, NEW) and [path.name for path in tmp_path.iterdir()] == ["it"]


@every_kind
@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), OSError(errno.EIO, "broken")], ids=repr)
def test_a_block_that_fails_changes_nothing(tmp_path: Path, kind: str, exists: bool, error: BaseException) -> None:
    path = tmp_path / "it"
    if exists:
        put(path, kind, OLD)
    before = contents(tmp_path)
    with pytest.raises(type(error)) as caught, KINDS[kind](path) as partial:
        put(partial, kind, NEW)
        raise error
    assert caught.value is error and contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == (["it"] if exists else [])


@every_kind
def test_all_of_it_is_flushed_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    flushed: set[int] = set()
    rename, replace = os.rename, os.replace

    def checked(move: Callable[[Any, Any], None], old: Path, new: Path) -> None:
        if new == tmp_path / "it":
            assert {path.stat().st_ino for path in (old, *old.rglob("*"))} <= flushed
        move(old, new)

    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.add(os.fstat(descriptor).st_ino))
    monkeypatch.setattr(os, "rename", lambda old, new: checked(rename, old, new))
    monkeypatch.setattr(os, "replace", lambda old, new: checked(replace, old, new))
    with KINDS[kind](tmp_path / "it") as partial:
        put(partial, kind, NEW)
    assert contents(tmp_path) == holds(kind, NEW) and flushed


def test_several_processes_write_a_shared_file_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "it"
    with atomic_file(path, shared=True) as one, atomic_file(path, shared=True) as other:
        assert one != other
        one.write_text("one")
        other.write_text("other")
    assert contents(tmp_path) == {"it": "one"}, "the last one to end"


def test_what_an_interruption_has_left_does_not_stand_in_the_way(tmp_path: Path) -> None:
    put(tmp_path / "it.partial", "folder", OLD)
    put(tmp_path / "it.removed", "folder", OLD)
    with atomic_folder(tmp_path / "it") as partial:
        put(partial, "folder", NEW)
    assert contents(tmp_path) == holds("folder", NEW)
    (tmp_path / "file.partial").write_text(NEW + NEW)
    with atomic_file(tmp_path / "file") as partial:
        partial.write_text(NEW)
    assert contents(tmp_path) == holds("folder", NEW) | {"file": NEW}


def test_a_folder_that_is_removed_loses_its_name_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "it", "folder", OLD)
    with monkeypatch.context() as patched:
        patched.setattr("shutil.rmtree", lambda path: pytest.fail(f"killed before {Path(path).name} is removed"))
        with pytest.raises(pytest.fail.Exception, match="it.removed"):
            remove_folder(tmp_path / "it")
    assert not (tmp_path / "it").exists()
    put(tmp_path / "other", "folder", OLD)
    remove_folder(tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["it.removed"]


@every_kind
@pytest.mark.parametrize("number", [*NO_SPACE, errno.EIO])
def test_no_space_is_said_in_one_line(tmp_path: Path, kind: str, number: int) -> None:
    path = tmp_path / "it"
    put(path, kind, OLD)
    with pytest.raises(OSError) as caught, KINDS[kind](path) as partial:
        put(partial, kind, NEW)
        raise OSError(number, os.strerror(number))
    assert isinstance(caught.value, NoSpaceLeft) == (number in NO_SPACE)
    if number in NO_SPACE:
        assert str(caught.value) == f"no space left while writing {path}"
    assert contents(tmp_path) == holds(kind, OLD)


def test_a_cause_that_is_no_space_counts() -> None:
    try:
        try:
            raise OSError(errno.ENOSPC, "full")
        except OSError as error:
            raise RuntimeError("could not save") from error
    except RuntimeError as error:
        assert is_no_space(error)
    assert not is_no_space(RuntimeError("could not save")) and not is_no_space(None)


def test_safetensors_says_it_in_its_own_way(tmp_path: Path) -> None:
    """Without an errno: the number stands in its text."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(Exception, match=f"os error {errno.EFBIG}") as caught:
            save_file({"weight": ones(1 << 12)}, tmp_path / "weights")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert is_no_space(caught.value)
