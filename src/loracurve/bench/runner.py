"""Running a suite: anchors once for each task and seed, then every cell; what is done is skipped.

A cell's numbers depend on its options alone, never on what ran before it, so that a suite that was killed and started
again gives what an uninterrupted one gives (to the bit on the CPU with the same number of threads).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from loracurve.bench.cells import PASSING, Group, Outcome, Say, run_one
from loracurve.bench.config import Executor, SuiteConfig
from loracurve.bench.memory import NO_MEMORY
from loracurve.bench.pool import run_in_pool
from loracurve.bench.provenance import plain
from loracurve.bench.ray_cluster import import_ray, run_on_ray
from loracurve.bench.shared import anchors_folder, remove_work
from loracurve.bench.store import record_of
from loracurve.bench.suite import Cell, cells_of, scans_of
from loracurve.system.consent import consented
from loracurve.system.environment import environment
from loracurve.system.errors import UserError
from loracurve.system.escaping import visible
from loracurve.system.files import atomic_write, write_json
from loracurve.system.folders import has_results, locked
from loracurve.system.paths import exists, is_file, is_folder
from loracurve.system.source import source
from loracurve.system.yaml_files import dump_yaml

__all__ = ["prepare", "run_suite"]


def _say(text: str) -> None:
    print(visible(text), file=sys.stderr, flush=True)


def prepare(suite: SuiteConfig, out: Path) -> list[Cell]:
    """Look through the folder of a suite, write its options and the environment; returns the cells.

    Raises:
        UserError: a cell in it was made with other options.
    """
    if has_results(out) and not is_file(out / "suite.yaml"):
        raise UserError(f"{out}: expected the folder of a suite, found other files; choose another --out")
    cells = [*cells_of(suite), *scans_of(suite)]
    for cell in cells:
        if record_of(suite, cell, out) is not None:
            remove_work(cell.folder(out))
    text = dump_yaml(plain(suite))
    atomic_write(out / "suite.yaml", lambda p: p.write_text(text))
    if not is_file(out / "environment.json"):
        write_json(out / "environment.json", environment(suite.commit))
    return cells


def run_suite(
    suite: SuiteConfig,
    out: str | Path,
    jobs: int = 0,
    seconds: float | None = None,
    retry: bool = False,
    progress: bool = False,
    say: Say = _say,
    executor: Executor = "processes",
    address: str | None = None,
) -> None:
    """Run what is still to be run of a suite.

    Args:
        suite: its options.
        out: a new folder, or one in which a suite was begun; methods, tasks and seeds may have been added since.
        jobs: cells at a time; 0: one for each GPU, without GPUs one (on a cluster: one for each node).
        seconds: start no further cell after this time.
        retry: run cells that failed once more.
        progress: bars while training.
        say: called with a line about each cell.
        executor: processes of this machine, or workers of a Ray cluster (`bench.ray_cluster`).
        address: of the Ray cluster. Default: what RAY_ADDRESS says, else one of this machine alone.

    Raises:
        UserError: the folder is of another suite, or another process works in it; there is no such cluster; the code
            has changes that no commit holds; in the end, where cells failed or could not run now, which ones.
        RuntimeError: cells broke by a fault of ours; all others have been run.
    """
    if exists(out) and not is_folder(out):
        raise UserError(f"{out}: expected a folder for results, found a file; choose another --out")
    consented(suite.model.trust_remote_code, "the suite")
    if executor == "ray":
        import_ray()
    elif address is not None:
        raise UserError(f"address: expected none without --executor ray, found {address!r}")
    with locked(Path(out)):
        _run_suite(suite, Path(out), jobs, seconds, retry, progress, say, executor, address)


def _run_suite(
    suite: SuiteConfig,
    out: Path,
    jobs: int,
    seconds: float | None,
    retry: bool,
    progress: bool,
    say: Say,
    executor: Executor,
    address: str | None,
) -> None:
    todo = [c for c in prepare(suite, out) if _is_open(suite, c, out, retry)]
    if todo and suite.commit is None and source().changed:
        raise UserError("the code of loracurve has changes that no commit holds; commit them, or say --commit NAME")
    for task, seed in {(c.task, c.seed) for c in todo if retry}:
        (anchors_folder(out, task, seed) / "failed.json").unlink(missing_ok=True)
    end = None if seconds is None else time.perf_counter() + seconds
    if executor == "processes":
        jobs = jobs or max(torch.cuda.device_count(), 1)
    found: dict[Cell, Outcome]
    if todo and executor == "ray":
        found = run_on_ray(suite, todo, out, jobs, end, say, address)
    elif jobs > 1 and len(todo) > 1:
        found = run_in_pool(suite, todo, out, jobs, end, say)
    else:
        found = {}
        for task, seed in dict.fromkeys((c.task, c.seed) for c in todo):
            group = Group(suite, task, seed, out, progress)
            found |= _run_group(group, [c for c in todo if (c.task, c.seed) == (task, seed)], end, say)
            group.close()
    _tell(suite, out, found)


def _tell(suite: SuiteConfig, out: Path, found: Mapping[Cell, Outcome]) -> None:
    """Raise an error that names the cells without results, if there are any but those left for later by the clock."""
    if broken := [c for c, outcome in found.items() if outcome == "broken"]:
        raise RuntimeError(f"{len(broken)} cells broke: {'; '.join(map(str, broken))}; the messages are above")
    parts = []
    if later := [str(c) for c, outcome in found.items() if outcome in PASSING]:
        parts.append(f"{len(later)} could not run now ({', '.join(later)}): the same command tries them again")
    records = ((c, record_of(suite, c, out)) for c in [*cells_of(suite), *scans_of(suite)])
    if failed := [f"{c}: {r['reason']}" for c, r in records if r is not None and r["status"] == "failed"]:
        parts.append(f"{len(failed)} failed ({'; '.join(failed)}): --retry runs them again")
    if parts:
        raise UserError(f"{out}: cells without results: {'; '.join(parts)}")


def _is_open(suite: SuiteConfig, cell: Cell, out: Path, retry: bool) -> bool:
    record = record_of(suite, cell, out)
    # Earlier versions stored a lack of memory, which may have passed.
    return record is None or (record["status"] == "failed" and (retry or record["reason"] == NO_MEMORY))


def _run_group(group: Group, cells: list[Cell], end: float | None, say: Say) -> dict[Cell, Outcome]:
    """Run cells one after the other."""
    found: dict[Cell, Outcome] = {}
    for cell in cells:
        if end is not None and time.perf_counter() > end:
            say(f"{cell}: left for later, the time is up")
            continue
        found[cell] = run_one(group, cell, say)
    return found
