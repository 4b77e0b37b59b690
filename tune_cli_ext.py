"""The import hook that gives torchtune's `tune` our recipes, configs and commands; those are in adapt_recipes/cli.py.

`tune_cli_ext.pth` calls `hook()` at every start of Python in the environment, so this module imports nothing that a
bare interpreter has not loaded, and does its work only when torchtune's command line is imported.
Where no .pth file is read, `python -m tune_cli_ext ls` is the same as `tune ls`.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # not typing.TYPE_CHECKING: importing typing would cost every Python start a millisecond
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

# What is extended, and by which function of adapt_recipes.cli, right after it has been executed.
EXTENSIONS = {
    "torchtune._recipe_registry": "add_recipes",
    "torchtune._cli.ls": "list_configs_once",
    "torchtune._cli.run": "check_before_run",
    "torchtune._cli.validate": "validate_strictly",
    "torchtune._cli.tune": "add_commands",
}


def hook() -> None:
    """Have torchtune's `tune` extended when it is imported. A second call does nothing; never raises."""
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)


class _TorchtuneFinder:
    """Lets torchtune's modules be found as usual; those of ``EXTENSIONS`` are extended after they are executed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        try:
            if name == "torchtune":
                _silence_known_noise()
            if name in EXTENSIONS:
                finders = (finder for finder in sys.meta_path if finder is not self)
                spec = next(filter(None, (finder.find_spec(name, path, target) for finder in finders)), None)
                if spec and spec.loader:
                    _extend_after_execution(spec, EXTENSIONS[name])
                return spec
        except Exception as error:
            _complain(error)
        return None


def _extend_after_execution(spec: ModuleSpec, extension: str) -> None:
    assert spec.loader is not None
    execute = spec.loader.exec_module

    def exec_module(module: ModuleType) -> None:
        execute(module)
        try:
            from adapt_recipes import cli

            extend: Callable[[ModuleType], None] = getattr(cli, extension)
            extend(module)
        except Exception as error:  # whatever is wrong with our files, the stock `tune` must go on working
            _complain(error)

    spec.loader.exec_module = exec_module  # type: ignore[method-assign]


def _complain(error: Exception) -> None:
    print(f"adapt-recipes could not extend torchtune's `tune`: {type(error).__name__}: {error}", file=sys.stderr)


def _silence_known_noise() -> None:
    """Two messages that follow from our pins (torch 2.13 with torchao 0.15 and torchdata 0.11) and mean no harm."""
    import logging
    import warnings

    noise = "Skipping import of cpp extensions due to incompatible torch version"
    logging.getLogger("torchao").addFilter(lambda record: not record.getMessage().startswith(noise))
    warnings.filterwarnings("ignore", message="'set_vital' is deprecated", category=UserWarning)


_FINDER = _TorchtuneFinder()

if __name__ == "__main__":
    # From the module of that name, not from this `__main__`: else the .pth file's hook and this one would both act.
    import tune_cli_ext

    tune_cli_ext.hook()
    from torchtune._cli.tune import main

    sys.exit(main())
