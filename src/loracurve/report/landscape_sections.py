"""The sections of a report that a scan fills."""

from __future__ import annotations

import pandas as pd

from loracurve.report import figures, plots
from loracurve.report.blocks import Block, Sheet, interval, number
from loracurve.report.run_data import RunData

__all__ = ["diversity", "landscape", "loss_paths"]

_NO_SCAN = "No scan yet: loracurve scan RUN makes one."


def loss_paths(run: RunData) -> Block:
    """Loss along the paths, barriers, lengths."""
    if run.scan is None or "paths" not in run.tables:
        methods = run.metrics["methods"]
        known = {n: (m["t"], m["point_nll"]) for n, m in methods.items() if m.get("point_nll")}
        block = Block(notes=[_NO_SCAN + " The points of the model averages are shown instead."])
        if known:
            drawn = figures.loss_along_path(known, ylabel="test NLL (nats)")
            block.figures.append(("loss_along_path", "Test loss at the points of each average", drawn))
        return block
    scan = run.scan
    drawn = plots.figure_of(plots.paths, run.tables["paths"], anchors=scan["anchors"], size=(6.4, 4.4))
    rows = [
        [
            f"{plots.PATH_LABELS.get(b['path'], b['path'])}, {b['segment']}–{b['segment'] + 1}",
            number(b["t_star"], 2),
            interval({**b, "estimate": b["excess"]}),
            number(b["above_ends"], 4, sign=True),
        ]
        for b in scan["barriers"]
    ]
    chosen, rows_used = scan["settings"]["choose"], scan["rows"]
    lengths = [
        [
            plots.PATH_LABELS.get(name, name),
            *(number(p[k], 3) for k in ("arc_length", "through_anchors")),
            *(number(p["nll"][s][k]) for s in ("test", "train") for k in ("mean", "highest")),
        ]
        for name, p in scan["paths"].items()
    ]
    heads = ["path", "length", "via anchors", "mean test", "highest test", "mean train", "highest train"]
    sheets = [
        Sheet(
            f"Barriers between neighbouring anchors, test NLL ({rows_used['test']:,} rows): excess over the line "
            f"between the ends at the t* of most {chosen} NLL, 95 % interval; * excludes 0",
            ["path, anchors", "t*", "excess", "above both ends"],
            rows,
        ),
        Sheet("Lengths in ‖ΔW‖, and NLL along each path", heads, lengths),
    ]
    cost = scan["cost"]
    note = f"{cost['evaluations']} merged evaluations of {cost['seconds_per_evaluation']:.2f} s."
    return Block([("scan_paths", "Test loss along the curve and its controls", drawn)], sheets, [note])


def diversity(run: RunData) -> Block:
    """Divergence between points of the curve, against distance and number of points."""
    if run.scan is None:
        return Block(notes=[_NO_SCAN])
    if "diversity" not in run.tables:
        return Block(notes=["The scan kept no predictions to compare (language modelling)."])
    frame, path = run.tables["diversity"], run.scan["diversity"]["path"]
    information = pd.DataFrame([r for r in run.scan["information"] if r["path"] == path])
    drawn = [
        (
            "diversity_map",
            f"Divergence for every pair of points, {path}",
            plots.figure_of(plots.diversity_map, frame, size=(5.2, 4.2)),
        ),
        (
            "diversity_distance",
            "Divergence against distance",
            plots.figure_of(plots.divergence_against_distance, frame),
        ),
        ("information", "Information by number of points", plots.figure_of(plots.information, information)),
    ]
    means = [
        [
            f"{r['split']}, {'one segment' if r['within'] else 'across segments'}",
            number(r["distance"], 3),
            number(r["jsd"], 5),
            number(r["disagreement"], 4),
        ]
        for r in run.scan["diversity"]["means"]
    ]
    heads = ["pairs", "distance", "JSD", "disagreement"]
    return Block(drawn, [Sheet(f"Means over pairs of points, {path}", heads, means)])


def landscape(run: RunData) -> Block:
    """The plane, the slopes and the sharpness."""
    if run.scan is None:
        return Block(notes=[_NO_SCAN])
    block = Block()
    plane, rows = run.scan["plane"], run.scan["rows"]["local"]
    if plane and "grid" in plane:
        frames = pd.DataFrame(plane["grid"]), pd.DataFrame(plane["projected"])
        drawn = plots.figure_of(plots.plane, *frames, size=(6.0, 4.6))
        block.figures.append(("plane", "Loss over the plane through three control points", drawn))
        block.notes.append(
            f"The curve leaves the plane: of its distance to the first corner at most "
            f"{plane['largest_outside']:.0%} is outside, {plane['mean_outside']:.0%} on average. Loss of {rows} rows."
        )
    elif plane:
        block.notes.append(f"No plane: {plane['missing']}.")
    for name, draw, title in (
        ("slopes", plots.slopes, "Slope of the loss and its bound"),
        ("sharpness", plots.sharpness, "Rise of the loss under noise on the factors"),
    ):
        points = pd.DataFrame(run.scan[name]["points"])
        if len(points):
            block.figures.append((name, f"{title}, {run.scan[name]['path']}", plots.figure_of(draw, points)))
    slopes = pd.DataFrame(run.scan["slopes"]["points"])
    if len(slopes):
        block.notes.append(
            f"Largest slope {slopes['slope'].abs().max():.3g}, largest bound {slopes['bound'].max():.3g} nats for each "
            "unit of t, at a grid of points; the bound says nothing about the height of the path."
        )
    return block
