"""Figures. Every function takes data and returns a `matplotlib.figure.Figure`; `save` writes it.

pyplot is never touched: its global list of figures belongs to the user's session, and a Figure without it draws
without a display. Colours are Okabe and Ito's, which stay apart for colour-blind readers; line styles and markers
differ as well, so that the figures survive printing in grey.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, MultipleLocator
from numpy.typing import ArrayLike

from loracurve.errors import UserError
from loracurve.storage import atomic_write

__all__ = ["loss_along_path", "posterior_over_t", "reliability", "save", "selective_prediction", "uncertainty_by_set"]

# Okabe & Ito 2008 without yellow, which is too light for lines on white; dark and light alternate.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.3)), (0, (6, 2, 1, 2)), (0, (3, 1)), (0, (5, 2, 1, 2, 1, 2)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#666666"

# Sizes in points for figures of 6 inches, so that they can be read at a width of 600 pixels.
_STYLE = {
    "font.size": 10.5,
    "axes.titlesize": 11,
    "axes.labelsize": 10.5,
    "legend.fontsize": 9.5,
    "legend.frameon": False,
    "legend.handlelength": 2.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "pdf.fonttype": 42,  # TrueType: text in the PDF stays text
}


def loss_along_path(
    paths: Mapping[str, tuple[ArrayLike, ArrayLike]],
    anchors: ArrayLike = (),
    ylabel: str = "validation NLL (nats)",
    title: str = "Loss along the path",
) -> Figure:
    """The loss at points of several paths between the same adapters.

    Args:
        paths: by name, the positions t in [0, 1] and the losses there.
        anchors: t of the anchors, marked by vertical lines; empty for a free curve.
        ylabel: which loss, on which data, in which unit.
        title: of the figure.

    Raises:
        UserError: no paths, or a path with another number of positions than losses.
    """
    _some(paths, "path")
    with drawing():
        figure, (axes,) = _panels(1, (6.0, 3.9))
        for number, position in enumerate(np.asarray(anchors, dtype=float).ravel()):
            axes.axvline(position, color=GREY, linewidth=1, linestyle=":", label="" if number else "anchors")
        for (name, (t, loss)), style in zip(paths.items(), styles(), strict=False):
            x, y = _columns(t, loss, name)
            _line(axes, x, y, name, style)
        axes.set(xlabel="position on the path t (fraction)", ylabel=ylabel, title=title, xlim=(-0.02, 1.02))
        legend_above(figure, axes)
    return figure


def posterior_over_t(t: ArrayLike, weights: ArrayLike, prior: ArrayLike, temperature: float) -> Figure:
    """The weight that the tempered likelihood gives each point of the curve, beside its weight before the data.

    Args:
        t: positions of the points in [0, 1].
        weights, prior: of each point, each summing to 1.
        temperature: T of the likelihood.

    Raises:
        UserError: other numbers of weights than of points.
    """
    with drawing():
        figure, (axes,) = _panels(1, (6.0, 3.9))
        for (name, values), style in zip({"posterior": weights, "prior": prior}.items(), styles(), strict=False):
            x, y = _columns(t, values, name)
            if name == "posterior":
                effective = 1 / float(np.square(y).sum())
                axes.vlines(x, 0, y, color=style["color"], linewidth=1)
            _line(axes, x, y, name, style)
        axes.set(xlabel="position on the curve t (fraction)", ylabel="weight in the average (fraction)")
        axes.set(title=f"T = {temperature:.3g}, {effective:.1f} of {len(x)} points effective", xlim=(-0.02, 1.02))
        axes.set_ylim(bottom=0)
        legend_above(figure, axes)
    return figure


def reliability(methods: Mapping[str, tuple[ArrayLike, ArrayLike]], bins: int = 15) -> Figure:
    """Reliability diagram (accuracy against confidence in bins of equal width), below it the number of items in a bin.

    Args:
        methods: by name, for each item the probability of the predicted class and whether the prediction is right.
        bins: number of bins of equal width on [0, 1].

    Raises:
        UserError: no methods, lengths that differ, or a confidence outside [0, 1].
    """
    _some(methods, "method")
    edges = np.linspace(0, 1, bins + 1)
    with drawing():
        figure = Figure(figsize=(6.0, 5.2), layout="constrained")
        axes, counts = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=":", label="perfectly calibrated")
        for (name, (confidence, correct)), style in zip(methods.items(), styles(), strict=False):
            x, y = _columns(confidence, correct, name)
            if len(x) and (x.min() < 0 or x.max() > 1):
                raise UserError(f"{name}: expected confidences in [0, 1], found {x.min():g} to {x.max():g}")
            # The bins of ECE are (low, high], with 0 in the first.
            place = np.clip(np.digitize(x, edges, right=True) - 1, 0, bins - 1)
            count = np.bincount(place, minlength=bins)
            filled = count > 0
            mean = [np.bincount(place, values, bins)[filled] / count[filled] for values in (x, y)]
            axes.plot(*mean, label=name, **style)
            style.pop("marker")
            counts.stairs(count, edges, label=name, linewidth=1.5, color=style["color"], linestyle=style["linestyle"])
        axes.set(ylabel="accuracy (fraction)", title="Reliability", xlim=(0, 1), ylim=(0, 1.02))
        # Logarithmic above 1: bins of a handful of items, whose accuracy means little, must be seen to be such.
        counts.set_yscale("symlog", linthresh=1)
        counts.set(xlabel=f"confidence (fraction), {bins} bins", ylabel="items")
        counts.set_ylim(bottom=0)
        legend_above(figure, axes)
    return figure


def uncertainty_by_set(sets: Mapping[str, Mapping[str, ArrayLike]]) -> Figure:
    """Cumulative distributions of total, expected and epistemic uncertainty over the items of several data sets.

    A curve further right means more uncertain items. Distribution functions need no bins, so sets of a few hundred and
    of many thousand items compare fairly.

    Args:
        sets: by name (in distribution, ambiguous, out of distribution), for each item `entropy`, `expected_entropy` and
            `mutual_information` in nats.

    Raises:
        UserError: no sets, a measure missing, or a set without items.
    """
    _some(sets, "set")
    measures = {
        "entropy": "total:\nentropy",
        "expected_entropy": "aleatoric:\nexpected entropy",
        "mutual_information": "epistemic:\nmutual information",
    }
    with drawing():
        figure, panels = _panels(3, (7.2, 3.6), sharey=True)
        for axes, (measure, heading) in zip(panels, measures.items(), strict=True):
            for (name, values), style in zip(sets.items(), styles(), strict=False):
                if measure not in values or not np.size(values[measure]):
                    raise UserError(f"{name}: expected {measure} for each item, found none")
                # Rounding may leave an information of -1e-9.
                x = np.sort(np.clip(np.asarray(values[measure], dtype=float).ravel(), 0, None))
                style.pop("marker")
                height = np.arange(len(x) + 1) / len(x)
                axes.step(np.r_[x[0], x], height, where="post", label=f"{name} ({len(x):,})", **style)
            axes.set(title=heading, xlabel="nats", ylim=(0, 1.02))
            axes.set_xlim(left=0)
            axes.xaxis.set_major_locator(MaxNLocator(4))
        panels[0].set_ylabel("items at or below (fraction)")
        legend_above(figure, panels[0])
    return figure


def selective_prediction(methods: Mapping[str, tuple[ArrayLike, ArrayLike]]) -> Figure:
    """Accuracy among the items answered when the most uncertain ones are left to someone else.

    Args:
        methods: by name, coverages (fractions of the items answered) and the accuracies there.

    Raises:
        UserError: no methods, or lengths that differ.
    """
    _some(methods, "method")
    with drawing():
        figure, (axes,) = _panels(1, (6.0, 3.9))
        for (name, (coverage, accuracy)), style in zip(methods.items(), styles(), strict=False):
            x, y = _columns(coverage, accuracy, name)
            _line(axes, x, y, name, style)
        axes.set(xlabel="coverage: items answered (fraction)", ylabel="accuracy among them (fraction)")
        axes.set(title="Selective prediction", xlim=(0, 1.02))
        axes.xaxis.set_major_locator(MultipleLocator(0.2))
        legend_above(figure, axes)
    return figure


def save(figure: Figure, folder: str | Path, name: str, dpi: int = 150) -> tuple[Path, Path]:
    """Write a figure as `name`.png and `name`.pdf, each complete or not at all; the folder is made.

    Args:
        figure: from a function of this module, or any other.
        folder, name: where, and the file name without ending.
        dpi: pixels per inch of the PNG.

    Returns:
        The two paths.

    Raises:
        UserError: the folder cannot be made or written to.
    """
    paths = Path(folder) / f"{name}.png", Path(folder) / f"{name}.pdf"
    # Without program and date the same data give the same bytes.
    for path, metadata in zip(paths, ({"Software": None}, {"CreationDate": None}), strict=True):

        def write(target: Path, kind: str = path.suffix[1:], metadata: dict[str, None] = metadata) -> None:
            figure.savefig(target, format=kind, dpi=dpi, metadata=metadata)

        with drawing():
            atomic_write(path, write)
    return paths


@contextmanager
def drawing() -> Iterator[None]:
    with matplotlib.style.context(["default", _STYLE]):  # whatever style the user's session has
        yield


def _panels(count: int, size: tuple[float, float], sharey: bool = False) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=size, layout="constrained")
    return figure, list(figure.subplots(1, count, sharey=sharey, squeeze=False)[0])


def styles() -> Iterator[dict[str, Any]]:
    """Colour, line style and marker of the first, second, ... line; of different cycle length."""
    for colour, dashes, marker in zip(cycle(_COLOURS), cycle(_DASHES), cycle(_MARKERS), strict=False):
        yield {"color": colour, "linestyle": dashes, "marker": marker}


def _line(axes: Axes, x: np.ndarray, y: np.ndarray, name: str, style: dict[str, Any]) -> None:
    """A line through the points in the order of x, which are marked where there is room."""
    order = np.argsort(x, kind="stable")
    marker = style["marker"] if len(x) <= 25 else ""
    axes.plot(x[order], y[order], label=name, **{**style, "marker": marker})


def legend_above(figure: Figure, axes: Axes) -> None:
    """Above the axes, where no line can run behind it, in as many columns as the width has room for."""
    handles, labels = axes.get_legend_handles_labels()
    room = 11 * figure.get_figwidth()  # characters; a handle is as wide as 6

    def width(columns: int) -> int:
        # matplotlib fills column by column; the first ones have a row more where it does not come out even.
        rows, longer = divmod(len(labels), columns)
        ends = [i * rows + min(i, longer) for i in range(columns + 1)]
        return sum(max(map(len, labels[a:b])) + 6 for a, b in itertools.pairwise(ends))

    columns = next((n for n in range(len(labels), 1, -1) if width(n) <= room), 1)
    figure.legend(handles, labels, loc="outside upper center", ncols=columns)


def _columns(x: ArrayLike, y: ArrayLike, name: str) -> tuple[np.ndarray, np.ndarray]:
    first, second = (np.asarray(values, dtype=float).ravel() for values in (x, y))
    if len(first) != len(second):
        raise UserError(f"{name}: expected two columns of one length, found {len(first)} and {len(second)} numbers")
    return first, second


def _some(data: Mapping[str, Any], what: str) -> None:
    if not data:
        raise UserError(f"expected at least one {what} to draw, found none")
