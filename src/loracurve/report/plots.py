"""Plots of a scan. Every function draws a data frame on an axis and returns the axis.

The frames are those of `landscape.scan`, `diversity`, `plane`, `slopes` and `sharpness`. On an axis of yours your own
style stays; `figures.figure_of` makes a figure in the package's style. pyplot is never touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from loracurve.report.figures import GREY, label, steady, styles
from loracurve.report.looks import RUN, looks_of

__all__ = [
    "PATH_LABELS",
    "divergence_against_distance",
    "diversity_map",
    "hessian",
    "information",
    "paths",
    "plane",
    "points_and_average",
    "sharpness",
    "slopes",
    "speed",
]


# The names of `landscape.config.PATHS` as readers see them.
PATH_LABELS = {
    "straight": "straight (A, B)",
    "delta_w": "straight ΔW",
    "procrustes": "Procrustes",
    "balanced+procrustes": "both alignments",
    "norm_matched": "norm-matched",
}


def paths(
    frame: pd.DataFrame,
    ax: Axes,
    split: str = "test",
    anchors: Sequence[float] = (),
    measure: Literal["nll", "acc"] = "nll",
    marked: str = "adapters",
) -> Axes:
    """NLL or accuracy along every path of `Scan.frame` on one split.

    Args:
        anchors: positions of adapters that the paths run through: dotted lines with triangles on the axis.
        marked: what stands there, for the legend.
    """
    for position in anchors:
        ax.axvline(position, color=GREY, linewidth=1, linestyle=":")
    if len(anchors):
        on_axis = ax.get_xaxis_transform()
        mark: dict[str, Any] = {"color": GREY, "linestyle": "", "marker": "^", "markersize": 7}
        ax.plot(anchors, [0] * len(anchors), label=marked, transform=on_axis, clip_on=False, zorder=3, **mark)
    _lines(frame[frame["split"] == split], measure, ax)
    ax.set(ylabel=f"{label(split)} NLL (nats)" if measure == "nll" else f"{label(split)} accuracy (fraction)")
    steady(ax, *((0.0, 0.2) if measure == "nll" else (0.1, 0.0)), top=None if measure == "nll" else 1.0)
    return ax


def points_and_average(
    frame: pd.DataFrame, ax: Axes, average: tuple[float, float, float] | None = None, **marks: Any
) -> Axes:
    """Test NLL of single points (path, split, t, nll), and of the curve's average: estimate and 95 % interval.

    Args:
        marks: `anchors` and `marked` of `paths`.
    """
    if average is not None:
        colour = RUN["curve"]["color"]
        ax.axhspan(*average[1:], color=colour, alpha=0.12, linewidth=0)
        words = "curve's average, 95 % interval"
        ax.axhline(average[0], color=colour, linewidth=1.2, linestyle=(0, (5, 2)), label=words)
    return paths(frame, ax, **marks)


def speed(frame: pd.DataFrame, ax: Axes) -> Axes:
    """||d Delta W / dt|| along every path of `speed_frame`."""
    _lines(frame, "speed", ax)
    ax.set(ylabel="‖dΔW/dt‖", title="Speed along the paths")
    ax.set_ylim(bottom=0)
    return ax


def _lines(frame: pd.DataFrame, column: str, ax: Axes) -> None:
    looks = looks_of(map(str, frame["path"]))
    for name, line in frame.groupby("path", sort=False):
        style = dict(looks[str(name)])
        line = line.sort_values("t")
        marker = style.pop("marker") if len(line) <= 25 else ""
        width = 2.6 if name == "curve" else 1.6
        shown = label(PATH_LABELS.get(str(name), name))
        ax.plot(line["t"], line[column], label=shown, linewidth=width, **{**style, "marker": marker})
    ax.set(xlabel="position on the path t (fraction)", xlim=(-0.02, 1.02))


def diversity_map(frame: pd.DataFrame, ax: Axes, split: str = "test") -> Axes:
    """Divergence of predictions for every pair of points of `diversity_frame`, as a symmetric map."""
    part = frame[frame["split"] == split]
    t = sorted({*part["t_i"], *part["t_j"]})
    place = {x: i for i, x in enumerate(t)}
    values = np.zeros((len(t), len(t)))
    for a, b, jsd in zip(part["t_i"], part["t_j"], part["jsd"], strict=True):
        values[place[a], place[b]] = values[place[b], place[a]] = jsd
    # The outer cells reach beyond 0 and 1, so that every point lies in the middle of its cell.
    low, high = t[0] - (t[1] - t[0]) / 2, t[-1] + (t[-1] - t[-2]) / 2
    image = ax.imshow(values, origin="lower", extent=(low, high, low, high), cmap="cividis", interpolation="nearest")
    ax.figure.colorbar(image, ax=ax, label="mean JSD (nats)", shrink=0.85)
    ax.set(xlabel="t of one point", ylabel="t of the other", title=f"Divergence between points ({label(split)})")
    ax.grid(False)
    return ax


def divergence_against_distance(frame: pd.DataFrame, ax: Axes) -> Axes:
    """Divergence against ||Delta W|| distance for every pair of `diversity_frame`, by split and within / across."""
    for (key, part), style in zip(frame.groupby(["split", "within"], sort=False), styles(), strict=False):
        split, within = key
        ax.plot(
            part["distance"],
            part["jsd"],
            linestyle="",
            alpha=0.7,
            markersize=3.5,
            label=f"{label(split)}, {'one segment' if within else 'across segments'}",
            **{k: style[k] for k in ("color", "marker")},
        )
    ax.set(xlabel="distance ‖ΔW_i − ΔW_j‖", ylabel="mean JSD (nats)", title="Function against parameters")
    ax.set_xlim(left=0)
    ax.set_ylim(bottom=0)
    return ax


def information(frame: pd.DataFrame, ax: Axes) -> Axes:
    """Mutual information of the average against its number of points, of one path of `information_frame`."""
    for (split, part), style in zip(frame.groupby("split", sort=False), styles(), strict=False):
        marker = style.pop("marker")
        ax.plot(part["n"], part["mutual_information"], marker=marker, label=f"{label(split)}, MI", **style)
        faint = {**style, "linewidth": 1.1, "alpha": 0.8}
        ax.plot(
            part["n"], part["pairwise_jsd"], marker=marker, fillstyle="none", label=f"{label(split)}, pairwise", **faint
        )
    ax.set(xlabel="points n of the average", ylabel="nats", title="Epistemic: information by number of points")
    ax.set_xscale("log")
    ticks = sorted(set(frame["n"]))
    ax.set_xticks(ticks, [str(n) for n in ticks])
    ax.set_xticks([], minor=True)
    ax.set_ylim(bottom=0)
    return ax


def plane(surface: pd.DataFrame, drawn: pd.DataFrame, ax: Axes) -> Axes:
    """Loss over the plane of `plane_frames`, with the curve and the control points projected onto it."""
    table = surface.pivot(index="y", columns="x", values="loss")
    loss = table.to_numpy()
    # The far corners are many times worse than the valley; levels by quantile show the valley.
    levels = np.unique(np.quantile(loss, np.linspace(0, 0.9, 13)))
    x, y = table.columns.to_numpy(), table.index.to_numpy()
    if len(levels) > 1:
        filled = ax.contourf(x, y, loss, levels=levels, cmap="cividis", extend="max")
        bar = ax.figure.colorbar(filled, ax=ax, label="NLL (nats), levels by quantile", shrink=0.9)
        bar.ax.set_yticks(levels[::2], [f"{level:.3g}" for level in levels[::2]])
    line, control = drawn[drawn["kind"] == "curve"], drawn[drawn["kind"] == "control"]
    ax.plot(line["x"], line["y"], color="white", linewidth=4)
    ax.plot(line["x"], line["y"], color="#D55E00", linewidth=2, label="curve, projected")
    # Control points outside the plane may lie far off the curve, so they are drawn hollow.
    ax.plot(
        control["x"],
        control["y"],
        linestyle="",
        marker="o",
        markersize=7,
        markerfacecolor="white",
        markeredgecolor="black",
        label="control points",
    )
    ax.set(xlabel="length along the first direction", ylabel="along the second", title="Loss over a plane")
    ax.grid(False)
    return ax


def slopes(frame: pd.DataFrame, ax: Axes) -> Axes:
    """Slope of the loss beside its bound, of `loss_slopes`; logarithmic."""
    series = {"bound": "bound", "slope": "slope by gradient", "measured": "slope measured"}
    for (column, words), style in zip(series.items(), styles(), strict=False):
        ax.plot(frame["t"], frame[column].abs(), label=words, **style)
    ax.set_yscale("log")
    ax.set(xlabel="position on the path t (fraction)", ylabel="|dL/dt| (nats)", title="Slope of the loss and its bound")
    return ax


def sharpness(frame: pd.DataFrame, ax: Axes) -> Axes:
    """Rise of the loss under noise along the path, of `sharpness_along`."""
    style = next(styles())
    ax.plot(frame["t"], frame["increase"], label="increase under noise", **style)
    ax.axhline(0, color=GREY, linewidth=1)
    ax.set(xlabel="position on the path t (fraction)", ylabel="rise of NLL (nats)", title="Sharpness")
    return ax


def hessian(frame: pd.DataFrame, ax: Axes) -> Axes:
    """Largest eigenvalue of the Hessian along the path, of `sharpness_along` with iterations."""
    ax.plot(frame["t"], frame["hessian"], label="largest Hessian eigenvalue", **next(styles()))
    ax.set(xlabel="position on the path t (fraction)", ylabel="eigenvalue (nats)", title="Curvature in LoRA space")
    return ax
