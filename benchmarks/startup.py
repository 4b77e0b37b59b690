"""Time of `tune ls`, `tune validate` and the start of `tune run`, and a run's peak memory and speed.

    python benchmarks/startup.py [--rounds N] [--config NAME] [--model FOLDER --data FOLDER] [key=value ...]

Each round lists, validates a shipped config, and runs it twice, each in a process of its own: first with an empty
cache of tokenized tasks, then from the cache. The table has the median of the rounds and their range. *Start-up* is the
time from the start of the process to the first line of ``log.jsonl``, before the first validation, and *first step* the
time to the end of the first step; the file cache of the operating system is not cleared. Only the budget of the config
is changed (``--budget``), so the share of mixture updates is that of its settings. Speed excludes start-up, validation
and updates, and the share of updates is of the time without validation. Give ``--model`` and ``--data`` for configs of
real models; their validation at the start and the end takes long, see ``tasks.validation_examples``.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common

from adapt_recipes.shipped import recipe_of


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the command line ``argv``. Returns the numbers that ``--json`` writes."""
    parser = common.parser(__doc__, max_seq_len=1024)
    parser.add_argument("--config", default="tiny_adapt_planned", help="a name in yaml/")
    parser.add_argument("--budget", type=int, default=9600, help="supervised tokens per run")
    parser.add_argument("--rounds", type=int, default=3)
    arguments, overrides = parser.parse_known_args(argv)
    real = not arguments.config.startswith("tiny_")
    commands: dict[str, list[float]] = {"ls": [], "validate": []}
    runs: dict[str, list[dict[str, Any]]] = {"cold": [], "cached": []}
    with tempfile.TemporaryDirectory() as name:
        given = [*common.sources(arguments, Path(name)), "tasks.types=null"] if real else []
        for number in range(arguments.rounds):
            folder = Path(name) / str(number)
            folder.mkdir()
            mine = [f"budget.tokens={arguments.budget}", f"tasks.cache_dir={folder / 'cache'}"]
            last_wins = dict(each.split("=", 1) for each in (*given, *mine, *overrides))
            words = [str(common.CONFIGS / f"{arguments.config}.yaml"), *(f"{k}={v}" for k, v in last_wins.items())]
            commands["ls"].append(seconds("ls"))
            commands["validate"].append(seconds("validate", *words))
            for state, measured in runs.items():
                measured.append(run(arguments.config, last_wins, folder / state, threads=arguments.threads))
    numbers = {
        "config": arguments.config,
        "budget_tokens": arguments.budget,
        **commands,
        **{state: {key: [each[key] for each in measured] for key in measured[0]} for state, measured in runs.items()},
    }
    rows: list[tuple[str, ...]] = [(f"tune {command}, s", spread(times), "") for command, times in commands.items()]
    rows += [
        (label, *(spread(numbers[state][key], scale) for state in runs))
        for label, key, scale in (
            ("tune run: start-up, s", "startup_seconds", 1),
            ("tune run: first step, s", "first_step_seconds", 1),
            ("whole run, s", "wall_seconds", 1),
            ("peak memory, MiB", "peak_mib", 1),
            ("tokens/s", "tokens_per_second", 1),
            ("supervised tokens/s", "supervised_tokens_per_second", 1),
            ("computed per token read, %", "computed", 100),
            ("mixture updates, % of time", "mixture_share", 100),
            ("steps", "steps", 1),
            ("mixture updates", "mixture_updates", 1),
        )
    ]
    title = f"{arguments.config}, {arguments.budget} supervised tokens, {arguments.rounds} rounds"
    common.show(title, ("", "cold", "cached"), rows)
    return common.write(arguments.json, numbers)


def spread(values: Sequence[float], scale: float = 1) -> str:
    """The median, and the range if there is one."""
    low, middle, high = (f"{scale * f(values):,.4g}" for f in (min, statistics.median, max))
    return middle if low == high else f"{middle} ({low} to {high})"


def tune(*words: str) -> list[str]:
    """The command line of `tune`."""
    return [sys.executable, "-m", "tune_cli_ext", *words]


def environment(**variables: str) -> dict[str, str]:
    """The environment of a process that imports this checkout."""
    python_path = os.pathsep.join([str(common.ROOT), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": python_path} | variables


def seconds(*words: str) -> float:
    """The time that a `tune` command takes."""
    started = time.perf_counter()
    done = subprocess.run(tune(*words), capture_output=True, text=True, env=environment())
    if done.returncode:
        raise RuntimeError(f"tune {' '.join(words)}: {done.stderr[-2000:]}")
    return time.perf_counter() - started


def run(config: str, overrides: dict[str, str], output_dir: Path, *, threads: int) -> dict[str, Any]:
    """Run a recipe to its end and watch it from outside."""
    path = common.CONFIGS / f"{config}.yaml"
    overrides = overrides | {"output_dir": str(output_dir)}
    command = tune("run", str(recipe_of(path)), "--config", str(path), *(f"{k}={v}" for k, v in overrides.items()))
    output = output_dir.with_suffix(".out")
    log = output_dir / "log.jsonl"
    startup = first_step = peak = 0.0
    started = time.perf_counter()
    with output.open("w") as file:
        variables = environment(OMP_NUM_THREADS=str(threads))
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=variables)
    while process.poll() is None:
        peak = max(peak, common.memory(process.pid)[1])
        if not first_step and log.exists() and (written := log.read_text()):
            startup = startup or time.perf_counter() - started
            first_step = time.perf_counter() - started if '"event": "step"' in written else 0.0
        time.sleep(0.01)
    wall = time.perf_counter() - started
    if process.returncode:
        raise RuntimeError(f"the run failed: {output.read_text()[-2000:]}")
    summary = json.loads((output_dir / "summary.json").read_text())
    training = summary["seconds"] - summary["validation_seconds"]
    stepping = training - summary["mixture_seconds"]
    return {
        "startup_seconds": startup,
        "first_step_seconds": first_step,
        "wall_seconds": wall,
        "peak_mib": peak,
        "tokens_per_second": summary["tokens"] / stepping,
        "supervised_tokens_per_second": summary["supervised_tokens"] / stepping,
        "computed": summary["computed_tokens"] / summary["tokens"],
        "mixture_share": summary["mixture_seconds"] / training,
        "steps": summary["steps"],
        "mixture_updates": summary["mixture_updates"],
    }


if __name__ == "__main__":
    main()
