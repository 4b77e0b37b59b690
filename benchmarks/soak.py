"""Kills a tiny run of two processes repeatedly, resumes it each time, and compares it with an uninterrupted run.

    python benchmarks/soak.py [--kills 50] [--seed 0] [--config tiny_adapt_planned] [key=value ...]

Each time one or both processes get a kill -9 after a random number of steps, in a third of all cases while they write a
checkpoint, and sometimes as they start. A remaining process has to end by itself, with one line, within a minute. Then
both are started again. Checkpoints are written in the foreground and in the background in turn. After the last kill the
run continues to its end, and has to equal the uninterrupted run bit for bit: its log (without times and the lines about
checkpoints and resumes), its summary and its model. The first difference is printed, and the exit status is 1. The
processes are forked from this one instead of started by torchrun, so that 50 kills take a few minutes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from adapt_recipes.config import command_line  # noqa: E402
from adapt_recipes.shipped import recipe_file, recipe_of  # noqa: E402 (runs without an installation as well)

NUM_PROCESSES = 2
# For the end of the process that was not killed.
STOP_TIMEOUT_SECONDS = 60
# Before a kill.
MAX_STEPS = 10
TIMES = ("seconds", "mixture_seconds", "validation_seconds")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the command line ``argv``. Returns counts of what happened."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the times and targets of the kills")
    parser.add_argument("--config", default="tiny_adapt_planned", help="a name in yaml/")
    arguments, overrides = parser.parse_known_args(argv)
    generator, happened, started = random.Random(arguments.seed), Counter[str](), time.monotonic()
    config = ROOT / "yaml" / f"{arguments.config}.yaml"
    recipe = _load(Path(recipe_file(str(recipe_of(config)))))
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        # 64 tokens per step, so that the last kill comes before the end.
        budget = 64 * (arguments.kills * (MAX_STEPS - 2) + 20)
        settings = [f"budget.tokens={budget}", "checkpoint_every=3", "validate_every=20", f"tasks.cache_dir={home}"]
        settings += ["log_every=1", "device=cpu", "resume=true", *overrides]
        command = ["--config", str(config), *settings]
        for number in range(arguments.kills):
            group = Group(recipe, [*command, f"async_checkpointing={str(number % 2 == 1).lower()}"], home / "killed")
            steps, victims = generator.randrange(MAX_STEPS), generator.choice([[0], [1], [0, 1]])
            # Before the processes are connected, only a launcher could end the other one.
            if steps == 0:
                victims = [0, 1]
            while group.num_steps() < steps and not group.ended():
                time.sleep(0.002)
            while steps % 3 == 1 and not group.is_saving() and not group.ended():
                pass
            time.sleep(generator.uniform(0, 0.02 if steps else 1))
            done, took, line = group.num_steps(), *group.kill(victims)
            happened.update({"kills of one": len(victims) == 1, "during a checkpoint": group.is_saving()})
            happened["steps before a kill"] += done
            happened["slowest end, ms"] = max(happened["slowest end, ms"], round(1000 * took))
            print(f"{number + 1}: killed {victims} after {done} steps; {line or 'none is left'}", flush=True)
        for folder in ("killed", "uninterrupted"):
            group = Group(recipe, command, home / folder)
            statuses = group.wait(None)
            if statuses != [0] * NUM_PROCESSES:
                sys.exit(f"the run in {folder} ended with {statuses}: {group.errors()}")
        happened["steps"] = _compare(home / "killed", home / "uninterrupted")
    happened["seconds"] = round(time.monotonic() - started)
    print(f"equal to the uninterrupted run: {json.dumps(happened)}")
    return dict(happened)


class Group:
    """The processes of a run. Their output goes to ``FOLDER.RANK.out`` and ``.err``.

    Args:
        recipe: the module.
        command: the command line without ``output_dir``.
        folder: the run directory.
    """

    def __init__(self, recipe: ModuleType, command: Sequence[str], folder: Path) -> None:
        self._folder = folder
        self._statuses: dict[int, int] = {}
        # Outside the range of ports that the system assigns.
        port = random.SystemRandom().randrange(20_000, 32_000)
        self._pids = [os.fork() or self._run_process(recipe, command, rank, port) for rank in range(NUM_PROCESSES)]

    def num_steps(self) -> int:
        """Steps since the start of the processes."""
        out = self._output(0, "out")
        return len(re.findall(r"^step ", out, re.MULTILINE))

    def is_saving(self) -> bool:
        """Whether there is an unfinished checkpoint."""
        return any((self._folder / "checkpoints").glob("*.partial"))

    def ended(self) -> bool:
        """Whether one of the processes has ended."""
        for rank, pid in enumerate(self._pids):
            if rank not in self._statuses:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    self._statuses[rank] = os.waitstatus_to_exitcode(status)
        return bool(self._statuses)

    def wait(self, limit: float | None) -> list[int]:
        """The exit statuses of all processes; those that take longer than ``limit`` seconds are killed."""
        started = time.monotonic()
        while self.ended() is False or len(self._statuses) < NUM_PROCESSES:
            for rank, pid in enumerate(self._pids):
                if limit is not None and time.monotonic() - started > limit and rank not in self._statuses:
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.002)
        return [self._statuses[rank] for rank in range(NUM_PROCESSES)]

    def kill(self, victims: Sequence[int]) -> tuple[float, str]:
        """Kills processes. Returns the seconds until all have ended, and the error of the remaining one."""
        if self.ended():
            sys.exit(f"ended before it was killed, with {self._statuses}: {self.errors()}")
        for rank in victims:
            os.kill(self._pids[rank], signal.SIGKILL)
        started = time.monotonic()
        statuses = self.wait(STOP_TIMEOUT_SECONDS)
        expected = [-signal.SIGKILL if rank in victims else 2 for rank in range(NUM_PROCESSES)]
        errors = [line for rank, lines in enumerate(self.errors()) for line in lines if rank not in victims]
        if statuses != expected or len(errors) != NUM_PROCESSES - len(victims):
            sys.exit(f"killed {victims}: ended with {statuses}, not {expected}: {errors}")
        return time.monotonic() - started, "".join(errors)

    def errors(self) -> list[list[str]]:
        """The errors of each process."""
        lines = (self._output(rank, "err").splitlines() for rank in range(NUM_PROCESSES))
        return [[line for line in each if line.startswith(("error: ", "Traceback"))] for each in lines]

    def _output(self, rank: int, kind: str) -> str:
        path = self._file(rank, kind)
        return path.read_text() if path.exists() else ""

    def _file(self, rank: int, kind: str) -> Path:
        return self._folder.with_name(f"{self._folder.name}.{rank}.{kind}")

    def _run_process(self, recipe: ModuleType, command: Sequence[str], rank: int, port: int) -> int:
        """In a forked process: runs the recipe as one of the group, and exits."""
        status = 1
        try:
            for stream, kind in ((1, "out"), (2, "err")):
                os.dup2(os.open(self._file(rank, kind), os.O_CREAT | os.O_WRONLY | os.O_TRUNC), stream)
            group = {"WORLD_SIZE": NUM_PROCESSES, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank}
            os.environ.update({key: str(value) for key, value in group.items()}, LOCAL_RANK=str(rank))
            command_line(recipe.main, recipe.Config, [*command, f"output_dir={self._folder}"])
        except SystemExit as leaving:
            status = leaving.code if isinstance(leaving.code, int) else 1
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _compare(killed: Path, uninterrupted: Path) -> int:
    """Exits with the first difference; returns the number of steps."""
    lines, expected = _log(killed), _log(uninterrupted)
    for i, (line, other) in enumerate(zip(lines, expected, strict=False)):
        if line != other:
            sys.exit(f"line {i + 1} of the log, without checkpoints and resumes, differs:\n{line}\n{other}")
    if len(lines) != len(expected):
        sys.exit(f"the log has {len(lines)} lines without checkpoints and resumes, not {len(expected)}")
    if _summary(killed) != _summary(uninterrupted):
        sys.exit(f"summary.json differs:\n{_summary(killed)}\n{_summary(uninterrupted)}")
    for path in (uninterrupted / "model").iterdir():
        if path.read_bytes() != (killed / "model" / path.name).read_bytes():
            sys.exit(f"model/{path.name} differs")
    return sum(event["event"] == "step" for event in lines)


def _log(folder: Path) -> list[dict[str, Any]]:
    events = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [_without_times(event) for event in events if event["event"] not in ("checkpoint", "resume")]


def _summary(folder: Path) -> dict[str, Any]:
    return _without_times(json.loads((folder / "summary.json").read_text()))


def _without_times(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in TIMES}


if __name__ == "__main__":
    main()
