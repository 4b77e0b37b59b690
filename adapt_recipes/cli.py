"""What this project adds to torchtune's `tune`: recipes and configs, strict checks, `tune plan` and `tune report`.

``tune_cli_ext`` calls the functions in its table with torchtune's modules, right after their import. They rely on these
details of torchtune 0.6.1: `_recipe_registry._ALL_RECIPES` is a list of `Recipe(name, file_path, configs,
supports_distributed)`, whose `file_path` may be absolute; `_cli.tune` takes `List`, `Run` and `Validate` from their
modules, and creates its last command by `Cat.create(subparsers)`; `Run._get_recipe` finds a recipe.

This module is quick to import: torch and the rest of the package are imported by the commands that need them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import yaml

from adapt_recipes.errors import nearest
from adapt_recipes.stop import NOTHING_PRINTED, STOP_SIGNALS, print_nothing_saved, stop_signals

# Between lines about a plan where there is no terminal; None: none are written.
PHASE_SECONDS: float | None = 10.0

# ---------------------------------------------------------------------------------------------- recipes and configs


def bundle() -> Path:
    """The folder with recipes/ and yaml/: inside the package if a wheel is installed, else the checkout.

    The folder beside an installed package, site-packages, has a `recipes` too, which is torchtune's.
    """
    package = Path(__file__).resolve().parent
    return package / "_bundled" if (package / "_bundled").is_dir() else package.parent


def shipped(folder: str, suffix: str) -> dict[str, Path]:
    """{file name without suffix: path} of a folder of the bundle, in alphabetical order."""
    return {path.stem: path for path in sorted((bundle() / folder).iterdir()) if path.suffix == suffix}


def recipe_of(config_path: str | Path) -> str | None:
    """The recipe that a config names by its key `recipe`, by name or path; None: it names none."""
    try:
        config = yaml.safe_load(Path(config_path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        # Loading the config will say what is wrong with it.
        return None
    recipe = config.get("recipe") if isinstance(config, dict) else None
    return None if recipe is None else str(recipe)


def add_recipes(registry: ModuleType) -> None:
    """Adds our recipes before torchtune's, each with its configs, as NAME and as yaml/NAME.yaml."""

    def recipe(name: str, path: Path) -> Any:
        return registry.Recipe(name=name, file_path=str(path), configs=[], supports_distributed=True)

    recipes = {name: recipe(name, path) for name, path in shipped("recipes", ".py").items()}
    for name, path in shipped("yaml", ".yaml").items():
        if owner := recipes.get(_recipe_in_text(path)):
            literal = f"yaml/{name}.yaml"
            # The path means a file in the current folder, if there is one: the user may have edited it.
            literal_path = os.path.abspath(literal) if os.path.isfile(literal) else str(path)
            owner.configs += [registry.Config(name, str(path)), registry.Config(literal, literal_path)]
    if sys.argv[1:2] == ["run"]:
        # torchtune would run a user's file as a module: ./my.py as "..my", and recipes/my.py as "recipes.my", which it
        # looks for in the `recipes` that torchtune installs. A registered path runs as a file.
        files = (word for word in sys.argv[2:] if word.endswith(".py") and os.path.isfile(word))
        recipes.update({word: recipe(word, Path(word).resolve()) for word in files})
    registry._ALL_RECIPES[:0] = recipes.values()


def _recipe_in_text(path: Path) -> str:
    """``recipe_of`` a shipped config without parsing YAML, because `tune` calls this for all of them when it starts."""
    with open(path, encoding="utf-8") as file:
        return next((line.split()[1] for line in file if line.startswith("recipe: ")), "")


def list_configs_once(ls: ModuleType) -> None:
    """Makes `tune ls` list each of our configs once where torchtune was imported before the command was known."""
    folder = Path(ls.__file__ or "").parents[1]
    ls.List._ls_cmd = lambda self, args: list_recipes(folder)


def list_recipes(torchtune_folder: str | Path) -> None:
    """Does `tune ls`, with each of our configs once, by its name, and without importing torchtune."""
    spec = spec_from_file_location("registry", Path(torchtune_folder) / "_recipe_registry.py")
    assert spec is not None and spec.loader is not None
    registry = module_from_spec(spec)
    spec.loader.exec_module(registry)
    add_recipes(registry)
    ours = shipped("recipes", ".py")
    lines = [("RECIPE", "CONFIG")]
    for recipe in registry.get_all_recipes():
        configs = [config.name for config in recipe.configs]
        if recipe.name in ours:
            configs = [name for name in configs if not name.endswith(".yaml")]
        lines += [("" if i else recipe.name, name) for i, name in enumerate(configs or ["<>"])]
    print("\n".join(f"{recipe:<40} {config:<40}" for recipe, config in lines))


# ------------------------------------------------------------------------------------------------------------ tune run


def check_before_run(run: ModuleType) -> None:
    """Makes `tune run` print one line where torchtune and torchrun would print a traceback."""

    class Run(run.Run):  # type: ignore[name-defined]
        def _get_recipe(self, recipe_str: str) -> Any:
            recipe = super()._get_recipe(recipe_str)
            if recipe is None and not _is_module(self._convert_to_dotpath(recipe_str)):
                hint = nearest(recipe_str, [known.name for known in run.get_all_recipes()])
                hint = hint if "did you mean" in hint else "; `tune ls` lists all recipes"
                self._parser.exit(2, f"tune run: error: no recipe '{recipe_str}', by name or by path{hint}\n")
            return recipe

        def _run_cmd(self, args: argparse.Namespace) -> None:
            try:
                _check_recipe(args.recipe, args.recipe_args)
            except ValueError as error:
                self._parser.exit(2, f"tune run: error: {error}\n")
            super()._run_cmd(args)

        def _run_distributed(self, args: argparse.Namespace, is_builtin: bool) -> None:
            from torch.distributed import DistError
            from torch.distributed.elastic.multiprocessing import SignalException
            from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
            from torch.distributed.elastic.rendezvous import RendezvousError

            # The thread of torchrun's timer may be the last to hold it, and then its finalizer joins that thread.
            sys.unraisablehook = _ignore_join_of_itself
            # Otherwise they print lines about every signal.
            for name in logging.root.manager.loggerDict:
                if name.startswith("torch.distributed.elastic"):
                    logging.getLogger(name).setLevel(logging.ERROR)
            # Without these, torchrun would die of SIGUSR1, and ignore `nohup`.
            args.signals_to_handle = ",".join(each.name for each in stop_signals()) + ",SIGQUIT"
            # For ``tune_cli_ext.hook``.
            os.environ["ADAPT_RECIPES_WORKER"] = "1"
            descriptor, nothing_printed = tempfile.mkstemp(prefix="adapt_recipes_")
            os.close(descriptor)
            os.environ[NOTHING_PRINTED] = nothing_printed

            def exit_as_stopped(number: int) -> NoReturn:
                if os.path.exists(nothing_printed):
                    print_nothing_saved(number)
                sys.exit(128 + number)

            try:
                super()._run_distributed(args, is_builtin=is_builtin)
            except SignalException as stopped:
                # Its processes have ended by now.
                exit_as_stopped(stopped.sigval)
            except ChildFailedError as failed:
                statuses = {failure.exitcode for failure in failed.failures.values()}
                stopped_by = statuses & {128 + each for each in STOP_SIGNALS}
                # Processes that have saved and are ending may get torchrun's own SIGTERM.
                if stopped_by and statuses <= stopped_by | {-signal.SIGTERM}:
                    exit_as_stopped(stopped_by.pop() - 128)
                self._parser.exit(1, f"{failed}\n")
            except (RendezvousError, DistError) as error:
                # The message of the rendezvous has no address.
                cause = error.__cause__ or error
                reason = " ".join(f"{type(cause).__name__}: {cause}".split()).rstrip(":.")
                advice = (
                    "start the same command on each, except for --node_rank, with an --rdzv_endpoint that all can reach"
                )
                where = f"the {args.nnodes} hosts did not connect at {args.rdzv_endpoint}"
                self._parser.exit(2, f"tune run: error: {where}, or lost the connection ({reason}); {advice}\n")
            finally:
                Path(nothing_printed).unlink(missing_ok=True)

    run.Run = Run  # type: ignore[attr-defined]


def _ignore_join_of_itself(unraisable: sys.UnraisableHookArgs) -> None:
    """Python's own hook, but for the error of a thread that joins itself, which harms nothing."""
    if str(unraisable.exc_value) != "cannot join current thread":
        sys.__unraisablehook__(unraisable)


def _check_recipe(recipe: str, words: Sequence[str]) -> None:
    """Refuses another recipe's config for a shipped recipe that is called by name; a path takes any config."""
    if recipe not in shipped("recipes", ".py") or "--config" not in words[:-1]:
        return
    name = words[words.index("--config") + 1]
    owner = None
    try:
        owner = recipe_of(config_file(name))
    except ValueError as error:
        # Otherwise loading the config will say that there is none.
        if "did you mean" in str(error):
            raise ValueError(f"--config: {error}") from error
    if owner not in (None, recipe):
        reason = f"--config {name}: is for the recipe {owner}, not for {recipe}"
        raise ValueError(f"{reason}; run that recipe, or give a recipe by its path, which takes any config")


def _is_module(dotted: str) -> bool:
    """Whether `tune run` could run this as a module, in the current folder or installed."""
    sys.path.append(os.getcwd())
    try:
        return find_spec(dotted) is not None
    except (ImportError, ValueError):
        return False
    finally:
        sys.path.pop()


# ------------------------------------------------------------------------------------------------------- tune validate


def validate_strictly(validate: ModuleType) -> None:
    """Replaces torchtune's `tune validate`, which does not check nested nodes and takes no names or overrides."""

    class Validate(validate.Validate):  # type: ignore[name-defined]
        """`tune validate CONFIG [key=value ...]`: our configs by their recipe's schema, others as torchtune does."""

        def _add_arguments(self) -> None:
            self._parser.usage = "tune validate <config> [key=value ...]"
            self._parser.add_argument("config", help="Name or path of a config to validate.")
            self._parser.add_argument("overrides", nargs="*", metavar="key=value", help="As given to `tune run`.")

        def _validate_cmd(self, args: argparse.Namespace) -> None:
            # As in `tune run`: a user's recipe may import modules of the current folder.
            sys.path.append(os.getcwd())
            try:
                config_path = config_file(args.config)
                recipe_path = _recipe_path(config_path)
                if recipe_path:
                    from adapt_recipes.strict import load

                    load(schema(recipe_path), config_path, args.overrides)
                elif args.overrides:
                    raise ValueError(
                        f"{args.config} is not for a recipe of ours: its overrides are not checked; remove them"
                    )
            except (ValueError, yaml.YAMLError) as error:
                self._parser.exit(2, f"tune validate: error: {' '.join(str(error).split())}\n")
            if recipe_path:
                print("Config is well-formed!")
            else:
                args.config = config_path
                super()._validate_cmd(args)

    validate.Validate = Validate  # type: ignore[attr-defined]


def config_file(name_or_path: str) -> str:
    """The file of a config.

    Raises:
        ValueError: it is neither a file nor a known name.
    """
    import torchtune
    from torchtune._recipe_registry import get_all_recipes

    configs = {config.name: config.file_path for recipe in get_all_recipes() for config in recipe.configs}
    if name_or_path in configs:
        stock_folder = os.path.join(os.path.dirname(torchtune.__file__), "..", "recipes", "configs")
        # If the second path is absolute, it is the result.
        return os.path.join(stock_folder, configs[name_or_path])
    if not os.path.isfile(name_or_path):
        raise ValueError(f"config {name_or_path!r} is neither a file nor a known name{nearest(name_or_path, configs)}")
    return name_or_path


def recipe_file(name_or_path: str) -> str:
    """The file of one of our recipes, or a user's file.

    Raises:
        ValueError: there is none.
    """
    recipes = shipped("recipes", ".py")
    if name_or_path.endswith(".py") and os.path.isfile(name_or_path):
        return name_or_path
    if name_or_path not in recipes:
        raise ValueError(f"no recipe '{name_or_path}', by name or by path{nearest(name_or_path, recipes)}")
    return str(recipes[name_or_path])


def schema(recipe_path: str) -> type:
    """The class `Config` of a recipe's file.

    Raises:
        ValueError: the file cannot be imported, or has no such class.
    """
    spec = spec_from_file_location(Path(recipe_path).stem, recipe_path)
    assert spec is not None and spec.loader is not None
    # dataclasses look up annotations in ``sys.modules``.
    recipe = sys.modules[spec.name] = module_from_spec(spec)
    try:
        spec.loader.exec_module(recipe)
    except Exception as error:
        # A user's file may raise anything.
        raise ValueError(f"{recipe_path} cannot be imported: {type(error).__name__}: {error}") from error
    if not hasattr(recipe, "Config"):
        raise ValueError(f"{recipe_path} has no class Config, which is the schema of a recipe's config")
    return recipe.Config


def _recipe_path(config_path: str) -> str | None:
    """The file of the recipe whose schema a config must fit; None for a config that is not ours.

    Raises:
        ValueError: the config is not a mapping, names a recipe that does not exist, or has our key ``strategy`` and
            names no recipe.
    """
    config = yaml.safe_load(Path(config_path).read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise ValueError(f"{config_path}: has to be a mapping of keys to values")
    if "recipe" in config:
        try:
            return recipe_file(str(config["recipe"]))
        except ValueError as error:
            raise ValueError(f"{config_path}: recipe: {error}") from error
    if "strategy" not in config:
        return None
    raise ValueError(f"{config_path}: missing key 'recipe'; allowed: {', '.join(shipped('recipes', '.py'))}, or a path")


# ------------------------------------------------------------------------------------------------ tune plan and report


def add_commands(tune: ModuleType) -> None:
    """Adds `tune plan` and `tune report`, where `tune` creates its own last command."""

    class Cat(tune.Cat):  # type: ignore[name-defined]
        @classmethod
        def create(cls, subparsers: Any) -> Any:
            add_plan(subparsers)
            add_report(subparsers)
            return super().create(subparsers)

    tune.Cat = Cat  # type: ignore[attr-defined]


def add_plan(subparsers: Any) -> None:
    """`tune plan RECIPE --config CONFIG [key=value ...]`: what `tune run` would do with the same arguments."""
    purpose = "Show what a run would do and need; trains nothing."
    # ``plan`` has a parser of its own, because a subcommand's accepts no overrides after an option.
    words = subparsers.add_parser("plan", prog="tune plan", help=purpose, add_help=False, prefix_chars="\0")
    words.add_argument("words", nargs="*")
    words.set_defaults(func=lambda given: plan(given.words))


def plan(words: Sequence[str]) -> None:
    """Runs `tune plan`."""
    parser = argparse.ArgumentParser(
        prog="tune plan",
        usage="tune plan [--nnodes M] [--nproc_per_node N] [--json] [--pilot SHARE] <recipe> "
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
        if arguments.pilot is not None and not 0 < arguments.pilot <= 1:
            raise ValueError(f"--pilot: a share of the budget, above 0 and at most 1, not {arguments.pilot:g}")
        if arguments.pilot is not None and arguments.nnodes > 1:
            raise ValueError("--pilot: its runs are on one machine; leave --nnodes out")
        _check_recipe(arguments.recipe, ["--config", arguments.config])
        num_processes = arguments.nnodes * arguments.nproc_per_node
        made, config = _make_plan(arguments, num_processes)
        pilot = None
        if arguments.pilot is not None:
            from adapt_recipes.planning import run_pilot

            pilot = run_pilot(config, arguments.pilot, made, num_processes=num_processes)
    except (ValueError, OSError, yaml.YAMLError) as error:
        parser.exit(2, f"tune plan: error: {' '.join(str(error).split())}\n")
    except KeyboardInterrupt:
        parser.exit(128 + signal.SIGINT, "tune plan: interrupted\n")
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
            from adapt_recipes.report import write_report
            from adapt_recipes.report.schedule import write_schedule

            if args.schedule:
                if len(args.runs) > 1:
                    raise ValueError(f"--schedule: is of one run, and there are {len(args.runs)}")
                write_schedule(Path(args.runs[0]), Path(args.schedule))

            page, *figures = write_report([Path(run) for run in args.runs], Path(args.out) if args.out else None)
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            parser.exit(2, f"tune report: error: it needs the package '{package}'; pip install {package}\n")
        except (ValueError, OSError) as error:
            parser.exit(2, f"tune report: error: {' '.join(str(error).split())}\n")
        print(f"{page}\n{len(figures)} figures in {figures[0].parent}/")
        if args.schedule:
            print(args.schedule)

    parser.set_defaults(func=report)
