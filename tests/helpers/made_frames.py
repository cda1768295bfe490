"""Tables as runs write them, and what a figure shows of them."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

SETS = {"test": (300, 0), "elements": (40, 1)}


def predictions() -> pd.DataFrame:
    """A table as a run writes it: three methods on two sets."""
    draw, tables = np.random.default_rng(3), []
    for method in ("adapter 0", "ensemble", "curve", "straight line"):
        for name, (size, label) in SETS.items():
            p = draw.beta(5, 2, size)
            expected, information = draw.gamma(1, 0.2, size), draw.gamma(1, 0.02, size)
            columns = {
                "method": method,
                "set": name,
                "label": draw.integers(0, 2, size) if label == 0 else None,
                "probs": list(np.stack([p, 1 - p], 1)),
                "entropy": expected + information,
                "expected_entropy": expected,
                "mutual_information": information,
            }
            tables.append(pd.DataFrame(columns))
    return pd.concat(tables, ignore_index=True)


def made_rows(probs: list[float], labels: list[int], method: str = "m", **measures: list[float]) -> pd.DataFrame:
    """Rows of one method on the test split, with two classes; the probabilities are class 0's."""
    rows = {"method": method, "set": "test", "label": labels, "probs": [[p, 1 - p] for p in probs]}
    return pd.DataFrame(rows | measures)


def lines(axes: Axes) -> dict[str, np.ndarray]:
    """[n, 2] points of each named line."""
    return {str(line.get_label()): line.get_xydata() for line in axes.lines}  # type: ignore[misc]


def path_frame() -> pd.DataFrame:
    t = np.linspace(0, 1, 11)
    rows = [
        (name, "test", x, y)
        for name, ys in (("straight", t * (1 - t)), ("curve", -t))
        for x, y in zip(t, ys, strict=True)
    ]
    return pd.DataFrame(rows, columns=["path", "split", "t", "nll"])
