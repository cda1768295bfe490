"""What one reads of a suite in ten seconds: its first curve against its first reference, in a sentence, three numbers
with intervals and a picture."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import pandas as pd

from loracurve.baselines.curve import Curve
from loracurve.bench.results import CellResult, Results, mean_of, references_of
from loracurve.bench.tables.table import Table
from loracurve.inference.intervals import Interval
from loracurve.report import figures, prediction_plots
from loracurve.report.blocks import Block, Tile
from loracurve.report.looks import RUN, Look
from loracurve.report.short import unequal_passes

__all__ = ["first_curve", "inside", "short"]


MOST = 14
"""Methods in the picture."""

_MEASURES = {
    "nll_ts": ("difference in NLL, nats", "surprise at the right answer, after temperature scaling", "below"),
    "acc": ("difference in right answers", "accuracy", "above"),
    "brier_ts": ("difference in Brier score", "squared distance from the right answer, likewise", "below"),
}


def short(results: Results, named: Mapping[str, Table], looks: Mapping[str, Look] = RUN) -> Block:
    """The verdict, differences in NLL, accuracy and Brier, and every method's NLL beside the reference's.

    Numbers are those of the table `differences`, with its intervals over rows and seeds.

    Args:
        named: tables by name.
        looks: of the page's methods.

    Returns:
        Empty for a suite that has no curve, or nothing to compare it with.
    """
    reference, method = references_of(results.suite)[0], first_curve(results)
    rows = [dict(zip(named["differences"].columns, r, strict=True)) for r in _rows(named)]
    rows = [r for r in rows if r["reference"] == reference]
    own = {r["measure"]: r for r in rows if r["method"] == method}
    if method is None or method == reference:
        return Block()
    if "nll_ts" not in own:
        counts = "no data set counts" if not results.counting else "no seed has both"
        return Block(notes=[f"No verdict on {method} against {reference} yet: {counts}."])
    block = Block(findings=[_verdict(results, method, reference, own["nll_ts"])])
    for measure, (words, what, side) in _MEASURES.items():
        found, meaning = own[measure]["seeds too"], f"{method} minus {reference}: {what}; {side} 0 is better"
        block.tiles.append(Tile(words, found._asdict(), meaning, percent=measure == "acc", difference=True))
    all_nll = [r for r in rows if r["measure"] == "nll_ts"]
    chosen = all_nll[:MOST] if own["nll_ts"] in all_nll[:MOST] else [*all_nll[: MOST - 1], own["nll_ts"]]
    frame = pd.DataFrame(
        [(r["method"], *r["seeds too"]) for r in chosen], columns=["method", "difference", "low", "high"]
    )
    axis = f"method minus {reference}: test NLL (nats)\n← method better      method worse →"
    draw = partial(prediction_plots.differences, words=axis, known=looks)
    drawn = figures.figure_of(draw, frame, size=(5.2, 1.3 + 0.32 * len(frame)), legend=False)
    caption = (
        f"Test NLL of each method minus that of {reference}, after temperature scaling, with 95 % intervals over rows "
        "and seeds: left of 0 the method is better; filled where the interval excludes 0"
    )
    block.figures.append(("differences", caption, drawn))
    return block


def _rows(named: Mapping[str, Table]) -> list[Any]:
    return list(named["differences"].rows) if "differences" in named else []


def inside(method: Any) -> Any:
    """The method that another is built upon, or itself."""
    return inside(method.of) if hasattr(method, "of") else method


def first_curve(results: Results) -> str | None:
    """A curve by itself, or else the first method that is built upon one."""
    methods = results.suite.methods.items()
    plain, any_of = ([n for n, m in methods if isinstance(look(m), Curve)] for look in (lambda m: m, inside))
    return next(iter([*plain, *any_of]), None)


def _verdict(results: Results, method: str, reference: str, row: Mapping[str, Any]) -> str:
    found: Interval = row["seeds too"]
    words = "cannot be told from"
    if found.distinguishable:
        words = "is better than" if found.estimate < 0 else "is worse than"
    sets = "1 data set" if row["sets"] == 1 else f"{row['sets']} data sets"
    said = (
        f"“{method}” ({_price(results, method)}) {words} “{reference}” ({_price(results, reference)}) by how well it "
        f"predicts test rows (NLL), on {sets}."
    )
    said += unequal_passes(*(_passes(results, name) for name in (method, reference)))
    if found.distinguishable and row["sets too"] is not None and not row["sets too"].distinguishable:
        said += " Whether that holds on other data sets these cannot tell."
    return said


def _price(results: Results, method: str) -> str:
    """Passes for an answer, and what training costs."""
    passes, cost = _passes(results, method), mean_of(_done(results, method), "cost")
    times = "1 pass" if passes == 1 else f"{passes} passes"
    return f"{times}, training worth {cost:.3g} fine-tune{'' if cost == 1 else 's'}"


def _passes(results: Results, method: str) -> int:
    return int(_done(results, method)[0].record["passes"])


def _done(results: Results, method: str) -> list[CellResult]:
    return [r for task in results.counting for r in results.seeds(task, method)]
