"""What this project adds to torchtune's `tune`: recipes and configs, strict checks, `tune plan` and `tune report`.

``tune_cli_ext`` calls the functions of its table with torchtune's modules, right after they are imported. What of
torchtune 0.6.1 they rely on: `_recipe_registry._ALL_RECIPES` is a list of `Recipe(name, file_path, configs,
supports_distributed)` in which an absolute `file_path` wins; `_cli.tune` takes `List`, `Run` and `Validate` from their
modules, and makes its last command by `Cat.create(subparsers)`; `Run._get_recipe` looks a recipe up.

Here stands what is light to import: torch and the rest of the package are imported by the commands that need them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
from collections.abc import Sequence
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from adapt_recipes.errors import nearest

# ---------------------------------------------------------------------------------------------- recipes and configs


def bundle() -> Path:
    """The folder that holds recipes/ and yaml/: inside the package in a wheel, else the checkout.

    The wheel's comes first: beside this package there, in site-packages, lies a `recipes` too, which is torchtune's.
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
    except (OSError, ValueError, yaml.YAMLError):  # whoever loads it says what is wrong with it
        return None
    recipe = config.get("recipe") if isinstance(config, dict) else None
    return None if recipe is None else str(recipe)


def add_recipes(registry: ModuleType) -> None:
    """Puts our recipes before torchtune's, each with its configs, as NAME and as yaml/NAME.yaml."""

    def recipe(name: str, path: Path) -> Any:
        return registry.Recipe(name=name, file_path=str(path), configs=[], supports_distributed=True)

    recipes = {name: recipe(name, path) for name, path in shipped("recipes", ".py").items()}
    for name, path in shipped("yaml", ".yaml").items():
        if owner := recipes.get(_recipe_in_text(path)):
            literal = f"yaml/{name}.yaml"
            # A file of that name in the current folder is the user's edited one, and is what the path means.
            literal_path = os.path.abspath(literal) if os.path.isfile(literal) else str(path)
            owner.configs += [registry.Config(name, str(path)), registry.Config(literal, literal_path)]
    if sys.argv[1:2] == ["run"]:
        # torchtune would run the user's own file as a module: ./my.py becomes "..my", and recipes/my.py "recipes.my",
        # which is looked for in the `recipes` that torchtune's wheel installs. A registered path runs as a file.
        files = (word for word in sys.argv[2:] if word.endswith(".py") and os.path.isfile(word))
        recipes.update({word: recipe(word, Path(word).resolve()) for word in files})
    registry._ALL_RECIPES[:0] = recipes.values()


def _recipe_in_text(path: Path) -> str:
    """``recipe_of`` a shipped config, without parsing all of YAML: `tune` does it for each of them at its start."""
    with open(path, encoding="utf-8") as file:
        return next((line.split()[1] for line in file if line.startswith("recipe: ")), "")


def list_configs_once(ls: ModuleType) -> None:
    """Lets `tune ls` show each of our configs by its name, and not by its path as well."""
    get_all_recipes = ls.get_all_recipes

    def listed() -> list[Any]:
        known = shipped("recipes", ".py")
        recipes = []
        for recipe in get_all_recipes():
            if recipe.name in known:
                configs = [config for config in recipe.configs if not config.name.endswith(".yaml")]
                recipe = type(recipe)(recipe.name, recipe.file_path, configs, recipe.supports_distributed)
            recipes.append(recipe)
        return recipes

    ls.get_all_recipes = listed  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------------------------------------ tune run


def check_before_run(run: ModuleType) -> None:
    """Has `tune run` say in one line what torchtune and torchrun end in a traceback for."""

    class Run(run.Run):  # type: ignore[name-defined]
        def _get_recipe(self, recipe_str: str) -> Any:
            recipe = super()._get_recipe(recipe_str)
            if recipe is None and not _is_module(self._convert_to_dotpath(recipe_str)):
                hint = nearest(recipe_str, [known.name for known in run.get_all_recipes()])
                hint = hint if "did you mean" in hint else "; `tune ls` lists those there are"
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

            try:
                super()._run_distributed(args, is_builtin=is_builtin)
            except SignalException as stopped:  # its processes have ended by now
                sys.exit(128 + stopped.sigval)
            except ChildFailedError as failed:  # which of them, after what they have said themselves
                statuses = {failure.exitcode for failure in failed.failures.values()}
                stopped_by = statuses & {128 + signal.SIGTERM, 128 + signal.SIGINT}
                # torchrun's own SIGTERM finds others that have saved, and are about to end with the same.
                if stopped_by and statuses <= stopped_by | {-signal.SIGTERM}:
                    sys.exit(stopped_by.pop())
                self._parser.exit(1, f"{failed}\n")
            except (RendezvousError, DistError) as error:
                cause = error.__cause__ or error  # the rendezvous says little, and names no address
                reason = " ".join(f"{type(cause).__name__}: {cause}".split()).rstrip(":.")
                advice = (
                    "start the same command on each, but for --node_rank, with an --rdzv_endpoint that all can reach"
                )
                where = f"the {args.nnodes} hosts do not meet at {args.rdzv_endpoint}"
                self._parser.exit(2, f"tune run: error: {where}, or not any more ({reason}); {advice}\n")

    run.Run = Run  # type: ignore[attr-defined]


def _check_recipe(recipe: str, words: Sequence[str]) -> None:
    """Refuses another recipe's config for a shipped recipe that is called by name; a path takes any config."""
    if recipe not in shipped("recipes", ".py") or "--config" not in words[:-1]:
        return
    name = words[words.index("--config") + 1]
    owner = None
    with contextlib.suppress(ValueError):  # no such config: whoever reads it says so
        owner = recipe_of(config_file(name))
    if owner not in (None, recipe):
        reason = f"--config {name}: is a config of {owner}, not of {recipe}"
        raise ValueError(f"{reason}; name that recipe, or give one by its path, which takes any config")


def _is_module(dotted: str) -> bool:
    """Whether `tune run` could run this as a module, from the current folder or from what is installed."""
    sys.path.append(os.getcwd())
    try:
        return find_spec(dotted) is not None
    except (ImportError, ValueError):
        return False
    finally:
        sys.path.pop()


# ------------------------------------------------------------------------------------------------------- tune validate


def validate_strictly(validate: ModuleType) -> None:
    """Replaces torchtune's `tune validate`, which does not look into nested nodes and knows no names or overrides."""

    class Validate(validate.Validate):  # type: ignore[name-defined]
        """`tune validate CONFIG [key=value ...]`: ours by the schema of their recipe, others as torchtune does."""

        def _add_arguments(self) -> None:
            self._parser.usage = "tune validate <config> [key=value ...]"
            self._parser.add_argument("config", help="Name or path of a config to validate.")
            self._parser.add_argument("overrides", nargs="*", metavar="key=value", help="As given to `tune run`.")

        def _validate_cmd(self, args: argparse.Namespace) -> None:
            sys.path.append(os.getcwd())  # as `tune run` does: a user's recipe may import what lies beside it
            try:
                config_path = config_file(args.config)
                recipe_path = _recipe_path(config_path)
                if recipe_path:
                    from adapt_recipes.strict import load

                    load(schema(recipe_path), config_path, args.overrides)
                elif args.overrides:
                    raise ValueError(f"{args.config} is no config of ours: overrides are not checked, leave them out")
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
        return os.path.join(stock_folder, configs[name_or_path])  # of an absolute path only that is left
    if not os.path.isfile(name_or_path):
        raise ValueError(f"config {name_or_path!r} is neither a file nor a known name{nearest(name_or_path, configs)}")
    return name_or_path


def recipe_file(name_or_path: str) -> str:
    """The file of one of our recipes, or a file of the user's.

    Raises:
        ValueError: there is none.
    """
    recipes = shipped("recipes", ".py")
    if name_or_path.endswith(".py") and os.path.isfile(name_or_path):
        return name_or_path
    if name_or_path not in recipes:
        raise ValueError(f"no recipe of ours '{name_or_path}', by name or by path{nearest(name_or_path, recipes)}")
    return str(recipes[name_or_path])


def schema(recipe_path: str) -> type:
    """The class `Config` of a recipe's file.

    Raises:
        ValueError: the file cannot be imported, or has no such class.
    """
    spec = spec_from_file_location(Path(recipe_path).stem, recipe_path)
    assert spec is not None and spec.loader is not None
    recipe = sys.modules[spec.name] = module_from_spec(spec)  # dataclasses look their annotations up there
    try:
        spec.loader.exec_module(recipe)
    except Exception as error:  # whatever a user's file does
        raise ValueError(f"{recipe_path} cannot be imported: {type(error).__name__}: {error}") from error
    if not hasattr(recipe, "Config"):
        raise ValueError(f"{recipe_path} has no class Config, which is the schema of a recipe's config")
    return recipe.Config


def _recipe_path(config_path: str) -> str | None:
    """The file of the recipe whose schema a config must fit; None for a config that is not ours.

    Raises:
        ValueError: the config is no mapping, or names a recipe that is not there, or has a ``strategy`` of ours and
            names none.
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
    """Gives `tune` the commands it lacks: they are made where it makes its own last one."""

    class Cat(tune.Cat):  # type: ignore[name-defined]
        @classmethod
        def create(cls, subparsers: Any) -> Any:
            add_plan(subparsers)
            add_report(subparsers)
            return super().create(subparsers)

    tune.Cat = Cat  # type: ignore[attr-defined]


def add_plan(subparsers: Any) -> None:
    """`tune plan RECIPE --config CONFIG [key=value ...]`: what `tune run` would do with the same words."""
    said = "Say what a run would do and need; train nothing."
    # All words are left to a parser of our own: as a subcommand, argparse takes no overrides behind an option.
    words = subparsers.add_parser("plan", prog="tune plan", help=said, add_help=False, prefix_chars="\0")
    words.add_argument("words", nargs="*")
    words.set_defaults(func=lambda given: plan(given.words))


def plan(words: Sequence[str]) -> None:
    """Runs `tune plan`."""
    parser = argparse.ArgumentParser(
        prog="tune plan",
        usage="tune plan [--nnodes M] [--nproc_per_node N] [--json] <recipe> --config <config> [key=value ...]",
        description="Say what a run would do and need: tasks, budget, steps, memory, disk. Trains nothing.",
        allow_abbrev=False,
    )
    # Called as in `tune run`, where they stand before the recipe; here they may stand anywhere.
    parser.add_argument("--nnodes", type=int, default=1, metavar="M", help="machines; default 1")
    per_node = ("--nproc_per_node", "--nproc-per-node")
    parser.add_argument(*per_node, type=int, default=1, metavar="N", help="processes (GPUs) on each; default 1")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--config", required=True, help="name or path of a config")
    parser.add_argument("recipe", help="name or path of a recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as given to `tune run`")
    arguments = parser.parse_intermixed_args(words)
    sys.path.append(os.getcwd())  # as `tune run` does: a user's recipe may import what lies beside it
    try:
        for option in ("nnodes", "nproc_per_node"):
            if getattr(arguments, option) < 1:
                raise ValueError(f"--{option}: has to be at least 1, not {getattr(arguments, option)}")
        _check_recipe(arguments.recipe, ["--config", arguments.config])
        num_processes = arguments.nnodes * arguments.nproc_per_node
        made, config = _make_plan(arguments, num_processes)
    except (ValueError, OSError, yaml.YAMLError) as error:
        parser.exit(2, f"tune plan: error: {' '.join(str(error).split())}\n")
    if arguments.json:
        print(json.dumps(made.to_dict(), indent=2))
        return
    from adapt_recipes.planning import show

    show(made, config, num_processes=num_processes)


def _make_plan(arguments: argparse.Namespace, num_processes: int) -> tuple[Any, Any]:
    """The plan and its config. What components print goes to stderr; progress is shown on a terminal only."""
    from omegaconf.errors import OmegaConfBaseException
    from rich.console import Console

    with contextlib.redirect_stdout(sys.stderr), Console(stderr=True).status("reading the recipe") as status:
        config_class, config_path = schema(recipe_file(arguments.recipe)), config_file(arguments.config)
        from adapt_recipes.planning import make_plan
        from adapt_recipes.strict import load

        try:
            config: Any = load(config_class, config_path, arguments.overrides)
            return make_plan(config, num_processes=num_processes, say=status.update), config
        except OmegaConfBaseException as error:
            raise ValueError(str(error)) from error


def add_report(subparsers: Any) -> None:
    """`tune report RUN... [--out PAGE.html]`."""
    parser = subparsers.add_parser(
        "report",
        prog="tune report",
        help="Show a run of ours on a page, or compare several.",
        description="Write one HTML page that shows a run, finished or not, or compares several, and a PNG of each of "
        "its figures in a folder beside it. Runs that differ only in seed are put together.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directory")
    parser.add_argument(
        "--out",
        metavar="PAGE.html",
        help="default: report.html, in the run directory, or of several runs in the current folder",
    )

    def report(args: argparse.Namespace) -> None:
        try:
            from adapt_recipes.report import write_report

            page, *figures = write_report([Path(run) for run in args.runs], Path(args.out) if args.out else None)
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            parser.exit(2, f"tune report: error: it needs the package '{package}'; pip install {package}\n")
        except (ValueError, OSError) as error:
            parser.exit(2, f"tune report: error: {' '.join(str(error).split())}\n")
        print(f"{page}\n{len(figures)} figures in {figures[0].parent}/")

    parser.set_defaults(func=report)
