"""One process at a time in a results folder, and what killed processes leave there."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from loracurve.system.errors import UserError
from loracurve.system.paths import entries, exists, is_folder, make_folder, reason, unfinished_prefix, writable

__all__ = [
    "LOCK",
    "has_results",
    "is_running",
    "locked",
    "new_folder",
    "remove_leftovers",
    "results_file",
    "results_folder",
]


LOCK = ".lock"

_LEFTOVER = re.compile(r"\..+\.(\d{1,10})\.[0-9a-f]{8}\.tmp")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of `folder`, which is made, and remove what killed ones left unfinished in it.

    The operating system ends the lock with the process, however that ends: none is ever in the way of a later run. A
    folder that was made and that nothing was put into is removed again.

    Raises:
        UserError: another process is in the folder, or the folder cannot be written.
    """
    with writable(folder):
        path = folder / LOCK
        lock = FileLock(path)
        _acquire(lock, folder)
        try:
            with contextlib.suppress(OSError):  # the number only serves the message
                path.write_text(f"{os.getpid()}\n")
            remove_leftovers(folder)
            yield
        finally:
            # Removed while it is still held: who opened it before finds that it has no name any more, and tries again.
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            lock.release()


def _acquire(lock: FileLock, folder: Path) -> None:
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise UserError(
            f"{folder} is in use by {_holder(folder / LOCK)}; wait until it ends, or choose another --out"
        ) from error
    except (OSError, NotImplementedError) as error:
        raise UserError(f"cannot lock {folder / LOCK}: {reason(error)}; choose another --out") from error


@contextlib.contextmanager
def results_folder(folder: Path, resume: bool | None = None) -> Iterator[Path]:
    """Lock a folder for new results before the work for them: one without contents, unless it is to be resumed.

    Args:
        resume: whether to go on with what is there; None: what makes the results cannot.

    Raises:
        UserError: as by `new_folder` and `locked`.
    """
    _check_new(folder, resume)
    with locked(folder):
        _check_new(folder, resume)  # another process may have filled it until now
        yield folder


@contextlib.contextmanager
def results_file(path: Path, option: str = "--out", replace: bool = False) -> Iterator[Path]:
    """Look before the work whether a file can be written in its place, and remove what killed processes left of it.

    Args:
        option: which names the file.
        replace: whether an older one may be there.

    Raises:
        UserError: there is one already, or it cannot be written.
    """
    if is_folder(path) or (os.path.lexists(path) and not replace):
        raise UserError(f"{path} exists already; choose another {option}")
    with writable(path.parent):
        with contextlib.suppress(OSError):
            _remove(p for p in path.parent.iterdir() if p.name.startswith(unfinished_prefix(path)))
        yield path


def _holder(path: Path) -> str:
    with contextlib.suppress(OSError, ValueError):
        if (text := path.read_bytes()[:20].decode().strip()).isdigit():
            return f"process {text}"
    return "another process"


def has_results(folder: Path) -> bool:
    """Whether anything but a lock and unfinished files of killed processes is in a folder."""
    return any(p.name != LOCK and not _LEFTOVER.fullmatch(p.name) for p in entries(folder))


def remove_leftovers(folder: Path) -> None:
    """Delete unfinished files (`files.atomic_write`) below `folder` whose process is no longer there."""
    _remove(folder.rglob(".*.tmp"))


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        match = _LEFTOVER.fullmatch(path.name)
        if match and not is_running(int(match[1])):
            with contextlib.suppress(OSError):
                path.unlink()


def is_running(process: int) -> bool:
    """Whether a process of this number is there on this machine."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def new_folder(folder: Path) -> Path:
    """Make a folder for results; raises UserError where one with contents exists."""
    _check_new(folder, None)
    try:
        make_folder(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot make {folder}: {reason(error)}; choose another --out") from error
    return folder


def _check_new(folder: Path, resume: bool | None) -> None:
    if exists(folder) and not is_folder(folder):
        raise UserError(f"{folder}: expected a folder for results, found a file; choose another --out")
    if is_folder(folder) and not resume and has_results(folder):
        otherwise = "" if resume is None else ", or go on with it by --resume"
        raise UserError(f"{folder} exists already; choose another --out{otherwise}")
