"""Warnings and error messages for users."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.util import find_spec
from os.path import commonprefix

_shown: set[str] | None = None


def warn(message: str) -> None:
    """Prints one line on stderr, on the first process only."""
    if os.environ.get("RANK", "0") == "0" and message not in (_shown or ()):
        print(f"warning: {message}", file=sys.stderr)
    if _shown is not None:
        _shown.add(message)


@contextmanager
def each_warning_once() -> Iterator[None]:
    """Within the block the same line is printed only once."""
    global _shown
    _shown = set()
    try:
        yield
    finally:
        _shown = None


def check_installed(packages: Iterable[str], *, extra: str) -> None:
    """Refuses to begin without the packages that an extra of pyproject.toml installs.

    Args:
        packages: by the names under which they are imported.
        extra: the one that installs them.

    Raises:
        ValueError: some are missing; it names them, and the command that installs them.
    """
    if missing := [name for name in packages if find_spec(name) is None]:
        raise ValueError(f"it needs {', '.join(missing)}; pip install 'adapt-recipes[{extra}]'")


def nearest(word: str, allowed: Iterable[str]) -> str:
    """The end of an error message about an unknown word.

    Args:
        word: of the user.
        allowed: the words that are allowed.

    Returns:
        ``"; did you mean 'x'?"`` if an allowed word has a similar spelling or is the abbreviation of ``word`` (lr of
        learning_rate); else all allowed words.
    """
    allowed = list(allowed)
    if close := closest(word, allowed):
        return f"; did you mean '{close}'?"
    return f"; allowed: {', '.join(allowed)}" if allowed else "; none is allowed here"


def closest(word: str, others: Sequence[str]) -> str | None:
    """The one of ``others`` whose spelling is similar to that of ``word``, or that is its abbreviation."""
    close = (
        [name for name in others if name.lower() == word.lower()]
        or get_close_matches(word, [name for name in others if _one_typo_apart(word, name)], n=1, cutoff=0.1)
        or get_close_matches(word, others, n=1)
        or [name for name in others if name == "".join(part[:1] for part in word.split("_"))]
    )
    return close[0] if close else None


def _one_typo_apart(one: str, other: str) -> bool:
    """Whether one letter is wrong, missing or extra, or two neighboring letters are swapped."""
    same = len(commonprefix([one, other]))
    one, other = one[same:], other[same:]
    swapped = one[:2] == other[:2][::-1] and one[2:] == other[2:]
    return swapped or one[1:] == other[1:] or one[1:] == other or one == other[1:]
