"""The queue."""

from __future__ import annotations

import math
import threading
from typing import Any

import pytest
from helpers.waiting import SECONDS, until

from loracurve.serving.batcher import Batcher, Closed, Job, QueueFull


def _job(key: str, work: Any, share: float = 0.3, deadline: float = math.inf, rows: int = 1) -> Job:
    job = Job(key, work, rows, deadline)
    job.ready = share
    return job


def _weigh(job: Job) -> float:
    return float(job.ready)


def _double(key: Any, jobs: Any) -> None:
    for job in jobs:
        job.succeed(job.work * 2)


def test_jobs_are_grouped_in_their_order() -> None:
    ran: list[list[Any]] = []

    def work(key: Any, jobs: Any) -> None:
        ran.append([job.work for job in jobs])
        _double(key, jobs)

    batcher = Batcher(work, _weigh, 11)
    jobs = [_job(key, i) for i, key in enumerate("aabaaa")]
    gone, late = _job("a", 6), _job("a", 7, deadline=-math.inf)
    gone.future.cancel()
    jobs += [_job("b", 8, share=5)]
    for job in (*jobs[:-1], gone, late, jobs[-1]):
        batcher.submit(job)
    batcher.start()
    assert [job.future.result(SECONDS) for job in jobs] == [2 * job.work for job in jobs]
    batcher.close(SECONDS)
    assert ran == [[0, 1, 3], [2], [4, 5], [8]]
    assert not late.future.done() and gone.future.cancelled()
    with pytest.raises(Closed):
        batcher.submit(_job("a", 0))


def test_the_queue_is_counted_in_rows_and_clients_that_go_leave_it() -> None:
    batcher = Batcher(_double, _weigh, 10)
    large, small = _job("a", 1, rows=50), _job("a", 2, rows=4)
    batcher.submit(large)  # more than may wait, but nobody else does
    with pytest.raises(QueueFull) as full:
        batcher.submit(small)
    assert full.value.retry_s == 1 and (len(batcher), batcher.rows) == (1, 50)
    large.future.cancel()
    assert (len(batcher), batcher.rows) == (0, 0)
    for _ in range(2):
        batcher.submit(_job("a", 2, rows=4))
    with pytest.raises(QueueFull):
        batcher.submit(_job("a", 2, rows=3))
    assert batcher.rows == 8
    last = _job("a", 3, rows=2)
    batcher.submit(last)
    batcher.start()
    assert last.future.result(SECONDS) == 6
    batcher.close(SECONDS)


def test_while_one_batch_runs_the_next_one_gathers() -> None:
    """A lone job is begun at once; those that come while it runs are one batch, whatever their number."""
    ran: list[list[Any]] = []
    running, release = threading.Event(), threading.Event()

    def work(key: Any, jobs: Any) -> None:
        ran.append([job.work for job in jobs])
        running.set()
        release.wait(SECONDS)
        _double(key, jobs)

    batcher = Batcher(work, _weigh, 100)
    batcher.start()
    jobs = [_job("a", i, share=0.1) for i in range(8)]
    try:
        batcher.submit(jobs[0])
        assert running.wait(SECONDS), "nothing else has to come"
        for job in jobs[1:]:
            batcher.submit(job)
        jobs[3].future.cancel()
        assert len(batcher) == 6 and jobs[0].started and not jobs[1].started
    finally:
        release.set()
    assert [job.future.result(SECONDS) for job in jobs[4:]] == [8, 10, 12, 14]
    batcher.close(SECONDS)
    assert ran == [[0], [1, 2, 4, 5, 6, 7]]


def test_clients_that_ran_together_are_waited_for() -> None:
    """For as many as the last batch had, and only for a part of the time that it took."""
    ran: list[int] = []

    def work(key: Any, jobs: Any) -> None:
        ran.append(len(jobs))
        _double(key, jobs)

    batcher = Batcher(work, _weigh, 100)
    batcher._together, batcher._patient_until = 2, math.inf
    batcher.start()
    jobs = [_job("a", 1), _job("a", 2)]
    batcher.submit(jobs[0])
    batcher.submit(jobs[1])
    assert [job.future.result(SECONDS) for job in jobs] == [2, 4] and ran == [2]
    until(lambda: batcher._patient_until < math.inf, "the batch is accounted for")
    alone = _job("a", 3)
    batcher.submit(alone)
    assert alone.future.result(SECONDS) == 6 and ran == [2, 1]
    batcher.close(SECONDS)


def test_a_job_that_cannot_be_weighed_fails_alone() -> None:
    batcher = Batcher(_double, lambda job: 1 / job.work, 100)
    jobs = [_job("a", 2), _job("a", 0), _job("a", 4)]
    for job in jobs:
        batcher.submit(job)
    batcher.start()
    assert jobs[0].future.result(SECONDS) == 4 and jobs[2].future.result(SECONDS) == 8
    assert isinstance(jobs[1].future.exception(SECONDS), ZeroDivisionError)
    batcher.close(SECONDS)


def test_one_jobs_fault_is_not_anothers() -> None:
    def work(key: Any, jobs: Any) -> None:
        if any(job.work == 1 for job in jobs):
            raise ValueError("one")
        for job in jobs:
            if job.work != 2:
                job.succeed(job.work)

    batcher = Batcher(work, _weigh, 10)
    jobs = [_job("a", i) for i in range(3)]
    for job in jobs:
        batcher.submit(job)
    batcher.start()
    assert jobs[0].future.result(SECONDS) == 0
    for job, message in zip(jobs[1:], ("one", "no answer was made"), strict=True):
        assert message in str(job.future.exception(SECONDS))
    batcher.close(SECONDS)


def test_closing_fails_what_waits() -> None:
    batcher = Batcher(_double, _weigh, 10)
    job = _job("a", 0)
    batcher.submit(job)
    batcher.close(SECONDS)
    assert isinstance(job.future.exception(SECONDS), Closed) and len(batcher) == 0
