"""Checks revisions out and runs `tune run` in them, without importing anything of theirs here: for same_runs.py.

As a script it is the process that runs the commands of one checkout.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]

# Every Python process of a checkout runs this as it starts: none can import the project from anywhere else.
GUARD = """
import importlib.util, os, sys
for name in ("adapt_recipes", "tune_cli_ext"):
    spec = importlib.util.find_spec(name)
    if spec is None or not str(spec.origin).startswith({root!r} + os.sep):
        print(name, "is not imported from the checkout but from", spec and spec.origin, file=sys.stderr, flush=True)
        os._exit(3)
"""


class Checkout:
    """A revision in a folder of its own, and the process that runs its commands.

    Args:
        name: of the folder, and in messages.
        revision: of git; ``.``: the working tree, with untracked files.
        home: where the folder is made.
    """

    def __init__(self, name: str, revision: str, home: Path) -> None:
        self.name, self.root, self.title = name, home / name, f"{name}: the working tree"
        self.root.mkdir()
        if revision == ".":
            for file in _git("ls-files", "-z", "--cached", "--others", "--exclude-standard").decode().split("\0"):
                if (ROOT / file).is_file():
                    (self.root / file).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(ROOT / file, self.root / file)
        else:
            commit = (
                _git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}").decode().strip()
            )
            subprocess.run(["tar", "-x", "-C", self.root], input=_git("archive", commit), check=True)
            self.title = f"{name}: {commit[:7]}"

    def start(self, commands: dict[str, list[str]]) -> None:
        """Start runs, one after the other. A name that ends in ``-resumed`` is of one that is killed and resumed.

        Args:
            commands: name of a run, and what follows ``tune run``.
        """
        guard, self._errors = self.root.with_suffix(".guard"), self.root.with_suffix(".txt")
        guard.mkdir()
        (guard / "sitecustomize.py").write_text(GUARD.format(root=str(self.root)))
        with open(self._errors, "w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-P", __file__, json.dumps(commands)],
                cwd=self.root,
                env=os.environ | {"PYTHONPATH": f"{guard}{os.pathsep}{self.root}", "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
            )

    def wait(self, run: str) -> str:
        """Wait for the next run, which has to be this one. Returns why it failed; "": it did not."""
        assert self._process.stdout is not None
        status = self._process.stdout.readline().strip()
        output = self.folder(run, ".txt") if status else self._errors
        last_line = (output.read_text().strip().splitlines() or ["no output"])[-1]
        if not status:
            stop(f"{self.name}: {last_line}")
        return "" if status == "0" else f"{self.name}: exit status {status}: {last_line}"

    def close(self) -> None:
        """End the process and all that it started."""
        assert self._process.stdout is not None
        with contextlib.suppress(OSError):
            os.killpg(self._process.pid, signal.SIGTERM)
        # This ends when the last run has, which may still write.
        self._process.stdout.read()
        self._process.wait()

    def folder(self, run: str, suffix: str = "") -> Path:
        """The run directory, or a file beside it."""
        return self.root / "runs" / f"{run}{suffix}"


def _git(*words: str) -> bytes:
    """What a command of git prints."""
    done = subprocess.run(["git", "-C", ROOT, *words], capture_output=True)
    if done.returncode:
        stop(done.stderr.decode() or f"git has no revision {words[-1].removesuffix('^{commit}')!r}")
    return done.stdout


def stop(reason: str) -> NoReturn:
    """Exit with one line."""
    print(f"same_runs.py: error: {' '.join(reason.split())}", file=sys.stderr)
    sys.exit(2)


# ---- in the process of a checkout


def serve(commands: dict[str, list[str]]) -> None:
    """Run the commands and print the exit status of each.

    Each is a fork of this process, which has imported what recipes import and called nothing. That isolates as well as
    a new process, whose imports alone take 6 s of CPU time; a fork takes 2 s in all.
    """
    statuses = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for recipe in sorted(Path("recipes").glob("*.py")):
        with contextlib.suppress(Exception):
            runpy.run_path(str(recipe))
    with contextlib.suppress(ImportError):
        # torchtune's command line takes 2 s to import these.
        import kagglehub  # type: ignore[import-untyped]  # noqa: F401
        import torch.distributed.run  # noqa: F401
    Path("runs").mkdir()
    for run, command in commands.items():
        status = run_and_kill(run, command) if run.endswith("-resumed") else 0
        status = status or os.waitstatus_to_exitcode(os.waitpid(fork(run, command), 0)[1])
        print(status, file=statuses, flush=True)


def fork(run: str, command: Sequence[str]) -> int:
    """Start ``tune run COMMAND``. Returns the process id."""
    if pid := os.fork():
        return pid
    status: object = 0
    try:
        for stream in (1, 2):
            os.dup2(os.open(f"runs/{run}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        os.environ["XDG_CACHE_HOME"] = os.path.abspath(f"runs/{run}.cache")
        sys.argv = ["tune", "run", *command]
        runpy.run_module("tune_cli_ext", run_name="__main__")
    except SystemExit as leaving:
        status = leaving.code or 0
    except BaseException:
        status = 1
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else 1)


def run_and_kill(run: str, command: Sequence[str]) -> int:
    """Kill a run after its second checkpoint. Returns 0, or its exit status if it failed before."""
    log = Path("runs", run, "log.jsonl")
    while True:
        pid, ended, status = fork(run, command), 0, 0
        while not ended and not (log.exists() and len(re.findall('"event": ?"checkpoint"', log.read_text())) > 1):
            time.sleep(0.001)
            ended, status = os.waitpid(pid, os.WNOHANG)
        if not ended:
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
        if (exit_status := os.waitstatus_to_exitcode(status)) > 0 or not log.with_name("summary.json").exists():
            return max(exit_status, 0)
        # It finished before it was killed, for this process had to wait for a CPU.
        shutil.rmtree(log.parent)


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
