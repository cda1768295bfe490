"""The one exception for input that is wrong: the command line prints it as one line and exits with code 2."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable

__all__ = ["CheckpointError", "UserError", "is_passing", "nearest", "one_line"]


class UserError(ValueError):
    """Input the user can mend. The message is one line: what was expected, what was found, what to do."""


class CheckpointError(UserError):
    """A checkpoint that nothing can go on with: damaged, or of another training. It says nothing about results."""


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


_PASSING = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EAGAIN),
    *(errno.EBUSY, errno.ESTALE, errno.ETIMEDOUT, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN),
}

# Classes of errors of a network that is down or a service that is busy, in the libraries that fetch for us.
_UNREACHABLE = {
    *(
        "ConnectionError",
        "ConnectError",
        "ConnectTimeout",
        "ReadTimeout",
        "ReadError",
        "RemoteProtocolError",
        "Timeout",
    ),
    *("TimeoutException", "LocalEntryNotFoundError", "OfflineModeIsEnabled", "ProxyError", "NetworkError"),
}


def is_passing(error: BaseException) -> bool:
    """Whether an error comes from the machine or the network as they are now, and may be gone at the next try.

    These are a full, read-only or failing disk, files or memory that others hold, a hub that cannot be reached, and a
    checkpoint that a person can put back or delete. An error that says so may stand behind the one that is told
    (`raise ... from`).
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, MemoryError | ConnectionError | TimeoutError | CheckpointError):
            return True
        if isinstance(seen, OSError) and seen.errno in _PASSING:
            return True
        if any(kind.__name__ in _UNREACHABLE for kind in type(seen).__mro__):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
