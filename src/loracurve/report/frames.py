"""Data frames of predictions: reliability, accuracy against coverage, and the distribution of the uncertainties.

`predictions` is the table predictions.parquet of a run: one row for each example, set and method, with the columns
method, set, label, probs and the uncertainties in nats.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from loracurve.inference.familiarity import p_values
from loracurve.inference.metrics import risk_coverage_curve
from loracurve.report.parts import THREE, TWO
from loracurve.system.errors import UserError

__all__ = [
    "BINS",
    "LEAST",
    "compared",
    "confidence",
    "foreign_share",
    "measures_of",
    "reliability_frame",
    "selective_frame",
    "uncertainty_frame",
    "wilson",
]


def measures_of(predictions: pd.DataFrame, method: str = "curve") -> tuple[str, ...]:
    """Entropy and the parts that a method's has, two or three."""
    within = predictions.get("within_points")
    three = within is not None and bool(within[predictions["method"] == method].any())
    return ("entropy", *(THREE if three else TWO))


def compared(predictions: pd.DataFrame) -> list[str]:
    """The methods that figures show beside each other: one adapter or one point, the ensemble, the curve."""
    known = set(predictions["method"])
    return [name for name in ("adapter 0", "best point", "ensemble", "curve") if name in known]


def confidence(predictions: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Probability of the predicted class of each row, and whether that class is the label; both ``[E]``."""
    probs = [np.asarray(p) for p in predictions["probs"]]
    right = [int(p.argmax()) == y for p, y in zip(probs, predictions["label"], strict=True)]
    return np.array([p.max() for p in probs], dtype=float), np.array(right, dtype=bool)


def reliability_frame(
    predictions: pd.DataFrame, methods: Sequence[str] | None = None, split: str = "test"
) -> pd.DataFrame:
    """Accuracy and mean confidence of rows of like confidence, at most `BINS` groups of at least `LEAST` rows each.

    Bins of equal width, which the expected calibration error has, hold a handful of rows each where a model is mostly
    sure: their accuracy is noise.

    Args:
        predictions: see above.
        methods: which; default `compared`.
        split: a labelled set.

    Returns:
        method, items, confidence, accuracy (fractions), and low and high: its 95 % interval (Wilson 1927).

    Raises:
        UserError: a method without rows of the split.
    """
    frames = []
    for method in compared(predictions) if methods is None else methods:
        top, right = confidence(_rows(predictions, method, split))
        rows = pd.DataFrame({"confidence": top, "accuracy": right.astype(float), "bin": _bins(top)})
        found = rows.groupby("bin").agg(
            items=("accuracy", "size"), confidence=("confidence", "mean"), accuracy=("accuracy", "mean")
        )
        found["low"], found["high"] = wilson(found["accuracy"].to_numpy(), found["items"].to_numpy())
        frames.append(found.reset_index(drop=True).assign(method=method))
    return pd.concat(frames, ignore_index=True)[["method", "items", "confidence", "accuracy", "low", "high"]]


def wilson(fraction: np.ndarray, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the 95 % interval of fractions of so many items each (Wilson 1927)."""
    z = 1.959964
    whole = 1 + z**2 / items
    middle = (fraction + z**2 / (2 * items)) / whole
    half = z * np.sqrt(fraction * (1 - fraction) / items + z**2 / (4 * items**2)) / whole
    return np.clip(middle - half, 0, 1), np.clip(middle + half, 0, 1)


BINS, LEAST = 10, 20


def _bins(values: np.ndarray) -> np.ndarray:
    """Number of the bin of each value: ascending, equal values in one, all of about the same size."""
    each, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    size = max(LEAST, -(-len(values) // BINS))
    number, filled, bins = 0, 0, np.zeros(len(each), dtype=int)
    for i, count in enumerate(counts):
        bins[i] = number
        filled += count
        if filled >= size:
            number, filled = number + 1, 0
    if 0 < filled < LEAST:
        bins[bins == number] = max(number - 1, 0)
    return np.asarray(bins[place])


def selective_frame(
    predictions: pd.DataFrame, methods: Sequence[str] | None = None, split: str = "test"
) -> pd.DataFrame:
    """Accuracy among the most certain rows, for every number of them (`metrics.risk_coverage_curve`).

    Args:
        predictions: see above.
        methods: which; default `compared`. The curve is ranked by its mutual information as well.
        split: a labelled set.

    Returns:
        method, measure (which ranks), items (answered), coverage and accuracy (fractions), and low and high: its 95 %
        interval (Wilson 1927).

    Raises:
        UserError: a method without rows of the split.
    """
    wanted = list(compared(predictions) if methods is None else methods)
    ranked = [(name, "entropy") for name in wanted] + [("curve", "mutual_information")] * ("curve" in wanted)
    frames = []
    for method, measure in ranked:
        rows = _rows(predictions, method, split)
        wrong = torch.from_numpy(~confidence(rows)[1])
        coverage, risk = risk_coverage_curve(torch.tensor(rows[measure].to_numpy()), wrong)
        items, accuracy = np.arange(1, len(rows) + 1), 1 - risk.numpy()
        low, high = wilson(accuracy, items)
        columns = {"items": items, "coverage": coverage.numpy(), "accuracy": accuracy, "low": low, "high": high}
        frames.append(pd.DataFrame({"method": method, "measure": measure, **columns}))
    return pd.concat(frames, ignore_index=True)


def uncertainty_frame(predictions: pd.DataFrame, method: str = "curve") -> pd.DataFrame:
    """Empirical distribution functions of entropy and its parts (`measures_of`) of one method on every set, test first.

    Distribution functions need no bins, so sets of a few hundred and of many thousand items compare fairly.

    Returns:
        set, items, measure, nats (ascending) and fraction (of the items at or below).

    Raises:
        UserError: a method without rows.
    """
    rows = predictions[predictions["method"] == method]
    if rows.empty:
        raise UserError(f"predictions: expected rows of {method!r}, found none")
    frames = []
    for name in sorted(rows["set"].unique(), key=lambda n: n != "test"):  # stable: the others in their order
        part = rows[rows["set"] == name]
        for measure in measures_of(predictions, method):
            # Rounding may leave an information of -1e-9.
            nats = np.sort(np.clip(part[measure].to_numpy(dtype=float), 0, None))
            fraction = np.arange(1, len(nats) + 1) / len(nats)
            columns = {"measure": measure, "nats": nats, "fraction": fraction}
            frames.append(pd.DataFrame({"set": name, "items": len(nats), **columns}))
    return pd.concat(frames, ignore_index=True)


def foreign_share(predictions: pd.DataFrame, known: Tensor, level: float) -> dict[str, float]:
    """The share of each set's rows whose familiarity is below a level (`familiarity.p_values`), of the curve.

    Args:
        predictions: see above, with distances where they were measured.
        known: [m] distances of known rows, ascending.
    """
    rows = predictions[predictions["method"] == "curve"].dropna(subset=["distance"])
    return {
        str(name): float((p_values(torch.tensor(part["distance"].to_numpy()), known) < level).double().mean())
        for name, part in rows.groupby("set", sort=False)
    }


def _rows(predictions: pd.DataFrame, method: str, split: str) -> pd.DataFrame:
    rows = predictions[(predictions["method"] == method) & (predictions["set"] == split)]
    if rows.empty:
        known = ", ".join(sorted(set(predictions["method"])))
        raise UserError(f"predictions: expected rows of {method!r} on {split!r}, found none; there are {known}")
    return rows
