"""The sections of a report that a scan fills."""

from __future__ import annotations

from functools import partial
from typing import Literal

import pandas as pd

from loracurve.report import figures, plots
from loracurve.report.adapters import single_adapters
from loracurve.report.blocks import Block, Sheet
from loracurve.report.numbers import number, rounded, star
from loracurve.report.run_data import RunData
from loracurve.report.short import ANCHORS, JOINTS, adapters_of, nll_of_test

__all__ = ["diversity", "landscape", "loss_paths"]


_NO_SCAN = "No scan yet: loracurve scan RUN makes one."


def loss_paths(run: RunData) -> Block:
    """Loss and accuracy along the paths, barriers, lengths."""
    if run.scan is None or "paths" not in run.tables:
        return _points_of_averages(run)
    scan, frame = run.scan, run.tables["paths"]
    block = Block(findings=[row["sentence"] for row in scan.get("gauge", [])])
    splits = [name for name in ("test", "train") if name in set(frame["split"])]
    drawings: tuple[tuple[str, Literal["nll", "acc"], str], ...] = (
        ("scan_paths", "nll", "NLL"),
        ("scan_accuracy", "acc", "Accuracy"),
    )
    joints = scan["subject"].get("anchors_from") == "joints of the curve"
    marks = {"anchors": scan["anchors"], "marked": JOINTS if joints else ANCHORS}
    for name, measure, words in drawings:
        draws = [partial(plots.paths, frame, split=s, measure=measure, **marks) for s in splits]
        drawn = figures.panels(draws, (5.2, 6.0), sharex=True)
        shown = " and ".join(splits)
        block.figures.append((name, f"{words} on {shown} rows along the paths; triangles: {marks['marked']}", drawn))
    rows = [
        [
            f"{_label(b['path'])}, {b['segment']}–{b['segment'] + 1}",
            number(b["t_star"], 2),
            rounded({**b, "estimate": b["excess"]}) + star(b),
            number(b["above_ends"], sign=True),
        ]
        for b in scan["barriers"]
    ]
    chosen, rows_used = scan["settings"]["choose"], scan["rows"]
    block.sheets.append(
        Sheet(
            f"Barriers between neighbouring anchors, test NLL ({rows_used['test']:,} rows): excess over the line "
            f"between the ends at the t* of most {chosen} NLL, 95 % interval; * excludes 0",
            ["path, anchors", "t*", "excess", "above both ends"],
            rows,
        )
    )
    lengths = [
        [
            _label(name),
            *(number(p[k]) for k in ("arc_length", "through_anchors")),
            *(number(p["nll"][s][k]) for s in ("test", "train") for k in ("mean", "highest")),
        ]
        for name, p in scan["paths"].items()
    ]
    heads = ["path", "length", "via anchors", "mean test", "highest test", "mean train", "highest train"]
    block.sheets.append(Sheet("Lengths in ‖ΔW‖, and NLL along each path", heads, lengths))
    cost = scan["cost"]
    block.notes.append(f"{cost['evaluations']} merged evaluations of {cost['seconds_per_evaluation']:.2f} s.")
    return block


def _points_of_averages(run: RunData) -> Block:
    """Without a scan: the loss at the points that the averages used."""
    block = Block(notes=[_NO_SCAN + " The points of the model averages are shown instead."])
    rows = [
        (name, "test", t, nll)
        for name, method in run.metrics["methods"].items()
        if len(method.get("point_nll") or ()) > 1  # one point is no path
        for t, nll in zip(method["t"], method["point_nll"], strict=True)
    ]
    if rows:
        frame, marks = pd.DataFrame(rows, columns=["path", "split", "t", "nll"]), adapters_of(run)
        drawn = figures.figure_of(plots.points_and_average, frame, average=nll_of_test(run), **marks)
        words = "Test NLL at the points of each average; band: 95 % interval of the curve's average over test rows"
        if marks:
            words += f"; triangles: {marks['marked']}"
        if count := len(single_adapters(run.metrics["methods"])):
            words += f"; lines run through {count} adapters at equal distances"
        block.figures.append(("loss_along_path", words, drawn))
        table = []
        for name, part in frame.groupby("path", sort=False):
            best = part.loc[part["nll"].idxmin()]
            whole = run.metrics["methods"][name]["sets"]["test"].get("nll")
            ends = (best["nll"], part["nll"].max(), whole)
            table.append([str(name), number(best["t"], 2), *(number(v) for v in ends)])
        caption = "Test NLL of single points and of their average; which point is best is known only by these rows"
        block.sheets.append(Sheet(caption, ["path", "t of the lowest", "lowest", "highest", "average"], table))
    return block


def diversity(run: RunData) -> Block:
    """Divergence between points of the curve, against distance and number of points."""
    if run.scan is None:
        return Block()  # the paths' section says that there is none
    if "diversity" not in run.tables:
        return Block(notes=["The scan kept no predictions to compare (language modelling)."])
    frame, path = run.tables["diversity"], run.scan["diversity"]["path"]
    information = pd.DataFrame([r for r in run.scan["information"] if r["path"] == path])
    drawn = [
        (
            "diversity_map",
            f"Divergence for every pair of points, {path}",
            figures.figure_of(plots.diversity_map, frame),
        ),
        (
            "diversity_distance",
            "Divergence against distance",
            figures.figure_of(plots.divergence_against_distance, frame),
        ),
        ("information", "Information by number of points", figures.figure_of(plots.information, information)),
    ]
    means = [
        [
            f"{r['split']}, {'one segment' if r['within'] else 'across segments'}",
            number(r["distance"]),
            number(r["jsd"]),
            number(r["disagreement"]),
        ]
        for r in run.scan["diversity"]["means"]
    ]
    heads = ["pairs", "distance", "JSD", "disagreement"]
    sheets = [Sheet(f"Means over pairs of points, {path}", heads, means)]
    most = max(r["n"] for r in run.scan["information"])
    averages = [
        [
            f"{_label(r['path'])}, {r['split']}",
            *(number(r[k]) for k in ("mutual_information", "pairwise_jsd")),
            number(r["nll"]),
        ]
        for r in run.scan["information"]
        if r["n"] == most and r["split"] != run.scan["settings"]["choose"]
    ]
    sheets.append(Sheet(f"Average of {most} points of each path", ["path, rows", "MI", "pair JSD", "NLL"], averages))
    return Block(figures=drawn, sheets=sheets)


def landscape(run: RunData) -> Block:
    """The plane, the slopes and the sharpness."""
    if run.scan is None:
        return Block()  # the paths' section says that there is none
    block = Block()
    plane, rows = run.scan["plane"], run.scan["rows"]["local"]
    if plane and "grid" in plane:
        frames = pd.DataFrame(plane["grid"]), pd.DataFrame(plane["projected"])
        drawn = figures.figure_of(plots.plane, *frames, size=(5.2, 4.2))
        block.figures.append(("plane", "Loss over the plane through three control points", drawn))
        block.notes.append(
            "The curve leaves the plane: of its distance to the first corner at most "
            f"{100 * plane['largest_outside']:.0f} % is outside, {100 * plane['mean_outside']:.0f} % on average. Loss "
            f"of {rows} rows."
        )
    elif plane:
        block.notes.append(f"No plane: {plane['missing']}.")
    slopes, sharpness = (pd.DataFrame(run.scan[name]["points"]) for name in ("slopes", "sharpness"))
    path = run.scan["slopes"]["path"]
    for name, draw, title, points in (
        ("slopes", plots.slopes, f"Slope of the loss and its bound, {path}", slopes),
        ("speed", plots.speed, "Speed along the paths, in ‖ΔW‖ for each unit of t", run.tables.get("speeds", [])),
        ("sharpness", plots.sharpness, f"Rise of the loss under noise on the factors, {path}", sharpness),
    ):
        if len(points):
            block.figures.append((name, title, figures.figure_of(draw, points)))
    if len(sharpness) and sharpness["hessian"].notna().all():
        drawn = figures.figure_of(plots.hessian, sharpness)
        block.figures.append(("hessian", f"Largest Hessian eigenvalue, {path}", drawn))
    if len(slopes):
        block.notes.append(
            f"Largest slope {slopes['slope'].abs().max():.3g}, largest bound {slopes['bound'].max():.3g} nats for each "
            "unit of t, at a grid of points; the bound says nothing about the height of the path."
        )
    return block


def _label(path: str) -> str:
    return plots.PATH_LABELS.get(path, path)
