"""Points of a run's curve as ordinary PEFT adapter folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from loracurve.curve.files import load_base_record
from loracurve.runs.carried import carry_unknowns
from loracurve.runs.run import Run, best_point, check_run, open_run
from loracurve.system.errors import UserError
from loracurve.system.folders import results_folder
from loracurve.system.paths import is_file

__all__ = ["export_run"]


def export_run(
    run: str,
    out: Path,
    points: int | None = None,
    best: bool = False,
    t: float | None = None,
    base: str | None = None,
) -> list[str]:
    """Write points of a curve into folders below `out`, with index.json of their t and weights, and, where they are
    those of the run's average, what it knows of unknown inputs (`runs.carried`); returns lines that say what was
    written, and how to compare it with PEFT where the base is in half precision.

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
    average = None
    if best:
        points_of = [(best_point(opened), 1.0)]
    elif t is not None:
        points_of = [(t, 1.0)]
    else:
        wanted = opened.config.evaluation
        if points is not None:
            wanted = replace(wanted, points=points, inference="curve")
        average = opened.average(wanted)
        if average.coefficients is not None:
            raise UserError(
                "export: expected points of the curve, found inference tunnel; give --points, --t or --best"
            )
        points_of = list(zip(average.t.tolist(), average.weights.tolist(), strict=True))
    unknowns = None if average is None else average.unknowns

    def carry(index: Sequence[Mapping[str, Any]]) -> None:
        if unknowns is not None:
            base = load_base_record(opened.folder / "curve").fingerprint
            carry_unknowns(unknowns, points_of, folder, index, base)

    places, weights = zip(*points_of, strict=True)
    opened.model.export_points(folder, places, weights, carry)
    lines = [f"{len(points_of)} adapter{'s' * (len(points_of) > 1)} written to {folder}"]
    if unknowns is not None:
        lines.append("with unknowns.json, by which loracurve tells inputs that are foreign to these points")
    elif average is None and is_file(opened.folder / "unknowns.json"):
        lines.append("without unknowns.json, which is of the average's points together")
    if opened.model.dtype in (torch.float16, torch.bfloat16):
        dtype = str(opened.model.dtype).removeprefix("torch.")
        lines.append(
            f"the base runs in {dtype}, where PEFT rounds logits and every batch rounds differently: compare "
            "predictions with the base in float32 (docs/how-to/export.md)"
        )
    return lines
