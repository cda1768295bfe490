"""The command `scan`: the landscape of a run, or of adapters that somebody already has, as a folder of tables."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Console
from rich.progress import Progress

from loracurve.curve.bezier import arc_length, chord_length, control_polygon_length, gram, lipschitz_bound
from loracurve.landscape.barriers import barrier_frame, gauge_verdicts
from loracurve.landscape.config import ScanConfig
from loracurve.landscape.diversity import diversity_frame, information_frame
from loracurve.landscape.paths import Path as LoraPath
from loracurve.landscape.paths import anchor_paths, curve_path, grid, speed_frame
from loracurve.landscape.plane import plane_frames
from loracurve.landscape.scan import LaidOut, Scan, lay_out, scan_paths
from loracurve.landscape.sharpness import sharpness_along
from loracurve.landscape.slopes import loss_slopes
from loracurve.landscape.subject import Subject
from loracurve.model.curve_model import CurveModel
from loracurve.system.environment import environment
from loracurve.system.errors import UserError
from loracurve.system.files import write_json
from loracurve.system.folders import new_folder
from loracurve.system.tables import records, write_table
from loracurve.tasks.task import Task

__all__ = ["scan_to_folder"]


def scan_to_folder(subject: Subject, folder: Path, config: ScanConfig, visible: bool = True) -> dict[str, Any]:
    """Scan, and write scan.json and the tables paths, speeds, predictions, diversity and plane (.parquet).

    Returns:
        What scan.json holds.

    Raises:
        UserError: the folder has contents already, or a split is missing.
    """

    started = time.perf_counter()
    model, task = subject.model, subject.task
    splits = _splits(model, task, config)
    paths = anchor_paths(subject.anchors, config.paths, model.scalings)
    if subject.trained and "curve" in config.paths:
        paths["curve"] = curve_path(model)
    if not paths:
        raise UserError("paths: the curve alone was asked for, but these adapters have none; ask for straight")
    new_folder(folder)
    times = {name: grid(path.segments, config.points) for name, path in paths.items()}
    local = lay_out(model, task.encode("train"), "train", config.local_rows, config.seed)
    main = paths.get("curve") or list(paths.values())[-1]
    steps = sum(map(len, times.values())) + config.plane**2 + config.slopes + config.sharpness
    with _bar(steps, visible) as progress:
        scan = scan_paths(model, paths, splits, times, progress)
        slopes = loss_slopes(model, main, local, _even(config.slopes), progress=progress)
        sharp = sharpness_along(
            model,
            main,
            local,
            _even(config.sharpness),
            config.noise,
            hessian_iterations=config.hessian,
            seed=config.seed,
            progress=progress,
        )
        plane = _plane(model, local, config, progress)
    barriers = barrier_frame(scan, config.choose, "test", config.seed, config.resamples)
    report: dict[str, Any] = {
        "settings": asdict(config),
        "subject": subject.record,
        "rows": {s.name: s.examples for s in splits} | {"local": local.examples},
        "anchors": torch.linspace(0, 1, len(next(iter(subject.anchors.values()))), dtype=torch.float64).tolist(),
        "paths": _describe(scan, paths),
        "barriers": records(barriers),
        "gauge": records(gauge_verdicts(barriers)),
        "geometry": _geometry(model) if subject.trained else None,
        "slopes": {"path": main.name, "split": "train", "points": records(slopes)},
        "sharpness": {"path": main.name, "split": "train", "points": records(sharp)},
        "information": records(
            pd.concat([information_frame(p, scan.labels) for p in scan.paths.values()], ignore_index=True)
        ),
        "plane": plane,
        "cost": scan.cost,
    }
    speeds = speed_frame(paths, {name: _even(config.speeds) for name in paths})
    _write_tables(folder, scan, {"speeds": speeds}, main, config, report)
    report["seconds"] = time.perf_counter() - started
    write_json(folder / "environment.json", environment())
    write_json(folder / "scan.json", report)
    return report


def _splits(model: CurveModel, task: Task, config: ScanConfig) -> list[LaidOut]:
    for name in ("train", config.choose, "test"):
        if name not in task.dataset.splits:
            raise UserError(f"{task.dataset.name}: expected a {name} split, found {', '.join(task.dataset.splits)}")
    names = dict.fromkeys(("test", config.choose, "train"))
    return [lay_out(model, task.encode(name), name, config.rows or None, config.seed) for name in names]


def _even(count: int) -> list[float]:
    """`count` positions, the mid-points of equal cells."""
    return [(i + 0.5) / count for i in range(count)]


def _plane(
    model: CurveModel, local: LaidOut, config: ScanConfig, progress: Callable[[str], None]
) -> dict[str, Any] | None:
    """Grid and projections; None where it was not asked for, the reason where there is none."""
    if not config.plane:
        return None
    try:
        surface, drawn = plane_frames(model, local, config.plane, progress=progress)
    except UserError as error:
        return {"missing": str(error)}
    curve = drawn[drawn["kind"] == "curve"]["outside"]
    return {
        "split": "train",
        "largest_outside": float(curve.max()),
        "mean_outside": float(curve.mean()),
        "grid": records(surface),
        "projected": records(drawn),
    }


def _describe(scan: Scan, paths: dict[str, LoraPath]) -> dict[str, Any]:
    """Lengths in ||Delta W||_F and the highest and mean loss of every path."""
    out = {}
    for name, path in paths.items():
        ends = path.distances([0.0, 1.0])
        polygon = path.distances([s / path.segments for s in range(path.segments + 1)])
        losses = {
            split: {"mean": float(nll.mean()), "highest": float(nll.mean(1).max()), "lowest": float(nll.mean(1).min())}
            for split, nll in scan.paths[name].nll.items()
        }
        out[name] = {
            "arc_length": path.arc_length(),
            "through_anchors": float(polygon.diagonal(1).sum()),
            "chord": float(ends[0, 1]),
            "nll": losses,
        }
    return out


def _geometry(model: CurveModel) -> dict[str, float]:
    """Lengths of the curve in factor space (A, B, dense heads), in its own gauge."""
    spec, control = model.spec, gram(model.control_points().values())
    shape = spec.segments, spec.degree
    return {
        "arc_length": float(arc_length(control, *shape)),
        "chord": float(chord_length(control)),
        "control_polygon": float(control_polygon_length(control)),
        "speed_bound": float(lipschitz_bound(control, *shape)),
    }


def _write_tables(
    folder: Path,
    scan: Scan,
    tables: dict[str, pd.DataFrame],
    main: LoraPath,
    config: ScanConfig,
    report: dict[str, Any],
) -> None:
    frames = {"paths": scan.frame(), **tables}
    if scan.paths[main.name].log_probs:
        frames["diversity"] = diversity_frame(scan.paths[main.name], main, config.diversity_points)
        report["diversity"] = {"path": main.name, "means": records(_diversity_means(frames["diversity"]))}
        frames["predictions"] = pd.DataFrame(_predictions(scan))
    if report["plane"] and "grid" in report["plane"]:
        frames["plane"] = pd.DataFrame(report["plane"]["grid"])
    for name, frame in frames.items():
        write_table(folder / f"{name}.parquet", frame)


def _diversity_means(frame: pd.DataFrame) -> pd.DataFrame:
    """Mean divergence of pairs within and across segments."""
    return frame.groupby(["split", "within"], as_index=False)[["distance", "jsd", "disagreement"]].mean()


def _predictions(scan: Scan) -> Iterator[dict[str, Any]]:
    """One row for each path, split and example, with the probabilities at every point."""
    for path in scan.paths.values():
        for split, log_probs in path.log_probs.items():
            probs = log_probs.exp().transpose(0, 1).numpy()
            for row, name, label in zip(probs, scan.ids[split], scan.labels[split].tolist(), strict=True):
                yield {"path": path.name, "set": split, "id": name, "label": label, "point_probs": list(row)}


@contextmanager
def _bar(steps: int, visible: bool) -> Iterator[Callable[[str], None]]:
    with Progress(console=Console(stderr=True), disable=not visible) as bar:
        task = bar.add_task("scan", total=steps)
        yield lambda what: bar.update(task, advance=1, description=what)
