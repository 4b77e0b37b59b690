"""The import hook that adds our recipes, configs and commands (adapt_recipes/cli.py) to torchtune's `tune`.

`tune_cli_ext.pth` calls `hook()` whenever Python starts in the environment, so this module imports nothing that a bare
interpreter has not loaded, and acts only when torchtune's command line is imported. Our own command `adapt-recipes` and
`python -m tune_cli_ext` are the same as `tune`, also where .pth files are ignored.
"""

from __future__ import annotations

import os
import sys

# Not typing.TYPE_CHECKING: an import of typing would delay every start of Python by a millisecond.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

# Module of torchtune -> the function of adapt_recipes.cli that extends it.
EXTENSIONS = {
    "torchtune._recipe_registry": "add_recipes",
    "torchtune._cli.ls": "list_configs_once",
    "torchtune._cli.run": "check_before_run",
    "torchtune._cli.validate": "validate_strictly",
    "torchtune._cli.tune": "add_commands",
}


def hook() -> None:
    """Extends torchtune's `tune` when it is imported. A second call does nothing; it never raises."""
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
    # A process that `tune run` has started; those that it will start are none.
    if os.environ.pop("ADAPT_RECIPES_WORKER", None):
        _exit_on_signals()


def main() -> None:
    """The command `adapt-recipes`."""
    hook()
    from torchtune._cli.tune import main as tune

    tune()


class _TorchtuneFinder:
    """Finds torchtune's modules as usual, and extends those in ``EXTENSIONS`` after they are executed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        try:
            if name != "torchtune" and name not in EXTENSIONS:
                return None
            finders = (finder for finder in sys.meta_path if finder is not self)
            spec = next(filter(None, (finder.find_spec(name, path, target) for finder in finders)), None)
            if name == "torchtune":
                _silence_known_noise()
                if os.path.basename(sys.argv[0]) in ("tune", "adapt-recipes", "tune_cli_ext.py"):
                    _begin_command(sys.argv[1:], spec)
                if spec and spec.loader:
                    _execute_without_collector(spec)
            elif spec and spec.loader:
                _extend_after_execution(spec, EXTENSIONS[name])
            return spec
        except Exception as error:
            _warn(error)
        return None


def _begin_command(words: list[str], torchtune: ModuleSpec | None) -> None:
    """What has to happen before torchtune is imported, which takes seconds because it imports torch and datasets."""
    if words[:1] == ["run"]:
        _exit_on_signals()
    elif words == ["ls"] and torchtune and torchtune.origin:
        from adapt_recipes import cli

        cli.list_recipes(os.path.dirname(torchtune.origin))
        sys.exit()


def _execute_without_collector(spec: ModuleSpec) -> None:
    """Pauses the garbage collector while the package is imported, and exempts its modules, which are never garbage.

    Searching their million objects again and again takes a fifth of the import, and as long at exit.
    """
    import gc

    assert spec.loader is not None
    execute = spec.loader.exec_module

    def exec_module(module: ModuleType) -> None:
        enabled = gc.isenabled()
        gc.disable()
        try:
            execute(module)
        finally:
            gc.freeze()
            if enabled:
                gc.enable()

    spec.loader.exec_module = exec_module  # type: ignore[method-assign]


def _extend_after_execution(spec: ModuleSpec, extension: str) -> None:
    assert spec.loader is not None
    execute = spec.loader.exec_module

    def exec_module(module: ModuleType) -> None:
        execute(module)
        try:
            from adapt_recipes import cli

            extend: Callable[[ModuleType], None] = getattr(cli, extension)
            extend(module)
        except Exception as error:
            # Whatever is wrong with our files, torchtune's `tune` has to keep working.
            _warn(error)

    spec.loader.exec_module = exec_module  # type: ignore[method-assign]


def _exit_on_signals() -> None:
    """Lets Ctrl-C and others end `tune run` in one line also while torch is imported."""
    try:
        from adapt_recipes.stop import exit_on_signals

        exit_on_signals()
    except Exception as error:
        _warn(error)


def _warn(error: Exception) -> None:
    print(f"adapt-recipes could not extend torchtune's `tune`: {type(error).__name__}: {error}", file=sys.stderr)


def _silence_known_noise() -> None:
    """Hides two harmless messages of our pinned versions (torch 2.13 with torchao 0.15 and torchdata 0.11)."""
    import logging
    import warnings

    noise = "Skipping import of cpp extensions due to incompatible torch version"
    logging.getLogger("torchao").addFilter(lambda record: not record.getMessage().startswith(noise))
    warnings.filterwarnings("ignore", message="'set_vital' is deprecated", category=UserWarning)


_FINDER = _TorchtuneFinder()

if __name__ == "__main__":
    # The module of that name, not this `__main__`: otherwise its hook and that of the .pth file would both act.
    import tune_cli_ext

    tune_cli_ext.main()
