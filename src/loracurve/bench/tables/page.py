"""The page about a suite: its tables and a few figures, from the store alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from loracurve.baselines.curve import Curve
from loracurve.bench.config import slug
from loracurve.bench.registry import ONE_MODE, method_name
from loracurve.bench.results import Results, seed_of, stacked
from loracurve.bench.suite import full_ensemble
from loracurve.bench.tables.foreign import SHARE, Order, orders_of, stream_risk
from loracurve.bench.tables.short import first_curve, inside, short
from loracurve.bench.tables.table import Table, shown
from loracurve.inference.intervals import bootstrap_interval
from loracurve.report import figures, frames, plots, prediction_plots, suite_plots
from loracurve.report.blocks import Block, Sheet
from loracurve.report.looks import RUN, Look, looks_of
from loracurve.report.page import images_of, render
from loracurve.system.tables import read_table

__all__ = ["write_suite_page"]


_SHOWN = 7  # methods in one axis

Draw = Callable[[Axes], Axes]


def write_suite_page(results: Results, tables: Sequence[Table], out: Path) -> Path:
    """Write report.html, and its figures as PNG and PDF in OUT/figures.

    Args:
        tables: of `write_tables`.

    Returns:
        The page.
    """
    named, looks = {table.name: table for table in tables}, _looks(results)
    blocks: tuple[tuple[str, Block, list[str]], ...] = (
        ("Summary", short(results, named, looks), []),
        ("Test rows", Block(), ["averages", "differences", "summary", "data_sets"]),
        (
            "Ensembles and methods of one mode",
            _sizes(results, named, looks),
            ["ensembles", "deep_ensemble_equivalents"],
        ),
        ("What curves hold that anchors do not", Block(), ["against_discrete", "weighted_points", "uncertainty"]),
        ("Foreign rows", _foreign(results, named, looks), ["foreign", "stream"]),
        ("Detection", _detection(named, looks), ["detection_verdicts", "detection"]),
        ("Reliability", _reliability(results, looks), []),
        ("Landscape", _landscape(results, out, looks), ["barriers", "barriers_each", "along_curves"]),
        ("Goals", Block(), ["goals"]),
        ("Costs and what is missing", Block(), ["costs", "left_out"]),
    )
    sections = []
    for title, block, names in blocks:
        block.sheets += [_sheet(named[name]) for name in names if name in named]
        if not block.empty:
            entry = {"run": out.name, "block": block, "images": images_of(out / "figures", block)}
            lead = _worked_cell(results, named["goals"]) if names == ["goals"] else ""
            sections.append({"title": title, "lead": lead, "blocks": [entry]})
    suite = results.suite
    line = (
        f"{Path(suite.model.name).name}: {len(suite.methods)} methods, tasks {', '.join(suite.tasks)}, "
        f"seeds {', '.join(map(str, suite.seeds))}; {len(results.done)} cells"
    )
    parts = {"title": out.resolve().name, "runs": [{"name": out.name, "line": line}], "sections": sections}
    return render(parts | {"together": None}, "metrics.parquet, tables and cells", out / "report.html")


def _looks(results: Results) -> dict[str, Look]:
    """Of every method on the page; the first curve, the full ensemble and one adapter look as in a run's report."""
    suite = results.suite
    first = {first_curve(results): "curve", full_ensemble(suite): "ensemble"}
    first |= {name: "single adapter" for name in _single(results)}
    known = {name: RUN[of] for name, of in first.items() if name is not None}
    # Those that share figures come first: colours are fewer than methods.
    methods = suite.methods.items()
    curves, lines = ([n for n, m in methods if method_name(m) == kind] for kind in ("curve", "line"))
    return looks_of([*known, *curves, *lines, *suite.methods], known) | {"ensembles": RUN["ensemble"]}


def _single(results: Results) -> list[str]:
    return [n for n, m in results.suite.methods.items() if method_name(m) == "single"][:1]


_TALLY = re.compile(r"(?:met|missed): \+(\d+) -(\d+) of (\d+)")


def _worked_cell(results: Results, goals: Table) -> str:
    """A cell of the goals that counts data sets, in words: the first with some on both sides, or else the first."""
    cells = [
        (row[0], column, value, tuple(map(int, found.groups())))
        for row in goals.rows
        for column, value in zip(goals.columns, row, strict=True)
        if column in ("ACC", "ECE", "error AURC, entropy") and (found := _TALLY.fullmatch(str(value)))
    ]
    if not cells:
        return ""
    method, column, cell, (better, worse, sets) = next((c for c in cells if c[3][0] and c[3][1]), cells[0])
    return (
        f"How to read a cell: “{cell}” of “{method}” under “{column}” says that on {better} of {sets} data sets the "
        f"whole interval lies where the method is better than “{full_ensemble(results.suite)}”, on {worse} where it is "
        f"worse, and on {sets - better - worse} it includes 0, which tells neither. The goal is met where it is worse "
        "on none."
    )


def _sheet(table: Table) -> Sheet:
    texts = next((i for i in range(len(table.columns)) if not table.is_text(i)), len(table.columns))
    caption = f"{table.title}. {table.notes}" if table.notes else table.title
    digits = [2 if re.search(r"\bs\b", column) else None for column in table.columns]  # seconds
    rows = [[shown(v, d) for v, d in zip(row, digits, strict=True)] for row in table.rows]
    return Sheet(caption, table.columns, rows, texts)


def _drawn(name: str, part: str, words: str, draw: Draw, height: float = 3.6) -> tuple[str, str, Figure]:
    """A figure with a title, and what it shows in words."""
    figure = figures.panels([lambda ax: draw(ax)], (5.2, height))
    figure.axes[0].set_title(figures.label(part))
    return f"{name}_{slug(part)}", f"{part}: {words}", figure


def _sizes(results: Results, named: dict[str, Table], looks: Mapping[str, Look]) -> Block:
    """NLL of ensembles against their size, beside methods of one mode, and beside curves."""
    block = Block()
    if "ensembles" not in named:
        return block
    methods = results.suite.methods.items()
    groups = {
        "one_mode": ("methods that train one adapter", [n for n, m in methods if method_name(m) in ONE_MODE]),
        "curves": ("curves", [n for n, m in methods if isinstance(m, Curve)]),
    }
    for key, (words, names) in groups.items():
        words = f"NLL of ensembles of M anchors and of {words}, at most {_SHOWN}; intervals are 95 % over test rows"
        for task in results.suite.tasks:
            rows = [r for r in named["ensembles"].rows if r[0] == task and str(r[1]).startswith("ensemble of ")]
            levels = [
                (n, *bootstrap_interval(stacked(done, "nll_ts"), seed_of(task, "summary")))
                for n in names
                if (done := results.seeds(task, n))
            ]
            if rows and levels:
                sizes = pd.DataFrame({"members": range(1, len(rows) + 1), "score": [r[2] for r in rows]})
                others = pd.DataFrame(levels[:_SHOWN], columns=["method", "score", "low", "high"])
                draw = partial(suite_plots.ensemble_sizes, sizes, others, known=looks)
                block.figures.append(_drawn(f"ensembles_and_{key}", task, words, draw))
    return block


def _detection(named: dict[str, Table], looks: Mapping[str, Look]) -> Block:
    """AUROC by MI against AUROC by entropy, means over tasks and sets."""
    block = Block()
    if "detection" not in named:
        return block
    rows = [(r[1], "errors" if r[2] == "errors" else "other sets", r[3], r[4]) for r in named["detection"].rows]
    frame = pd.DataFrame(
        [(m, w, s, getattr(v, "estimate", None)) for m, w, s, v in rows], columns=["method", "what", "score", "auroc"]
    )
    means = frame.pivot_table(index=["what", "method"], columns="score", values="auroc", sort=False).dropna()
    if "MI" not in means:
        return block
    for what, part in means.groupby(level="what", sort=False):
        draw = partial(suite_plots.by_information_and_entropy, part.reset_index(), known=looks)
        words = "AUROC by MI and by entropy, means over tasks, sets and seeds"
        block.figures.append(_drawn("auroc", f"detection of {what}", words, draw, 5.0))
    return block


def _foreign(results: Results, named: dict[str, Table], looks: Mapping[str, Look]) -> Block:
    """Risk against coverage on a stream with foreign rows: the full ensemble and one adapter by entropy, and what holds
    an answer back for two reasons, as uncertain or as far from the training data."""
    block = Block()
    if "stream" not in named:
        return block
    whole = full_ensemble(results.suite)
    chosen: list[tuple[str, Order]] = [(m, "entropy") for m in (*_single(results), whole)]
    curves = [n for n, m in results.suite.methods.items() if isinstance(inside(m), Curve)]
    both = [n for n in curves if {"W", "two reasons"} <= set(orders_of(results, n))]
    chosen += [(n, "entropy") for n in curves[:1]] + [(n, order) for n in both[:1] for order in ("W", "two reasons")]
    parts = []
    for method, order in chosen:
        if order in orders_of(results, method):
            risk = stream_risk(results, method, order)[1:]
            coverage = [(i + 1) / len(risk) for i in range(len(risk))]
            columns = {"method": method, "order": order, "coverage": coverage, "risk": risk.tolist()}
            parts.append(pd.DataFrame(columns))
    if parts:
        words = (
            f"risk and coverage with {100 * SHARE:.0f} % foreign rows, means over pairs and seeds; answering one is an "
            "error. two reasons: the uncertain come late, those far from the training data last"
        )
        draw = partial(suite_plots.risk_and_coverage, pd.concat(parts), known=looks)
        block.figures.append(_drawn("stream", "a stream with foreign rows", words, draw, 4.2))
    return block


def _reliability(results: Results, looks: Mapping[str, Look]) -> Block:
    """Accuracy against confidence on test rows of all seeds: a single adapter, the ensemble, curves."""
    methods = list(results.suite.methods.items())
    chosen = [*_single(results), full_ensemble(results.suite)]
    chosen += [n for n, m in methods if isinstance(m, Curve)][:3]
    block = Block()
    for task in results.suite.tasks:
        rows = [
            pd.DataFrame({"method": name, "set": "test", "label": labels.tolist(), "probs": list(r.test.probs.numpy())})
            for name in chosen
            for r in results.seeds(task, name)
            for labels in [r.predictions.labels["test"]]
        ]
        if rows:
            frame = frames.reliability_frame(pd.concat(rows), [n for n in chosen if results.seeds(task, n)])
            words = f"accuracy against confidence in at most {frames.BINS} groups of like rows, seeds together"
            draw = partial(prediction_plots.reliability, frame, known=looks)
            block.figures.append(_drawn("reliability", task, words, draw, 4.2))
    return block


def _landscape(results: Results, out: Path, looks: Mapping[str, Look]) -> Block:
    """NLL between anchors where they were scanned, and at the points of lines and curves."""
    block = Block()
    for task, scans in results.scans_by_task().items():
        profiles = [read_table(cell.folder(out) / "paths.parquet").to_pandas() for cell, _ in scans]
        mean = pd.concat(profiles).groupby(["path", "split", "t"], sort=False, as_index=False)["nll"].mean()
        anchors = [i / results.suite.landscape.pairs for i in range(results.suite.landscape.pairs + 1)]
        words = "test NLL along the lines between anchors (triangles), mean over seeds"
        block.figures.append(_drawn("barriers", task, words, partial(plots.paths, mean, anchors=anchors)))
    for task in results.suite.tasks:
        points: list[tuple[Any, ...]] = []
        for name in results.suite.methods:
            done = results.seeds(task, name)
            if done and (t := results.positions(done)):
                nll = sum(r.point_nll("test").mean(1) for r in done) / len(done)
                points += [(name, x, y) for x, y in zip(t, nll.tolist(), strict=True)]  # type: ignore[union-attr]
        if points:
            frame = pd.DataFrame(points, columns=["path", "t", "nll"])
            frame = frame[frame["path"].isin(list(dict.fromkeys(frame["path"]))[:_SHOWN])]
            words = f"test NLL at the points of lines and curves, at most {_SHOWN}, mean over seeds"
            block.figures.append(_drawn("points", task, words, partial(suite_plots.points, frame, known=looks)))
    return block
