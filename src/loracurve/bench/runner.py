"""Running a suite: anchors once for each task and seed, then every cell; what is done is skipped.

A cell's numbers depend on its options alone, never on what ran before it, so that a suite that was killed and started
again gives what an uninterrupted one gives (to the bit on the CPU with the same number of threads).
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from loracurve.baselines.base import Fitted, Setting
from loracurve.baselines.curve import Curve
from loracurve.bench.cluster import import_ray, run_on_ray
from loracurve.bench.landscapes import along_curve, scan_anchors
from loracurve.bench.memory import NO_MEMORY, PeakMemory, free_memory, out_of_memory
from loracurve.bench.options import fingerprint, options_of, plain
from loracurve.bench.pool import run_in_pool
from loracurve.bench.setting import Shared, anchors_folder, open_shared, remove_work, train_anchors
from loracurve.bench.store import record_of, write_frame, write_predictions
from loracurve.bench.suite import LANDSCAPE, Cell, Executor, SuiteConfig, cells_of, method_of, scans_of
from loracurve.environment import environment
from loracurve.errors import UserError, one_line
from loracurve.locking import has_results, locked
from loracurve.lora_space import ControlPoints
from loracurve.storage import atomic_write, write_json
from loracurve.tasks.data import subset

__all__ = ["Group", "prepare", "run_one", "run_suite"]

Say = Callable[[str], None]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Group:
    """The cells of one task and seed: opened when the first of them is to be run."""

    def __init__(self, suite: SuiteConfig, task: str, seed: int, out: Path, progress: bool = False) -> None:
        self.suite, self.task, self.seed, self.out, self.progress = suite, task, seed, out, progress
        self._shared: Shared | UserError | None = None
        self._anchors: ControlPoints | None = None

    @property
    def shared(self) -> Shared:
        """Model and sets; raises the UserError of the first try again instead of loading a model for every cell."""
        if self._shared is None:
            try:
                self._shared = open_shared(self.suite, self.task, self.seed)
            except UserError as error:
                self._shared = error
        if isinstance(self._shared, UserError):
            raise self._shared
        return self._shared

    def anchors(self) -> ControlPoints:
        """The stored anchors, trained first where there are none."""
        if self._anchors is None:
            self._anchors = train_anchors(self.suite, self.shared, self.task, self.seed, self.out, self.progress)
            free_memory()
        return self._anchors

    def close(self) -> None:
        """Let go of the model, before the next one is loaded."""
        self._shared = self._anchors = None
        free_memory()

    def run(self, cell: Cell) -> dict[str, Any]:
        """Fit, predict and store one cell; a UserError or a lack of memory is recorded as the reason why it failed."""
        folder = cell.folder(self.out)
        record: dict[str, Any] = {
            "task": cell.task,
            "seed": cell.seed,
            "method": cell.method,
            "options": options_of(self.suite, cell),
            "environment": environment(),
        }
        try:
            work = self._scan if cell.method == LANDSCAPE else self._fit_and_predict
            record |= {"status": "done"} | work(cell, folder)
        except (UserError, torch.OutOfMemoryError, torch.AcceleratorError) as error:
            if not (isinstance(error, UserError) or out_of_memory(error)):
                raise
            reason = str(error) if isinstance(error, UserError) else NO_MEMORY
            record |= {"status": "failed", "reason": one_line(reason)}
        free_memory()
        write_json(folder / "cell.json", record)  # last: it says that the rest is there
        remove_work(folder)
        return record

    def _fit_and_predict(self, cell: Cell, folder: Path) -> dict[str, Any]:
        training = self.suite.training_of(self.task, self.seed)
        work = folder / f"work-{fingerprint(self.suite, cell)}"  # a checkpoint of other options is never gone on with
        model, task, samples = self.shared.model, self.shared.task, self.suite.samples
        setting = Setting(model, task, self.anchors(), training, samples, self.seed, work, self.progress)
        with PeakMemory() as memory:
            started = time.perf_counter()
            fitted = method_of(self.suite, cell.method).fit(setting)
            fit_seconds, started = time.perf_counter() - started, time.perf_counter()
            predicted = {name: fitted.predict(encoded) for name, encoded in self.shared.sets.items()}
            predict_seconds = time.perf_counter() - started
        write_predictions(folder / "predictions.parquet", predicted, self.shared.sets)
        return self._along(cell, fitted) | {
            "passes": fitted.passes,
            "cost": fitted.cost,
            "notes": fitted.notes,
            "fit_seconds": fit_seconds,
            "predict_seconds": predict_seconds,
            "predicted_rows": sum(len(e) for e in self.shared.sets.values()),
            "peak_memory_bytes": memory.bytes,
        }

    def _along(self, cell: Cell, fitted: Fitted) -> dict[str, Any]:
        """Figures along a trained curve that was just predicted with, where the suite asks for a landscape."""
        method, options = method_of(self.suite, cell.method), self.suite.landscape
        if not (options.pairs and isinstance(method, Curve) and method.inference == "curve"):
            return {}
        task = self.shared.task
        rows = task.encode_rows(subset(task.dataset.rows("train"), options.local_rows), "train rows")
        t = fitted.notes["average"]["t"]
        return {"along": along_curve(self.shared.model, t, rows, options, self.seed)}

    def _scan(self, cell: Cell, folder: Path) -> dict[str, Any]:
        """Scan paths between the anchors."""
        sets, anchors = self.shared.sets, self.anchors()
        with PeakMemory() as memory:
            started = time.perf_counter()
            try:
                found, frames = scan_anchors(self.shared.model, anchors, sets, self.suite.landscape)
            finally:
                self.close()  # the base weights may be of another dtype now
            seconds = time.perf_counter() - started
        for name, frame in frames.items():
            write_frame(frame, folder / f"{name}.parquet")
        return found | {
            "passes": 0,
            "cost": 0.0,
            "fit_seconds": 0.0,
            "predict_seconds": seconds,
            "predicted_rows": sum(found["rows"].values()),
            "peak_memory_bytes": memory.bytes,
        }


def prepare(suite: SuiteConfig, out: Path) -> list[Cell]:
    """Look through the folder of a suite, write its options and the environment; returns the cells.

    Raises:
        UserError: a cell in it was made with other options.
    """
    if has_results(out) and not (out / "suite.yaml").is_file():
        raise UserError(f"{out}: expected the folder of a suite, found other files; choose another --out")
    cells = [*cells_of(suite), *scans_of(suite)]
    for cell in cells:
        if record_of(suite, cell, out) is not None:
            remove_work(cell.folder(out))
    text = yaml.safe_dump(plain(suite), sort_keys=False)
    atomic_write(out / "suite.yaml", lambda p: p.write_text(text))
    if not (out / "environment.json").is_file():
        write_json(out / "environment.json", environment())
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
        executor: processes of this machine, or workers of a Ray cluster (`bench.cluster`).
        address: of the Ray cluster. Default: what RAY_ADDRESS says, else one of this machine alone.

    Raises:
        UserError: the folder is of another suite, or another process works in it; there is no such cluster.
        RuntimeError: cells broke by a fault of ours; all others have been run.
    """
    if Path(out).exists() and not Path(out).is_dir():
        raise UserError(f"{out}: expected a folder for results, found a file; choose another --out")
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
    for task, seed in {(c.task, c.seed) for c in todo if retry}:
        (anchors_folder(out, task, seed) / "failed.json").unlink(missing_ok=True)
    end = None if seconds is None else time.perf_counter() + seconds
    if executor == "processes":
        jobs = jobs or max(torch.cuda.device_count(), 1)
    if todo and executor == "ray":
        broken = run_on_ray(suite, todo, out, jobs, end, say, address)
    elif jobs > 1 and len(todo) > 1:
        broken = run_in_pool(suite, todo, out, jobs, end, say)
    else:
        broken = []
        for task, seed in dict.fromkeys((c.task, c.seed) for c in todo):
            group = Group(suite, task, seed, out, progress)
            broken += _run_group(group, [c for c in todo if (c.task, c.seed) == (task, seed)], end, say)
            group.close()
    if broken:
        raise RuntimeError(f"{len(broken)} cells broke: {'; '.join(map(str, broken))}; the messages are above")


def _is_open(suite: SuiteConfig, cell: Cell, out: Path, retry: bool) -> bool:
    record = record_of(suite, cell, out)
    return record is None or (retry and record["status"] == "failed")


def _run_group(group: Group, cells: list[Cell], end: float | None, say: Say) -> list[Cell]:
    """Run cells one after the other; returns those that broke."""
    broken = []
    for cell in cells:
        if end is not None and time.perf_counter() > end:
            say(f"{cell}: left for later, the time is up")
            continue
        if not run_one(group, cell, say):
            broken.append(cell)
    return broken


def run_one(group: Group, cell: Cell, say: Say) -> bool:
    """Run a cell and say how it went; whether it did not break."""
    try:
        record = group.run(cell)
    except Exception:  # a fault of ours in one cell shall not cost the others; it is raised in the end
        say(traceback.format_exc().rstrip())
        return False
    if record["status"] == "failed":
        say(f"{cell}: failed: {record['reason']}")
    else:
        say(f"{cell}: fitted in {record['fit_seconds']:.1f} s, predicted in {record['predict_seconds']:.1f} s")
    return True
