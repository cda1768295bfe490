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
from pathlib import Path

import torch

from loracurve.bench.cells import PASSING, Outcome, Result, Say, run_cell
from loracurve.bench.config import SuiteConfig
from loracurve.bench.suite import Cell
from loracurve.system.errors import one_line

__all__ = ["run_in_pool", "spread", "visible_gpus"]

TRIES = 2
"""A cell whose process is killed twice is to blame."""


def run_in_pool(
    suite: SuiteConfig, cells: list[Cell], out: Path, jobs: int, end: float | None, say: Say
) -> dict[Cell, Outcome]:
    """Run cells in `jobs` processes (see `spread`).

    Cells that were stopped by something that may pass run once more in the end, one at a time.
    """
    found = _in_processes(suite, cells, out, jobs, end, say)
    again = [c for c, outcome in found.items() if outcome in PASSING]
    if again and not (end is not None and time.perf_counter() > end):
        say(f"{len(again)} cell{'s' * (len(again) > 1)} could not run beside others: once more, one at a time")
        found |= _in_processes(suite, again, out, 1, end, say)
    return found


def _in_processes(
    suite: SuiteConfig, cells: list[Cell], out: Path, jobs: int, end: float | None, say: Say
) -> dict[Cell, Outcome]:
    gpus = visible_gpus(torch.cuda.device_count())
    # Beside a GPU more threads would only wait for each other.
    threads = 2 if gpus else max((os.cpu_count() or 1) // jobs, 1)
    with _processes([gpus[job % len(gpus)] if gpus else "" for job in range(jobs)], threads) as (submit, close):
        return spread(cells, jobs, lambda place, cell: submit(place, run_cell, suite, cell, out), end, say, close)


@contextmanager
def _processes(gpus: list[str], threads: int) -> Iterator[tuple[Callable[..., Future[Result]], Callable[[int], bool]]]:
    """One process for each place, by its GPU ("": none): gives `submit(place, function, *arguments)` and
    `close(place)`, which ends it unless no other place shares its device, and says whether it did.

    Each process is a pool of its own: one that is killed takes no other with it, and its place gets a new one. So does
    one in which a cell broke: what broke it (CUDA's state, say) may break all that come after.
    """
    context = multiprocessing.get_context("spawn")
    others = multiprocessing.active_children()
    pools: dict[int, ProcessPoolExecutor] = {}
    last: dict[int, Future[Result]] = {}
    sharing = Counter(gpus)

    def submit(place: int, *call: object) -> Future[Result]:
        before = last.get(place)
        if before is not None and before.exception() is None and before.result()[0] == "broken":
            pools.pop(place).shutdown(wait=False)
        with _without_interrupts():
            try:
                last[place] = pools[place].submit(*call)  # type: ignore[arg-type]
            except (KeyError, BrokenExecutor):
                pools[place] = ProcessPoolExecutor(1, context, _start, (threads, os.getpid()))
                with _visible(gpus[place]):
                    last[place] = pools[place].submit(*call)  # type: ignore[arg-type]
        return last[place]

    def close(place: int) -> bool:
        if sharing[gpus[place]] == 1:
            return False
        sharing[gpus[place]] -= 1
        pools.pop(place).shutdown()  # what it held is free when the next cell begins
        return True

    try:
        yield submit, close
    except BaseException:  # an interruption: nobody waits until the cells are done, which go on from checkpoints
        for pool in pools.values():
            pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()).difference(others):
            process.kill()
        raise
    for pool in pools.values():
        pool.shutdown()


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Processes that start inside never see a Ctrl-C, which the terminal sends to all: this one decides for them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def spread(
    cells: list[Cell],
    jobs: int,
    submit: Callable[[int, Cell], Future[Result]],
    end: float | None,
    say: Say,
    close: Callable[[int], bool] = lambda place: False,
) -> dict[Cell, Outcome]:
    """Have `jobs` cells at a time run by what `submit` hands them to, each at one of `jobs` places.

    A place goes on with the task and seed whose model, sets and fitted methods it holds, then with one that nobody has
    begun, and only then with one that another place is at. No cell runs before its group's anchors are there: the first
    cell trains them. A cell whose process is killed is tried once more. So is one that found no memory, if its place
    can be closed, which leaves its memory to the others. Returns what became of the cells; those that the time was up
    for are not in it.
    """
    groups: dict[tuple[str, int], list[Cell]] = {}
    for cell in cells:
        groups.setdefault(_group(cell), []).append(cell)
    places: list[tuple[str, int] | None] = [None] * jobs
    open_groups: set[tuple[str, int]] = set()  # whose anchors are there
    running: dict[Future[Result], tuple[int, Cell]] = {}
    found: dict[Cell, Outcome] = {}
    tries: Counter[Cell] = Counter()
    closed: set[int] = set()

    def next_for(place: int) -> Cell | None:
        begun = {_group(cell) for _, cell in running.values()}
        waiting = {key: left for key, left in groups.items() if left and (key in open_groups or key not in begun)}
        new = next((key for key in waiting if key not in open_groups), None)
        most = max(waiting, key=lambda key: len(waiting[key]), default=None)
        key = next((k for k in (places[place], new, most) if k in waiting), None)
        return None if key is None else groups[key].pop(0)

    while True:
        up = end is not None and time.perf_counter() > end
        taken = {place for place, _ in running.values()} | closed
        for place in [] if up else [p for p in range(jobs) if p not in taken]:
            if (chosen := next_for(place)) is not None:
                running[submit(place, chosen)] = place, chosen
                places[place] = _group(chosen)
                tries[chosen] += 1
        if not running:
            break
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            place, cell = running.pop(future)
            try:
                outcome, lines = future.result()
                if outcome == "crowded" and tries[cell] < TRIES and close(place):
                    closed.add(place)
                    groups[_group(cell)].insert(0, cell)
                    lines = [f"{cell}: no memory beside the others; once more, with {jobs - len(closed)} at a time"]
                else:
                    found[cell] = outcome
            except BrokenExecutor:
                places[place] = None
                if again := tries[cell] < TRIES:
                    groups[_group(cell)].insert(0, cell)
                else:
                    found[cell] = "broken"
                lines = [f"{cell}: its process is gone; " + ("once more in a new one" if again else "given up")]
            except Exception as error:  # the process, not the cell: gone with its machine
                found[cell], lines = "broken", [f"{cell}: {one_line(repr(error))}"]
            for line in lines:
                say(line)
            if cell in found:
                open_groups.add(_group(cell))
    if left := sum(map(len, groups.values())):
        say(f"{left} cells left for later, the time is up")
    return found


def _group(cell: Cell) -> tuple[str, int]:
    """What shares a model, sets and anchors."""
    return cell.task, cell.seed


def visible_gpus(count: int) -> list[str]:
    """What the `count` GPUs of this process are called in CUDA_VISIBLE_DEVICES: it may itself see some of them only."""
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named[:count] if named else [str(i) for i in range(count)]


@contextmanager
def _visible(gpu: str) -> Iterator[None]:
    """Processes that start inside see one GPU from their first line on: imports (bitsandbytes) may look for devices."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    if gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    try:
        yield
    finally:
        if before is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = before
        elif gpu:
            del os.environ["CUDA_VISIBLE_DEVICES"]


def _start(threads: int, parent: int) -> None:
    """In a new process: end with the parent, even if that is killed."""
    torch.set_num_threads(threads)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
