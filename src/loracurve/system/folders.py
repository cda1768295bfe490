"""One process at a time in a results folder, and what killed processes leave there."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from loracurve.system.errors import UserError

__all__ = ["LOCK", "has_results", "is_running", "locked", "new_folder", "remove_leftovers"]


LOCK = ".lock"

_LEFTOVER = re.compile(r"\..+\.(\d{1,10})\.[0-9a-f]{8}\.tmp")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of `folder`, which is made, and remove what killed ones left unfinished in it.

    The operating system ends the lock with the process, however that ends: none is ever in the way of a later run.

    Raises:
        UserError: another process is in the folder, or the folder cannot be written.
    """
    path = folder / LOCK
    lock = FileLock(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout as error:
        raise UserError(
            f"{folder} is in use by {_holder(path)}; wait until it ends, or choose another --out"
        ) from error
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another --out") from error
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


def _holder(path: Path) -> str:
    with contextlib.suppress(OSError, ValueError):
        if (text := path.read_bytes()[:20].decode().strip()).isdigit():
            return f"process {text}"
    return "another process"


def has_results(folder: Path) -> bool:
    """Whether anything but a lock and unfinished files of killed processes is in a folder."""
    return any(p.name != LOCK and not _LEFTOVER.fullmatch(p.name) for p in folder.iterdir())


def remove_leftovers(folder: Path) -> None:
    """Delete unfinished files (`files.atomic_write`) below `folder` whose process is no longer there."""
    for path in folder.rglob(".*.tmp"):
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


def new_folder(folder: Path, resume: bool = False) -> Path:
    """Make a folder for results; raises UserError where one with contents exists, unless it is to be resumed."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: expected a folder for results, found a file; choose another --out")
    if folder.is_dir() and has_results(folder) and not resume:
        raise UserError(f"{folder} exists already; choose another --out, or go on with it by --resume")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {folder}: {error.strerror}; choose another --out") from error
    return folder
