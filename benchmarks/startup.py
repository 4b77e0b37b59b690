"""Start-up time with a cold and a warm cache, peak memory, and speed from a run's ``summary.json``.

    python benchmarks/startup.py [--config NAME] [--model FOLDER --data FOLDER] [key=value ...]

Runs a shipped config twice, each time in a process of its own: first with an empty cache of tokenized tasks, then from
the cache. Start-up is the time from the start of the process to the first line of ``log.jsonl``, when training begins;
the file cache of the operating system is not cleared. Only the budget of the config is changed (``--budget``), so the
share of mixture updates is that of its settings. Speed excludes start-up, validation and updates, and the share of
updates is of the time without validation. Give ``--model`` and ``--data`` for configs of real models; their validation
at the start and the end takes long, see ``tasks.validation_examples``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common

from adapt_recipes.cli import recipe_file, recipe_of


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the command line ``argv``. Returns the numbers that ``--json`` writes."""
    parser = common.parser(__doc__, max_seq_len=1024)
    parser.add_argument("--config", default="tiny_adapt_planned", help="a name in yaml/")
    parser.add_argument("--budget", type=int, default=9600, help="supervised tokens per run")
    arguments, overrides = parser.parse_known_args(argv)
    real = not arguments.config.startswith("tiny_")
    numbers: dict[str, Any] = {"config": arguments.config, "budget_tokens": arguments.budget}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources = [*common.sources(arguments, folder), "tasks.types=null"] if real else []
        overrides = [*sources, f"budget.tokens={arguments.budget}", f"tasks.cache_dir={folder / 'cache'}", *overrides]
        for state in ("cold", "cached"):
            output_dir = folder / state
            last_wins = dict(each.split("=", 1) for each in (*overrides, f"output_dir={output_dir}"))
            numbers[state] = run(arguments.config, last_wins, output_dir, threads=arguments.threads)
    rows = [
        (label, *(show(numbers[state][key]) for state in ("cold", "cached")))
        for label, key, show in (
            ("start-up, s", "startup_seconds", float),
            ("whole run, s", "wall_seconds", float),
            ("peak memory, MiB", "peak_mib", float),
            ("tokens/s", "tokens_per_second", float),
            ("supervised tokens/s", "supervised_tokens_per_second", float),
            ("computed per token read", "computed", "{:.1%}".format),
            ("mixture updates, share of time", "mixture_share", "{:.1%}".format),
            ("steps", "steps", int),
            ("mixture updates", "mixture_updates", int),
        )
    ]
    common.show(f"{arguments.config}, {arguments.budget} supervised tokens", ("", "cold", "cached"), rows)
    return common.write(arguments.json, numbers)


def run(config: str, overrides: dict[str, str], output_dir: Path, *, threads: int) -> dict[str, Any]:
    """Run a recipe to its end and watch it from outside."""
    path = common.CONFIGS / f"{config}.yaml"
    command = [sys.executable, recipe_file(str(recipe_of(path))), "--config", str(path)]
    command += [f"{key}={value}" for key, value in overrides.items()]
    python_path = os.pathsep.join([str(common.ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": python_path}
    output = output_dir.with_suffix(".out")
    first_line = output_dir / "log.jsonl"
    startup = peak = 0.0
    started = time.perf_counter()
    with output.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    while process.poll() is None:
        peak = max(peak, common.memory(process.pid)[1])
        if not startup and first_line.exists() and first_line.stat().st_size:
            startup = time.perf_counter() - started
        time.sleep(0.01)
    wall = time.perf_counter() - started
    if process.returncode:
        raise RuntimeError(f"the run failed: {output.read_text()[-2000:]}")
    summary = json.loads((output_dir / "summary.json").read_text())
    training = summary["seconds"] - summary["validation_seconds"]
    stepping = training - summary["mixture_seconds"]
    return {
        "startup_seconds": startup,
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
