"""Test functions run by a group of processes, as torchrun would start them.

A file's functions are imported once, by ``python group.py FILE FOLDER SIZE FUNCTION...``; each is then run in turn by
``SIZE`` processes forked from there, which have done no backward yet, as a fork needs.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).parents[1]
TIME_LIMIT = 240  # seconds, for one function


class Ended(NamedTuple):
    """What one process of a group has left.

    Attributes:
        status: what it ended with, negative for a signal; 2 for a user's error, which is said in one line.
        result: what the function returned; None if it did not.
        out, err: what it said.
        seconds: from its start to its end.
    """

    status: int
    result: Any
    out: str
    err: str
    seconds: float


def run(functions: Sequence[Callable[[Path], Any]], folder: Path, *, size: int = 2) -> dict[str, list[Ended]]:
    """Runs functions of a test file, one after the other, each by ``size`` processes.

    Args:
        functions: each takes a folder that its processes share, and returns what ``torch.save`` can write.
        folder: for all of them.
        size: processes of a group.

    Returns:
        For each function's name what its processes have left, by rank.
    """
    file = sys.modules[functions[0].__module__].__file__
    names = [function.__name__ for function in functions]
    command = [sys.executable, __file__, str(file), str(folder), str(size), *names]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    paths = os.pathsep.join((str(ROOT), str(Path(__file__).parent), str(Path(str(file)).parent)))
    done = subprocess.run(command, env=environment | {"PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {name: [_ended(folder / name, rank) for rank in range(size)] for name in names}


def free_ports(number: int) -> list[int]:
    """Ports on which nothing listens, and none that the system gives out by itself: other groups take those."""
    found: list[int] = []
    for port in random.SystemRandom().sample(range(20_000, 32_000), 12_000):
        if len(found) == number:
            break
        with socket.socket() as tried, contextlib.suppress(OSError):
            tried.bind(("127.0.0.1", port))
            found.append(port)
    return found


def _ended(folder: Path, rank: int) -> Ended:
    status, seconds = (folder / f"{rank}.status").read_text().split()
    result = folder / f"{rank}.pt"
    return Ended(
        int(status),
        torch.load(result, weights_only=False) if result.exists() else None,
        (folder / f"{rank}.out").read_text(),
        (folder / f"{rank}.err").read_text(),
        float(seconds),
    )


def _main(file: str, folder: Path, size: int, names: Sequence[str]) -> None:
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in names:
        shared = folder / name
        shared.mkdir()
        group = {
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_ports(1)[0]),
        }
        started, children = time.monotonic(), {}
        for rank in range(size):
            if pid := os.fork():
                children[pid] = rank
            else:
                os.environ.update(group | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
                _be(rank, getattr(module, name), shared)
        while children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid:
                code = os.waitstatus_to_exitcode(status)
                (shared / f"{children.pop(pid)}.status").write_text(f"{code} {time.monotonic() - started}")
            else:
                time.sleep(0.01)
                for each in children if time.monotonic() - started > TIME_LIMIT else ():
                    os.kill(each, signal.SIGKILL)


def _be(rank: int, function: Callable[[Path], Any], shared: Path) -> None:
    """This process is one of the group from now on."""
    for stream, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(shared / f"{rank}.{kind}", os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream)
    status = 1
    try:
        torch.save(function(shared), shared / f"{rank}.pt")
        status = 0
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else 1
    except (ValueError, OSError) as error:  # as ``command_line`` does
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    _main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
