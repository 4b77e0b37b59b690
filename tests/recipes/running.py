"""Tiny runs of the recipes, the one harness of all tests of runs: in this process, or in processes that can be killed.

- ``finished``: a shipped config on its own data, to its end; the fixture ``run`` shortens it to 8 steps.
- ``Runs``: the tiny configs on four small tasks of text, each a command line; in this process, in one of its own, or
  in a group of several. The fixture ``runs`` gives a file of tests its own.
- ``exit_status``: any command line, as a shell would see it.

A process of its own is forked from one that has everything imported, so that a kill costs the run and not the imports.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from group import free_ports
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import adapt_recipes.run
from adapt_recipes import models
from adapt_recipes.config import command_line, load

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def recipe_of(config: Path) -> str:
    """The recipe's name, by the config's key ``recipe``."""
    return next(line.split()[1] for line in config.read_text().splitlines() if line.startswith("recipe: "))


SUITES = {path.stem: path for path in sorted((ROOT / "yaml").glob("eval_*.yaml"))}
# Of the recipes that train.
CONFIGS = {path.stem: path for path in sorted((ROOT / "yaml").glob("*.yaml")) if path.stem not in SUITES}
# Strategy: recipe
RECIPES = {name.removeprefix("tiny_"): recipe_of(path) for name, path in CONFIGS.items() if name.startswith("tiny_")}
TOTAL_TOKENS = 330  # more than one pass over some of the tasks below
TIMES = ("seconds", "mixture_seconds", "validation_seconds")

_forkserver = multiprocessing.get_context("forkserver")
_forkserver.set_forkserver_preload(["running"])


def load_recipe(name: str) -> Any:
    """The module in ``recipes/``; by its path, because torchtune has a package of that name."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "recipes" / f"{name}.py")
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


for _name in RECIPES.values():
    load_recipe(_name)


def learns(config: Path) -> bool:
    """Whether its mixture changes."""
    return "mixture_update_every" in config.read_text()


def recipe_class(strategy: str) -> Any:
    """The ``Recipe`` of the strategy's module."""
    return load_recipe(RECIPES[strategy]).Recipe


def before(strategy: str, method: str, act: Callable[[], object], *, after: int = 0) -> Any:
    """Patches the runs of a strategy: ``act`` is called before a method, each time that enough steps are done.

    Args:
        strategy: what the config is called.
        method: of the recipe or of ``adapt_recipes.run.Run``; "finish" comes when the budget is spent, before model/.
        act: takes nothing.
        after: steps done, or more.
    """
    recipe, run = recipe_class(strategy), adapt_recipes.run.Run
    owner: Any = models if method == "finish" else recipe if hasattr(recipe, method) else run
    name = "save" if method == "finish" else method
    original = getattr(owner, name)

    def acting(self: Any, *arguments: Any, **named: Any) -> Any:
        if method == "finish" or self.ledger.steps >= after:
            act()
        return original(self, *arguments, **named)

    return mock.patch.object(owner, name, acting)


def exit_status(recipe: str, argv: list[str]) -> int:
    """Of a command line, in this process; an error is a line on stderr."""
    module = load_recipe(recipe)
    with pytest.raises(SystemExit) as end:
        command_line(module.main, module.Config, argv)
    assert isinstance(end.value.code, int)
    return end.value.code


class Run(NamedTuple):
    """A finished run and what it wrote."""

    folder: Path
    log: list[dict[str, Any]]
    summary: dict[str, Any]

    def events(self, name: str) -> list[dict[str, Any]]:
        return [line for line in self.log if line["event"] == name]

    def training(self) -> list[dict[str, Any]]:
        """The step events without their times, and without what was read for other purposes."""
        other = ("seconds", "total_tokens")
        return [{key: value for key, value in line.items() if key not in other} for line in self.events("step")]


def finished(config: str, *overrides: str, output_dir: Path, recipe: str | None = None) -> Run:
    """A shipped config, by name, run to its end in this process; by the recipe that it names, or another."""
    module = load_recipe(recipe or recipe_of(CONFIGS[config]))
    assert module.main(load(module.Config, CONFIGS[config], [f"output_dir={output_dir}", *overrides])) == 0
    return Run(output_dir, events(output_dir), json.loads((output_dir / "summary.json").read_text()))


class Killed(BaseException):
    """No `except Exception` sees this, as none sees kill -9."""


class Runs:
    """Runs of the shipped tiny configs on small tasks, each a command line.

    Dropout makes training draw random numbers, so that a generator that is not where it belongs shows.

    Args:
        home: a folder for the tasks and their cache.
    """

    def __init__(self, home: Path) -> None:
        self._whole = home / "whole"
        self.cache = home / "cache"
        self.tasks = home / "tasks"
        self.tasks.mkdir()
        for task, (num_rows, answer) in {"a": (12, "x"), "b": (20, "yes"), "c": (30, "12"), "d": (16, "it is")}.items():
            rows = [{"prompt": f"{task}{i}", "response": f"{answer}{i % 7}"} for i in range(num_rows)]
            (self.tasks / f"{task}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        self.settings: dict[str, Any] = {
            "tasks": "adapt_recipes.data.jsonl_tasks",
            "tasks.path": self.tasks,
            "tasks.cache_dir": self.cache,
            "tasks.validation_examples": 4,
            "tasks.no_validation": "[d]",
            "tokenizer.supervise_end": "true",
            "model.attn_dropout": 0.1,
            "budget.tokens": TOTAL_TOKENS,
            "tasks.max_epochs_per_task": 1000,
            "batch_size": 8,
            "validate_every": 4,
            "checkpoint_every": 2,
        }
        self.learned_settings = {"mixture_update_every": 3, "probe.examples": 3}

    def argv(self, strategy: str, output_dir: Path, /, **changes: Any) -> list[str]:
        """The recipe's command line. Keys with dots come as ``**{"optimizer.lr": 0.1}``."""
        config = CONFIGS[f"tiny_{strategy}"]
        settings = self.settings | (self.learned_settings if learns(config) else {})
        settings |= {"output_dir": output_dir, "resume": "true"} | changes
        return ["--config", str(config), "~tasks.noise", *(f"{key}={value}" for key, value in settings.items())]

    def config(self, strategy: str, output_dir: Path, /, **changes: Any) -> Any:
        _, path, *overrides = self.argv(strategy, output_dir, **changes)
        return load(load_recipe(RECIPES[strategy]).Config, path, overrides)

    def run(self, strategy: str, output_dir: Path, /, **changes: Any) -> int:
        """Run in this process. Returns the exit status; errors come as they are raised."""
        return load_recipe(RECIPES[strategy]).main(self.config(strategy, output_dir, **changes))

    def whole(self, strategy: str, /, **changes: Any) -> Path:
        """The run directory of a run that was never stopped; run once."""
        folder = self._whole / "-".join(map(str, (strategy, *changes.values())))
        if not folder.exists():
            assert self.run(strategy, folder, **changes) == 0
        return folder

    def stop(self, strategy: str, output_dir: Path, /, *, method: str = "step", after: int = 0, **changes: Any) -> None:
        """Run in this process up to the first call of a method, as ``before`` says it, and die there."""

        def die() -> None:
            raise Killed

        with before(strategy, method, die, after=after), pytest.raises(Killed):
            self.run(strategy, output_dir, **changes)

    def start(
        self,
        strategy: str,
        output_dir: Path,
        /,
        *,
        die_at_operation: int | None = None,
        max_file_bytes: int | None = None,
        **changes: Any,
    ) -> ForkServerProcess:
        """Run in a process of its own, whose output goes to ``OUTPUT_DIR.out`` and ``.err``.

        Args:
            strategy: what the config is called.
            output_dir: the run directory.
            die_at_operation: kill -9 before the n-th operation on a file of the run directory.
            max_file_bytes: the system refuses to write larger files.
            changes: see ``argv``.
        """
        argv = self.argv(strategy, output_dir, **changes)
        process = _forkserver.Process(
            target=_run, args=(RECIPES[strategy], argv, output_dir, die_at_operation, max_file_bytes)
        )
        _start(process)
        return process

    def start_group(
        self,
        strategy: str,
        output_dir: Path,
        /,
        *,
        size: int = 2,
        ranks: Sequence[int] | None = None,
        prepare: Callable[[int], None] | None = None,
        **changes: Any,
    ) -> list[ForkServerProcess]:
        """Run in several processes, as torchrun would start them; each one's output goes to ``OUTPUT_DIR.RANK.out``
        and ``.err``.

        Args:
            strategy, output_dir, changes: see ``start``.
            size: how many processes the run has.
            ranks: of those that are started; None: all.
            prepare: called with its rank by each, before the run; a function of a test file, or a partial one.
        """
        (port,) = free_ports(1)
        environment = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        argv, processes = self.argv(strategy, output_dir, **changes), []
        for rank in range(size) if ranks is None else ranks:
            own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
            process = _forkserver.Process(target=_be, args=(RECIPES[strategy], argv, output_dir, own, prepare))
            _start(process)
            processes.append(process)
        return processes

    def finish_group(self, strategy: str, output_dir: Path, /, **arguments: Any) -> list[int]:
        """The same, to their ends. Returns their exit statuses, negative for a signal."""
        return end(self.start_group(strategy, output_dir, **arguments))

    def finish(self, strategy: str, output_dir: Path, /, **arguments: Any) -> int | None:
        """The same, to its end. Returns the exit status, negative for a signal."""
        process = self.start(strategy, output_dir, **arguments)
        process.join(120)
        assert process.exitcode is not None, "it hangs"
        return process.exitcode


def _start(process: ForkServerProcess) -> None:
    # The process that the others are forked from reads this when it starts, at the first run.
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(map(str, (ROOT, HERE, HERE.parent)))):
        process.start()


def end(processes: Sequence[ForkServerProcess], *, within: float = 120) -> list[int]:
    """The exit statuses of processes, which have to end within some seconds."""
    limit = time.monotonic() + within
    for process in processes:
        process.join(limit - time.monotonic())
    hanging = [process for process in processes if process.exitcode is None]
    for process in hanging:
        process.kill()
    assert not hanging, "it hangs"
    return [process.exitcode or 0 for process in processes]


def _be(
    recipe: str,
    argv: list[str],
    output_dir: Path,
    environment: dict[str, str],
    prepare: Callable[[int], None] | None,
) -> None:
    """This process is one of a group."""
    os.environ.update(environment)
    rank = environment["RANK"]
    _redirect(output_dir, f".{rank}")
    if prepare:
        prepare(int(rank))
    module = load_recipe(recipe)
    command_line(module.main, module.Config, argv)


def _redirect(output_dir: Path, kind: str = "") -> None:
    for stream, suffix in ((1, f"{kind}.out"), (2, f"{kind}.err")):
        path = output_dir.with_name(output_dir.name + suffix)
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)


def _run(
    recipe: str, argv: list[str], output_dir: Path, die_at_operation: int | None, max_file_bytes: int | None
) -> None:
    _redirect(output_dir)
    if max_file_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
    if die_at_operation:
        _die(output_dir, die_at_operation)
    module = load_recipe(recipe)
    command_line(module.main, module.Config, argv)


def _die(folder: Path, operation: int) -> None:
    """Kill this process before its n-th operation on a file of ``folder``."""
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        changes = event in ("os.rename", "os.mkdir", "os.rmdir", "os.remove")  # rmtree names no folder: counted all
        if changes or (event == "open" and str(arguments[0]).startswith(f"{folder}/")):
            count += 1
            if count == operation:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def said(output_dir: Path, suffix: str) -> str:
    """What the last run in a process of its own wrote to ``.out`` or ``.err``."""
    return output_dir.with_name(output_dir.name + suffix).read_text()


def events(output_dir: Path) -> list[dict[str, Any]]:
    """The lines of ``log.jsonl``; a last one that is still being written is left out."""
    with contextlib.suppress(FileNotFoundError):
        text = (output_dir / "log.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return []


def sequence(output_dir: Path) -> list[dict[str, Any]]:
    """What a log says of the run whether or not it was interrupted: no times, no checkpoints, no resumes."""
    kept = [event for event in events(output_dir) if event["event"] not in ("checkpoint", "resume")]
    return [{key: value for key, value in event.items() if key not in TIMES} for event in kept]


def summary(output_dir: Path) -> dict[str, Any]:
    """``summary.json`` without its times."""
    values = json.loads((output_dir / "summary.json").read_text())
    return {key: value for key, value in values.items() if key not in TIMES}


def files(folder: Path) -> dict[str, bytes]:
    """Everything below a folder, without the file that a killed run may leave where its lock was."""
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """All that is in a ``step_N``, by whichever number of processes it was written."""
    file = folder.parent / "whole.pt"
    dcp_to_torch_save(folder, file)
    whole = torch.load(file, weights_only=False)
    file.unlink()
    rest = torch.load(folder / "shared.pt")
    shared = {**rest["shared"], **rest["shared"]["states"]}
    return {**whole, "groups": rest["optimizer"]["param_groups"], "rng": rest["own"][0], **shared}


def assert_same_run(output_dir: Path, expected: Path) -> None:
    """Two finished runs said the same, bit for bit, and ended with the same model."""
    for here, there in zip(sequence(output_dir), sequence(expected), strict=False):
        assert here == there
    assert len(sequence(output_dir)) == len(sequence(expected))
    assert summary(output_dir) == summary(expected)
    assert files(output_dir / "model") == files(expected / "model")
