"""Paths as people give them: looked at, opened and made here, so that whatever is wrong with one is told in a line.

`Path.exists` and its kin raise for names that are too long and folders that may not be entered; libraries read a colon
as a URI. Here a path is a place in the local file system, and what the system says of it becomes a UserError.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from loracurve.system.errors import UserError

__all__ = [
    "check_given",
    "entries",
    "exists",
    "file_size",
    "flush",
    "is_file",
    "is_folder",
    "is_path_error",
    "make_folder",
    "opened",
    "read_text",
    "reason",
    "temporary",
    "unfinished_prefix",
    "writable",
]

_ABSENT = (errno.ENOENT, errno.ENOTDIR)


def reason(error: BaseException) -> str:
    """What the system says, without the path that stands in front of it already."""
    return getattr(error, "strerror", None) or str(error)


def is_path_error(error: OSError) -> bool:
    """Whether an error of the system is about a path or its disk, and so for the person to mend."""
    return error.filename is not None or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def check_given(name: str, path: str) -> None:
    """Raise UserError for words that are no path: none at all, a NUL byte, a home folder that no shell has written out.

    Args:
        name: of the option, for the message.
    """
    if not path or "\0" in path:
        raise UserError(f"{name}: expected a path, found {path!r}")
    if path.startswith("~"):
        raise UserError(f"{name}: expected a path, found {path!r}, which no shell has expanded; write $HOME, or ./~")


def _seen(path: str | Path) -> os.stat_result | None:
    """What is at a path, behind links; None for nothing (a link to nothing among it)."""
    try:
        return os.stat(path)
    except OSError as error:
        if error.errno in _ABSENT:
            return None
        raise UserError(f"cannot look at {path}: {reason(error)}") from error
    except ValueError as error:
        raise UserError(f"expected a path, found {str(path)!r} ({error})") from error


def exists(path: str | Path) -> bool:
    """Whether there is anything; raises UserError where the system won't say."""
    return _seen(path) is not None


def is_file(path: str | Path) -> bool:
    """Whether there is an ordinary file; raises UserError where the system won't say."""
    found = _seen(path)
    return found is not None and stat.S_ISREG(found.st_mode)


def is_folder(path: str | Path) -> bool:
    """Whether there is a folder; raises UserError where the system won't say."""
    found = _seen(path)
    return found is not None and stat.S_ISDIR(found.st_mode)


def file_size(path: str | Path) -> int:
    """Bytes of a file, 0 where there is none."""
    found = _seen(path)
    return 0 if found is None else found.st_size


def entries(folder: str | Path) -> list[Path]:
    """What is in a folder, sorted; raises UserError where it cannot be listed."""
    try:
        return sorted(Path(folder).iterdir())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot list {folder}: {reason(error)}") from error


@contextmanager
def opened(path: str | Path, expected: str = "a file", **options: Any) -> Iterator[IO[Any]]:
    """Open a file to read it; what the system says against that, then or later, is a UserError.

    Args:
        expected: what should be there, for the message.
        options: of `open`. Default: bytes.
    """
    if not is_file(path):
        raise UserError(f"{path}: expected {expected}, found {'a folder' if is_folder(path) else 'none'}")
    try:
        with Path(path).open(**{"mode": "rb", **options}) as file:
            yield file
    except OSError as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from error


def read_text(path: str | Path, expected: str = "a file") -> str:
    """The text of a file in UTF-8, without a mark at its beginning."""
    with opened(path, expected, mode="r", encoding="utf-8-sig") as file:
        try:
            return str(file.read())
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path}: expected UTF-8 text, found byte {error.start} that is not; save it as UTF-8"
            ) from None


def temporary(path: Path) -> Path:
    """A name beside `path` for its unfinished contents: of this process, and no longer than file systems allow."""
    return path.with_name(f"{unfinished_prefix(path)}{os.getpid()}.{secrets.token_hex(4)}.tmp")


def unfinished_prefix(path: Path) -> str:
    """How the names of the unfinished contents of a file begin."""
    return f".{os.fsencode(path.name)[:200].decode(errors='ignore')}."


def make_folder(folder: Path) -> list[Path]:
    """Make a folder and those it lies in; returns the new ones, outermost first. Their names are on the disk then.

    Raises:
        OSError: one of them cannot be made.
    """
    if folder.is_dir():
        return []
    made = make_folder(folder.parent) if folder.parent != folder else []
    try:
        folder.mkdir()
        made.append(folder)
    except FileExistsError:
        if not folder.is_dir():  # another process made it
            raise
    flush(folder.parent)
    return made


def flush(path: Path) -> None:
    """Wait until a file's contents, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writable(folder: Path) -> Iterator[Path]:
    """Make a folder and write into it, so that before the work it is known whether there is a place for its results;
    what was made and stayed empty is removed again.

    Raises:
        UserError: it cannot be made or written into.
    """
    made = _probe(folder)
    try:
        yield folder
    finally:
        for new in reversed(made):
            with suppress(OSError):
                new.rmdir()


def _probe(folder: Path) -> list[Path]:
    """The folders that are new, outermost first."""
    made: list[Path] = []
    try:
        made = make_folder(folder)
        file = temporary(folder / "probe")
        os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        file.unlink()
    except (OSError, ValueError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free some space or choose another folder with --out" if full else "choose another --out"
        raise UserError(f"cannot write into {folder}: {reason(error)}; {remedy}") from error
    return made
