"""Tables of the landscape: barriers between anchors with their controls, and what lies along the curves.

The first ones need the scans of a suite (its option `landscape`); the last one is made from the predictions at the
points of each curve, with what cells recorded about the curve where they did.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from loracurve.bench.results import CellResult, Results, seed_of, shared_seeds
from loracurve.bench.suite import Cell, full_ensemble
from loracurve.bench.tables.table import Table, Value
from loracurve.inference.intervals import Interval, bootstrap_interval
from loracurve.landscape.diversity import pairwise_divergence
from loracurve.system.tables import read_table

__all__ = ["along_curves", "barriers", "heights"]


def barriers(results: Results, out: Path) -> list[Table]:
    """Barriers of every path: one row for each task, and one for each pair of anchors."""
    paths: list[str] = list(results.suite.landscape.paths)
    rows = Table(
        "barriers",
        "Barriers between neighbouring anchors, means over pairs and seeds",
        [
            "task",
            "pairs",
            "test rows",
            *paths,
            *(f"{p}, above both ends" for p in paths),
            "the straight one's barrier",
        ],
        notes="Excess of test NLL (nats) over the line between the ends' at the t* of most validation NLL, with 95 % "
        "bootstrap intervals over test rows; it may be negative. Above both ends: L(t*) minus the larger NLL of the "
        "two ends. gauge: a control (delta_w, procrustes, balanced+procrustes) has no barrier.",
    )
    each = Table(
        "barriers_each",
        "Barriers between neighbouring anchors, each pair",
        ["task", "seed", "anchors", "path", "t*", "excess", "above both ends", "distance", "verdict"],
        notes="distance: of the two anchors, in ||Delta W||.",
    )
    for task, scans in results.scans_by_task().items():
        verdicts, above = Counter[str](), {path: list[float]() for path in paths}
        excess = {path: list[Tensor]() for path in paths}
        for cell, record in scans:
            said = {v["segment"]: v["verdict"] for v in record["verdicts"]}
            verdicts.update(said.values())
            for (path, _), part in _excess(cell, out):
                excess[str(path)].append(torch.tensor(part["excess"].to_numpy(), dtype=torch.float64))
            for b in record["barriers"]:
                above[b["path"]].append(b["above_ends"])
                s = b["segment"]
                found = Interval(b["excess"], b["low"], b["high"])
                row: list[Value] = [task, cell.seed, f"{s}-{s + 1}", b["path"], b["t_star"], found, b["above_ends"]]
                each.rows.append([*row, record["distances"][s][s + 1], said.get(s) if b["path"] == "straight" else ""])
        pooled = [bootstrap_interval(torch.stack(excess[p]).mean(0), seed_of(task, "barriers")) for p in paths]
        means = [sum(above[p]) / len(above[p]) for p in paths]
        summed = ", ".join(f"{verdict} {count}" for verdict, count in verdicts.most_common())
        rows.rows.append([task, len(above[paths[0]]), len(excess[paths[0]][0]), *pooled, *means, summed])
    return [rows, each]


def _excess(cell: Cell, out: Path) -> Any:
    return read_table(cell.folder(out) / "excess.parquet").to_pandas().groupby(["path", "segment"])


def heights(results: Results, task: str, method: str) -> tuple[float, Interval] | None:
    """How far a path through anchors rises above the worst of them, in test NLL (nats).

    Returns:
        The highest point minus the worst anchor, of the seed where that is largest; and the same for the point and the
        anchor that validation rows choose, mean over seeds with an interval over test rows. None for a path without
        shared anchors.
    """
    done, whole = shared_seeds(results.seeds(task, method), results.seeds(task, full_ensemble(results.suite)))
    if not done or results.positions(done) is None or not (count := results.anchors_of(method)):
        return None
    plain, chosen = [], []
    for mine, anchors in zip(done, whole, strict=True):
        path, ends = mine.point_nll("test"), anchors.point_nll("test")[:count]
        plain.append(float(path.mean(1).max() - ends.mean(1).max()))
        places = [int(r.point_nll("validation")[:n].mean(1).argmax()) for r, n in ((mine, None), (anchors, count))]
        chosen.append(path[places[0]] - ends[places[1]])
    return max(plain), bootstrap_interval(torch.stack(chosen).mean(0), seed_of(task, "heights"))


def along_curves(results: Results) -> Table:
    """Loss, diversity, speed and sharpness along every line and curve."""
    table = Table(
        "along_curves",
        "Along the curves, means over seeds",
        [
            *("task", "method", "lowest NLL", "highest NLL", "highest - worst anchor", "the same at t*"),
            *("JSD near", "JSD far", "JSD near, train", "JSD far, train"),
            *("length", "highest / lowest speed", "sharpness, ends", "sharpness, inside"),
        ],
        notes="NLL of single points on test rows. highest - worst anchor: of the seed where it is largest; at t*: for "
        "the point and the anchor of most validation NLL, with its 95 % bootstrap interval. JSD: mean over pairs of "
        "points less than a third of the curve apart (near) and more than two thirds (far). Length, speed: "
        "||Delta W||. sharpness: rise of training NLL under noise on the factors.",
    )
    for task, method, done in results.each():
        t = results.positions(done)
        if t is None or len(t) < 2:
            continue
        nll = torch.stack([r.point_nll("test").mean(1) for r in done])
        above = heights(results, task, method)
        row: list[Value] = [task, method, nll.min(1).values.mean().item(), nll.max(1).values.mean().item()]
        row += above or (None, None)
        for name in ("test", "train"):
            there = [r.points(name) for r in done if name in r.predictions.sets]
            row += _near_and_far(there, torch.tensor(t, dtype=torch.float64)) if there else [None, None]
        table.rows.append([*row, *_recorded(done)])
    return table


def _near_and_far(points: list[Tensor], t: Tensor) -> list[Value]:
    jsd = torch.stack([pairwise_divergence(p)[0] for p in points]).mean(0)
    apart = (t[:, None] - t).abs()
    pairs = torch.ones_like(jsd).triu(1).bool()
    # The margin is for thirds of the curve that rounding moved.
    chosen = [jsd[pairs & (apart < 1 / 3 - 1e-9)], jsd[pairs & (apart > 2 / 3 + 1e-9)]]
    return [v.mean().item() if len(v) else None for v in chosen]


def _recorded(done: list[CellResult]) -> list[Value]:
    """Length, ratio of speeds, sharpness at the ends and inside, of the cells that recorded them."""
    found = [r.record["along"] for r in done if isinstance(r.record.get("along"), Mapping)]
    if not found:
        return [None] * 4
    frame = pd.DataFrame(
        {"length": a["length"], "ratio": max(a["speed"]) / max(min(a["speed"]), 1e-12), **_sharpness(a)} for a in found
    )
    return [frame[c].mean().item() if c in frame else None for c in ("length", "ratio", "ends", "inside")]


def _sharpness(along: Mapping[str, Any]) -> dict[str, float]:
    rise = along.get("sharpness", {}).get("increase", [])
    return {"ends": (rise[0] + rise[-1]) / 2, "inside": sum(rise[1:-1]) / (len(rise) - 2)} if len(rise) > 2 else {}
