"""Points of a run's curve as ordinary PEFT adapter folders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from loracurve.runs.run import Run, best_point, check_run, open_run
from loracurve.system.errors import UserError
from loracurve.system.files import write_json
from loracurve.system.folders import results_folder

__all__ = ["export_run"]


def export_run(
    run: str,
    out: Path,
    points: int | None = None,
    best: bool = False,
    t: float | None = None,
    base: str | None = None,
) -> list[str]:
    """Write points of a curve into folders below `out`, with index.json of their t and weights; returns lines that say
    what was written, and how to compare it with PEFT where the base is in half precision.

    Args:
        run: run directory.
        out: new folder.
        points: this many points, as they are averaged; None: the run's own number.
        best: only the point of lowest validation NLL.
        t: only this point, in [0, 1].
        base: where the base model is now, which the adapters then name; None: where it was.

    Raises:
        UserError: no run there, a folder with something in it, or a run whose average lies off the curve.
    """
    check_run(Path(run))
    with results_folder(out) as folder:
        return _export(open_run(run, base=base), folder, points, best, t)


def _export(opened: Run, folder: Path, points: int | None, best: bool, t: float | None) -> list[str]:
    if best:
        times, weights = [best_point(opened)], [1.0]
    elif t is not None:
        times, weights = [t], [1.0]
    else:
        wanted = opened.config.evaluation if points is None else replace(opened.config.evaluation, points=points)
        average = opened.average(wanted)
        if average.coefficients is not None:
            raise UserError(
                "export: expected points of the curve, found inference tunnel; give --points, --t or --best"
            )
        times, weights = average.t.tolist(), average.weights.tolist()
    index = []
    for i, (time, weight) in enumerate(zip(times, weights, strict=True)):
        name = f"point-{i:02d}"
        opened.model.export(folder / name, time)
        index.append({"folder": name, "t": time, "weight": weight})
    write_json(folder / "index.json", index)
    lines = [f"{len(index)} adapter{'s' * (len(index) > 1)} written to {folder}"]
    if opened.model.dtype in (torch.float16, torch.bfloat16):
        dtype = str(opened.model.dtype).removeprefix("torch.")
        lines.append(
            f"the base runs in {dtype}, where PEFT rounds logits and every batch rounds differently: compare "
            "predictions with the base in float32 (docs/how-to/export.md)"
        )
    return lines
