"""What is allowed to happen when a stranger's file is read: it is, or is refused in a line, soon, in little memory."""

from __future__ import annotations

import contextlib
import resource
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from loracurve.system.errors import UserError, one_line

__all__ = ["in_time", "little_memory", "read_or_refused"]


@contextlib.contextmanager
def little_memory(more: int = 2**31) -> Iterator[None]:
    """2 GiB more than now at most: what takes more raises MemoryError, which nothing may let through."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextlib.contextmanager
def in_time(seconds: float = 10) -> Iterator[None]:
    """AssertionError where the block computes longer, or takes ten times as long: others may be at work too."""

    def late(*_: object) -> None:
        raise AssertionError(f"took more than {seconds} s")

    timers = {signal.ITIMER_PROF: signal.SIGPROF, signal.ITIMER_REAL: signal.SIGALRM}
    before = {number: signal.signal(number, late) for number in timers.values()}
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, 10 * seconds)
    try:
        yield
    finally:
        for timer, number in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])


def read_or_refused(read: Callable[[], object], seconds: float = 10) -> str | None:
    """What a UserError says, as the command line prints it; None where the file was read. Other errors are faults."""
    with in_time(seconds), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            read()
        except UserError as error:
            said = one_line(error)
            assert said and said.isprintable() and len(said) <= 600
            return said
    return None
