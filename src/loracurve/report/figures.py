"""Figures: one style, several plots in one figure, and files.

pyplot is never touched: its global list of figures belongs to the user's session, and a Figure without it draws
without a display. Colours are Okabe and Ito's, which stay apart for colour-blind readers; line styles and markers
differ as well, so that the figures survive printing in grey.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from loracurve.system.escaping import inline
from loracurve.system.files import atomic_write

__all__ = [
    "COLOURS",
    "DOTTED",
    "GREY",
    "drawing",
    "embedded",
    "figure_of",
    "label",
    "panels",
    "save",
    "steady",
    "styles",
]


# Okabe & Ito 2008 without yellow, which is too light for lines on white; dark and light alternate. Wine and a brown
# for more.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#882255", "#8A6D1D")

DOTTED = (0, (1, 1.3))

_DASHES: tuple[Any, ...] = (
    "-",
    (0, (5, 2)),
    DOTTED,
    (0, (6, 2, 1, 2)),
    (0, (3, 1)),
    (0, (5, 2, 1, 2, 1, 2)),
    (0, (1, 3)),
    (0, (9, 2)),
    (0, (3, 1, 1, 1)),
    (0, (12, 2, 2, 2)),
)

_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "h")

GREY = "#666666"

# Sizes in points for figures of 5.2 inches, so that they can be read at the width of a phone, 360 pixels.
_STYLE = {
    "font.size": 10.5,
    "axes.titlesize": 11,
    "axes.labelsize": 10.5,
    "legend.fontsize": 9,
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


def figure_of(
    draw: Callable[..., Axes], *data: Any, size: tuple[float, float] = (5.2, 3.6), legend: bool = True, **options: Any
) -> Figure:
    """A figure in the package's style with one axis that `draw(*data, ax, **options)` fills, the legend above it."""
    return panels([lambda ax: draw(*data, ax, **options)], size, legend=legend)


def panels(
    draws: Sequence[Callable[[Axes], Axes]],
    size: tuple[float, float],
    columns: int = 1,
    legend: bool = True,
    **layout: Any,
) -> Figure:
    """A figure in the package's style with an axis for each of `draws`, row by row, and one legend above all.

    Args:
        draws: fill one axis each.
        size: width and height in inches.
        columns: axes side by side.
        legend: whether to draw one, where anything is labelled.
        layout: for `Figure.subplots` (sharex, sharey, height_ratios).
    """
    with drawing():
        figure = Figure(figsize=size, layout="constrained")
        places = figure.subplots(-(-len(draws) // columns), columns, squeeze=False, **layout).ravel()
        for draw, place in zip(draws, places, strict=True):
            draw(place)
            if layout.get("sharex") or layout.get("sharey"):
                place.label_outer()
        if legend:
            _legend_above(figure, places)
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


def embedded(png: Path) -> bytes:
    """A saved figure with a palette, a third of the bytes: for pages. An octree keeps the colours of thin lines; a
    median cut mixes them with others."""
    with Image.open(png) as image:
        flat = image.convert("RGB").quantize(_PALETTE, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    written = BytesIO()
    flat.save(written, "PNG", optimize=True)
    return written.getvalue()


_PALETTE = 128


def steady(ax: Axes, least: float = 0.0, part: float = 0.2, top: float | None = None) -> None:
    """Widen a vertical axis that shows less than `least`, or than a part of its level, so that noise looks like noise.

    Args:
        top: where values end, which the axis passes by little.
    """
    low, high = ax.get_ylim()
    missing = max(least, part * max(abs(low), abs(high))) - (high - low)
    if missing <= 0:
        return
    up = missing / 2
    if top is not None:
        up = min(up, max(top + 0.02 * (high - low + missing) - high, 0))
    ax.set_ylim(low - (missing - up), high + up)


@contextmanager
def drawing() -> Iterator[None]:
    with matplotlib.style.context(["default", _STYLE]):  # whatever style the user's session has
        yield


def label(name: object, most: int = 60) -> str:
    """A name for an axis, title or legend: without mathematics (dollars), not hidden (a legend leaves out names that
    begin with an underline), and of at most `most` characters."""
    text = inline(str(name))
    text = text if len(text) <= most else f"{text[: most - 1]}…"
    return ("\u2009" if text.startswith("_") else "") + text.replace("$", r"\$")


def styles() -> Iterator[dict[str, Any]]:
    """Colour, line style and marker of the first, second, ... line; of different cycle length."""
    for colour, dashes, marker in zip(cycle(COLOURS), cycle(_DASHES), cycle(_MARKERS), strict=False):
        yield {"color": colour, "linestyle": dashes, "marker": marker}


def _legend_above(figure: Figure, axes: Sequence[Axes] | np.ndarray) -> None:
    """Above all axes, where no line can run behind it, in as many columns as the width has room for."""
    named = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    if not named:
        return
    renderer = FigureCanvasAgg(figure).get_renderer()
    for columns in range(len(named), 0, -1):
        legend = figure.legend(list(named.values()), list(named), loc="outside upper center", ncols=columns)
        if columns == 1 or legend.get_window_extent(renderer).width <= figure.bbox.width:
            return
        legend.remove()
