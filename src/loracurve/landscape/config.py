"""Options of a scan. No torch here: options are read before it is imported."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from loracurve.model.config import Dtype
from loracurve.system.errors import UserError

__all__ = ["PATHS", "PathName", "ScanConfig"]


PathName = Literal["straight", "delta_w", "balanced", "procrustes", "balanced+procrustes", "norm_matched", "curve"]

PATHS: tuple[str, ...] = get_args(PathName)


@dataclass(frozen=True)
class ScanConfig:
    """What is scanned, and how finely."""

    points: int = 61
    """Points on each path between two neighbouring anchors, both ends included."""
    paths: list[PathName] = field(default_factory=lambda: list(PATHS))  # type: ignore[arg-type]
    """Which paths: straight (in A and B), delta_w, balanced, procrustes, balanced+procrustes, norm_matched, curve."""
    rows: int = 500
    """Use at most this many rows of each split; 0: all."""
    choose: Literal["validation", "train"] = "validation"
    """The split on which the highest point of each path is chosen; the test split judges it."""
    diversity_points: int = 21
    """Points of the curve between which divergences and distances are taken."""
    plane: int = 11
    """Grid points in each direction over the plane through three anchors; 0: no plane."""
    slopes: int = 13
    """Points of the curve at which the slope of the loss and its bound are computed; 0: none."""
    speeds: int = 25
    """Points of each path at which its speed is computed; 0: none."""
    sharpness: int = 13
    """Points of the curve at which the loss under noise is computed; 0: none."""
    noise: float = 0.1
    """That noise, relative to the rows of A and the columns of B, once norm is split evenly between A and B."""
    hessian: int = 0
    """Power iterations for the largest Hessian eigenvalue at these points; slow. 0: none."""
    local_rows: int = 64
    """Training rows for plane, slopes and sharpness."""
    dtype: Dtype = "float32"
    """Dtype of the base weights during the scan. Merged bfloat16 weights move the loss by rounding; `auto` keeps the
    checkpoint's and half of the memory."""
    resamples: int = 2000
    """Bootstrap resamples of the test rows."""
    seed: int = 0
    """Seed of the rows drawn, the bootstrap and the noise."""

    def __post_init__(self) -> None:
        if self.points < 3:
            raise UserError(f"points: expected at least 3, found {self.points}; ask for 61")
        for name in ("rows", "plane", "slopes", "speeds", "sharpness", "hessian"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}: expected 0 or more, found {getattr(self, name)}")
        for name in ("local_rows", "diversity_points", "resamples"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: expected at least 1, found {getattr(self, name)}")
        if not self.paths:
            raise UserError(f"paths: expected some of {', '.join(PATHS)}, found none")
