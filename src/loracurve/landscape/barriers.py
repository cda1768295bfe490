"""Barriers: how far the loss along a path rises above what its ends have.

The excess at u in [0, 1] is L(u) - ((1 - u) L(0) + u L(1)) (Entezari et al. 2022, section 2; Frankle et al. 2020
subtract the mean of the ends instead). Its maximum over a grid is positive on every flat path with noise on it, and so
is a bootstrap of that maximum. Here the highest point u* is chosen on other data, and the excess there is bootstrapped
on the test data; it may be negative.
"""

from __future__ import annotations

from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor

from loracurve.inference.intervals import Interval, paired_bootstrap
from loracurve.landscape.scan import Scan
from loracurve.system.errors import UserError
from loracurve.system.randomness import stream_seed

__all__ = ["Barrier", "barrier", "barrier_frame", "excess", "gauge_verdicts"]


# Lines between the same adapters that a barrier of gauge alone does not have.
_CONTROLS = ("delta_w", "procrustes", "balanced+procrustes")


class Barrier(NamedTuple):
    """The barrier of one stretch of a path between two ends."""

    place: int
    """number of the inner point u* of most excess on the selection data"""
    chosen: float
    """excess at u* on the selection data, nats: biased upwards, for the record"""
    excess: Interval
    """excess at u* on the test data with its bootstrap interval, nats"""
    above_ends: float
    """L(u*) - max(L(0), L(1)) on the test data, nats"""


def excess(nll: Tensor, u: Tensor) -> Tensor:
    """L(u) - ((1 - u) L(0) + u L(1)) for losses ``[n, ...]`` at u ``[n]`` ascending from 0 to 1; same shape."""
    return nll - _between_ends(nll, u)


def _between_ends(nll: Tensor, u: Tensor) -> Tensor:
    u = u.to(nll).reshape(-1, *[1] * (nll.dim() - 1))
    return (1 - u) * nll[0] + u * nll[-1]


def barrier(selection: Tensor, test: Tensor, u: Tensor, seed: int, resamples: int = 2000) -> Barrier:
    """The barrier between the first and the last of n points.

    Args:
        selection: NLL ``[n, E']`` of the data that choose u*.
        test: NLL ``[n, E]`` of the data that judge it.
        u: ``[n]`` ascending from 0 to 1.
        seed, resamples: of the bootstrap over test examples.

    Raises:
        ValueError: numbers of points that differ, or fewer than three.
    """
    if not len(selection) == len(test) == len(u) or len(u) < 3:
        raise ValueError(f"expected losses at the same n >= 3 points, found {len(selection)}, {len(test)}, {len(u)}")
    # The ends have none by definition; with them no path could be found to lie below the line between its ends.
    curve = excess(selection.mean(1), u)
    place = int(curve[1:-1].argmax()) + 1
    mean = test.mean(1)
    return Barrier(
        place,
        float(curve[place]),
        paired_bootstrap(test[place], _between_ends(test, u)[place], seed, resamples),
        float(mean[place] - torch.maximum(mean[0], mean[-1])),
    )


def barrier_frame(
    scan: Scan, chosen_on: str = "validation", tested_on: str = "test", seed: int = 0, resamples: int = 2000
) -> pd.DataFrame:
    """The barriers of every path between every two neighbouring anchors.

    Returns:
        path, segment, t_star (on the whole path), chosen_excess, excess, low, high (95 % interval), distinguishable
        (the interval excludes 0) and above_ends; nats.

    Raises:
        UserError: a split that was not scanned, or the same for both.
    """
    if chosen_on == tested_on:
        raise UserError(f"barriers: expected t* to be chosen on other rows than {tested_on!r}; scan a second split")
    rows = []
    for path in scan.paths.values():
        for split in (chosen_on, tested_on):
            if split not in path.nll:
                raise UserError(f"barriers: expected the split {split!r} in the scan, found {', '.join(path.nll)}")
        for s in range(path.segments):
            inside = path.segment(s)
            t = path.t[inside]
            u = (t - t[0]) / (t[-1] - t[0])
            draw = stream_seed(seed, "barrier", path.name, s) % 2**31
            found = barrier(path.nll[chosen_on][inside], path.nll[tested_on][inside], u, draw, resamples)
            interval = found.excess
            rows.append(
                {
                    "path": path.name,
                    "segment": s,
                    "t_star": float(t[found.place]),
                    "chosen_excess": found.chosen,
                    "excess": interval.estimate,
                    "low": interval.low,
                    "high": interval.high,
                    "distinguishable": interval.distinguishable,
                    "above_ends": found.above_ends,
                }
            )
    return pd.DataFrame(rows)


def gauge_verdicts(barriers: pd.DataFrame) -> pd.DataFrame:
    """Whether the straight line's barrier in (A, B) is real or a matter of rescaling freedom (gauge), between every two
    neighbours: (A, B) and (R A, B R^-1) are the same adapter, but lines between adapters depend on R.

    The straight line in Delta W and the lines between aligned adapters have the same ends and nothing trained. The one
    of least excess on the selection data is the control; the test rows judge both.

    Args:
        barriers: from `barrier_frame`.

    Returns:
        segment, verdict, control and sentence; empty without the straight line or any control. Verdicts: none (the
        straight line has no barrier), gauge (the control has none, and its interval lies below the straight line's),
        partly gauge (it has a lower one), not gauge (it has one that is not clearly lower), undecided (too few rows).
    """
    rows = []
    for segment, part in barriers.groupby("segment"):
        found = part.set_index("path")
        controls = found[found.index.isin(_CONTROLS)]
        if "straight" not in found.index or controls.empty:
            continue
        straight, control = found.loc["straight"], controls.loc[controls["chosen_excess"].idxmin()]
        lower, remains = control["high"] < straight["low"], control["low"] > 0
        if straight["low"] <= 0:
            verdict, words = "none", "has no barrier that these rows can tell from none"
        elif lower:
            verdict = "partly gauge" if remains else "gauge"
            words = "has a barrier, " + ("partly" if remains else "and it is") + " a matter of rescaling (gauge)"
        elif remains:
            verdict, words = "not gauge", "has a barrier that rescaling (gauge) does not remove"
        else:
            verdict, words = "undecided", "has a barrier; these rows are too few to say if rescaling (gauge) is why"
        sentence = (
            f"Between anchors {segment} and {int(str(segment)) + 1} the straight line in (A, B) {words}: excess "
            f"{_interval(straight)} nats at its t*, against {_interval(control)} on the path {control.name}."
        )
        rows.append((segment, verdict, control.name, sentence))
    return pd.DataFrame(rows, columns=["segment", "verdict", "control", "sentence"])


def _interval(row: pd.Series) -> str:
    return f"{row['excess']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}]"
