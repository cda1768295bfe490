"""What one reads of a run in ten seconds: a sentence, three numbers with intervals, a picture."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import torch

from loracurve.inference.intervals import Interval, bootstrap_interval
from loracurve.report import figures, frames, plots, prediction_plots
from loracurve.report.blocks import Block, Tile
from loracurve.report.run_data import RunData

__all__ = ["nll_of_test", "short", "verdict"]


KEPT = 0.8
"""Share of the rows that is answered in the third number."""


def short(run: RunData) -> Block:
    """The verdict, the curve's accuracy, NLL and accuracy on its surest rows, and how it compares."""
    block = Block(findings=[verdict(run)])
    block.tiles = _tiles(run)
    block.numbers["headline"] = {tile.words: tile.found for tile in block.tiles}
    compared = [(c["second"], *(c["nll"][k] for k in ("estimate", "low", "high"))) for c in _comparisons(run)]
    if compared:
        frame = pd.DataFrame(compared, columns=["method", "difference", "low", "high"])
        size = (5.2, 1.3 + 0.32 * len(frame))
        drawn = figures.figure_of(prediction_plots.differences, frame, size=size, legend=False)
        words = "Test NLL of the curve minus each other method's, with 95 % intervals: left of 0 the curve is better"
        block.figures.append(("differences", words, drawn))
    elif points := run.metrics["methods"]["curve"].get("point_nll"):
        at = run.metrics["methods"]["curve"]["t"]
        frame = pd.DataFrame({"path": "curve", "split": "test", "t": at, "nll": points})
        drawn = figures.figure_of(plots.points_and_average, frame, average=nll_of_test(run), size=(5.2, 3.6))
        words = "Test NLL of each single point of the curve, and of their average with its 95 % interval"
        block.figures.append(("points_and_average", words, drawn))
    return block


def verdict(run: RunData) -> str:
    """Whether the curve is better than the ensemble of its anchors; of a curve that has none, than its own points."""
    methods = run.metrics["methods"]
    for comparison in _comparisons(run):
        if comparison["second"] == "ensemble":
            found = comparison["nll"]
            words = "not distinguishable from"
            if found["distinguishable"]:
                words = "better than" if found["estimate"] < 0 else "worse than"
            passes = [_passes(methods[comparison[k]]["passes"]) for k in ("first", "second")]
            return f"The curve ({passes[0]}) has a test NLL {words} the ensemble's of its anchors ({passes[1]})."
    curve = methods["curve"]
    points, nll = curve.get("point_nll") or [], curve["sets"]["test"].get("nll")
    alone = "No other method was trained on these rows, so the report compares with none."
    if len(points) < 2 or nll is None:
        return alone
    below = sum(p > nll for p in points)
    which = "all" if below == len(points) else f"{below}" if below else "none"
    return (
        f"The average of {len(points)} points has a test NLL of {nll:.3f}, lower than {which} of its single points "
        f"({min(points):.3f} to {max(points):.3f}; the best one is known only by these very rows). {alone}"
    )


def _passes(count: int) -> str:
    return f"{count} pass" if count == 1 else f"{count} passes"


def _comparisons(run: RunData) -> list[dict[str, Any]]:
    return list(run.metrics.get("comparisons") or [])


def nll_of_test(run: RunData) -> Interval | None:
    """The curve's NLL on test rows with its 95 % bootstrap interval; None where no predictions were kept."""
    rows = _test_rows(run)
    if rows.empty:
        return None
    chance = np.array([np.asarray(p)[int(y)] for p, y in zip(rows["probs"], rows["label"], strict=True)], dtype=float)
    loss = -np.log(np.clip(chance, np.finfo(np.float64).tiny, 1))
    found = bootstrap_interval(torch.from_numpy(loss), seed=0)
    recorded = run.metrics["methods"]["curve"]["sets"]["test"].get("nll")
    return found if recorded is None else found._replace(estimate=recorded)


def _test_rows(run: RunData) -> pd.DataFrame:
    if run.predictions is None:
        return pd.DataFrame()
    return run.predictions[(run.predictions["method"] == "curve") & (run.predictions["set"] == "test")]


def _tiles(run: RunData) -> list[Tile]:
    test, rows, nll = run.metrics["methods"]["curve"]["sets"]["test"], _test_rows(run), nll_of_test(run)
    if nll is None:
        return [Tile("NLL, nats", _found(test.get("nll")), "surprise at the right answer")] if "nll" in test else []
    _, right = frames.confidence(rows)
    kept = math.ceil(KEPT * len(rows))
    surest = right[np.argsort(rows["entropy"].to_numpy(), kind="stable")[:kept]]
    return [
        Tile("right answers", _found(*_share(right)), f"accuracy on {len(rows):,} test rows", percent=True),
        Tile("NLL, nats", _found(*nll), "surprise at the right answer; lower is better"),
        Tile(
            f"right among the surest {100 * KEPT:.0f} %", _found(*_share(surest)),
            f"where the most uncertain {100 - 100 * KEPT:.0f} % are left to somebody else", percent=True,
        ),
    ]  # fmt: skip


def _share(right: np.ndarray) -> Interval:
    low, high = frames.wilson(np.array([right.mean()]), np.array([len(right)]))
    return Interval(float(right.mean()), float(low[0]), float(high[0]))


def _found(estimate: float | None, low: float | None = None, high: float | None = None) -> dict[str, float | None]:
    return {"estimate": estimate, "low": low, "high": high}
