"""The queue."""

from __future__ import annotations

import math
from typing import Any

import pytest

from loracurve.serving.batcher import Batcher, Closed, Job, QueueFull


def _job(key: str, work: Any, share: float = 0.3, deadline: float = math.inf) -> Job:
    return Job(key, work, share, deadline)


def test_jobs_are_grouped_in_their_order() -> None:
    ran: list[list[Any]] = []

    def work(key: Any, jobs: Any) -> None:
        ran.append([job.work for job in jobs])
        for job in jobs:
            job.succeed(job.work * 2)

    batcher = Batcher(work, 0, 10)
    jobs = [_job(key, i) for i, key in enumerate("aabaaa")]
    gone, late = _job("a", 6), _job("a", 7, deadline=-math.inf)
    gone.future.cancel()
    jobs += [_job("b", 8, share=5)]
    for job in (*jobs[:-1], gone, late, jobs[-1]):
        batcher.submit(job)
    with pytest.raises(QueueFull):
        for i in range(4):
            batcher.submit(_job("a", 9 + i, share=1))
    batcher.start()
    assert [job.future.result(10) for job in jobs] == [2 * job.work for job in jobs]
    batcher.close(10)
    assert ran[:4] == [[0, 1, 3], [2], [4, 5], [8]]
    assert not late.future.done() and gone.future.cancelled()
    with pytest.raises(Closed):
        batcher.submit(_job("a", 0))


def test_one_jobs_fault_is_not_anothers() -> None:
    def work(key: Any, jobs: Any) -> None:
        if any(job.work == 1 for job in jobs):
            raise ValueError("one")
        for job in jobs:
            if job.work != 2:
                job.succeed(job.work)

    batcher = Batcher(work, 0, 10)
    jobs = [_job("a", i) for i in range(3)]
    for job in jobs:
        batcher.submit(job)
    batcher.start()
    assert jobs[0].future.result(10) == 0
    for job, message in zip(jobs[1:], ("one", "no answer was made"), strict=True):
        assert message in str(job.future.exception(10))
    batcher.close(10)


def test_closing_fails_what_waits() -> None:
    batcher = Batcher(lambda key, jobs: None, 60, 10)
    job = _job("a", 0)
    batcher.submit(job)
    batcher.start()
    batcher.close(10)
    assert isinstance(job.future.exception(10), Closed)
