"""Plots of predictions. Every function draws a data frame of `frames` on an axis and returns the axis."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, MultipleLocator

from loracurve.report.figures import DOTTED, GREY, label, steady, styles
from loracurve.report.looks import RUN, Look, looks_of

__all__ = ["differences", "posterior_over_t", "reliability", "selective_prediction", "uncertainty"]


_HEADINGS = {
    "entropy": "total: entropy",
    "expected_entropy": "aleatoric: expected entropy",
    "mutual_information": "epistemic: mutual information",
    "within_points": "epistemic, within points: large far from training data",
    "between_points": "epistemic, between points: the fine-tunes disagree",
}


def reliability(frame: pd.DataFrame, ax: Axes, known: Mapping[str, Look] = RUN) -> Axes:
    """Accuracy against confidence of `reliability_frame`, for each method, with intervals."""
    looks = looks_of(frame["method"], known)
    lowest = max(0, min(frame["confidence"].min(), frame["low"].min()) - 0.02)
    ax.plot([lowest, 1], [lowest, 1], color=GREY, linewidth=1, linestyle=":", label="perfectly calibrated")
    for name, part in frame.groupby("method", sort=False):
        ends = np.clip([part["accuracy"] - part["low"], part["high"] - part["accuracy"]], 0, None)
        thin: dict[str, Any] = {"capsize": 2, "elinewidth": 0.8, "linewidth": 1.2}
        ax.errorbar(part["confidence"], part["accuracy"], ends, label=label(name), **thin, **looks[str(name)])
    ax.set(xlabel="confidence (mean of a group of like rows)", ylabel="accuracy, 95 % interval", title="Reliability")
    ax.set(xlim=(lowest, 1.01), ylim=(lowest, 1.01))
    return ax


def uncertainty(frame: pd.DataFrame, ax: Axes, measure: str) -> Axes:
    """Distribution functions of one measure of `uncertainty_frame`; a line further right means more uncertain items."""
    part = frame[frame["measure"] == measure]
    for (name, line), style in zip(part.groupby("set", sort=False), styles(), strict=False):
        style.pop("marker")
        x, y = line["nats"].to_numpy(), line["fraction"].to_numpy()
        ax.step(np.r_[x[0], x], np.r_[0, y], where="post", label=f"{label(name)} ({len(x):,})", **style)
    ax.set(title=_HEADINGS[measure], xlabel="nats", ylabel="items at or below", ylim=(0, 1.02))
    ax.set_xlim(left=0)
    ax.xaxis.set_major_locator(MaxNLocator(4))
    return ax


def selective_prediction(frame: pd.DataFrame, ax: Axes) -> Axes:
    """Accuracy among the items answered when the most uncertain ones are left out, of `selective_frame`."""
    looks = looks_of(frame["method"])
    for (method, measure), part in frame.groupby(["method", "measure"], sort=False):
        style = {key: looks[method][key] for key in ("color", "linestyle")}
        if measure != "entropy":
            style["linestyle"] = DOTTED
        if (method, measure) == ("curve", "entropy"):
            ax.fill_between(part["coverage"], part["low"], part["high"], color=style["color"], alpha=0.15, linewidth=0)
        ax.plot(
            part["coverage"], part["accuracy"], label=f"{label(method)}, by {MEASURE_LABELS[str(measure)]}", **style
        )
    ax.set(xlabel="coverage: items answered (fraction)", ylabel="accuracy among them (fraction)")
    ax.set(title="Selective prediction", xlim=(0, 1.02))
    ax.xaxis.set_major_locator(MultipleLocator(0.2))
    steady(ax, 0.1, 0.0, top=1.0)
    return ax


def differences(
    frame: pd.DataFrame,
    ax: Axes,
    words: str = "curve minus other: test NLL (nats)\n← curve better      curve worse →",
    known: Mapping[str, Look] = RUN,
) -> Axes:
    """Differences of NLL from one method, with intervals: method, difference, low, high; one line each.

    Args:
        words: what the axis shows, and on which side the better ones are.
    """
    looks = looks_of(frame["method"], known)
    places = np.arange(len(frame))[::-1]
    ax.axvline(0, color=GREY, linewidth=1, linestyle=":")
    for place, row in zip(places, frame.itertuples(index=False), strict=True):
        told, colour = not row.low <= 0 <= row.high, looks[row.method]["color"]
        ends = [[max(row.difference - row.low, 0)], [max(row.high - row.difference, 0)]]
        ax.errorbar(
            [row.difference], [place], xerr=ends, color=colour, marker="o", capsize=3, linewidth=1.6,
            markerfacecolor=colour if told else "white",
        )  # fmt: skip
    ax.set_yticks(places, [label(name, 32) for name in frame["method"]])
    ax.set(xlabel=words)
    ax.set_ylim(-0.6, len(frame) - 0.4)
    ax.grid(visible=False, axis="y")
    ax.xaxis.set_major_locator(MaxNLocator(5))
    widest = max(map(abs, ax.get_xlim()))
    ax.set_xlim(-widest, widest)
    return ax


def posterior_over_t(frame: pd.DataFrame, ax: Axes, temperature: float) -> Axes:
    """The weight that the likelihood, tempered by `temperature`, gives each point of a curve, beside its prior weight.

    Args:
        frame: t, posterior and prior, one row for each point.
    """
    for name, style in zip(("posterior", "prior"), styles(), strict=False):
        if name == "posterior":
            ax.vlines(frame["t"], 0, frame[name], color=style["color"], linewidth=1)
        ax.plot(frame["t"], frame[name], label=name, **style)
    effective = 1 / frame["posterior"].pow(2).sum()
    ax.set(xlabel="position on the curve t (fraction)", ylabel="weight in the average (fraction)", xlim=(-0.02, 1.02))
    ax.set_title(f"T = {temperature:.3g}, {effective:.1f} of {len(frame)} points effective")
    ax.set_ylim(bottom=0)
    return ax


MEASURE_LABELS = {"entropy": "entropy", "expected_entropy": "expected entropy", "mutual_information": "MI"}
