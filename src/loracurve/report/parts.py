"""The parts that uncertainty has, two or three, under the names that readers see."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["DETECTORS", "EXPLAINED", "HEADINGS", "THREE", "TWO", "detectors_of", "has_three", "parts_of"]


TWO = ("expected_entropy", "mutual_information")

THREE = ("expected_entropy", "within_points", "between_points")
"""where there is a Gaussian at each point: `mutual_information` is the sum of the last two"""

HEADINGS = {
    "entropy": "entropy",
    "expected_entropy": "expected",
    "mutual_information": "MI",
    "within_points": "within points",
    "between_points": "between points",
}

EXPLAINED = (
    "Entropy has three parts: expected (aleatoric), what the data leave open; within points, large far from the "
    "training data; between points, where the fine-tunes disagree. MI (epistemic) is the sum of the last two."
)

DETECTORS = {"entropy": "entropy", "mi": "MI", "within": "within points", "distance": "distance"}
"""scores that tell sets apart, of which the last two need what a run knows of unknown inputs"""


def has_three(figures: Mapping[str, Any]) -> bool:
    """Whether figures of a set have three parts: without Gaussians the part within the points is 0, or not there."""
    return bool(figures.get("within_points"))


def parts_of(methods: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """The parts that methods of metrics.json have on any of their sets."""
    return THREE if any(has_three(figures) for method in methods for figures in method["sets"].values()) else TWO


def detectors_of(methods: Iterable[Mapping[str, Any]]) -> list[str]:
    """The names in `DETECTORS` that methods of metrics.json have figures of, on any set."""
    found = {name for method in methods for by in method["detection"].values() for name in by or ()}
    return [name for name in DETECTORS if f"auroc_{name}" in found]
