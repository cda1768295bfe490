"""Plots of a suite's results. Every function draws a data frame on an axis and returns the axis."""

from __future__ import annotations

from itertools import cycle, islice

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from loracurve.report.figures import GREY, label, steady, styles

__all__ = ["by_information_and_entropy", "ensemble_sizes", "points", "risk_and_coverage"]


def ensemble_sizes(sizes: pd.DataFrame, others: pd.DataFrame, ax: Axes, measure: str = "NLL") -> Axes:
    """A score of ensembles of each size, and other methods as levels, with their intervals on the right.

    Args:
        sizes: members, score.
        others: method, score, low, high.
    """
    ax.plot(sizes["members"], sizes["score"], color="black", marker="o", markersize=4, label="ensembles")
    last = int(sizes["members"].max())
    for i, (row, style) in enumerate(zip(others.itertuples(index=False), styles(), strict=False)):
        x = last + 1 + 0.6 * i
        ax.plot([1, x], [row.score, row.score], color=style["color"], linestyle=style["linestyle"], linewidth=1)
        errors = [[max(row.score - row.low, 0)], [max(row.high - row.score, 0)]]
        mark = {"color": style["color"], "marker": style["marker"]}
        ax.errorbar([x], [row.score], errors, linestyle="", capsize=2, linewidth=1, label=label(row.method), **mark)
    ax.set(xlabel="members M", ylabel=f"{measure} after temperature scaling")
    ax.set_xticks([m for m in range(1, last + 1) if last <= 5 or m in (1, 2, 3, 5) or m == last])
    steady(ax)
    return ax


def by_information_and_entropy(frame: pd.DataFrame, ax: Axes) -> Axes:
    """AUROC by mutual information against AUROC by entropy: method, MI, entropy. Below the diagonal entropy wins."""
    middle = frame["entropy"].mean()
    ax.axline((middle, middle), slope=1, color=GREY, linewidth=1, linestyle=":")
    colours = cycle([style["color"] for style in islice(styles(), 7)])
    markers = cycle("osD^vPX<>*h")  # of another cycle length than the colours
    for row, colour, marker in zip(frame.itertuples(index=False), colours, markers, strict=False):
        ax.plot([row.entropy], [row.MI], linestyle="", color=colour, marker=marker, label=label(row.method))
    ax.set(xlabel="AUROC by entropy", ylabel="AUROC by MI")
    ax.autoscale()
    ax.xaxis.set_major_locator(MaxNLocator(5))
    return ax


def risk_and_coverage(frame: pd.DataFrame, ax: Axes) -> Axes:
    """Share of errors among the answers against the share of rows that are answered: method, coverage, risk."""
    for (name, part), style in zip(frame.groupby("method", sort=False), styles(), strict=False):
        line = {k: v for k, v in style.items() if k != "marker"}
        ax.plot(part["coverage"], part["risk"], label=label(name), **line)
    ax.set(xlabel="coverage: share of rows answered", ylabel="risk: share of errors among answers", xlim=(0, 1))
    ax.set_ylim(bottom=0)
    return ax


def points(frame: pd.DataFrame, ax: Axes) -> Axes:
    """NLL of single points of lines and curves: path (the method's name), t, nll."""
    for (name, part), style in zip(frame.groupby("path", sort=False), styles(), strict=False):
        ax.plot(part["t"], part["nll"], label=label(name), **style)
    ax.set(xlabel="position on the path t (fraction)", ylabel="test NLL (nats)", xlim=(-0.02, 1.02))
    steady(ax)
    return ax
