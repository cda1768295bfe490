"""The one exception for input that is wrong: the command line prints it as one line and exits with code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["UserError", "nearest", "one_line"]


class UserError(ValueError):
    """Input the user can mend. The message is one line: what was expected, what was found, what to do."""


def nearest(word: str, valid: Iterable[str], cutoff: float = 0.5) -> str:
    """Return ``"; did you mean 'x'?"`` for the valid name closest to `word`, or an empty string.

    Args:
        cutoff: least similarity, twice the matching letters over all letters of both.
    """
    close = difflib.get_close_matches(word, list(valid), n=1, cutoff=cutoff)
    return f"; did you mean {close[0]!r}?" if close else ""


def one_line(error: object, most: int = 600) -> str:
    """The text of an error as one printable line of at most `most` characters, whatever somebody's file put into it."""
    text = " ".join(str(error).split())
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[: most + 1])
    return text if len(text) <= most else f"{text[: most - 3]}..."
