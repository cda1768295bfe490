"""Several processes, one cell each: every process has its own GPU, or its share of the CPU's threads.

`spread` is also what `bench.ray_cluster` runs its cells with.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing.queues import SimpleQueue
from pathlib import Path

import torch

from loracurve.bench.cells import Result, Say, run_cell
from loracurve.bench.config import SuiteConfig
from loracurve.bench.memory import NO_MEMORY
from loracurve.bench.store import record_of
from loracurve.bench.suite import Cell
from loracurve.system.errors import one_line

__all__ = ["run_in_pool", "spread", "visible_gpus"]


def run_in_pool(suite: SuiteConfig, cells: list[Cell], out: Path, jobs: int, end: float | None, say: Say) -> list[Cell]:
    """Run cells in `jobs` processes; the first cell of each task and seed trains its anchors, the others follow it.

    Cells that found no memory beside the others run once more in the end, one at a time. Returns the cells that broke.
    """
    context = multiprocessing.get_context("spawn")
    gpus, places = visible_gpus(torch.cuda.device_count()), context.SimpleQueue()
    for job in range(jobs):
        places.put(gpus[job % len(gpus)] if gpus else "")
    # Beside a GPU more threads would only wait for each other.
    threads = 2 if gpus else max((os.cpu_count() or 1) // jobs, 1)
    with ProcessPoolExecutor(jobs, context, _start, (places, threads, os.getpid())) as pool:

        def submit(cell: Cell) -> Future[Result]:
            return pool.submit(run_cell, suite, cell, out)

        broken = spread(cells, jobs, submit, end, say)
        again = [c for c in cells if (record_of(suite, c, out) or {}).get("reason") == NO_MEMORY]
        if again:
            say(f"{len(again)} cell{'s' * (len(again) > 1)} found no memory beside others: once more, one at a time")
            broken += spread(again, 1, submit, end, say)
        return broken


def spread(
    cells: list[Cell],
    jobs: int,
    submit: Callable[[Cell], Future[Result]],
    end: float | None,
    say: Say,
) -> list[Cell]:
    """Have `jobs` cells at a time run by what `submit` hands them to, and no cell before its group's anchors are there.

    Returns the cells that broke.
    """
    groups: dict[tuple[str, int], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.task, cell.seed), []).append(cell)
    ready = [group.pop(0) for group in groups.values()]  # the rest waits for the group's anchors
    running: dict[Future[Result], Cell] = {}
    broken: list[Cell] = []
    while ready or running:
        if end is not None and time.perf_counter() > end and ready:
            say(f"{len(ready) + sum(map(len, groups.values()))} cells left for later, the time is up")
            ready, groups = [], {}
        while ready and len(running) < jobs:
            cell = ready.pop(0)
            running[submit(cell)] = cell
        for future in wait(running, return_when=FIRST_COMPLETED).done if running else ():
            cell = running.pop(future)
            try:
                fine, lines = future.result()
            except Exception as error:  # the process, not the cell: killed, or gone with its machine
                fine, lines = False, [f"{cell}: {one_line(repr(error))}"]
            for line in lines:
                say(line)
            if not fine:
                broken.append(cell)
            ready = groups.pop((cell.task, cell.seed), []) + ready
    return broken


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
