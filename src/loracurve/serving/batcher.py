"""Requests of several clients run together: a queue with a limit, and one thread that works on it.

While a batch is computed the next one gathers. A request that finds the thread idle waits for nobody.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Batcher", "Closed", "Job", "QueueFull"]

# Clients that ran together come back together: the thread waits for them, at most this part of what their batch took.
PATIENCE = 0.1

# Weight of the last batch in the running mean of the seconds that a row takes.
RECENT = 0.3


class QueueFull(Exception):
    """As many rows wait as may; `retry_s` is when there will be room, in whole seconds."""

    def __init__(self, retry_s: int) -> None:
        super().__init__(f"try again in {retry_s} s")
        self.retry_s = retry_s


class Closed(Exception):
    """The server stops."""


@dataclass(eq=False)
class Job:
    """What one request asks for. Jobs with the same `key` can run together, as long as their shares sum to 1."""

    key: Hashable
    work: Any
    rows: int
    """how many rows or prompts it has"""
    deadline: float
    """when nobody waits any more, on the monotonic clock, in seconds"""
    future: Future[Any] = field(default_factory=Future)
    share: float | None = None
    """of a full batch, known once it has been weighed; a job of more than 1 runs alone"""
    ready: Any = None
    """what weighing it made of its work"""
    started: bool = False
    """whether it is being worked on"""

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
        weigh: which share of a full batch a job is; called once for each job, on the thread. It may settle the job.
        most_rows: rows that may wait; `submit` raises QueueFull beyond. A job that waits alone may have more.
    """

    def __init__(
        self, run: Callable[[Hashable, Sequence[Job]], None], weigh: Callable[[Job], float], most_rows: int
    ) -> None:
        self._run, self._weigh, self._most_rows = run, weigh, most_rows
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="loracurve-batcher", daemon=True)
        self._together, self._patient_until, self._seconds_a_row = 0, -math.inf, 0.0

    def __len__(self) -> int:
        """How many jobs wait."""
        return len(self._jobs)

    @property
    def rows(self) -> int:
        """How many rows wait."""
        with self._changed:
            return sum(job.rows for job in self._jobs)

    @property
    def wait_s(self) -> int:
        """How long the rows that wait will take, in whole seconds, at least 1."""
        return max(1, math.ceil(self.rows * self._seconds_a_row))

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Put a job at the end of the queue, which it leaves when its future is settled or cancelled; raises QueueFull
        or Closed."""
        with self._changed:
            if self._closed:
                raise Closed
            if self._jobs and self.rows + job.rows > self._most_rows:
                raise QueueFull(self.wait_s)
            self._jobs.append(job)
            self._changed.notify()
        job.future.add_done_callback(lambda _: self._forget(job))

    def close(self, patience: float) -> None:
        """Stop: jobs that wait fail with Closed; the one that runs has `patience` seconds to end."""
        with self._changed:
            self._closed = True
            self._changed.notify()
            waiting = [*self._jobs]
        for job in waiting:
            job.fail(Closed())
        if self._thread.is_alive():
            self._thread.join(patience)

    def _forget(self, job: Job) -> None:
        with self._changed, suppress(ValueError):
            self._jobs.remove(job)

    def _work(self) -> None:
        while jobs := self._next():
            begun = time.monotonic()
            self._settle(jobs)
            ended = time.monotonic()
            with self._changed:
                each = (ended - begun) / sum(job.rows for job in jobs)
                known = self._seconds_a_row or each
                self._seconds_a_row = known + RECENT * (each - known)
                self._together, self._patient_until = len(jobs), ended + PATIENCE * (ended - begun)
            del jobs  # rows and answers are not kept until the next request comes

    def _next(self) -> list[Job]:
        """The oldest job and those of its key that run with it; none when closed."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._closed)
                while not self._closed and len(self._jobs) < self._together:
                    if (left := self._patient_until - time.monotonic()) <= 0:
                        break
                    self._changed.wait(left)
                if self._closed:
                    return []
                waiting = [*self._jobs]
            if chosen := self._chosen(waiting):
                return chosen

    def _chosen(self, waiting: Sequence[Job]) -> list[Job]:
        """The first job that somebody waits for, and those of its key behind it up to one that does not fit."""
        chosen: list[Job] = []
        total = 0.0
        for job in waiting:
            if not job.live:
                self._forget(job)
                continue
            if chosen and job.key != chosen[0].key:
                continue
            if job.share is None:
                try:
                    job.share = self._weigh(job)
                except Exception as error:
                    job.fail(error)
            if not job.live:  # weighing it settled it
                continue
            assert job.share is not None
            if chosen and total + job.share > 1 + 1e-9:
                break
            chosen.append(job)
            total += job.share
        for job in chosen:
            job.started = True
            self._forget(job)
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
