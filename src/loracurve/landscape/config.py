"""Options of a scan. No torch here: options are read before it is imported."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal, get_args

from loracurve.model.config import Dtype
from loracurve.system.errors import UserError
from loracurve.system.ranges import Amount, Count, NonNegative, Points, PointsOrNone, Range, Seed, check_ranges

__all__ = ["PATHS", "PathName", "PathPoints", "ScanConfig"]


PathName = Literal["straight", "delta_w", "balanced", "procrustes", "balanced+procrustes", "norm_matched", "curve"]

PATHS: tuple[str, ...] = get_args(PathName)

PathPoints = Annotated[int, Range(3, 100_000)]
"""Points on a path between two adapters: both ends and some between them."""


@dataclass(frozen=True)
class ScanConfig:
    """What is scanned, and how finely."""

    points: PathPoints = 61
    """Points on each path between two neighbouring anchors, both ends included."""
    paths: list[PathName] = field(default_factory=lambda: list(PATHS))  # type: ignore[arg-type]
    """Which paths: straight (in A and B), delta_w, balanced, procrustes, balanced+procrustes, norm_matched, curve."""
    rows: Amount = 500
    """Use at most this many rows of each split; 0: all."""
    choose: Literal["validation", "train"] = "validation"
    """The split on which the highest point of each path is chosen; the test split judges it."""
    diversity_points: Points = 21
    """Points of the curve between which divergences and distances are taken."""
    plane: PointsOrNone = 11
    """Grid points in each direction over the plane through three anchors; 0: no plane."""
    slopes: PointsOrNone = 13
    """Points of the curve at which the slope of the loss and its bound are computed; 0: none."""
    speeds: PointsOrNone = 25
    """Points of each path at which its speed is computed; 0: none."""
    sharpness: PointsOrNone = 13
    """Points of the curve at which the loss under noise is computed; 0: none."""
    noise: NonNegative = 0.1
    """That noise, relative to the rows of A and the columns of B, once norm is split evenly between A and B."""
    hessian: Amount = 0
    """Power iterations for the largest Hessian eigenvalue at these points; slow. 0: none."""
    local_rows: Count = 64
    """Training rows for plane, slopes and sharpness."""
    dtype: Dtype = "float32"
    """Dtype of the base weights during the scan. Merged bfloat16 weights move the loss by rounding; `auto` keeps the
    checkpoint's and half of the memory."""
    resamples: Points = 2000
    """Bootstrap resamples of the test rows."""
    seed: Seed = 0
    """Seed of the rows drawn, the bootstrap and the noise."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if not self.paths:
            raise UserError(f"paths: expected some of {', '.join(PATHS)}, found none")
