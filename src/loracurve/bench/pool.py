"""Several processes, one cell each: every process has its own GPU, or its share of the CPU's threads.

`spread` is also what `bench.ray_cluster` runs its cells with.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.queues import SimpleQueue
from pathlib import Path

import torch

from loracurve.bench.cells import Outcome, Result, Say, run_cell
from loracurve.bench.config import SuiteConfig
from loracurve.bench.suite import Cell
from loracurve.system.errors import one_line

__all__ = ["Spread", "run_in_pool", "spread", "visible_gpus"]

TRIES = 2
"""A cell whose process is killed twice is to blame."""


def run_in_pool(
    suite: SuiteConfig, cells: list[Cell], out: Path, jobs: int, end: float | None, say: Say
) -> dict[Cell, Outcome]:
    """Run cells in `jobs` processes; the first cell of each task and seed trains its anchors, the others follow it.

    A process that is killed ends its pool: what ran or waited there runs in a new one, a cell at most `TRIES` times.
    Cells that were stopped by something that may pass (no memory beside the others) run once more in the end, one at a
    time.
    """
    found: dict[Cell, Outcome] = {}
    tries: Counter[Cell] = Counter()
    todo = cells
    while todo:
        went = _in_one_pool(suite, todo, out, jobs, end, say)
        found |= went.outcomes
        tries.update(went.gone)
        found |= dict.fromkeys((c for c in went.gone if tries[c] >= TRIES), "broken")
        todo = [c for c in (*went.gone, *went.waiting) if tries[c] < TRIES]
        if todo:
            say(f"a process is gone: {len(todo)} cell{'s' * (len(todo) > 1)} in new ones")
    again = [c for c, outcome in found.items() if outcome == "later"]
    if again and not (end is not None and time.perf_counter() > end):
        say(f"{len(again)} cell{'s' * (len(again) > 1)} could not run beside others: once more, one at a time")
        found |= _in_one_pool(suite, again, out, 1, end, say).outcomes
    return found


def _in_one_pool(suite: SuiteConfig, cells: list[Cell], out: Path, jobs: int, end: float | None, say: Say) -> Spread:
    context = multiprocessing.get_context("spawn")
    gpus, places = visible_gpus(torch.cuda.device_count()), context.SimpleQueue()
    for job in range(jobs):
        places.put(gpus[job % len(gpus)] if gpus else "")
    # Beside a GPU more threads would only wait for each other.
    threads = 2 if gpus else max((os.cpu_count() or 1) // jobs, 1)
    others = multiprocessing.active_children()
    with ProcessPoolExecutor(jobs, context, _start, (places, threads, os.getpid())) as pool:

        def submit(cell: Cell) -> Future[Result]:
            with _without_interrupts():
                return pool.submit(run_cell, suite, cell, out)

        try:
            return spread(cells, jobs, submit, end, say)
        except BaseException:  # an interruption: nobody waits until the cells are done, which go on from checkpoints
            pool.shutdown(wait=False, cancel_futures=True)
            for process in set(multiprocessing.active_children()).difference(others):
                process.kill()
            raise


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Processes that start inside never see a Ctrl-C, which the terminal sends to all: this one decides for them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@dataclass
class Spread:
    """What became of cells that were handed out."""

    outcomes: dict[Cell, Outcome] = field(default_factory=dict)
    gone: list[Cell] = field(default_factory=list)
    """in processes that are gone, with the one that was killed"""
    waiting: list[Cell] = field(default_factory=list)
    """not begun when the pool broke"""


def spread(
    cells: list[Cell],
    jobs: int,
    submit: Callable[[Cell], Future[Result]],
    end: float | None,
    say: Say,
) -> Spread:
    """Have `jobs` cells at a time run by what `submit` hands them to, and no cell before its group's anchors are there.

    It ends when all are done, the time is up, or the pool breaks.
    """
    groups: dict[tuple[str, int], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.task, cell.seed), []).append(cell)
    ready = [group.pop(0) for group in groups.values()]  # the rest waits for the group's anchors
    running: dict[Future[Result], Cell] = {}
    found = Spread()
    broken = False
    while (ready and not broken) or running:
        if end is not None and time.perf_counter() > end and ready:
            say(f"{len(ready) + sum(map(len, groups.values()))} cells left for later, the time is up")
            ready, groups = [], {}
        while ready and len(running) < jobs and not broken:
            try:
                running[submit(ready[0])] = ready[0]
                ready.pop(0)
            except BrokenExecutor:
                broken = True
        for future in wait(running, return_when=FIRST_COMPLETED).done if running else ():
            cell = running.pop(future)
            try:
                outcome, lines = future.result()
            except BrokenExecutor:
                broken = True
                found.gone.append(cell)
                continue
            except Exception as error:  # the process, not the cell: gone with its machine
                outcome, lines = "broken", [f"{cell}: {one_line(repr(error))}"]
            for line in lines:
                say(line)
            found.outcomes[cell] = outcome
            ready = groups.pop((cell.task, cell.seed), []) + ready
    found.waiting = [*ready, *(cell for group in groups.values() for cell in group)]
    return found


def visible_gpus(count: int) -> list[str]:
    """What the `count` GPUs of this process are called in CUDA_VISIBLE_DEVICES: it may itself see some of them only."""
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named[:count] if named else [str(i) for i in range(count)]


def _start(places: SimpleQueue[str], threads: int, parent: int) -> None:
    """In a new process, before torch looks for devices: take a place; end with the parent, even if that is killed."""
    if gpu := places.get():
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    torch.set_num_threads(threads)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
