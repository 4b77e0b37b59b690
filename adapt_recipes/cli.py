"""What this project adds to torchtune's `tune`: recipes and configs, strict checks, and the commands of ``commands``.

``tune_cli_ext`` calls the functions in its table with torchtune's modules, right after their import. They rely on these
details of torchtune 0.6.1: `_recipe_registry._ALL_RECIPES` is a list of `Recipe(name, file_path, configs,
supports_distributed)`, whose `file_path` may be absolute; `_cli.tune` takes `List`, `Run` and `Validate` from their
modules, makes its parser by `argparse.ArgumentParser`, and creates its last command by `Cat.create(subparsers)`;
`Run._get_recipe` finds a recipe, and `Run._is_distributed_args` says whether torchrun starts it.

This module is quick to import: what needs torch imports it when it runs.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import tempfile
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NoReturn

import yaml

from adapt_recipes.commands import add_export, add_new, add_plan, add_report
from adapt_recipes.shipped import check_recipe, config_file, nearest_or_ls, recipe_file, schema, shipped
from adapt_recipes.stop import NOTHING_PRINTED, STOP_SIGNALS, print_nothing_saved, stop_signals
from adapt_recipes.words import COMMAND, CommandParser, parse_override, split_words

# ---------------------------------------------------------------------------------------------- recipes and configs


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
        def _add_arguments(self) -> None:
            super()._add_arguments()
            # Otherwise argparse would name the words after a missing recipe as missing too.
            next(each for each in self._parser._actions if each.dest == "recipe_args").required = False
            # Known before the recipe too, where it is refused with its place.
            self._parser.add_argument("--config", help=argparse.SUPPRESS)

        def _get_recipe(self, recipe_str: str) -> Any:
            recipe = super()._get_recipe(recipe_str)
            if recipe is None and not _is_module(self._convert_to_dotpath(recipe_str)):
                hint = nearest_or_ls(recipe_str, [known.name for known in run.get_all_recipes()])
                self._parser.error(f"no recipe '{recipe_str}', by name or by path{hint}")
            return recipe

        def _run_cmd(self, args: argparse.Namespace) -> None:
            self._options = sys.argv[2 : sys.argv.index(args.recipe, 2)]
            try:
                self._check_options(args)
                recipe = self._get_recipe(args.recipe)
                config, others = split_words(args.recipe_args)
                # A user's file may take other words.
                if recipe and not args.recipe.endswith(".py"):
                    check_recipe(args.recipe, config)
                    for word in others:
                        parse_override(word)
            except ValueError as error:
                self._parser.error(" ".join(str(error).split()))
            # torchtune knows no --config=FILE.
            args.recipe_args = ["--config", config, *others]
            super()._run_cmd(args)

        def _check_options(self, args: argparse.Namespace) -> None:
            """Refuses --config and an option given twice before the recipe, and numbers of processes that cannot be."""
            actions = [self._parser._option_string_actions.get(word.partition("=")[0]) for word in self._options]
            for action in filter(None, actions):
                if actions.count(action) > 1:
                    raise ValueError(f"{action.option_strings[-1]} is given twice")
            from torch.distributed.run import determine_local_world_size, parse_min_max_nnodes

            try:
                num_processes = determine_local_world_size(args.nproc_per_node)
            except ValueError as error:
                reason = f"{str(error).rstrip('.')}; write a number of processes, cpu or auto"
                raise ValueError(f"--nproc_per_node {args.nproc_per_node}: {reason}") from error
            if num_processes < 1:
                raise ValueError(f"--nproc_per_node: has to be at least 1, not {num_processes}")
            try:
                least, most = parse_min_max_nnodes(args.nnodes)
            except (ValueError, RuntimeError):
                least = most = 0
            if not 0 < least <= most:
                raise ValueError(f"--nnodes: has to be a number of hosts, or MIN:MAX, not {args.nnodes}")
            # Last, because a recipe may have become the value of an option without one.
            if args.config is not None:
                raise ValueError("--config comes after the recipe: tune run RECIPE --config FILE")

        def _is_distributed_args(self, args: argparse.Namespace) -> bool:
            return bool(self._options)

        def _run_distributed(self, args: argparse.Namespace, is_builtin: bool) -> None:
            from torch.distributed import DistError
            from torch.distributed.elastic.multiprocessing import SignalException
            from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
            from torch.distributed.elastic.rendezvous import RendezvousError

            # The thread of torchrun's timer may be the last to hold it, and then its finalizer joins that thread.
            sys.unraisablehook = _ignore_join_of_itself
            # Otherwise they print lines about every signal and error; errors are raised too.
            for name in logging.root.manager.loggerDict:
                if name.startswith("torch.distributed.elastic"):
                    logging.getLogger(name).setLevel(logging.CRITICAL)
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
                # An error of the user, which one of them has printed before torchrun ended the others.
                if 2 in statuses and statuses <= {2, 128 + signal.SIGTERM, -signal.SIGTERM}:
                    sys.exit(2)
                self._parser.exit(1, f"{failed}\n")
            except (RendezvousError, DistError) as error:
                # The message of the rendezvous has no address.
                cause = error.__cause__ or error
                reason = " ".join(f"{type(cause).__name__}: {cause}".split()).rstrip(":.")
                advice = (
                    "start the same command on each, except for --node_rank, with an --rdzv_endpoint that all can reach"
                )
                where = f"the {args.nnodes} hosts did not connect at {args.rdzv_endpoint}"
                self._parser.error(f"{where}, or lost the connection ({reason}); {advice}")
            except Exception as error:
                if os.environ.get("ADAPT_TRACEBACK"):
                    raise
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                self._parser.error(f"torchrun failed: {reason} (ADAPT_TRACEBACK=1 shows where)")
            finally:
                Path(nothing_printed).unlink(missing_ok=True)

    run.Run = Run  # type: ignore[attr-defined]


def _ignore_join_of_itself(unraisable: sys.UnraisableHookArgs) -> None:
    """Python's own hook, but for the error of a thread that joins itself, which harms nothing."""
    if str(unraisable.exc_value) != "cannot join current thread":
        sys.__unraisablehook__(unraisable)


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
            self._parser.add_argument(
                "overrides", nargs="*", default=[], metavar="key=value", help="As given to `tune run`."
            )

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
                self._parser.error(" ".join(str(error).split()))
            if recipe_path:
                print("Config is well-formed!")
            else:
                args.config = config_path
                super()._validate_cmd(args)

    validate.Validate = Validate  # type: ignore[attr-defined]


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


# --------------------------------------------------------------------------------------- tune plan, report and export


def add_commands(tune: ModuleType) -> None:
    """Adds our commands where `tune` creates its own last one; errors of all are one line, under ``COMMAND``."""
    # Its commands' parsers are of the same class.
    tune.argparse = SimpleNamespace(ArgumentParser=CommandParser)  # type: ignore[attr-defined]

    class Cat(tune.Cat):  # type: ignore[name-defined]
        @classmethod
        def create(cls, subparsers: Any) -> Any:
            add_new(subparsers)
            add_plan(subparsers)
            add_report(subparsers)
            add_export(subparsers)
            return super().create(subparsers)

    class TuneCLIParser(tune.TuneCLIParser):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            commands = next(action for action in self._parser._actions if action.choices)
            for parser in (self._parser, *commands.choices.values()):
                parser.prog = parser.prog.replace("tune", COMMAND, 1)
                parser.usage = parser.usage and parser.usage.replace("tune", COMMAND, 1)

    tune.Cat, tune.TuneCLIParser = Cat, TuneCLIParser  # type: ignore[attr-defined]
