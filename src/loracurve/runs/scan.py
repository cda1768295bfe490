"""The landscape of a run."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch

from loracurve.landscape.paths import joints
from loracurve.landscape.subject import Subject
from loracurve.model.config import Dtype
from loracurve.runs.config import load_config
from loracurve.runs.run import open_run
from loracurve.system.errors import UserError
from loracurve.system.paths import entries, is_file, is_folder

__all__ = ["run_to_scan"]


def run_to_scan(folder: str | Path, dtype: Dtype, base: str | None = None) -> Subject:
    """Open a finished run; a free curve lends its joints as anchors. `base`: as `open_run` takes it.

    Raises:
        UserError: no fitted curve there.
    """

    folder = Path(folder)
    if not is_file(folder / "config.yaml"):
        raise UserError(f"{folder}: expected a run directory, found no config.yaml in it; make one with loracurve fit")
    known = load_config(folder / "config.yaml")
    run = open_run(folder, base=base)
    if dtype != "auto" and dtype != known.model.dtype:
        run.model.model.to(getattr(torch, dtype))
        run.model.set_curve(run.model.spec, run.model.control_points())  # in the dtype that goes with the base's
    folders = sorted((p for p in _inside(folder / "anchors") if p.name.isdigit()), key=lambda p: int(p.name))
    spec = run.model.spec
    from_anchors = len(folders) == spec.segments + 1  # fewer where several pieces lie between two of them
    anchors = run.model.read_adapters(folders) if from_anchors else joints(run.model.control_points(), spec.degree)
    record = {
        "curve": asdict(spec),
        "anchors_from": "anchors" if from_anchors else "joints of the curve",
        "base": run.config.model.name,
        "task": known.task.data,
        "scoring": known.task.scoring,
    }
    return Subject(run.model, anchors, run.task, True, record)


def _inside(folder: Path) -> list[Path]:
    return entries(folder) if is_folder(folder) else []
