"""`tune new`, `plan`, `report` and `export`. Quick to import: each imports torch and the rest when it runs."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from adapt_recipes.errors import check_installed, each_warning_once
from adapt_recipes.shipped import bundle, check_recipe, config_file, recipe_file, schema
from adapt_recipes.words import COMMAND, Parser

# Between lines about a plan where there is no terminal; None: none are written.
PHASE_SECONDS: float | None = 10.0


def add_new(subparsers: Any) -> None:
    """`tune new NAME --tasks TASKS --model FOLDER [--column COLUMN] [--pilot SHARE]`."""
    parser = subparsers.add_parser(
        "new",
        prog="tune new",
        help="Write a config for your own tasks and model.",
        description="Read your tasks and your model, and write NAME.yaml, a config with a reason at every choice: "
        "lengths, batches, budget, and a mixture if there are several tasks.",
        allow_abbrev=False,
    )
    parser.add_argument("name", help="of the config and the run")
    parser.add_argument(
        "--tasks", required=True, help="folder or file: JSON Lines, JSON, Parquet, a saved dataset, ..."
    )
    parser.add_argument("--model", required=True, help="Hugging Face folder")
    parser.add_argument("--column", help="column whose values are the tasks; default: each file or split is one")
    parser.add_argument(
        "--pilot", type=float, metavar="SHARE", help="choose the mixture by short runs, of a share of the budget"
    )

    def new(args: argparse.Namespace) -> None:
        from adapt_recipes.planning import run_pilot, show, show_pilot, write_config
        from adapt_recipes.strict import load

        def best(config: Any, made: Any) -> str:
            found = run_pilot(config, args.pilot, made, num_processes=1)
            show_pilot(found)
            return found.best

        try:
            _check_share(args.pilot)
            with contextlib.redirect_stdout(sys.stderr), each_warning_once(), _phases() as say:
                file, config, made = write_config(
                    args.name,
                    tasks=args.tasks,
                    model=args.model,
                    column=args.column,
                    template=bundle() / "yaml" / "vicuna.jinja",
                    load=lambda recipe, path: load(schema(recipe_file(recipe)), str(path), []),
                    pilot=best if args.pilot is not None else None,
                    say=say,
                )
        except (ValueError, OSError) as error:
            parser.error(" ".join(str(error).split()))
        except KeyboardInterrupt:
            parser.exit(128 + signal.SIGINT, f"{COMMAND} new: interrupted, and nothing written\n")
        show(made, config, num_processes=1)
        print(f"{file}\n{COMMAND} run {config.recipe} --config {file}")

    parser.set_defaults(func=new)


def _check_share(share: float | None) -> None:
    if share is not None and not 0 < share <= 1:
        raise ValueError(f"--pilot: a share of the budget, above 0 and at most 1, not {share:g}")


def add_plan(subparsers: Any) -> None:
    """`tune plan RECIPE --config CONFIG [key=value ...]`: what `tune run` would do with the same arguments."""
    purpose = "Show what a run would do and need; trains nothing."
    # ``plan`` has a parser of its own, because a subcommand's accepts no overrides after an option.
    words = subparsers.add_parser("plan", prog="tune plan", help=purpose, add_help=False, prefix_chars="\0")
    words.add_argument("words", nargs="*")
    words.set_defaults(func=lambda given: plan(given.words))


def plan(words: Sequence[str]) -> None:
    """Runs `tune plan`."""
    parser = Parser(
        prog=f"{COMMAND} plan",
        usage=f"{COMMAND} plan [--nnodes M] [--nproc_per_node N] [--json] [--pilot SHARE] <recipe> "
        "--config <config> [key=value ...]",
        description="Show what a run would do and need: tasks, budget, steps, memory, disk. Trains nothing, but with "
        "--pilot two short runs, from which it predicts losses under several mixtures.",
        allow_abbrev=False,
    )
    # The options of `tune run` that come before the recipe; here they may come anywhere.
    parser.add_argument("--nnodes", type=int, default=1, metavar="M", help="machines; default 1")
    per_node = ("--nproc_per_node", "--nproc-per-node")
    parser.add_argument(*per_node, type=int, default=1, metavar="N", help="processes (GPUs) on each; default 1")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--pilot", type=float, metavar="SHARE", help="share of the budget to spend on short runs")
    parser.add_argument("--config", required=True, help="name or path of a config")
    parser.add_argument("recipe", help="name or path of a recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as given to `tune run`")
    arguments = parser.parse_intermixed_args(words)
    # As in `tune run`: a user's recipe may import modules of the current folder.
    sys.path.append(os.getcwd())
    try:
        for option in ("nnodes", "nproc_per_node"):
            if getattr(arguments, option) < 1:
                raise ValueError(f"--{option}: has to be at least 1, not {getattr(arguments, option)}")
        _check_share(arguments.pilot)
        if arguments.pilot is not None and arguments.nnodes > 1:
            raise ValueError("--pilot: its runs are on one machine; leave --nnodes out")
        check_recipe(arguments.recipe, arguments.config)
        num_processes = arguments.nnodes * arguments.nproc_per_node
        made, config = _make_plan(arguments, num_processes)
        pilot = None
        if arguments.pilot is not None:
            from adapt_recipes.planning import run_pilot

            pilot = run_pilot(config, arguments.pilot, made, num_processes=num_processes)
    except (ValueError, OSError, yaml.YAMLError) as error:
        parser.error(" ".join(str(error).split()))
    except KeyboardInterrupt:
        parser.exit(128 + signal.SIGINT, f"{COMMAND} plan: interrupted\n")
    if arguments.json:
        print(json.dumps(made.to_dict() | ({"pilot": pilot.to_dict()} if pilot else {}), indent=2))
        return
    from adapt_recipes.planning import show, show_pilot

    show(made, config, num_processes=num_processes)
    if pilot:
        show_pilot(pilot)


def _make_plan(arguments: argparse.Namespace, num_processes: int) -> tuple[Any, Any]:
    """The plan and its config. Output of components goes to stderr, as progress does."""
    from omegaconf.errors import OmegaConfBaseException

    with contextlib.redirect_stdout(sys.stderr), _phases() as say:
        say("reading the recipe")
        config_class, config_path = schema(recipe_file(arguments.recipe)), config_file(arguments.config)
        from adapt_recipes.planning import make_plan
        from adapt_recipes.strict import load

        try:
            config: Any = load(config_class, config_path, arguments.overrides)
            return make_plan(config, num_processes=num_processes, say=say), config
        except OmegaConfBaseException as error:
            raise ValueError(str(error)) from error


@contextlib.contextmanager
def _phases() -> Iterator[Callable[[str], None]]:
    """Shows the phase of a plan: by a spinner on a terminal, elsewhere by a line every ten seconds.

    While tasks are read it shows nothing, because preparing them shows how far it is.
    """
    from rich.console import Console

    status, ended, is_terminal = Console(stderr=True).status(""), threading.Event(), sys.stderr.isatty()
    phase, began = "", time.monotonic()

    def say(name: str) -> None:
        nonlocal phase, began
        phase, began = name, time.monotonic()
        if is_terminal and name == "reading tasks":
            status.stop()
        elif is_terminal:
            status.update(name)
            status.start()

    def say_again() -> None:
        while not ended.wait(PHASE_SECONDS):
            if phase not in ("", "reading tasks"):
                print(f"{phase}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)

    if not is_terminal:
        threading.Thread(target=say_again, daemon=True).start()
    try:
        yield say
    finally:
        ended.set()
        if is_terminal:
            status.stop()


def add_report(subparsers: Any) -> None:
    """`tune report RUN... [--out PAGE.html] [--schedule CONFIG.yaml]`."""
    parser = subparsers.add_parser(
        "report",
        prog="tune report",
        help="Show a run on a page, or compare several.",
        description="Write one HTML page that shows a run, finished or not, or compares several, and a PNG of each of "
        "its figures in a folder beside it. Runs that differ only in seed are combined. What mixture_eval measured is "
        "compared with the scores of the first.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directory; beside runs, the scores of a base model")
    parser.add_argument(
        "--out",
        metavar="PAGE.html",
        help="default: report.html in the run directory; of several runs, in the current folder",
    )

    parser.add_argument(
        "--schedule",
        metavar="CONFIG.yaml",
        help="of one finished run: write a config that repeats the mixture it has learned, as a fixed schedule",
    )

    def report(args: argparse.Namespace) -> None:
        try:
            check_installed(("itables", "matplotlib", "plotly"), extra="report")
            from adapt_recipes.report.page import write_report
            from adapt_recipes.report.schedule import write_schedule

            if args.schedule:
                if len(args.runs) > 1:
                    raise ValueError(f"--schedule: is of one run, and there are {len(args.runs)}")
                write_schedule(Path(args.runs[0]), Path(args.schedule))

            page, *figures = write_report([Path(run) for run in args.runs], Path(args.out) if args.out else None)
        except (ValueError, OSError) as error:
            parser.error(" ".join(str(error).split()))
        print(f"{page}\n{len(figures)} figures in {figures[0].parent}/")
        if args.schedule:
            print(args.schedule)

    parser.set_defaults(func=report)


def add_export(subparsers: Any) -> None:
    """`tune export RUN [--step N] [--out FOLDER] [--dtype DTYPE]`."""
    parser = subparsers.add_parser(
        "export",
        prog="tune export",
        help="Write a checkpoint of a run as a Hugging Face folder.",
        description="Write the model of a checkpoint as a Hugging Face folder, and adapters, if it has any, for PEFT "
        "beside it: what the run writes as model/ and adapter/ when it ends there. The run may have been stopped, have "
        "died, or be at work.",
    )
    parser.add_argument("run", metavar="RUN", help="run directory")
    parser.add_argument("--step", type=int, metavar="N", help="of the checkpoint; default: the newest one")
    parser.add_argument("--out", metavar="FOLDER", help="default: exported_model_step_N in the run directory")
    parser.add_argument(
        "--dtype",
        choices=("stored", "fp32", "bf16", "fp16"),
        help="of the weights; stored: that of the base model; default: checkpointer.save_dtype of the run",
    )

    def run(args: argparse.Namespace) -> None:
        # As in `tune run`: the builder of the model may be in a module of the current folder.
        sys.path.append(os.getcwd())
        try:
            from adapt_recipes.export import export

            out = Path(args.out) if args.out else None
            with contextlib.redirect_stdout(sys.stderr):
                written = export(Path(args.run), step=args.step, out=out, save_dtype=args.dtype)
        except (ValueError, OSError) as error:
            parser.error(" ".join(str(error).split()))
        print(*written, sep="\n")

    parser.set_defaults(func=run)
