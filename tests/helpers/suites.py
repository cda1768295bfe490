"""Suites of seconds on made data, and what is read of them."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import torch

from helpers.made import SHARED, write_rows
from loracurve.baselines.curve import Curve
from loracurve.baselines.ensembles import Ensemble
from loracurve.baselines.single import Single
from loracurve.bench.cells import Result
from loracurve.bench.config import LandscapeConfig, SuiteConfig, SuiteTask
from loracurve.bench.results import Results
from loracurve.bench.suite import Cell
from loracurve.bench.tables.table import Table
from loracurve.bench.tables.write import write_tables
from loracurve.bench.tiny_model import TINY
from loracurve.curve.config import CurveConfig, LoraOptions
from loracurve.model.config import ModelConfig
from loracurve.training.config import LoopConfig

WORK = "work-*"
"""Folders of checkpoints in a store, one for each set of options."""

SIZES = {"train": 40, "validation": 20, "test": 24}


def anchored(**options: Any) -> Curve:
    """Through the first three anchors, two points for all rows."""
    return Curve(CurveConfig("anchored"), **{"training": SHARED} | options)


def little(folder: Path, **changes: object) -> SuiteConfig:
    """A suite of seconds on made data."""
    if not (folder / "made").is_dir():
        write_rows(folder / "made", SIZES)
        write_rows(folder / "other", {"train": 2, "validation": 2, "test": 9}, start="and ")
    options: dict[str, object] = {
        "model": ModelConfig(TINY),
        "tasks": {"made": SuiteTask(scoring="label", shift=["other"], ood=["other"])},
        "methods": {"one": Single(), "ensemble 2": Ensemble(2), "curve": anchored(units=4)},
        "data_folder": str(folder),
        "anchors": 3,
        "samples": 3,
        "lora": LoraOptions(r=2, lora_alpha=4),
        "training": LoopConfig(steps=4, batch_size=4, learning_rate=1e-2),
        "train_rows": 10,
    }
    return SuiteConfig(**options | changes)  # type: ignore[arg-type]


def bytes_of(out: Path) -> dict[str, bytes]:
    """Everything that must not depend on when a suite was stopped."""
    files = [*out.glob("cells/**/predictions.parquet"), out / "metrics.parquet", *out.glob("tables/*")]
    return {str(p.relative_to(out)): p.read_bytes() for p in files if not p.name.startswith("costs")}


OPTIONS = LandscapeConfig(pairs=2, points=3, rows=0, local_rows=8, sharpness=3)


def record(out: Path, method: str, seed: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Cell("made", seed, method).folder(out) / "cell.json").read_text())
    return found


def tables_of(suite: SuiteConfig, out: Path) -> dict[str, Table]:
    return {t.name: t for t in write_tables(suite, out)}


def point_nll(results: Results, method: str, seed: int = 0, split: str = "test") -> torch.Tensor:
    result = results.done[Cell("made", seed, method)]
    labels = result.predictions.labels[split]
    return -result.points(split).double()[:, torch.arange(len(labels)), labels]


def named(table: Table, method: str) -> dict[str, Any]:
    (row,) = [r for r in table.rows if r[1] == method]
    return dict(zip(table.columns, row, strict=True))


def killed_or_done(cell: Cell, marks: str) -> Result:
    """A cell that kills its process: `first` at its first try, `always` each time."""
    mark = Path(marks) / f"{cell.seed} {cell.method}"
    seen = mark.exists()
    mark.touch()
    if cell.method == "always" or (cell.method == "first" and not seen):
        os.kill(os.getpid(), signal.SIGKILL)
    return "done", [f"{cell}: done"]


def needs_room(cell: Cell, folder: str, room: int) -> Result:
    """A device with memory for `room` processes: one has its part from its first cell on."""
    mine = Path(folder) / f"process {os.getpid()}"
    mine.touch()
    for place in range(room):
        path = Path(folder) / f"{place}"
        try:
            os.link(mine, path)
        except FileExistsError:
            if not path.samefile(mine):
                continue
        return "done", []
    return "crowded", []


_cells_here = 0


def visible_from_the_start() -> Result:
    """The GPUs that this process saw before its first import."""
    found = dict(entry.split("=", 1) for entry in Path("/proc/self/environ").read_text().split("\0") if "=" in entry)
    return "done", [found.get("CUDA_VISIBLE_DEVICES", "none named")]


def breaks_once_used(cell: Cell) -> Result:
    """A process that is fit for one cell."""
    global _cells_here
    _cells_here += 1
    return ("done", [f"{cell}: done"]) if _cells_here == 1 else ("broken", [f"{cell}: broken"])
