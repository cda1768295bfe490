"""What one reads of a run in ten seconds: a sentence, three numbers with intervals, a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from loracurve.curve.config import CurveConfig
from loracurve.inference.intervals import Interval, bootstrap_interval
from loracurve.report import figures, frames, plots, prediction_plots
from loracurve.report.blocks import Block, Tile
from loracurve.report.run_data import RunData

__all__ = ["ANCHORS", "JOINTS", "adapters_of", "nll_of_test", "short", "unequal_passes", "verdict"]


KEPT = 0.8
"""Share of the rows that is answered in the third number."""


def short(run: RunData) -> Block:
    """The verdict, the curve's accuracy, NLL and accuracy on its surest rows, and how it compares."""
    block = Block(findings=[verdict(run)])
    block.tiles = _tiles(run)
    block.numbers["headline"] = {tile.words: tile.found for tile in block.tiles}
    figure = _differences(run) or _points(run)
    block.figures = [] if figure is None else [figure]
    return block


def _differences(run: RunData) -> tuple[str, str, Figure] | None:
    """The curve beside what was trained too; None where nothing was. The base model is far away as a rule, and would
    hide the others' differences: the verdict has it."""
    compared = [c for c in _comparisons(run) if c["second"] not in ("base model", "best point")]
    if not compared:
        return None
    rows = [(c["second"], *(c["nll"][k] for k in ("estimate", "low", "high"))) for c in compared]
    frame = pd.DataFrame(rows, columns=["method", "difference", "low", "high"])
    size = (5.2, 1.3 + 0.32 * len(frame))
    drawn = figures.figure_of(prediction_plots.differences, frame, size=size, legend=False)
    words = "Test NLL of the curve minus each other method's, with 95 % intervals: left of 0 the curve is better"
    return "differences", words, drawn


def _points(run: RunData) -> tuple[str, str, Figure] | None:
    curve = run.metrics["methods"]["curve"]
    if len(points := curve.get("point_nll") or []) < 2:
        return None
    frame = pd.DataFrame({"path": "curve", "split": "test", "t": curve["t"], "nll": points})
    drawn = figures.figure_of(plots.points_and_average, frame, average=nll_of_test(run), **adapters_of(run))
    words = "Test NLL of each single point of the curve, and of their average with its 95 % interval"
    return "points_and_average", words, drawn


def verdict(run: RunData) -> str:
    """Whether the curve is better than the ensemble of anchors or rivals; of a curve without them, than its best point,
    or its points where no best one is known; and what the base model without fine-tuning has."""
    found = {c["second"]: c for c in _comparisons(run)}
    if "ensemble" in found:
        said = (
            f"The curve ({_passes(run, 'curve')}) has a test NLL {_told(found['ensemble'])} that of the ensemble of "
            f"separate fine-tunes ({_passes(run, 'ensemble')})."
        )
        said += _unequal(run, "ensemble")
    elif "best point" in found:
        said = (
            f"The curve's average ({_passes(run, 'curve')}) has a test NLL {_told(found['best point'])} that of its "
            f"best single point, which validation rows chose ({_passes(run, 'best point')})."
        )
        said += _unequal(run, "best point")
    else:
        said = _among_points(run)
    if "base model" in found:
        own, base = (run.metrics["methods"][name]["sets"]["test"]["nll"] for name in ("curve", "base model"))
        said += (
            f" By test NLL the curve ({own:.3f}) is {_told(found['base model'])} the base model without fine-tuning "
            f"({base:.3f})."
        )
    return (said if found else f"{said} {_ALONE}").strip()


_ALONE = "No other method was trained on these rows, so the report compares with none."


def _told(comparison: Mapping[str, Any]) -> str:
    """What a paired difference says, curve first."""
    found = comparison["nll"]
    if not found["distinguishable"]:
        return "not distinguishable from"
    return "better than" if found["estimate"] < 0 else "worse than"


def _among_points(run: RunData) -> str:
    """Of how many single points the average is better by the test rows alone; empty where points are not known."""
    curve = run.metrics["methods"]["curve"]
    points, nll = curve.get("point_nll") or [], curve["sets"]["test"].get("nll")
    if len(points) < 2 or nll is None:
        return ""
    below = sum(p > nll for p in points)
    which = "all" if below == len(points) else f"{below}" if below else "none"
    return (
        f"The average of {len(points)} points has a test NLL of {nll:.3f}, lower than {which} of its single points "
        f"({min(points):.3f} to {max(points):.3f}; the best one is known only by these very rows)."
    )


def _passes(run: RunData, method: str) -> str:
    count = run.metrics["methods"][method]["passes"]
    return f"{count} pass" if count == 1 else f"{count} passes"


def _unequal(run: RunData, other: str) -> str:
    methods = run.metrics["methods"]
    return unequal_passes(methods["curve"]["passes"], methods[other]["passes"])


def unequal_passes(first: int, second: int) -> str:
    """What a verdict on two methods has to say of their passes; empty where these are as many."""
    return "" if first == second else f" This is not at equal cost: an answer takes {first} passes against {second}."


ANCHORS, JOINTS = "anchors (adapters)", "control points (joints of the curve)"
"""What lies on a curve: of an anchored one, of a free one."""


def adapters_of(run: RunData) -> dict[str, Any]:
    """Where adapters lie on the curve, for `plots.paths`: `anchors`, their t, and `marked`, what they are.

    An anchored curve runs through its anchors; of a free one the joints of its segments are control points that lie on
    the curve. Empty where the options are unknown.
    """
    options = run.config.get("curve", {})
    known = {f.name: options[f.name] for f in fields(CurveConfig) if f.name in options}
    if not known:
        return {}
    config = CurveConfig(**known)
    spec = config.spec(len(run.config.get("adapters") or range(config.anchors)))
    if config.kind == "anchored":
        return {"anchors": spec.anchor_times, "marked": ANCHORS}
    joints = [i / spec.segments for i in range(spec.segments + 1)]
    return {"anchors": joints, "marked": JOINTS}


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
