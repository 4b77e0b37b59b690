"""Adds to torchtune's `tune`: our recipes and configs, a `tune validate` that looks inside them, and `tune report`.

`tune_cli_ext.pth` calls `hook()` at every start of Python in the environment, so this module imports nothing that a
bare interpreter has not loaded, and does its work only when torchtune's command line is imported.
Where no .pth file is read, `python -m tune_cli_ext ls` is the same as `tune ls`.

What of torchtune 0.6.1 it relies on: `_recipe_registry._ALL_RECIPES` is a list of `Recipe(name, file_path, configs,
supports_distributed)` in which an absolute `file_path` wins, and `_cli.tune` takes `Validate` from `_cli.validate` and
`Run`, whose `_get_recipe` looks a recipe up, from `_cli.run`, and makes its last command by `Cat.create(subparsers)`.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # not typing.TYPE_CHECKING: importing typing would cost every Python start a millisecond
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any


def hook() -> None:
    """Have torchtune's `tune` extended when it is imported. A second call does nothing; never raises."""
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)


class _TorchtuneFinder:
    """Lets torchtune's modules be found as ever; two of them are extended right after they have been executed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        try:
            if name == "torchtune":
                _silence_known_noise()
            if extend := _EXTENSIONS.get(name):
                finders = (finder for finder in sys.meta_path if finder is not self)
                spec = next(filter(None, (finder.find_spec(name, path, target) for finder in finders)), None)
                if spec and spec.loader:
                    _extend_after_execution(spec, extend)
                return spec
        except Exception as error:
            _complain(error)
        return None


def _extend_after_execution(spec: ModuleSpec, extend: Callable[[ModuleType], None]) -> None:
    execute = spec.loader.exec_module  # type: ignore[union-attr]

    def exec_module(module: ModuleType) -> None:
        execute(module)
        try:
            extend(module)
        except Exception as error:  # whatever is wrong with our files, the stock `tune` must go on working
            _complain(error)

    spec.loader.exec_module = exec_module  # type: ignore[union-attr, method-assign]


def _complain(error: Exception) -> None:
    print(f"adapt-recipes could not extend torchtune's `tune`: {type(error).__name__}: {error}", file=sys.stderr)


def _silence_known_noise() -> None:
    """Two messages that follow from our pins (torch 2.13 with torchao 0.15 and torchdata 0.11) and mean no harm."""
    import logging
    import warnings

    noise = "Skipping import of cpp extensions due to incompatible torch version"
    logging.getLogger("torchao").addFilter(lambda record: not record.getMessage().startswith(noise))
    warnings.filterwarnings("ignore", message="'set_vital' is deprecated", category=UserWarning)


# ---- recipes and configs


def _bundle() -> str:
    """The folder that holds recipes/ and yaml/: inside the package in a wheel, else the checkout.

    The wheel's comes first: beside this file there, in site-packages, lies a `recipes` too, which is torchtune's.
    """
    here = os.path.dirname(os.path.abspath(__file__))
    bundled = os.path.join(here, "adapt_recipes", "_bundled")
    return bundled if os.path.isdir(bundled) else here


def _files(folder: str, suffix: str) -> dict[str, str]:
    """{file name without suffix: absolute path} of a folder of the bundle, in alphabetical order."""
    folder = os.path.join(_bundle(), folder)
    names = sorted(name for name in os.listdir(folder) if name.endswith(suffix))
    return {name.removesuffix(suffix): os.path.join(folder, name) for name in names}


def _recipe_named_in(config_path: str) -> str | None:
    """What stands before `--config` in a config's first line, like `# tune run RECIPE --config yaml/NAME.yaml`."""
    with open(config_path, encoding="utf-8") as file:
        words = file.readline().split()
    return words[words.index("--config") - 1] if words[:3] == ["#", "tune", "run"] and "--config" in words else None


def _add_recipes(registry: ModuleType) -> None:
    """Put our recipes before torchtune's, each with its configs, as NAME and as yaml/NAME.yaml."""

    def recipe(name: str, path: str) -> Any:
        return registry.Recipe(name=name, file_path=path, configs=[], supports_distributed=True)

    recipes = {name: recipe(name, path) for name, path in _files("recipes", ".py").items()}
    for name, path in _files("yaml", ".yaml").items():
        if owner := recipes.get(_recipe_named_in(path) or ""):
            literal = f"yaml/{name}.yaml"
            # A file of that name in the current folder is the user's edited one, and is what the path means.
            literal_path = os.path.abspath(literal) if os.path.isfile(literal) else path
            owner.configs += [registry.Config(name, path), registry.Config(literal, literal_path)]
    if sys.argv[1:2] == ["run"]:
        # torchtune would run the user's own file as a module: ./my.py becomes "..my", and recipes/my.py "recipes.my",
        # which is looked for in the `recipes` that torchtune's wheel installs. A registered path runs as a file.
        files = (word for word in sys.argv[2:] if word.endswith(".py") and os.path.isfile(word))
        recipes.update({word: recipe(word, os.path.abspath(word)) for word in files})
    registry._ALL_RECIPES[:0] = recipes.values()


# ---- tune run


def _make_run_say_what_is_wrong(run: ModuleType) -> None:
    """Have `tune run` say in one line what torchtune and torchrun end in a traceback for."""

    class Run(run.Run):  # type: ignore[name-defined]
        def _get_recipe(self, recipe_str: str) -> Any:
            from adapt_recipes.errors import nearest

            recipe = super()._get_recipe(recipe_str)
            if recipe is None and not _is_module(self._convert_to_dotpath(recipe_str)):
                hint = nearest(recipe_str, [known.name for known in run.get_all_recipes()])
                hint = hint if "did you mean" in hint else "; `tune ls` lists those there are"
                self._parser.exit(2, f"tune run: error: no recipe '{recipe_str}', by name or by path{hint}\n")
            return recipe

        def _run_distributed(self, args: argparse.Namespace, is_builtin: bool) -> None:
            import signal

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
                told = statuses & {128 + signal.SIGTERM, 128 + signal.SIGINT}
                # torchrun's own SIGTERM finds others that have saved, and are about to end with the same.
                if told and statuses <= told | {-signal.SIGTERM}:
                    sys.exit(told.pop())
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


def _is_module(dotted: str) -> bool:
    """Whether `tune run` could run this as a module, from the current folder or from what is installed."""
    from importlib.util import find_spec

    sys.path.append(os.getcwd())
    try:
        return find_spec(dotted) is not None
    except (ImportError, ValueError):
        return False
    finally:
        sys.path.pop()


# ---- tune validate


def _make_validate_strict(validate: ModuleType) -> None:
    """Replace torchtune's `tune validate`, which does not look into nested nodes and knows no names or overrides."""

    class Validate(validate.Validate):  # type: ignore[name-defined]
        """`tune validate CONFIG [key=value ...]`: ours by the schema of their recipe, others as torchtune does."""

        def _add_arguments(self) -> None:
            self._parser.usage = "tune validate <config> [key=value ...]"
            self._parser.add_argument("config", help="Name or path of a config to validate.")
            self._parser.add_argument("overrides", nargs="*", metavar="key=value", help="As given to `tune run`.")

        def _validate_cmd(self, args: argparse.Namespace) -> None:
            from omegaconf.errors import OmegaConfBaseException
            from yaml import YAMLError

            sys.path.append(os.getcwd())  # as `tune run` does: a user's recipe may import what lies beside it
            try:
                config_path = _config_path(args.config)
                recipe_path = _recipe_path(config_path)
                if recipe_path:
                    _validate_strictly(recipe_path, config_path, args.overrides)
                elif args.overrides:
                    raise ValueError(f"{args.config} is no config of ours: overrides are not checked, leave them out")
            except (ValueError, YAMLError, OmegaConfBaseException) as error:
                self._parser.exit(2, f"tune validate: error: {' '.join(str(error).split())}\n")
            if recipe_path:
                print("Config is well-formed!")
            else:
                args.config = config_path
                super()._validate_cmd(args)

    validate.Validate = Validate  # type: ignore[attr-defined]


def _config_path(name_or_path: str) -> str:
    import torchtune
    from torchtune._recipe_registry import get_all_recipes

    from adapt_recipes.errors import nearest

    configs = {config.name: config.file_path for recipe in get_all_recipes() for config in recipe.configs}
    if name_or_path in configs:
        stock_folder = os.path.join(os.path.dirname(torchtune.__file__), "..", "recipes", "configs")
        return os.path.join(stock_folder, configs[name_or_path])  # of an absolute path only that is left
    if not os.path.isfile(name_or_path):
        raise ValueError(f"config {name_or_path!r} is neither a file nor a known name{nearest(name_or_path, configs)}")
    return name_or_path


def _recipe_path(config_path: str) -> str | None:
    """The file of the recipe whose schema a config must fit; None for configs that are not ours.

    It is named in the config's first line, by name or path; otherwise by its `strategy`: the recipe is then that of the
    shipped configs with the same strategy.
    """
    from adapt_recipes.errors import nearest

    recipes = _files("recipes", ".py")
    recipe = _recipe_named_in(config_path) or ""
    if recipe in recipes:
        return recipes[recipe]
    if recipe.endswith(".py"):
        if not os.path.isfile(recipe):
            raise ValueError(f"{config_path}: its first line names the recipe {recipe}, which is not a file here")
        return recipe
    strategy = _strategy(config_path)
    if strategy is None:
        return None
    shipped = _files("yaml", ".yaml").values()
    owners = {_strategy(path): recipes[name] for path in shipped if (name := _recipe_named_in(path)) in recipes}
    if strategy not in owners:
        known = sorted(filter(None, owners))
        raise ValueError(f"{config_path}: no recipe is known for strategy {strategy!r}{nearest(strategy, known)}")
    return owners[strategy]


def _strategy(config_path: str) -> str | None:
    """The value of a config's top-level key `strategy`, if it has one."""
    from omegaconf import DictConfig, OmegaConf

    config = OmegaConf.load(config_path)
    if not isinstance(config, DictConfig):
        raise ValueError(f"{config_path}: has to be a mapping of keys to values")
    return str(config["strategy"]) if "strategy" in config else None


def _validate_strictly(recipe_path: str, config_path: str, overrides: list[str]) -> None:
    """Raise ValueError, with a message of one line, unless config and overrides fit the `Config` of the recipe."""
    from adapt_recipes.config import load

    load(_schema(recipe_path), config_path, overrides)


def _schema(recipe_path: str) -> type:
    """The class `Config` of a recipe's file."""
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location(os.path.basename(recipe_path).removesuffix(".py"), recipe_path)
    assert spec is not None and spec.loader is not None
    recipe = sys.modules[spec.name] = module_from_spec(spec)  # dataclasses look their annotations up there
    try:
        spec.loader.exec_module(recipe)
    except Exception as error:  # whatever a user's file does
        raise ValueError(f"{recipe_path} cannot be imported: {type(error).__name__}: {error}") from error
    if not hasattr(recipe, "Config"):
        raise ValueError(f"{recipe_path} has no class Config, which is the schema of a recipe's config")
    return recipe.Config


# ---- tune plan


def _add_plan(subparsers: Any) -> None:
    """`tune plan RECIPE --config CONFIG [key=value ...]`: what `tune run` would do with the same words."""
    said = "Say what a run would do and need; train nothing."
    # All words are left to a parser of our own: as a subcommand, argparse takes no overrides behind an option.
    words = subparsers.add_parser("plan", prog="tune plan", help=said, add_help=False, prefix_chars="\0")
    words.add_argument("words", nargs="*")
    words.set_defaults(func=lambda given: _plan(given.words))


def _plan(words: Sequence[str]) -> None:
    import argparse
    import contextlib
    import json

    from omegaconf.errors import OmegaConfBaseException
    from rich.console import Console
    from yaml import YAMLError

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
        num_processes = arguments.nnodes * arguments.nproc_per_node
        # What components print goes to stderr, and so does what is being done, which is for a terminal alone.
        with contextlib.redirect_stdout(sys.stderr), Console(stderr=True).status("reading the recipe") as status:
            schema, config_path = _schema(_recipe_file(arguments.recipe)), _config_path(arguments.config)
            from adapt_recipes.config import load
            from adapt_recipes.planning import make_plan, show

            config: Any = load(schema, config_path, arguments.overrides)
            plan = make_plan(config, num_processes=num_processes, say=status.update)
    except (ValueError, OSError, YAMLError, OmegaConfBaseException) as error:
        parser.exit(2, f"tune plan: error: {' '.join(str(error).split())}\n")
    if arguments.json:
        print(json.dumps(plan.to_dict(), indent=2))
    else:
        show(plan, config, num_processes=num_processes)


def _recipe_file(name_or_path: str) -> str:
    """The file of one of our recipes, or a file of the user's."""
    from adapt_recipes.errors import nearest

    recipes = _files("recipes", ".py")
    if name_or_path.endswith(".py") and os.path.isfile(name_or_path):
        return name_or_path
    if name_or_path not in recipes:
        raise ValueError(f"no recipe of ours '{name_or_path}', by name or by path{nearest(name_or_path, recipes)}")
    return recipes[name_or_path]


# ---- tune report


def _add_commands(tune: ModuleType) -> None:
    """Give `tune` the commands it lacks: they are made where it makes its own last one."""

    class Cat(tune.Cat):  # type: ignore[name-defined]
        @classmethod
        def create(cls, subparsers: Any) -> Any:
            _add_plan(subparsers)
            _add_report(subparsers)
            return super().create(subparsers)

    tune.Cat = Cat  # type: ignore[attr-defined]


def _add_report(subparsers: Any) -> None:
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
        from pathlib import Path

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


_EXTENSIONS = {
    "torchtune._recipe_registry": _add_recipes,
    "torchtune._cli.run": _make_run_say_what_is_wrong,
    "torchtune._cli.tune": _add_commands,
    "torchtune._cli.validate": _make_validate_strict,
}
_FINDER = _TorchtuneFinder()

if __name__ == "__main__":
    # From the module of that name, not from this `__main__`: else the .pth file's hook and this one would both act.
    import tune_cli_ext

    tune_cli_ext.hook()
    from torchtune._cli.tune import main

    sys.exit(main())
