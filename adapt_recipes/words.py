"""The words of a command line, with errors of one line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from adapt_recipes.errors import closest

# The name under which this was called, for messages: that of torchtune, or ours.
COMMAND = "adapt-recipes" if os.path.basename(sys.argv[0]) == "adapt-recipes" else "tune"


class Parser(argparse.ArgumentParser):
    """A parser whose error is one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


class CommandParser(Parser):
    """The parser of `tune` and of each of its commands. A command's own refuses what it does not know, with a hint."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[argparse.Namespace, list[str]]:  # type: ignore[override]
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            word = unknown[0].partition("=")[0]
            close = closest(word, list(self._option_string_actions)) if word.startswith("-") else None
            self.error(f"unknown argument '{word}'" + (f"; did you mean '{close}'?" if close else ""))
        return namespace, unknown


def split_words(words: Sequence[str]) -> tuple[str, list[str]]:
    """Splits what follows a recipe into the config, by name or path, and the other words in their order.

    Prints a help and exits where it is asked for.

    Raises:
        ValueError: there is not exactly one `--config FILE` or `--config=FILE`.
    """
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        exit_on_error=False,
        usage=f"{COMMAND} run RECIPE --config FILE [key=value ...] [~key ...]",
        description=f"`{COMMAND} run --help` lists the options of torchrun, which come before the recipe.",
        epilog="ADAPT_TRACEBACK=1 in the environment shows where an error comes from.",
    )
    parser.add_argument("--config", action="append", default=[], help="name or path of a YAML file")
    try:
        arguments, others = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        raise ValueError("--config: has no value; write --config FILE") from error
    if len(arguments.config) > 1:
        raise ValueError("--config is given twice")
    if not arguments.config:
        flags = (word.partition("=")[0] for word in others if word.startswith("-"))
        for flag in flags:
            if closest(flag, ["--config"]):
                raise ValueError(f"unknown argument '{flag}'; did you mean '--config'?")
        raise ValueError(f"--config FILE is missing after the recipe; `{COMMAND} ls` lists the shipped ones")
    if not arguments.config[0]:
        raise ValueError("--config: has no value; write --config FILE")
    return arguments.config[0], others


def parse_override(word: str) -> tuple[str, str | None]:
    """Splits `key=value` into both, and `~key` into the key and None.

    Raises:
        ValueError: it is neither.
    """
    key, equals, text = word.partition("=")
    removes, key = key.startswith("~"), key.removeprefix("~").strip()
    if removes == bool(equals) or key.startswith("-") or not all(key.split(".")):
        hint = "; options of torchrun, such as --nproc_per_node, come before the recipe" if key.startswith("-") else ""
        raise ValueError(f"'{word}' is not an override: write key=value, or ~key to remove a key, without spaces{hint}")
    return key, None if removes else text
