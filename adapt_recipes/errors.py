"""How an error for a user names what is allowed."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(word: str, allowed: Iterable[str]) -> str:
    """The end of an error message about an unknown word.

    Args:
        word: what the user wrote.
        allowed: what would have been right.

    Returns:
        ``"; did you mean 'x'?"`` where something allowed is spelled alike or abbreviates it, else all that is allowed.
    """
    allowed = list(allowed)
    initials = "".join(part[:1] for part in word.split("_"))  # learning_rate for lr
    if close := get_close_matches(word, allowed, n=1) or [name for name in allowed if name == initials]:
        return f"; did you mean '{close[0]}'?"
    return f"; allowed: {', '.join(allowed)}" if allowed else "; none is allowed here"
