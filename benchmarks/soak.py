"""Kills a tiny run of two processes again and again, resumes it each time, and compares it with one never stopped.

    python benchmarks/soak.py [--kills 50] [--seed 0] [--config tiny_adapt_planned] [key=value ...]

Each time one of the two processes gets a kill -9 after a random number of steps, or both do, in a third of all cases
while they write a checkpoint, and now and then as they start; one that is left has to end by itself, with one line,
within a minute. Then both are started again. Checkpoints are written in the foreground and in the background in turn.
After so many kills the run goes on to its end, and has to be, bit for bit, the run that was never stopped: its log, but
for times and the lines about checkpoints and resumes, its summary and its model. What differs is named, and the exit
status is 1. The processes are forked from this one, as torchrun would start them but without its start-up: 50 kills
take a few minutes.
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

from adapt_recipes.cli import recipe_file, recipe_of  # noqa: E402 (runs without an installation as well)
from adapt_recipes.config import command_line  # noqa: E402

SIZE = 2  # processes
STOP_TIMEOUT = 60  # seconds, for the end of the one that was not killed
MAX_STEPS = 10  # before a kill
TIMES = ("seconds", "mixture_seconds", "validation_seconds")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the command line ``argv``. Returns what happened, counted."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the victims")
    parser.add_argument("--config", default="tiny_adapt_planned", help="a name in yaml/")
    arguments, overrides = parser.parse_known_args(argv)
    generator, happened, started = random.Random(arguments.seed), Counter[str](), time.monotonic()
    config = ROOT / "yaml" / f"{arguments.config}.yaml"
    recipe = _load(Path(recipe_file(str(recipe_of(config)))))
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        budget = 64 * (arguments.kills * (MAX_STEPS - 2) + 20)  # in tokens, 64 a step: the last kill is before the end
        settings = [f"budget.tokens={budget}", "checkpoint_every=3", "validate_every=20", f"tasks.cache_dir={home}"]
        settings += ["log_every=1", "device=cpu", "resume=true", *overrides]
        command = ["--config", str(config), *settings]
        for number in range(arguments.kills):
            group = Group(recipe, [*command, f"async_checkpointing={str(number % 2 == 1).lower()}"], home / "killed")
            steps, victims = generator.randrange(MAX_STEPS), generator.choice([[0], [1], [0, 1]])
            if steps == 0:  # before the processes have met, only a launcher could end the other one
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
        for folder in ("killed", "whole"):
            group = Group(recipe, command, home / folder)
            statuses = group.wait(None)
            if statuses != [0] * SIZE:
                sys.exit(f"the run in {folder} ended with {statuses}: {group.errors()}")
        happened["steps"] = _compare(home / "killed", home / "whole")
    happened["seconds"] = round(time.monotonic() - started)
    print(f"the same as never stopped: {json.dumps(happened)}")
    return dict(happened)


class Group:
    """The processes of a run. What they say goes to ``FOLDER.RANK.out`` and ``.err``.

    Args:
        recipe: the module.
        command: its command line, without ``output_dir``.
        folder: the run directory.
    """

    def __init__(self, recipe: ModuleType, command: Sequence[str], folder: Path) -> None:
        self._folder = folder
        self._statuses: dict[int, int] = {}
        port = random.SystemRandom().randrange(20_000, 32_000)  # none that the system gives out by itself
        self._pids = [os.fork() or self._be(recipe, command, rank, port) for rank in range(SIZE)]

    def num_steps(self) -> int:
        """How many it has done since it was started."""
        out = self._one_line(0, "out")
        return len(re.findall(r"^step ", out, re.MULTILINE))

    def is_saving(self) -> bool:
        """Whether there is an unfinished checkpoint."""
        return any((self._folder / "checkpoints").glob("*.partial"))

    def ended(self) -> bool:
        """Whether one of the processes has."""
        for rank, pid in enumerate(self._pids):
            if rank not in self._statuses:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    self._statuses[rank] = os.waitstatus_to_exitcode(status)
        return bool(self._statuses)

    def wait(self, limit: float | None) -> list[int]:
        """The exit statuses of all; those that take longer than so many seconds are killed."""
        started = time.monotonic()
        while self.ended() is False or len(self._statuses) < SIZE:
            for rank, pid in enumerate(self._pids):
                if limit is not None and time.monotonic() - started > limit and rank not in self._statuses:
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.002)
        return [self._statuses[rank] for rank in range(SIZE)]

    def kill(self, victims: Sequence[int]) -> tuple[float, str]:
        """Kill some. Returns the seconds until all have ended, and what the one that is left has said."""
        if self.ended():
            sys.exit(f"ended before it was killed, with {self._statuses}: {self.errors()}")
        for rank in victims:
            os.kill(self._pids[rank], signal.SIGKILL)
        started = time.monotonic()
        statuses = self.wait(STOP_TIMEOUT)
        expected = [-signal.SIGKILL if rank in victims else 2 for rank in range(SIZE)]
        errors = [line for rank, lines in enumerate(self.errors()) for line in lines if rank not in victims]
        if statuses != expected or len(errors) != SIZE - len(victims):
            sys.exit(f"killed {victims}: ended with {statuses}, not {expected}: {errors}")
        return time.monotonic() - started, "".join(errors)

    def errors(self) -> list[list[str]]:
        """Of each process."""
        lines = (self._one_line(rank, "err").splitlines() for rank in range(SIZE))
        return [[line for line in each if line.startswith(("error: ", "Traceback"))] for each in lines]

    def _one_line(self, rank: int, kind: str) -> str:
        path = self._file(rank, kind)
        return path.read_text() if path.exists() else ""

    def _file(self, rank: int, kind: str) -> Path:
        return self._folder.with_name(f"{self._folder.name}.{rank}.{kind}")

    def _be(self, recipe: ModuleType, command: Sequence[str], rank: int, port: int) -> int:
        """This process is one of the group from now on."""
        status = 1
        try:
            for stream, kind in ((1, "out"), (2, "err")):
                os.dup2(os.open(self._file(rank, kind), os.O_CREAT | os.O_WRONLY | os.O_TRUNC), stream)
            group = {"WORLD_SIZE": SIZE, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank}
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


def _compare(folder: Path, whole: Path) -> int:
    """Exit with the first difference; returns the number of steps."""
    here, there = _log(folder), _log(whole)
    for i, (mine, other) in enumerate(zip(here, there, strict=False)):
        if mine != other:
            sys.exit(f"line {i + 1} of the log, without checkpoints and resumes, differs:\n{mine}\n{other}")
    if len(here) != len(there):
        sys.exit(f"the log has {len(here)} lines without checkpoints and resumes, not {len(there)}")
    if _summary(folder) != _summary(whole):
        sys.exit(f"summary.json differs:\n{_summary(folder)}\n{_summary(whole)}")
    for path in (whole / "model").iterdir():
        if path.read_bytes() != (folder / "model" / path.name).read_bytes():
            sys.exit(f"model/{path.name} differs")
    return sum(event["event"] == "step" for event in here)


def _log(folder: Path) -> list[dict[str, Any]]:
    events = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [_timeless(event) for event in events if event["event"] not in ("checkpoint", "resume")]


def _summary(folder: Path) -> dict[str, Any]:
    return _timeless(json.loads((folder / "summary.json").read_text()))


def _timeless(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in TIMES}


if __name__ == "__main__":
    main()
