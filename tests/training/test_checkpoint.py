"""A checkpoint is whole or absent, whatever happens while it is written, and what it holds is what was saved.

On one process; ``test_checkpoint_processes.py`` has several.
"""

from __future__ import annotations

import errno
import functools
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.optim import AdamW8bit

from adapt_recipes.files import NoSpaceLeft
from adapt_recipes.training import checkpoint
from adapt_recipes.training.checkpoint import Checkpoints


@pytest.fixture(autouse=True)
def unflushed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here goes as far as a power failure, and flushing takes longer than all the rest."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


FILES = (".metadata", "__0_0.distcp", "checksums.json", "shared.pt")


def checkpoints(folder: Path, *, keep: int = 1, asynchronous: bool = False) -> Checkpoints:
    return Checkpoints(folder, keep=keep, asynchronous=asynchronous)


def small(value: float = 0.0, size: int = 10) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model that is one number everywhere, and its optimizer's state as well."""
    model = nn.Linear(size, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for parameter in model.parameters():
        nn.init.constant_(parameter, value)
        optimizer.state[parameter]["momentum_buffer"] = torch.full_like(parameter, value)
    return model, optimizer


def save(folder: Path, step: int, *, value: float | None = None, keep: int = 1, size: int = 10) -> None:
    value = step if value is None else value
    checkpoints(folder, keep=keep).save(step, *small(value, size), shared={"value": value}, own=value)


def assert_whole(folder: Path) -> tuple[int, float]:
    """The newest checkpoint is what ``save`` saved. Returns its step and value."""
    store = checkpoints(folder)
    saved = store.newest()
    assert saved is not None
    value = saved.shared["value"]
    model = nn.Linear(saved_size(saved.folder), 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    store.load(saved, model, optimizer)
    for parameter in model.parameters():
        assert (parameter == value).all() and (optimizer.state[parameter]["momentum_buffer"] == value).all()
    assert saved.own == [value]
    return saved.step, value


def saved_size(folder: Path) -> int:
    metadata = checkpoint.dcp.FileSystemReader(folder).read_metadata()
    return metadata.state_dict_metadata["model.weight"].size[1]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- what is saved is loaded


class Model(nn.Module):
    """With whatever may make trouble: a parameter that no loss reads, a buffer, an odd dtype, and what is asked for."""

    def __init__(self, *, tied: bool = False, frozen: bool = False, width: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, width)
        self.hidden = nn.Linear(width, width)
        self.output = nn.Linear(width, 16, bias=False)
        self.unused = nn.Parameter(torch.randn(3))
        self.bf16 = nn.Parameter(torch.randn(width, dtype=torch.bfloat16))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        if tied:
            self.output.weight = self.embedding.weight
        self.embedding.requires_grad_(not frozen)

    def forward(self, tokens: Tensor) -> Tensor:
        self.calls += 1
        return self.output(torch.tanh(self.hidden(self.embedding(tokens))) * self.bf16)


class Odd(torch.optim.Optimizer):
    """Keeps what optimizers seldom keep."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": torch.tensor(0.1), "pair": (1, None)})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                state = self.state[parameter]
                state["count"] = state.get("count", 0) + 1
                state["nothing"] = None
                state["sums"] = {"gradient": state.get("sums", {}).get("gradient", 0) + parameter.grad}
                parameter -= self.param_groups[0]["lr"] * state["sums"]["gradient"] / state["count"]


def two_groups(model: nn.Module) -> torch.optim.Optimizer:
    weights = list(model.parameters())
    groups = [{"params": weights[1:], "weight_decay": 0.5}, {"params": weights[:1], "lr": 0.02, "betas": (0.5, 0.6)}]
    return torch.optim.AdamW(groups, lr=0.1)


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "adamw, two groups": two_groups,
    "adam, amsgrad": lambda model: torch.optim.Adam(model.parameters(), lr=0.1, amsgrad=True, weight_decay=0.5),
    "adafactor": lambda model: torch.optim.Adafactor(model.parameters(), lr=0.1),
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5),
    "sgd, momentum": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.5),
    "odd": lambda model: Odd(model.parameters()),
    "8 bit": lambda model: AdamW8bit(model.parameters(), lr=0.1, weight_decay=0.5),
}


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchao's optimizers compile their step, which takes a compiler and long."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        tokens = torch.randint(0, 16, (2, 5), generator=torch.Generator().manual_seed(step))
        F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def bits(value: Any) -> Any:
    """Nested containers with, for every tensor, all that it is."""
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(bits, value))
    if isinstance(value, Tensor) and hasattr(value, "codes"):
        return type(value), bits(value.codes), bits(value.scale), value.signed
    if isinstance(value, Tensor):
        return type(value), value.dtype, value.shape, value.detach().contiguous().view(-1).view(torch.uint8).tolist()
    return value


def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    return bits([model.state_dict(), optimizer.state_dict()])


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("structure", [{}, {"tied": True}, {"frozen": True}], ids=["plain", "tied", "frozen"])
def test_training_goes_on_to_the_bit(tmp_path: Path, kind: str, structure: dict[str, bool]) -> None:
    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = Model(**structure, width=64 if kind == "8 bit" else 4)
        return model, OPTIMIZERS[kind](model)

    model, optimizer = build()
    train(model, optimizer, range(3))
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"] * 0.7
    before = state(model, optimizer)
    checkpoints(tmp_path).save(3, model, optimizer, shared={}, own=None)
    assert state(model, optimizer) == before, "saving changes nothing"
    if kind == "8 bit":
        assert "OptimState8bit" in str(before)

    resumed = build()
    assert state(*resumed) != before
    saved = checkpoints(tmp_path).newest()
    assert saved is not None
    checkpoints(tmp_path).load(saved, *resumed)
    assert state(*resumed) == before
    assert all(parameter.grad is None for parameter in resumed[0].parameters())
    train(model, optimizer, range(3, 6))
    train(*resumed, range(3, 6))
    assert state(*resumed) == state(model, optimizer) != before


def test_weights_that_are_views_are_saved_as_small_as_they_are(tmp_path: Path) -> None:
    model = nn.Linear(10, 1, bias=False)
    model.weight = nn.Parameter(torch.arange(1_000_000.0)[None, :10])
    checkpoints(tmp_path).save(1, model, torch.optim.SGD(model.parameters()), shared={}, own=None)
    assert (tmp_path / "step_1" / "__0_0.distcp").stat().st_size < 10_000


def test_what_is_shared_and_what_is_its_own_come_back(tmp_path: Path) -> None:
    shared = {"names": ["a", None], "share": 0.5, "pair": (1, 2), "nested": {"weights": torch.arange(3.0)}}
    path = tmp_path / "run" / "checkpoints"
    assert checkpoints(path).newest() is None
    checkpoints(path).save(3, *small(), shared=shared, own={"seed": 1})
    saved = checkpoints(path).newest()
    assert saved is not None
    assert (saved.folder, saved.step) == (path / "step_3", 3)
    assert bits(saved.shared) == bits(shared) and saved.own == [{"seed": 1}]


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (lambda: nn.Linear(11, 1), "Size mismatch"),
        (lambda: nn.Linear(10, 1, bias=False), "bias"),
        (lambda: nn.ModuleDict({"another": nn.Linear(10, 1)}), "weight"),
    ],
)
def test_another_model_is_refused(tmp_path: Path, other: Callable[[], nn.Module], reason: str) -> None:
    save(tmp_path, 1)
    saved = checkpoints(tmp_path).newest()
    model = other()
    assert saved is not None
    match = (
        rf"^checkpoint {saved.folder}, written by 1 process, cannot be loaded .* on 1 process: [^\n]*{reason}[^\n]*\Z"
    )
    with pytest.raises(ValueError, match=match):
        checkpoints(tmp_path).load(saved, model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_another_optimizer_is_refused(tmp_path: Path, momentum: float) -> None:
    model, _ = small()
    optimizer = torch.optim.AdamW(model.parameters()) if momentum else torch.optim.SGD(model.parameters())
    save(tmp_path, 1)
    saved = checkpoints(tmp_path).newest()
    assert saved is not None
    with pytest.raises(
        ValueError, match=r"^checkpoint .* cannot be loaded into this model and optimizer on 1 process: "
    ):
        checkpoints(tmp_path).load(saved, model, optimizer)


# ---- which ones there are


def test_the_newest_is_by_number_and_the_oldest_beyond_keep_go(tmp_path: Path) -> None:
    for step in (2, 8, 9, 10, 100):
        save(tmp_path, step, keep=3)
    assert names(tmp_path) == ["step_10", "step_100", "step_9"]
    assert assert_whole(tmp_path) == (100, 100)
    save(tmp_path, 101, keep=1)
    assert names(tmp_path) == ["step_101"]
    for step in (102, 103):
        save(tmp_path, step, keep=3)
    checkpoints(tmp_path, keep=2).clean()
    assert names(tmp_path) == ["step_102", "step_103"], "a removal that was interrupted is made up for"
    assert names(tmp_path / "step_103") == sorted(FILES)


def test_a_step_saved_again_is_replaced(tmp_path: Path) -> None:
    save(tmp_path, 5)
    save(tmp_path, 5, value=0.5)
    assert assert_whole(tmp_path) == (5, 0.5) and names(tmp_path) == ["step_5"]


def test_what_interruptions_leave_is_ignored_and_cleared_away(tmp_path: Path) -> None:
    save(tmp_path, 1)
    for leftover in ("step_2.partial", "step_0.removed", "step_1.replaced"):
        shutil.copytree(tmp_path / "step_1", tmp_path / leftover)
        (tmp_path / leftover / "shared.pt").unlink()
    (tmp_path / "notes").mkdir()
    (tmp_path / "step_9").write_text("not a folder")
    assert assert_whole(tmp_path) == (1, 1)
    checkpoints(tmp_path).clean()
    assert names(tmp_path) == ["notes", "step_1", "step_9"]
    checkpoints(tmp_path / "nowhere").clean()
    for leftover in ("step_2.partial", "step_3.partial"):
        shutil.copytree(tmp_path / "step_1", tmp_path / leftover)
        (tmp_path / leftover / "__7_0.distcp").touch()
    save(tmp_path, 3, keep=2)
    assert names(tmp_path) == ["notes", "step_1", "step_3", "step_9"] and names(tmp_path / "step_3") == sorted(FILES)


def test_a_replaced_one_counts_until_the_new_one_has_its_name(tmp_path: Path) -> None:
    save(tmp_path, 1)
    os.rename(tmp_path / "step_1", tmp_path / "step_1.replaced")
    assert assert_whole(tmp_path) == (1, 1)
    checkpoints(tmp_path).clean()
    assert names(tmp_path) == ["step_1"]
    assert assert_whole(tmp_path) == (1, 1)


def test_everything_is_flushed_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[int] = []
    ever: set[int] = set()
    rename = os.rename

    def noted(descriptor: int) -> None:
        flushed.append(os.fstat(descriptor).st_ino)
        ever.add(flushed[-1])

    def checked(old: Path, new: Path) -> None:
        if Path(new).name == "step_2":
            assert {path.stat().st_ino for path in (old, *Path(old).iterdir())} <= set(flushed)
            assert flushed[-1] == old.stat().st_ino, "the folder last: it names the files"
            flushed.clear()
        rename(old, new)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "rename", checked)
    save(tmp_path, 2)
    assert flushed[0] == tmp_path.stat().st_ino
    (tmp_path / "run").mkdir()
    save(tmp_path / "run" / "checkpoints", 2)
    assert (tmp_path / "run").stat().st_ino in ever, "which names the folder of checkpoints"


def test_a_failure_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with pytest.raises((AttributeError, TypeError)):
        checkpoints(tmp_path).save(2, *small(), shared={"function": lambda: None}, own=None)
    assert names(tmp_path) == ["step_1"]


# ---- damage


def flip(file: Path, place: float) -> None:
    content = bytearray(file.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1 << 4
    file.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "missing": Path.unlink,
    "empty": lambda file: file.write_bytes(b""),
    "shorter": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
    "first bit": lambda file: flip(file, 0),
    "a bit in the middle": lambda file: flip(file, 0.5),
    "last bit": lambda file: flip(file, 1),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", FILES)
def test_the_one_before_a_damaged_one_serves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, damage: str
) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, keep=3)
    for step in (2, 3):
        DAMAGE[damage](tmp_path / f"step_{step}" / file)
    before = names(tmp_path)
    store = checkpoints(tmp_path)
    saved = store.newest()
    assert saved is not None and saved.step == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: damaged checkpoints in {tmp_path}: step_3 (") and "step_2 (" in line
    assert line.endswith("; going on from step_1") and (file in line or file == "checksums.json")
    assert names(tmp_path) == before, "looking changes nothing"
    store.save(2, *small(2), shared={"value": 2}, own=2)
    assert names(tmp_path) == ["step_2"], "what is damaged is not among those that are kept"
    assert assert_whole(tmp_path) == (2, 2)


def test_every_bit_of_the_checksums_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    monkeypatch.setattr(checkpoint, "_checksum", functools.cache(checkpoint._checksum))
    monkeypatch.setattr(checkpoint, "_read_shared", lambda content: {})
    file = tmp_path / "step_1" / "checksums.json"
    content = file.read_bytes()
    checksums = json.loads(content)
    for place, bit in itertools.product(range(len(content)), range(8)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << bit
        file.write_bytes(flipped)
        store = checkpoints(tmp_path)
        if not store._damage(file.parent, [store._inspect(file.parent)]):
            assert json.loads(flipped) == checksums, "white space, or the same in other letters"


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EACCES, errno.EMFILE])
@pytest.mark.parametrize("file", ["checksums.json", "shared.pt", "__0_0.distcp"])
def test_what_cannot_be_read_is_not_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, file: str
) -> None:
    for step in (1, 2):
        save(tmp_path, step, keep=2)
    path = tmp_path / "step_2" / file

    def failing(original: Any) -> Any:
        def read(self: Any, *arguments: Any) -> Any:
            if Path(self) == path:
                raise OSError(number, os.strerror(number), str(path))
            return original(self, *arguments)

        return read

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", failing(Path.read_bytes))
        patched.setattr(checkpoint, "_checksum", failing(checkpoint._checksum))
        store = checkpoints(tmp_path)
        with pytest.raises(OSError, match=f"^resume: process 0 cannot read {path}: {os.strerror(number)}$"):
            store.newest()
        store.clean()
    assert checkpoints(tmp_path).newest().step == 2  # type: ignore[union-attr]


def test_where_all_are_damaged_nothing_is_started(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step, keep=2)
        (tmp_path / f"step_{step}" / "shared.pt").unlink()
    message = (
        r"damaged checkpoints in .*: step_2 \([^\n]*shared.pt'\), step_1 \([^\n]*\); there is no whole one: remove "
    )
    with pytest.raises(ValueError, match=rf"^{message}{tmp_path} to start again\Z"):
        checkpoints(tmp_path).newest()
    assert names(tmp_path) == ["step_1", "step_2"]


# ---- no space: a disk that is really full where one can be mounted, a limit of the system on file sizes everywhere


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))  # Python ignores the signal
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def assert_no_space(folder: Path, full: Any, *, size: int = 10, shared: int = 0) -> None:
    save(folder, 1)
    before = names(folder / "step_1")
    for asynchronous in (False, True):
        store = checkpoints(folder, keep=2, asynchronous=asynchronous)
        with pytest.raises(NoSpaceLeft) as caught, full:
            store.save(2, *small(2, size), shared={"bytes": torch.ones(shared)}, own=None)
            store.wait()
        message = f"no space left while writing checkpoint step_2 in {folder}; the newest whole checkpoint is step_1"
        assert str(caught.value) == message
        assert names(folder) == ["step_1"] and names(folder / "step_1") == before
        assert assert_whole(folder) == (1, 1)
        store.close()


@pytest.mark.parametrize("limit", [0, 1000, 4096, 1 << 15, 1 << 20])
def test_weights_that_the_system_refuses(tmp_path: Path, limit: int) -> None:
    assert_no_space(tmp_path, reusable(largest_file, limit), size=1 << 19)


def test_shared_state_that_the_system_refuses(tmp_path: Path) -> None:
    assert_no_space(tmp_path, reusable(largest_file, 1 << 15), shared=1 << 15)


def reusable(manager: Callable[[int], Any], argument: int) -> Any:
    """A context that can be entered again and again."""

    class Reusable:
        def __enter__(self) -> None:
            self.entered = manager(argument)
            self.entered.__enter__()

        def __exit__(self, *exception: Any) -> None:
            self.entered.__exit__(*exception)

    return Reusable()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.strip()}")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.root
@pytest.mark.parametrize("too_large", [{"size": 1 << 18}, {"shared": 1 << 18}])
def test_a_full_disk(small_disk: Path, too_large: dict[str, int]) -> None:
    assert_no_space(small_disk, reusable(lambda _: largest_file(resource.RLIM_INFINITY), 0), **too_large)


WRITERS = {"weights": "_Writer.write_data", "shared state": "torch.save", "checksums": "_checksums", "flush": "fsync"}


@pytest.mark.parametrize("number", [28, 122, 5])
@pytest.mark.parametrize("failing", WRITERS)
def test_no_space_and_other_trouble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, number: int) -> None:
    def fail(*args: object) -> None:
        raise OSError(number, os.strerror(number))

    *owner, name = WRITERS[failing].split(".")
    monkeypatch.setattr(getattr(checkpoint, owner[0]) if owner else checkpoint, name, fail)
    with pytest.raises(OSError) as caught:
        save(tmp_path, 4)
    if number == 5:
        assert not isinstance(caught.value, NoSpaceLeft) and caught.value.errno == 5
    else:
        message = f"no space left while writing checkpoint step_4 in {tmp_path}; there is no whole one"
        assert isinstance(caught.value, NoSpaceLeft) and str(caught.value) == message
    assert names(tmp_path) == []


# ---- in the background


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Until it is set, no weights are written."""
    released, write = threading.Event(), checkpoint._Writer.write_data

    def waiting(*args: Any) -> Any:
        assert released.wait(60)
        return write(*args)

    monkeypatch.setattr(checkpoint._Writer, "write_data", waiting)
    return released


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("kind", ["adamw, two groups", "odd", "8 bit"])
def test_what_is_written_later_is_what_was_there(tmp_path: Path, held: threading.Event, kind: str) -> None:
    model = Model(width=64)
    optimizer = OPTIMIZERS[kind](model)
    train(model, optimizer, range(2))
    shared, own = {"tensor": torch.ones(3), "list": [1]}, {"tensor": torch.ones(3)}
    expected = bits([shared, own]), state(model, optimizer)
    store = checkpoints(tmp_path, asynchronous=True)
    store.save(2, model, optimizer, shared=shared, own=own)
    optimizer.param_groups[0]["lr"] *= 0.5
    train(model, optimizer, range(2, 4))
    for tensor in (shared["tensor"], own["tensor"]):
        tensor.zero_()
    shared["list"].append(2)
    assert "step_2" not in names(tmp_path)
    held.set()
    store.wait()
    assert names(tmp_path) == ["step_2"]
    saved = store.newest()
    assert saved is not None
    model = Model(width=64)
    optimizer = OPTIMIZERS[kind](model)
    store.load(saved, model, optimizer)
    assert (bits([saved.shared, *saved.own]), state(model, optimizer)) == expected
    store.close()


def test_what_is_written_later_is_written_from_the_same_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    devices: list[tuple[str, int]] = []
    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "is_initialized", lambda: True)
        patched.setattr(torch.cuda, "current_device", lambda: 3)
        patched.setattr(
            torch.cuda, "set_device", lambda device: devices.append((threading.current_thread().name, device))
        )
        store = checkpoints(tmp_path, asynchronous=True)
    store.save(1, *small(1), shared={}, own=None)
    store.close()
    assert devices == [("checkpoint_0", 3)]


@pytest.mark.parametrize("call", ["save", "wait", "close"])
def test_one_write_at_a_time_is_waited_for(tmp_path: Path, held: threading.Event, call: str) -> None:
    store = checkpoints(tmp_path, asynchronous=True)
    store.save(1, *small(1), shared={"value": 1}, own=1)
    threading.Timer(0.1, held.set).start()
    assert "step_1" not in names(tmp_path)
    store.save(2, *small(2), shared={"value": 2}, own=2) if call == "save" else getattr(store, call)()
    assert held.is_set() and {"step_1", "step_2"} & set(names(tmp_path))
    store.close()
    assert names(tmp_path) == ["step_2" if call == "save" else "step_1"]
    assert_whole(tmp_path)


@pytest.mark.parametrize("call", ["save", "wait", "close"])
def test_an_error_in_the_background_is_raised_at_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    store = checkpoints(tmp_path, asynchronous=True)
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "fsync", lambda path: 1 / 0)
        store.save(1, *small(1), shared={"value": 1}, own=1)
        with pytest.raises(ZeroDivisionError):
            store.save(2, *small(2), shared={"value": 2}, own=2) if call == "save" else getattr(store, call)()
    assert names(tmp_path) == []
    if call != "close":  # it is raised once, and the next write is another one
        store.save(3, *small(3), shared={"value": 3}, own=3)
        store.close()
        assert assert_whole(tmp_path) == (3, 3)


# ---- kill -9


class Killed(BaseException):
    """No `except Exception` sees this, as none sees kill -9."""


class Disk:
    """Counts operations on files of a folder: make, open, rename, remove. From the n-th on, none happens any more."""

    def __init__(self) -> None:
        self.folder, self.count, self.last = "", 0, 0
        sys.addaudithook(self._hook)

    @contextmanager
    def dies_before(self, operation: int, folder: Path) -> Iterator[None]:
        self.folder, self.count, self.last = str(folder), 0, operation
        try:
            yield
        finally:
            self.last = 0

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.last:
            changes = event in ("os.rename", "os.mkdir", "os.rmdir", "os.remove")  # rmtree names no folder: counted all
            if changes or (event == "open" and str(arguments[0]).startswith(self.folder)):
                self.count += 1
                if self.count >= self.last:
                    raise Killed


@pytest.fixture(scope="module")
def disk() -> Disk:
    return Disk()  # once: a hook cannot be taken away


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_end_before_any_operation_leaves_a_whole_checkpoint(tmp_path: Path, disk: Disk, asynchronous: bool) -> None:
    """Step 1 is saved again, and then step 2 over both. ``test_checkpoint_processes.py`` has the real kill -9."""
    left_behind, reached = set(), (1, 1.0)
    for operation in itertools.count(1):
        folder = tmp_path / str(operation)
        save(folder, 1)
        store = checkpoints(folder, asynchronous=asynchronous)
        killed = False
        try:
            with disk.dies_before(operation, folder):
                store.save(1, *small(1.5), shared={"value": 1.5}, own=1.5)
                store.save(2, *small(2), shared={"value": 2}, own=2)
                store.wait()
        except Killed:
            killed = True
        left_behind |= {Path(name).suffix for name in names(folder)}
        found = assert_whole(folder)
        assert found in ((1, 1), (1, 1.5), (2, 2)) and found >= reached, "the later the kill, the newer the checkpoint"
        reached = found
        save(folder, 3)
        assert names(folder) == ["step_3"] and assert_whole(folder) == (3, 3)
        if not killed:
            break
    assert operation > 30, "the operations were counted"
    assert reached == (2, 2) and left_behind == {"", ".partial", ".removed", ".replaced"}
