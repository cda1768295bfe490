"""Running one cell of a suite, with the model, the sets and the anchors that cells of a task and seed share."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from loracurve.baselines.curve import Curve
from loracurve.baselines.method import Fitted, Setting, Shelf
from loracurve.bench.anchor_scan import along_curve, scan_anchors
from loracurve.bench.config import LANDSCAPE, SuiteConfig
from loracurve.bench.memory import NO_MEMORY, free_memory
from loracurve.bench.provenance import fingerprint, options_of
from loracurve.bench.shared import Shared, open_shared, remove_work, train_anchors
from loracurve.bench.store import write_cell_predictions, write_frame
from loracurve.bench.suite import Cell, method_of
from loracurve.curve.lora_space import ControlPoints
from loracurve.system.environment import environment
from loracurve.system.errors import UserError, is_passing, one_line
from loracurve.system.files import write_json
from loracurve.system.memory import PeakMemory, out_of_memory
from loracurve.tasks.dataset import subset

__all__ = ["PASSING", "Group", "Outcome", "Result", "Say", "run_cell", "run_one"]


Say = Callable[[str], None]
"""What is called with a line about each cell."""

Outcome = Literal["done", "failed", "later", "crowded", "broken"]
"""failed: stored with its reason; later: nothing is stored, because what stopped it may pass (no space, no hub);
crowded: the same, no memory; broken: by a fault of ours, or the process is gone"""

PASSING: tuple[Outcome, ...] = ("later", "crowded")
"""Of cells that may run at the next try."""

Result = tuple[Outcome, list[str]]
"""How a cell went, and what there is to say about it."""


class Group:
    """The cells of one task and seed: opened when the first of them is to be run."""

    def __init__(self, suite: SuiteConfig, task: str, seed: int, out: Path, progress: bool = False) -> None:
        self.suite, self.task, self.seed, self.out, self.progress = suite, task, seed, out, progress
        self._shared: Shared | UserError | None = None
        self._anchors: ControlPoints | None = None
        self._shelf = Shelf()

    @property
    def shared(self) -> Shared:
        """Model and sets; raises the UserError of the first try again instead of loading a model for every cell."""
        if self._shared is None:
            try:
                self._shared = open_shared(self.suite, self.task, self.seed)
            except UserError as error:
                if is_passing(error):
                    raise
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
        self._shelf = Shelf()
        free_memory(model_too=True)

    def run(self, cell: Cell) -> dict[str, Any]:
        """Fit, predict and store one cell; a UserError is recorded as the reason why it failed.

        Raises:
            UserError: something stopped it that may have passed at the next try; nothing is recorded.
        """
        folder = cell.folder(self.out)
        record: dict[str, Any] = {
            "task": cell.task,
            "seed": cell.seed,
            "method": cell.method,
            "options": options_of(self.suite, cell),
            "environment": environment(self.suite.commit),
        }
        try:
            work = self._scan if cell.method == LANDSCAPE else self._fit_and_predict
            record |= {"status": "done"} | work(cell, folder)
        except (UserError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError) as error:
            if out_of_memory(error):
                free_memory()
                raise UserError(NO_MEMORY) from error
            if not isinstance(error, UserError) or is_passing(error):
                raise
            record |= {"status": "failed", "reason": one_line(error)}
        free_memory()
        write_json(folder / "cell.json", record)  # last: it says that the rest is there
        remove_work(folder)
        return record

    def _fit_and_predict(self, cell: Cell, folder: Path) -> dict[str, Any]:
        training = self.suite.training_of(self.task, self.seed)
        work = folder / f"work-{fingerprint(self.suite, cell)}"  # a checkpoint of other options is never gone on with
        model, task, samples = self.shared.model, self.shared.task, self.suite.samples
        shelf, saved = self._shelf, self._shelf.saved
        setting = Setting(model, task, self.anchors(), training, samples, self.seed, work, self.progress, shelf)
        with PeakMemory() as memory:
            started = time.perf_counter()
            fitted = shelf.fit(method_of(self.suite, cell.method, self.task), setting)
            now = time.perf_counter()
            fit_seconds, started = now - started + shelf.saved - saved, now
            predicted = {name: fitted.predict(encoded) for name, encoded in self.shared.sets.items()}
            predict_seconds = time.perf_counter() - started
        write_cell_predictions(folder / "predictions.parquet", predicted, self.shared.sets)
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


def run_one(group: Group, cell: Cell, say: Say) -> Outcome:
    """Run a cell and say how it went."""
    try:
        record = group.run(cell)
    except Exception as error:  # a fault of ours in one cell shall not cost the others; it is raised in the end
        if isinstance(error, UserError) or is_passing(error):
            say(f"{cell}: not now: {one_line(error)}")
            return "crowded" if out_of_memory(error.__cause__ or error) else "later"
        say(traceback.format_exc().rstrip())
        return "broken"
    if record["status"] == "failed":
        say(f"{cell}: failed: {record['reason']}")
        return "failed"
    say(f"{cell}: fitted in {record['fit_seconds']:.1f} s, predicted in {record['predict_seconds']:.1f} s")
    return "done"


_group: Group | None = None
"""of this process, where it is one of several"""


def run_cell(suite: SuiteConfig, cell: Cell, out: Path) -> Result:
    """In another process: run one cell; the model stays loaded for the next one of the same task and seed."""
    global _group

    if _group is None or (_group.task, _group.seed) != (cell.task, cell.seed):
        if _group is not None:
            _group.close()
        _group = Group(suite, cell.task, cell.seed, out)
    lines: list[str] = []
    return run_one(_group, cell, lines.append), lines
