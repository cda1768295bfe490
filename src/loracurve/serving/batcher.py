"""Requests of several clients run together: a queue with a limit, and one thread that works on it."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Batcher", "Closed", "Job", "QueueFull"]


class QueueFull(Exception):
    """As many jobs wait as may."""


class Closed(Exception):
    """The server stops."""


@dataclass(eq=False)
class Job:
    """What one request asks for. Jobs with the same `key` can run together, as long as their shares sum to 1."""

    key: Hashable
    work: Any
    share: float
    """of a full batch; a job of more than 1 runs alone"""
    deadline: float
    """on the monotonic clock, in seconds"""
    arrived: float = field(default_factory=time.monotonic)
    future: Future[Any] = field(default_factory=Future)

    @property
    def live(self) -> bool:
        """Whether somebody still waits for the answer."""
        return not self.future.done() and time.monotonic() < self.deadline

    def succeed(self, value: Any) -> None:
        """Give the answer; nothing happens where nobody waits any more."""
        with suppress(InvalidStateError):
            self.future.set_result(value)

    def fail(self, error: BaseException) -> None:
        """Give an error instead."""
        with suppress(InvalidStateError):
            self.future.set_exception(error)


class Batcher:
    """Collects jobs and runs those that fit together, on one thread, which alone uses the model and the tokenizer.

    Args:
        run: works on jobs of one key and settles each of them. Where it raises on several jobs each runs alone, so that
            none fails for another's fault.
        wait: seconds the oldest job waits for others.
        most_waiting: jobs that may wait; `submit` raises QueueFull beyond.
    """

    def __init__(self, run: Callable[[Hashable, Sequence[Job]], None], wait: float, most_waiting: int) -> None:
        self._run, self._wait, self._most_waiting = run, wait, most_waiting
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="loracurve-batcher", daemon=True)

    def __len__(self) -> int:
        """How many jobs wait."""
        return len(self._jobs)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Put a job at the end of the queue; raises QueueFull or Closed."""
        with self._changed:
            if self._closed:
                raise Closed
            if len(self._jobs) >= self._most_waiting:
                self._jobs = deque(j for j in self._jobs if j.live)  # those whose clients have gone
            if len(self._jobs) >= self._most_waiting:
                raise QueueFull
            self._jobs.append(job)
            self._changed.notify()

    def close(self, patience: float) -> None:
        """Stop: jobs that wait fail with Closed; the one that runs has `patience` seconds to end."""
        with self._changed:
            self._closed = True
            for job in self._jobs:
                job.fail(Closed())
            self._jobs.clear()
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(patience)

    def _work(self) -> None:
        while jobs := self._next():
            self._settle(jobs)
            del jobs  # rows and answers are not kept until the next request comes

    def _next(self) -> list[Job]:
        """The oldest job and those of its key that run with it; none when closed."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._jobs or self._closed)
                if self._closed:
                    return []
                until = self._jobs[0].arrived + self._wait
                while not self._closed and (left := until - time.monotonic()) > 0 and not _full(self._jobs):
                    self._changed.wait(left)
                chosen: list[Job] = []
                rest: deque[Job] = deque()
                for job in self._jobs:
                    fits = not chosen or job.key == chosen[0].key and not _full([*chosen, job], 1 + 1e-9)
                    if job.live:
                        (chosen if fits else rest).append(job)
                self._jobs = rest
                if chosen:
                    return chosen

    def _settle(self, jobs: Sequence[Job]) -> None:
        try:
            self._run(jobs[0].key, jobs)
        except Exception as error:
            if len(jobs) > 1:
                for job in jobs:
                    if job.live:
                        self._settle([job])
            elif jobs[0].live:
                jobs[0].fail(error)
        for job in jobs:
            if job.live:  # a late one gets no error: that it is late is all there is to say
                job.fail(RuntimeError("no answer was made"))


def _full(jobs: Iterable[Job], most: float = 1 - 1e-9) -> bool:
    return sum(job.share for job in jobs) > most
