"""Programs that a test starts: each in a process group of its own, which ends with the test whatever happens."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import psutil

from helpers.waiting import SECONDS


@contextmanager
def started(command: Sequence[object], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A program that runs inside the block."""
    # Shells start what they put into the background with SIGINT ignored, and so its children.
    process = subprocess.Popen(
        [str(word) for word in command],
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **options,
    )
    try:
        yield process
    finally:
        end_group(process.pid)
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


def ran(command: Sequence[object], **options: Any) -> subprocess.CompletedProcess[str]:
    """A program that has ended, with what it said."""
    with started(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options) as process:
        out, err = process.communicate(timeout=SECONDS)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def end_group(leader: int) -> None:
    """Kill what is left of a process group, and children of its leader that have left the group."""
    left = []
    with suppress(psutil.NoSuchProcess):
        left = psutil.Process(leader).children(recursive=True)
    with suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)
    for child in left:
        with suppress(psutil.NoSuchProcess):
            child.kill()
