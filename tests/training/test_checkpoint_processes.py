"""Checkpoints of several processes, read by as many, more or fewer; killed, full and damaged on any of them.

Each function in ``CASES`` is run by a process of its own, which forks the groups that it needs and asks what they left.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import gc
import io
import itertools
import os
import shutil
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from group import Ended, run
from test_checkpoint import bits, checkpoints, flip, largest_file, names, two_groups
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torchao.optim import AdamW8bit
from torchtune.models.llama3_2 import llama3_2

from adapt_recipes.files import NoSpaceLeft
from adapt_recipes.models import TokenLosses, train_adapters_alone
from adapt_recipes.models.lora import with_lora
from adapt_recipes.training import checkpoint
from adapt_recipes.training.checkpoint import Checkpoints

pytestmark = pytest.mark.slow

NUMBERS = (1, 2, 3)


def forked(folder: Path, size: int, work: Callable[[int], None], *, all_at_once: bool = False) -> list[int]:
    """Runs ``work(rank)`` on processes that form a group; one alone forms none.

    Args:
        folder: for what they meet over.
        size: how many there are.
        work: fails where it raises.
        all_at_once: as soon as one has ended, the others are killed.

    Returns:
        Their exit statuses, by rank.
    """
    store = folder / f"store {time.monotonic_ns()}"
    children: dict[int, int] = {}
    gc.freeze()  # else each process copies all memory as soon as it collects garbage
    for rank in range(size):
        if child := os.fork():
            children[child] = rank
            continue
        status = 1
        try:
            signal.alarm(50)  # no test waits for ever
            os.fsync = lambda descriptor: None  # nothing here goes as far as a power failure
            if size > 1:
                meeting = dist.FileStore(str(store), size)
                dist.init_process_group("gloo", store=meeting, rank=rank, world_size=size)
            work(rank)
            status = 0
            if size > 1:
                # Until all are done: the end of one resets connections over which another may still receive.
                meeting.set(f"done {rank}", "")
                with contextlib.suppress(RuntimeError):
                    meeting.wait([f"done {each}" for each in range(size)], datetime.timedelta(seconds=10))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    statuses: dict[int, int] = {}
    while children:
        child, status = os.wait()
        statuses[children.pop(child)] = os.waitstatus_to_exitcode(status)
        for each in children if all_at_once else ():
            os.kill(each, signal.SIGKILL)
    return [statuses[rank] for rank in range(size)]


def whole(value: Any) -> Any:
    """Nested dicts and lists with every tensor gathered from its shards."""
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    if isinstance(value, list):
        return list(map(whole, value))
    if isinstance(value, DTensor):
        local = whole(value.to_local())
        spread = DTensor.from_local(
            local, value.device_mesh, value.placements, shape=value.shape, stride=value.stride()
        )
        return spread.full_tensor()
    return value.dequantize() if hasattr(value, "codes") else value


def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    return bits(whole([model.state_dict(), optimizer.state_dict()]))


# ---- any number of processes reads what any number wrote


def decoder(seed: int, *, lora: bool) -> nn.Module:
    """Of tied weights, and of sizes that neither 2 nor 3 processes share evenly."""
    torch.manual_seed(seed)
    model = llama3_2(
        vocab_size=13, num_layers=2, num_heads=2, num_kv_heads=1, embed_dim=8, max_seq_len=8, intermediate_dim=10
    )
    if lora:
        with_lora(
            model, lora_attn_modules=["q_proj"], apply_lora_to_mlp=True, lora_rank=2, lora_alpha=4, lora_dropout=0.0
        )
        for name, parameter in model.named_parameters():
            if "lora_b" in name:  # zero, otherwise, and without a gradient to its other half
                nn.init.normal_(parameter)
        assert train_adapters_alone(model)
    sharded = TokenLosses(model)
    if dist.is_initialized():
        for module in (*model.layers, sharded):
            fully_shard(module)
    return sharded


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.5)


KINDS: dict[str, tuple[bool, Callable[[nn.Module], torch.optim.Optimizer]]] = {
    "full": (False, two_groups),
    "lora": (True, adamw),
}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        tokens = torch.randint(0, 13, (2, 7), generator=torch.Generator().manual_seed(step))
        model(tokens[:, :-1], tokens[:, 1:]).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def any_number_reads_what_any_number_wrote(folder: Path) -> None:
    def write(size: int, rank: int) -> None:
        for kind, (lora, optimizer_of) in KINDS.items():
            model = decoder(0, lora=lora)
            optimizer = optimizer_of(model)
            train(model, optimizer, range(2))
            there = folder / f"{kind} {size}"
            store = checkpoints(there)
            store.save(2, model, optimizer, shared={}, own=None)
            saved = state(model, optimizer)
            train(model, optimizer, range(2, 4))
            later = state(model, optimizer)
            if rank == 0:
                torch.save((saved, later), there.with_suffix(".pt"))
            if kind == "lora" and size == 3:
                shards = [parameter.to_local().numel() for parameter in model.parameters()]
                assert 0 in whole_group(shards), "a process without a row of some weight"

    def read(size: int, rank: int) -> None:
        for (kind, (lora, optimizer_of)), written_by in itertools.product(KINDS.items(), NUMBERS):
            there = folder / f"{kind} {written_by}"
            expected, later = torch.load(there.with_suffix(".pt"), weights_only=False)
            model = decoder(1, lora=lora)
            optimizer = optimizer_of(model)
            store = checkpoints(there)
            saved = store.newest()
            assert saved is not None and len(saved.own) == written_by
            store.load(saved, model, optimizer)
            assert state(model, optimizer) == expected, (kind, written_by, size)
            for parameter in model.parameters():
                assert isinstance(parameter, DTensor) == (size > 1)
                for key, value in optimizer.state.get(parameter, {}).items():
                    assert isinstance(value, DTensor) == (size > 1 and key != "step")
            if size == written_by:
                train(model, optimizer, range(2, 4))
                assert state(model, optimizer) == later

    for job, size in itertools.product((write, read), NUMBERS):
        assert forked(folder, size, functools.partial(job, size)) == [0] * size


def whole_group(values: list[int]) -> list[int]:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, values)
    return sum(everyone, [])


def state_in_8_bits_is_cut_between_its_blocks_only(folder: Path) -> None:
    torch.compile = lambda function, **options: function

    def build(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model = nn.Linear(64, 256)
        if dist.is_initialized():
            fully_shard(model)
        return model, AdamW8bit(model.parameters(), lr=0.1)

    def write(rank: int) -> None:
        model, optimizer = build(0)
        for step in range(2):
            model(torch.randn(3, 64, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        checkpoints(there).save(2, model, optimizer, shared={}, own=None)
        before = state(model, optimizer)
        if rank == 0:
            torch.save(before, there.with_suffix(".pt"))

    def read(rank: int) -> None:
        model, optimizer = build(1)
        store = checkpoints(there)
        saved = store.newest()
        assert saved is not None
        if dist.is_initialized() and dist.get_world_size() == 3:
            with pytest.raises(ValueError, match=rf"^checkpoint {there}/step_2, written by .* on 3 processes: .*\Z"):
                store.load(saved, model, optimizer)
        else:
            store.load(saved, model, optimizer)
            assert state(model, optimizer) == torch.load(there.with_suffix(".pt"), weights_only=False)

    for written_by, sizes in {1: (2, 3), 2: (1, 2)}.items():
        there = folder / str(written_by)
        assert forked(folder, written_by, write) == [0] * written_by
        for size in sizes:
            assert forked(folder, size, read) == [0] * size, (written_by, size)


# ---- a small one


def small(value: float) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(3000, 5)
    for parameter in model.parameters():
        nn.init.constant_(parameter, value)
    if dist.is_initialized():
        fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for parameter in model.parameters():
        optimizer.state[parameter]["momentum_buffer"] = parameter.detach().clone()
    return model, optimizer


def save(folder: Path, step: int, *, keep: int = 1) -> None:
    save_in(checkpoints(folder, keep=keep), step)


def save_in(store: Checkpoints, step: int, **more: Any) -> None:
    own = dist.get_rank() if dist.is_initialized() else 0
    store.save(step, *small(step), shared={"value": step, "rank": own, **more}, own=own)


def newest(folder: Path) -> int:
    """The step of the newest checkpoint, which is what ``save`` saved."""
    store = checkpoints(folder)
    saved = store.newest()
    assert saved is not None
    model, optimizer = small(0.5)
    optimizer.state.clear()
    store.load(saved, model, optimizer)
    for parameter in model.parameters():
        assert (whole(parameter) == saved.step).all()
        assert (whole(optimizer.state[parameter]["momentum_buffer"]) == saved.step).all()
    assert saved.shared == {"value": saved.step, "rank": 0} and saved.own == list(range(len(saved.own)))
    return saved.step


def what_is_shared_is_the_first_ones_and_what_is_own_each_ones(folder: Path) -> None:
    assert forked(folder, 2, lambda rank: save(folder / "run", 1)) == [0, 0]

    def read(rank: int) -> None:
        assert newest(folder / "run") == 1
        saved = checkpoints(folder / "run").newest()
        assert saved is not None and saved.own == [0, 1] and saved.folder == folder / "run" / "step_1"

    for size in NUMBERS:
        assert forked(folder, size, read) == [0] * size


def a_single_process_without_a_group_is_nothing_to_speak_of(folder: Path) -> None:
    with warnings.catch_warnings(record=True) as said:
        save(folder / "run", 1)
        assert newest(folder / "run") == 1
    assert [str(each.message) for each in said if "distributed" in str(each.message)] == []


# ---- damage


def all_choose_the_same_where_one_finds_damage(folder: Path) -> None:
    there = folder / "run"

    def write(rank: int) -> None:
        for step in (1, 2):
            save(there, step, keep=2)

    assert forked(folder, 2, write) == [0, 0]
    files = names(there / "step_2")
    assert files == [".metadata", "__0_0.distcp", "__1_0.distcp", "checksums.json", "shared.pt"]

    def read(rank: int) -> None:
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            assert newest(there) == 1
        lines = said.getvalue().splitlines()
        assert len(lines) == (rank == 0) and all(line.endswith("; going on from step_1") for line in lines)

    for size, file in [(2, file) for file in files] + [(3, "__1_0.distcp")]:
        intact = (there / "step_2" / file).read_bytes()
        flip(there / "step_2" / file, 0.7)
        assert forked(folder, size, read) == [0] * size, (size, file)
        (there / "step_2" / file).write_bytes(intact)

    def replace(rank: int) -> None:
        store = checkpoints(there)
        store.newest()
        save_in(store, 3)
        assert newest(there) == 3

    flip(there / "step_2" / "__1_0.distcp", 0.7)
    assert forked(folder, 2, replace) == [0, 0]
    assert names(there) == ["step_3"]

    def refuse(rank: int) -> None:
        with pytest.raises(
            ValueError, match=r"^damaged checkpoints in .*: step_3 \(__1_0.* is not what was written\); "
        ):
            newest(there)

    flip(there / "step_3" / "__1_0.distcp", 0.7)
    assert forked(folder, 3, refuse) == [0] * 3


def what_one_of_them_does_not_see_is_not_damaged(folder: Path) -> None:
    assert forked(folder, 2, lambda rank: save(folder / "0" / "run", 1)) == [0, 0]
    shutil.copytree(folder / "0", folder / "1")

    def work(message: str, rank: int) -> None:
        os.chdir(folder / str(rank))  # as on two hosts: another folder of the same name
        store = checkpoints(Path("run"))
        with pytest.raises((ValueError, OSError), match=message):
            store.newest()
        store.clean()

    (folder / "1" / "run" / "step_1" / "__0_0.distcp").unlink()
    message = r"^resume: process 1 cannot read run/step_1/__0_0.distcp: No such file or directory$"
    assert forked(folder, 2, functools.partial(work, message)) == [0, 0]
    shutil.rmtree(folder / "1" / "run" / "step_1")
    message = r"^output_dir: run is not the same folder on process 1 as on 0$"
    assert forked(folder, 2, functools.partial(work, message)) == [0, 0]
    assert names(folder / "0" / "run") == ["step_1"]


# ---- errors on one of them


def a_full_disk_is_one_for_all(folder: Path) -> None:
    def work(rank: int) -> None:
        store = checkpoints(there, keep=2, asynchronous=asynchronous)
        save_in(store, 1)
        store.wait()
        full = largest_file(limit) if rank == victim else contextlib.nullcontext()
        with pytest.raises(NoSpaceLeft) as caught, full:
            save_in(store, 2, tensor=torch.ones(1_000_000))
            store.wait()
        message = f"no space left while writing checkpoint step_2 in {there}; the newest whole checkpoint is step_1"
        assert str(caught.value) == message
        dist.barrier()
        assert names(there) == ["step_1"]
        dist.barrier()
        save_in(store, 3)
        store.close()
        assert newest(there) == 3 and names(there) == ["step_1", "step_3"]

    # Of the weights, in places where torch raises different errors; and, last, of what is shared.
    cases = ((0, 1000, True), (0, 20_000, False), (1, 10_000, False), (1, 20_000, True), (0, 1_000_000, False))
    for victim, limit, asynchronous in cases:
        there = folder / f"{victim} {limit} {asynchronous}"
        assert forked(folder, 2, work) == [0, 0], (victim, limit)


def another_error_is_one_for_all(folder: Path) -> None:
    def work(rank: int) -> None:
        save(there, 1)
        *owner, name = failing.split(".")
        original = getattr(getattr(checkpoint, *owner) if owner else checkpoint, name)
        if rank == victim:
            setattr(getattr(checkpoint, *owner) if owner else checkpoint, name, lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError if rank == victim or owner else RuntimeError, match="division by zero"):
            save(there, 2)
        setattr(getattr(checkpoint, *owner) if owner else checkpoint, name, original)
        dist.barrier()
        assert names(there) == ["step_1"]
        dist.barrier()
        save(there, 3)
        assert newest(there) == 3

    for victim, failing in ((0, "fsync"), *itertools.product(range(2), ("_checksums", "_Writer.write_data"))):
        there = folder / f"{victim} {failing}"
        assert forked(folder, 2, work) == [0, 0], (victim, failing)


def a_folder_of_each_ones_own_is_refused(folder: Path) -> None:
    def work(rank: int) -> None:
        with pytest.raises(
            ValueError if rank == 0 else RuntimeError, match="is not the same folder on process 1 as on"
        ):
            save(folder / f"run {rank}", 1)

    assert forked(folder, 2, work) == [0, 0]
    assert names(folder / "run 0") == []


# ---- in the background


def nothing_has_its_name_before_all_have_written(folder: Path) -> None:
    there = folder / "run"
    go = folder / "go"

    def work(slow: int, rank: int) -> None:
        write = checkpoint._Writer.write_data

        def waiting(*args: Any) -> Any:
            while not go.exists():
                time.sleep(0.01)
            return write(*args)

        if rank == slow:
            checkpoint._Writer.write_data = waiting  # type: ignore[method-assign]
        store = checkpoints(there, asynchronous=True)
        save_in(store, 1)
        time.sleep(0.2)
        dist.barrier()
        assert names(there) == ["step_1.partial"]
        dist.barrier()
        if rank == slow:
            go.touch()
        store.close()
        dist.barrier()
        assert names(there) == ["step_1"] and newest(there) == 1

    for slow in range(2):
        assert forked(folder, 2, functools.partial(work, slow)) == [0, 0]
        shutil.rmtree(there)
        go.unlink()


def training_goes_on_beside_a_write(folder: Path) -> None:
    def work(rank: int) -> None:
        write, released = checkpoint._Writer.write_data, threading.Event()
        held = lambda *args: released.wait(30) and write(*args)  # noqa: E731
        checkpoint._Writer.write_data = held  # type: ignore[method-assign]
        model = decoder(0, lora=False)
        optimizer = two_groups(model)
        train(model, optimizer, range(1))
        store = checkpoints(folder / "run", keep=9, asynchronous=True)
        states = []
        for step in range(1, 6):  # collectives of the run and of the write, at the same time
            states.append(state(model, optimizer))
            store.save(step, model, optimizer, shared={}, own=None)
            train(model, optimizer, range(step, step + 1))
            released.set()
            train(model, optimizer, range(step + 10, step + 12))
        store.close()
        saved = checkpoints(folder / "run").newest()
        model = decoder(1, lora=False)
        optimizer = two_groups(model)
        assert saved is not None and saved.step == 5
        checkpoints(folder / "run").load(saved, model, optimizer)
        assert state(model, optimizer) == states[-1]

    assert forked(folder, 2, work) == [0, 0]


# ---- kill -9


def die_at(operation: int, folder: Path) -> None:
    """Kill this process before its n-th operation on a file of ``folder``: make, open, rename, remove."""
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        changes = event in ("os.rename", "os.mkdir", "os.rmdir", "os.remove")  # rmtree names no folder: counted all
        if changes or (event == "open" and str(arguments[0]).startswith(str(folder))):
            count += 1
            if count == operation:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def killed(folder: Path, *, victim: int, least: int) -> None:
    """Over a checkpoint of step 1, that of step 2 is written, until one of two processes is killed, or both are."""
    assert forked(folder, 2, lambda rank: save(folder / "ready", 1)) == [0, 0]

    def work(rank: int) -> None:
        model, optimizer = small(2)
        store = checkpoints(there)
        if rank == victim:
            die_at(operation, there)
        store.save(2, model, optimizer, shared={"value": 2, "rank": rank}, own=rank)

    found = []
    for operation in itertools.count(1):
        there = Path(shutil.copytree(folder / "ready", folder / str(operation)))
        both = operation % 2 == 0
        statuses = forked(folder, 2, work, all_at_once=both)
        found.append(newest(there))
        if statuses[victim] == 0:
            break
        assert statuses[victim] == -9 and statuses[1 - victim] in ((0, 1, -9) if both else (0, 1))
        save(there, 3)
        assert names(there) == ["step_3"] and newest(there) == 3
    assert found == sorted(found) and found[0] == 1 and found[-1] == 2
    assert operation > least, "the operations were counted"


def the_first_is_killed_before_any_operation(folder: Path) -> None:
    killed(folder, victim=0, least=20)


def the_second_is_killed_before_any_operation(folder: Path) -> None:
    killed(folder, victim=1, least=3)


CASES = (
    any_number_reads_what_any_number_wrote,
    state_in_8_bits_is_cut_between_its_blocks_only,
    what_is_shared_is_the_first_ones_and_what_is_own_each_ones,
    a_single_process_without_a_group_is_nothing_to_speak_of,
    all_choose_the_same_where_one_finds_damage,
    what_one_of_them_does_not_see_is_not_damaged,
    a_full_disk_is_one_for_all,
    another_error_is_one_for_all,
    a_folder_of_each_ones_own_is_refused,
    nothing_has_its_name_before_all_have_written,
    training_goes_on_beside_a_write,
    the_first_is_killed_before_any_operation,
    the_second_is_killed_before_any_operation,
)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Ended]]:
    return run(CASES, tmp_path_factory.mktemp("processes"), size=1)


@pytest.mark.parametrize("case", [case.__name__ for case in CASES])
def test_checkpoints_of_several_processes(ended: dict[str, list[Ended]], case: str) -> None:
    (only,) = ended[case]
    assert only.status == 0, only.err
