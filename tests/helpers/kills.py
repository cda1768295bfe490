"""kill -9 at an event: before a call of the storage to the operating system, so that no clock decides where."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from helpers.waiting import until

CALLS = ("open", "fsync", "replace", "unlink")


def forked(work: Callable[[], object], said: str | Path = os.devnull) -> int:
    """Do `work` in a child of this process, which has imported everything already; its process number.

    Args:
        said: a file for what it prints, and for the traceback of a fault.
    """
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        with open(said, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            sys.stdout = sys.stderr = file
            torch.set_num_threads(1)
            try:
                work()
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(bool(end.code))
            except BaseException:
                traceback.print_exc()
    finally:
        os._exit(code)


def ended(child: int) -> int:
    """The exit code of a child, or minus the signal that ended it; one that hangs is killed, and the test fails."""
    status = 0

    def step() -> bool:
        nonlocal status
        done, status = os.waitpid(child, os.WNOHANG)
        return bool(done)

    try:
        until(step, "the process ended")
    except AssertionError:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise
    return os.waitstatus_to_exitcode(status)


def finished(work: Callable[[], object]) -> None:
    """Do `work` in a child, to its end."""
    assert ended(forked(work)) == 0, "what was left could not be gone on with"


def _watched(work: Callable[[], object], seen: Callable[[str, str], None]) -> None:
    """Do `work`, and tell `seen` the name and the last path of each call before it is made."""

    def call(name: str, *arguments: Any, **options: Any) -> Any:
        seen(name, next((str(a) for a in reversed(arguments) if isinstance(a, str | Path)), ""))
        return plain[name](*arguments, **options)

    plain = {name: getattr(os, name) for name in CALLS}
    for name in CALLS:
        setattr(os, name, partial(call, name))
    work()


def calls_of(work: Callable[[], object]) -> int:
    """How many calls `work` makes; it is done in a child, to its end."""
    there, here = os.pipe()
    count = 0

    def seen(name: str, path: str) -> None:
        nonlocal count
        count += 1

    def counted() -> None:
        _watched(work, seen)
        os.write(here, str(count).encode())

    finished(counted)
    os.close(here)
    with os.fdopen(there) as said:
        return int(said.read())


def killed(work: Callable[[], object], before: int | Callable[[str, str], bool]) -> bool:
    """Do `work` in a child that is killed before its `before`-th call, or the first for which `before(name, path)`.

    Returns:
        whether it was; False: it ended by itself.
    """
    left = before if isinstance(before, int) else 0

    def seen(name: str, path: str) -> None:
        nonlocal left
        left -= 1
        if left == 0 if isinstance(before, int) else before(name, path):
            os.kill(os.getpid(), signal.SIGKILL)

    code = ended(forked(lambda: _watched(work, seen)))
    assert code in (0, -signal.SIGKILL), "what was left could not be gone on with"
    return code != 0
