"""Several processes: they meet, fail together, agree, and end; nobody waits for one that is gone."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import group
import pytest
import torch
from torch import Tensor

from adapt_recipes.data import Example, MicroBatch, micro_batches
from adapt_recipes.signals import nonfinite
from adapt_recipes.training import checkpoint
from adapt_recipes.training import process_group as module
from adapt_recipes.training.checkpoint import Checkpoints
from adapt_recipes.training.process_group import (
    all_gather_object,
    all_reduce_sum,
    check_same,
    process_group,
    raise_on_all_ranks,
    rank,
    world_size,
)
from adapt_recipes.training.sockets import detect_lost_hosts

# ------------------------------------------------------------------------------------------ what two processes do


def said(block: Any) -> str:
    """What an error of a block says; "" if there is none."""
    try:
        block()
    except Exception as error:
        return f"{type(error).__name__}: {error}" if isinstance(error, RuntimeError | KeyError) else str(error)
    return ""


def fail(*, on: tuple[int, ...], kind: type[Exception] = ValueError, in_turn: bool = False) -> None:
    with raise_on_all_ranks(in_turn=in_turn):
        if rank() in on:
            raise kind(f"folder {rank()}")


def all_goes_well(folder: Path) -> dict[str, Any]:
    with process_group("cpu", batch_size=2):
        print(f"hello from {rank()}")
        turns = folder / "turns"
        with raise_on_all_ranks(in_turn=True), turns.open("a") as file:
            if rank() == 0:
                time.sleep(0.3)
            file.write(str(rank()))
        same = {"optimizer": {"lr": 0.1}, "seed": 0}
        other = {"optimizer": {"lr": 0.1 if rank() == 0 else 0.2}, "seed": rank()}
        return {
            "rank": (rank(), world_size()),
            "device": module.get_device(None).type,
            "gathered": all_gather_object({"it": rank()}),
            "summed": all_reduce_sum(torch.tensor([1.0, rank()], dtype=torch.float64)),
            "turns": turns.read_text()[0],
            "nobody": said(lambda: fail(on=())),
            "first": said(lambda: fail(on=(0,), kind=FileNotFoundError)),
            "second": said(lambda: fail(on=(1,))),
            "both": said(lambda: fail(on=(0, 1))),
            "bug": said(lambda: fail(on=(1,), kind=KeyError)),
            "first in turn": said(lambda: fail(on=(0,), in_turn=True)),
            "second in turn": said(lambda: fail(on=(1,), in_turn=True)),
            "same": said(lambda: check_same(same, advice="do")),
            "other": said(lambda: check_same(other, advice="do")),
            "still there": all_gather_object(rank()),
        }


def two_hosts_take_turns(folder: Path) -> str:
    """Four processes, two on each host."""
    os.environ["LOCAL_RANK"] = str(int(os.environ["RANK"]) % 2)
    with process_group("cpu", batch_size=4):
        turns = folder / "turns"
        with raise_on_all_ranks(in_turn=True), turns.open("a") as file:
            if rank() in (0, 2):
                time.sleep(0.3)
            file.write(str(rank()))
        return turns.read_text()


def one_cannot_see_the_folder(folder: Path) -> None:
    with process_group("cpu", batch_size=2):
        fail(on=(1,))
        all_gather_object(None)


def none_can_see_the_folder(folder: Path) -> None:
    with process_group("cpu", batch_size=2):
        fail(on=(0, 1))
        all_gather_object(None)


def too_few_examples(folder: Path) -> None:
    with process_group("cpu", batch_size=1):
        all_gather_object(None)


def the_second_one_has_a_bug(folder: Path) -> None:
    with process_group("cpu", batch_size=2):
        for number in range(9):
            if number == 5 and rank() == 1:
                raise KeyError("what")
            all_reduce_sum(torch.zeros(9))


def the_second_one_is_killed(folder: Path) -> None:
    with process_group("cpu", batch_size=2):
        for number in range(9):
            if number == 5 and rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            all_reduce_sum(torch.zeros(9))


def the_second_one_never_comes(folder: Path) -> None:
    module.RENDEZVOUS_TIMEOUT = timedelta(seconds=1)
    if os.environ["RANK"] == "0":
        with process_group("cpu", batch_size=2):
            pass


def the_first_one_never_comes(folder: Path) -> None:
    module.RENDEZVOUS_TIMEOUT = timedelta(seconds=1)
    if os.environ["RANK"] == "1":
        with process_group("cpu", batch_size=2):
            pass


def no_way_to_connect(folder: Path) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "nothing"
    with process_group("cpu", batch_size=2):
        pass


def the_second_one_takes_longer_than_a_meeting(folder: Path) -> list[int]:
    module.RENDEZVOUS_TIMEOUT = timedelta(seconds=1)
    with process_group("cpu", batch_size=2):
        time.sleep(2 * rank())
        return all_gather_object(rank())


def checkpoints_may_take_longer_than_a_meeting(folder: Path) -> None:
    module.RENDEZVOUS_TIMEOUT = checkpoint.RENDEZVOUS_TIMEOUT = timedelta(seconds=1)
    with process_group("cpu", batch_size=2):
        checkpoints = Checkpoints(folder, keep=1, asynchronous=False)
        time.sleep(2 * rank())
        assert checkpoints.newest() is None
        checkpoints.close()


def how_long_they_wait(folder: Path) -> list[timedelta]:
    """As a part of torch that is not public says: the run's group and the checkpoints'."""
    with process_group("cpu", batch_size=2):
        checkpoints = Checkpoints(folder, keep=1, asynchronous=False)
        groups: list[Any] = [torch.distributed.group.WORLD, checkpoints._group]
        waits = [each._get_backend(torch.device("cpu")).options._timeout for each in groups]
        checkpoints.close()
        return waits


def connections_that_ask_whether_the_other_host_is_there(folder: Path) -> list[tuple[int, int]]:
    with process_group("cpu", batch_size=2):
        checkpoints = Checkpoints(folder, keep=1, asynchronous=False)
        asks = []
        for number in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(number))) as connection:
                connection.getpeername()  # an error for one that listens
                if connection.family in (socket.AF_INET, socket.AF_INET6):
                    alive = connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                    asks.append((alive, connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)))
        checkpoints.close()
        return asks


class Fatal(torch.nn.Module):
    """Token 9 gives an infinite loss, token 8 an infinite gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = torch.nn.Parameter(torch.zeros(10))

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        losses = (self.weights[tokens] + torch.where(tokens == 9, torch.inf, 0))[labels != -100]
        slope = torch.where(tokens == 8, torch.inf, 1)[labels != -100]
        losses.register_hook(lambda gradient: gradient * slope)
        return losses


NAMES = [f"example {i}" for i in range(5)]


def batches_of(*rows: list[int]) -> list[MicroBatch]:
    examples = [Example(torch.tensor(row), torch.tensor(row)) for row in rows]
    tasks = [i % 2 for i in range(len(rows))]
    return micro_batches(examples, tasks, max_tokens=4, rank=rank(), world_size=world_size())


def look_for(*rows: list[int]) -> str:
    return said(lambda: nonfinite.raise_nonfinite(Fatal(), batches_of(*rows), names=NAMES, step=7))


class Named:
    def __init__(self, name: str) -> None:
        self.name = name


TASKS: Any = [Named("a"), Named("b")]
FATAL_LOSS = [[1, 2, 3], [1, 2], [1, 9], [9], [1]]  # micro-batches compute the longest first
INFINITE, FINE = torch.tensor([1.0, torch.nan]).double(), torch.ones(2).double()


def not_finite() -> dict[str, str]:
    """On one process or as one of two: they have to say the same."""
    batches, other = batches_of(*FATAL_LOSS), batches_of([1], [9], [1], [1])
    apart = batches_of([1, 2, 3], [1])  # of two processes, each has one task
    mine = INFINITE if rank() == world_size() - 1 else FINE  # a gradient's shard, say
    every: Any = {"model": Fatal(), "batches": batches, "tasks": TASKS, "step": 7}
    some: Any = {"batches": apart, "task_names": "ab", "step": 7}
    return {
        "loss": look_for(*FATAL_LOSS),
        "gradient": look_for([1, 2, 3], [1, 2], [1, 8], [8], [1]),
        "all together": look_for([1, 2, 3], [1, 2], [1, 3], [1], [1]),
        "fine": said(lambda: nonfinite.check_finite(**every, values=[FINE])),
        "one shard": said(lambda: nonfinite.check_finite(**every, values=[mine])),
        "named": said(lambda: nonfinite.check_finite(**every | {"batches": other}, values=[mine])),
        "dots": said(lambda: nonfinite.check_dots(INFINITE, **some)),
        "no such task": said(lambda: nonfinite.check_dots(INFINITE, **some | {"batches": batches_of([1])})),
        "reward": said(
            lambda: nonfinite.check_rewards(INFINITE, **some | {"batches": [apart, batches]}, reward="Mine")
        ),
    }


def one_of_two_not_finite(folder: Path) -> dict[str, str]:
    with process_group("cpu", batch_size=2):
        return not_finite()


def one_loss_is_not_finite(folder: Path) -> None:
    with process_group("cpu", batch_size=2):
        nonfinite.raise_nonfinite(Fatal(), batches_of(*FATAL_LOSS), names=NAMES, step=7)


FUNCTIONS = (
    all_goes_well,
    one_cannot_see_the_folder,
    none_can_see_the_folder,
    too_few_examples,
    the_second_one_has_a_bug,
    the_second_one_is_killed,
    the_second_one_never_comes,
    the_first_one_never_comes,
    no_way_to_connect,
    the_second_one_takes_longer_than_a_meeting,
    checkpoints_may_take_longer_than_a_meeting,
    how_long_they_wait,
    connections_that_ask_whether_the_other_host_is_there,
    one_of_two_not_finite,
    one_loss_is_not_finite,
)

# ------------------------------------------------------------------------------------------------ and what came of it


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[group.Ended]]:
    return group.run(FUNCTIONS, tmp_path_factory.mktemp("group"))


def errors(ended: list[group.Ended]) -> list[list[str]]:
    """The lines that each process has said; libraries' warnings have no part in it."""
    return [[line for line in each.err.splitlines() if line.startswith(("error: ", "Traceback"))] for each in ended]


@pytest.mark.slow
def test_a_normal_run_is_quiet_and_only_the_first_process_speaks(ended: dict[str, list[group.Ended]]) -> None:
    first, second = ended["all_goes_well"]
    assert (first.status, first.out, first.err) == (0, "hello from 0\n", "")
    assert (second.status, second.out, second.err) == (0, "", "")


@pytest.mark.slow
def test_what_processes_tell_each_other(ended: dict[str, list[group.Ended]]) -> None:
    for number, each in enumerate(ended["all_goes_well"]):
        assert each.result["rank"] == (number, 2) and each.result["device"] == "cpu"
        assert each.result["gathered"] == [{"it": 0}, {"it": 1}] and each.result["still there"] == [0, 1]
        assert each.result["summed"].tolist() == [2, 1]
        assert each.result["turns"] == "0", "the first one first, though it was slower"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "first", "second"),
    [
        ("nobody", "", ""),
        ("first", "folder 0", "folder 0"),
        ("second", "folder 1 (on process 1)", "folder 1"),
        ("both", "folder 0", "folder 0"),
        ("bug", "RuntimeError: KeyError: 'folder 1' (on process 1)", "KeyError: 'folder 1'"),
        ("first in turn", "folder 0", "folder 0"),
        ("second in turn", "folder 1 (on process 1)", "folder 1"),
        ("same", "", ""),
        (
            "other",
            "optimizer.lr, seed: not the same on process 1 as on process 0; do",
            "optimizer.lr, seed: not the same on process 1 as on process 0; do",
        ),
    ],
)
def test_an_error_of_one_is_an_error_of_all(
    ended: dict[str, list[group.Ended]], case: str, first: str, second: str
) -> None:
    assert [each.result[case] for each in ended["all_goes_well"]] == [first, second]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "line"),
    [
        ("one_cannot_see_the_folder", "folder 1 (on process 1)"),
        ("none_can_see_the_folder", "folder 0"),
        ("too_few_examples", "batch_size: 1 examples are too few for 2 processes; one each"),
        ("one_loss_is_not_finite", f"step 7: the loss of example 2 is not finite; {nonfinite.ADVICE}"),
    ],
)
def test_a_shared_error_is_said_once_and_ends_all(ended: dict[str, list[group.Ended]], case: str, line: str) -> None:
    assert [each.status for each in ended[case]] == [2, 2]
    assert errors(ended[case]) == [[f"error: {line}"], []]


@pytest.mark.slow
def test_on_each_host_one_goes_first(tmp_path: Path) -> None:
    for each in group.run((two_hosts_take_turns,), tmp_path, size=4)["two_hosts_take_turns"]:
        assert sorted(each.result[:2]) == ["0", "2"] and sorted(each.result[2:]) == ["1", "3"]


@pytest.mark.slow
def test_when_one_fails_on_its_own_the_others_say_why_they_end(ended: dict[str, list[group.Ended]]) -> None:
    first, second = ended["the_second_one_has_a_bug"]
    assert first.status == 2 and second.status == 1 and "KeyError: 'what'" in second.err
    assert errors([first]) == [["error: process 1 has ended: KeyError: 'what'"]]
    assert first.seconds < 60


@pytest.mark.slow
def test_when_one_is_killed_the_others_end_at_once(ended: dict[str, list[group.Ended]]) -> None:
    first, second = ended["the_second_one_is_killed"]
    assert second.status == -signal.SIGKILL and first.status == 2 and first.seconds < 60
    ((line,),) = errors([first])
    assert re.fullmatch(
        r"error: another process has ended or does not answer, without an error message \(.*Connection .*\)", line
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "who", "why"),
    [
        ("the_second_one_never_comes", 0, "waiting for clients. 1/2 clients joined"),
        ("the_first_one_never_comes", 1, "The client socket has timed out"),
    ],
)
def test_processes_that_do_not_meet(ended: dict[str, list[group.Ended]], case: str, who: int, why: str) -> None:
    assert ended[case][who].status == 2
    (line,) = errors([ended[case][who]])[0]
    assert re.match(r"error: 2 processes did not meet at 127\.0\.0\.1:\d+ within 1 s: ", line) and why in line
    assert line.endswith("; start them with `tune run --nproc_per_node N RECIPE --config FILE`")


@pytest.mark.slow
def test_processes_that_meet_and_cannot_connect(ended: dict[str, list[group.Ended]]) -> None:
    for each in ended["no_way_to_connect"]:
        assert each.status == 2
        ((line,),) = errors([each])
        assert re.match(r"error: 2 processes met at 127\.0\.0\.1:\d+, and cannot connect: .*address for: nothing", line)
        assert "; set GLOO_SOCKET_IFNAME, and NCCL_SOCKET_IFNAME for cuda, to the network interface" in line


@pytest.mark.slow
def test_work_may_take_longer_than_a_meeting(ended: dict[str, list[group.Ended]]) -> None:
    assert [each.result for each in ended["the_second_one_takes_longer_than_a_meeting"]] == [[0, 1]] * 2
    assert [each.status for each in ended["checkpoints_may_take_longer_than_a_meeting"]] == [0, 0]
    assert [each.result for each in ended["how_long_they_wait"]] == [[timedelta(hours=1)] * 2] * 2


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not list a process's connections")
def test_a_host_that_is_gone_is_asked_for(ended: dict[str, list[group.Ended]]) -> None:
    for each in ended["connections_that_ask_whether_the_other_host_is_there"]:
        assert len(each.result) >= 3 and set(each.result) == {(1, 60_000)}, "the store's, the run's, the checkpoints'"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not list a process's connections")
def test_connections_of_others_are_left_alone() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        with socket.create_connection(address) as theirs:
            with detect_lost_hosts():
                ours = socket.create_connection(address)
                before = len(os.listdir("/proc/self/fd"))
            assert len(os.listdir("/proc/self/fd")) == before, "nothing is left open"
            waits = [each.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) for each in (theirs, ours)]
            ours.close()
    assert waits == [0, 60_000]


@pytest.mark.slow
def test_what_is_not_finite_is_named_alike_on_any_number_of_processes(ended: dict[str, list[group.Ended]]) -> None:
    first, second = (each.result for each in ended["one_of_two_not_finite"])
    assert first == second == not_finite()
    for case, message in {
        "loss": "step 7: the loss of example 2 is not finite",
        "gradient": "step 7: the gradient of example 2 is not finite",
        "all together": "step 7: the gradient is not finite, though that of every single example is",
        "one shard": "step 7: the loss of validation example 2 of task 'a' is not finite",
        "named": "step 7: the loss of validation example 1 of task 'a' is not finite",
        "dots": "step 7: the gradient of training examples of task 'b' is not finite",
        "reward": "step 7: the reward of task 'b' is nan",
    }.items():
        assert first[case] == f"{message}; {nonfinite.ADVICE}"
    assert first["fine"] == first["no such task"] == ""


# -------------------------------------------------------------------------------------------------------- alone


def test_one_process_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with process_group("cpu", batch_size=1):
        assert not torch.distributed.is_initialized()
        assert (rank(), world_size(), all_gather_object("it")) == (0, 1, ["it"])
        values = torch.ones(2)
        assert all_reduce_sum(values) is values
        check_same({"a": 1}, advice="")
        with pytest.raises(KeyError), raise_on_all_ranks(in_turn=True):
            raise KeyError("as it is")


@pytest.mark.parametrize(
    ("environment", "device", "message"),
    [
        ({}, "cpu", "WORLD_SIZE is 2 in the environment, without RANK, MASTER_ADDR, MASTER_PORT; start them with"),
        ({"RANK": "0", "MASTER_PORT": "1"}, "cpu", "WORLD_SIZE is 2 in the environment, without MASTER_ADDR; start"),
    ],
)
def test_an_incomplete_environment(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], device: str, message: str
) -> None:
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"WORLD_SIZE": "2", **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"^{message}"), process_group(device, batch_size=2):
        pass


@pytest.mark.parametrize("device", [None, "cuda"])
def test_more_processes_than_devices(monkeypatch: pytest.MonkeyPatch, device: str | None) -> None:
    for name, value in {"WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "3", "LOCAL_RANK": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"^--nproc_per_node: 3 processes and 2 CUDA devices; one each$"):
        module.get_device(device)
    assert module.get_device("cpu").type == "cpu"


@pytest.mark.parametrize("device", ["cuda:1", "mps"])
def test_a_device_that_processes_cannot_share(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        ValueError, match=f"^device: '{device}' cannot be that of each of 2 processes; allowed: cpu, cuda"
    ):
        module.get_device(device)


# ------------------------------------------------------------------------------------------------------ with torchrun

LOOP = """
import os, signal, sys, time
import torch
from adapt_recipes.training.process_group import process_group, rank, all_reduce_sum
from adapt_recipes.training.interrupt import StopSignals

try:
    with process_group("cpu", batch_size=2), StopSignals() as stop:
        step = 0
        while not stop.agreed():
            step += 1
            all_reduce_sum(torch.zeros(9))
            if step == 5:
                open(f"{sys.argv[1]}/{rank()}.pid", "w").write(str(os.getpid()))
            time.sleep(0.01)
        open(f"{sys.argv[1]}/{rank()}.stopped", "w").write(f"{step} {stop.exit_status}")
    sys.exit(stop.exit_status)
except OSError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
"""


@pytest.mark.slow
@pytest.mark.parametrize("target", ["a worker", "the launcher"])
def test_under_torchrun(tmp_path: Path, target: str) -> None:
    (tmp_path / "loop.py").write_text(LOOP)
    run = "torch.distributed.run", "--standalone", "--nproc_per_node", "2"
    launcher = subprocess.Popen(
        [sys.executable, "-m", *run, str(tmp_path / "loop.py"), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(group.ROOT), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    while launcher.poll() is None and sum(bool(file.read_text()) for file in tmp_path.glob("*.pid")) < 2:
        time.sleep(0.05)
    started = time.monotonic()
    if target == "a worker":
        os.kill(int((tmp_path / "1.pid").read_text()), signal.SIGKILL)
    else:
        launcher.send_signal(signal.SIGTERM)
    _, err = launcher.communicate(timeout=120)
    assert launcher.returncode != 0 and time.monotonic() - started < 60
    stopped = [file.read_text() for file in sorted(tmp_path.glob("*.stopped"))]
    if target == "a worker":
        assert stopped == []
        # torchrun may have stopped the other one by then.
        assert re.search(
            "error: (another process has ended .* without an error message|stopped by SIGTERM, but not all)", err
        )
    else:
        first, second = stopped
        assert first == second and first.endswith(" 143"), "at the same step"
