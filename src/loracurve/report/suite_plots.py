"""Plots of a suite's results. Every function draws a data frame on an axis and returns the axis.

`known` are the looks of the page (`looks.looks_of`).
"""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from loracurve.report.figures import DOTTED, GREY, label, steady
from loracurve.report.looks import Look, looks_of

__all__ = ["by_information_and_entropy", "ensemble_sizes", "points", "risk_and_coverage"]


def ensemble_sizes(
    sizes: pd.DataFrame, others: pd.DataFrame, ax: Axes, known: Mapping[str, Look], measure: str = "NLL"
) -> Axes:
    """A score of ensembles of each size, and other methods as levels, with their intervals on the right.

    Args:
        sizes: members, score.
        others: method, score, low, high.
    """
    looks = looks_of(["ensembles", *others["method"]], known)
    ax.plot(sizes["members"], sizes["score"], label="ensembles", **{**looks["ensembles"], "markersize": 4})
    last = int(sizes["members"].max())
    for i, row in enumerate(others.itertuples(index=False)):
        style = looks[row.method]
        x = last + 1 + 0.6 * i
        ax.plot([1, x], [row.score, row.score], color=style["color"], linestyle=style["linestyle"], linewidth=1)
        errors = [[max(row.score - row.low, 0)], [max(row.high - row.score, 0)]]
        mark = {"color": style["color"], "marker": style["marker"]}
        ax.errorbar([x], [row.score], errors, linestyle="", capsize=2, linewidth=1, label=label(row.method), **mark)
    ax.set(xlabel="members M", ylabel=f"{measure} after temperature scaling")
    ax.set_xticks([m for m in range(1, last + 1) if last <= 5 or m in (1, 2, 3, 5) or m == last])
    steady(ax)
    return ax


def by_information_and_entropy(frame: pd.DataFrame, ax: Axes, known: Mapping[str, Look]) -> Axes:
    """AUROC by mutual information against AUROC by entropy: method, MI, entropy. Below the diagonal entropy wins."""
    middle = frame["entropy"].mean()
    ax.axline((middle, middle), slope=1, color=GREY, linewidth=1, linestyle=":")
    looks = looks_of(frame["method"], known)
    for row in frame.itertuples(index=False):
        ax.plot([row.entropy], [row.MI], label=label(row.method), **{**looks[row.method], "linestyle": ""})
    ax.set(xlabel="AUROC by entropy", ylabel="AUROC by MI")
    ax.autoscale()
    ax.xaxis.set_major_locator(MaxNLocator(5))
    return ax


def risk_and_coverage(frame: pd.DataFrame, ax: Axes, known: Mapping[str, Look]) -> Axes:
    """Share of errors among the answers against the share of rows that are answered: method, order (what they are
    answered by), coverage, risk. A method has one colour."""
    looks = looks_of(frame["method"], known)
    dashes = [DOTTED, (0, (4, 1.5, 1, 1.5)), (0, (2, 2))]
    further = dict(zip((order for order in frame["order"].unique() if order != "entropy"), dashes, strict=False))
    for (method, order), part in frame.groupby(["method", "order"], sort=False):
        line = {"color": looks[method]["color"], "linestyle": further.get(order, looks[method]["linestyle"])}
        ax.plot(part["coverage"], part["risk"], label=label(f"{method}, {order}"), **line)
    ax.set(xlabel="coverage: share of rows answered", ylabel="risk: share of errors among answers", xlim=(0, 1))
    ax.set_ylim(bottom=0)
    return ax


def points(frame: pd.DataFrame, ax: Axes, known: Mapping[str, Look]) -> Axes:
    """NLL of single points of lines and curves: path (the method's name), t, nll."""
    looks = looks_of(frame["path"], known)
    for name, part in frame.groupby("path", sort=False):
        ax.plot(part["t"], part["nll"], label=label(name), **looks[str(name)])
    ax.set(xlabel="position on the path t (fraction)", ylabel="test NLL (nats)", xlim=(-0.02, 1.02))
    steady(ax)
    return ax
