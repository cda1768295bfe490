"""The picture of a barrier and a valley: NLL along a straight line between fine-tunes, and along a curve."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from matplotlib.axes import Axes

from loracurve.report.figures import GREY
from loracurve.system.yaml_files import load_yaml

__all__ = ["CURVE", "LINE", "stored_valley", "valley"]


LINE, CURVE = "#D55E00", "#0072B2"


def stored_valley() -> dict[str, Any]:
    """One data set of the evidence (`results/pictures.py` writes it): `title`, `line` and `curve` with `x` and `nll`,
    `average`; NLL in nats above that of the fine-tunes."""
    found: dict[str, Any] = load_yaml((files("loracurve.report") / "valley.yaml").read_text())
    return found


def valley(found: Mapping[str, Any], ax: Axes) -> Axes:
    """Draw what `stored_valley` describes."""
    ax.plot(found["line"]["x"], found["line"]["nll"], color=LINE, label="straight line")
    ax.plot(found["curve"]["x"], found["curve"]["nll"], "o-", color=CURVE, label="curve")
    ax.axhline(found["average"], color=CURVE, linestyle=(0, (5, 2)), label="average along the curve")
    ax.axhline(0, color=GREY, linewidth=0.8)
    ax.set(title=found["title"], xticks=[0, 1], xticklabels=["a fine-tune", "the next"])
    low, high = ax.get_ylim()
    ax.set_ylim(min(low, found["average"]) - 0.06 * (high - low), high)
    return ax
