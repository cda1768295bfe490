"""The shape of a curve: segments, degree, and which control points are trained."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loracurve import curve
from loracurve.errors import UserError

__all__ = ["CurveSpec"]


@dataclass(frozen=True)
class CurveSpec:
    """Shape of a curve: segments, degree, and which of its K = segments * degree + 1 control points are trained."""

    segments: int = 2
    degree: int = 2
    trainable: tuple[bool, ...] = ()
    """one flag for each control point; empty: all are trained (a free curve)"""
    alignment: str = "none"
    """gauge alignment that the anchors went through, for the record"""

    def __post_init__(self) -> None:
        if self.trainable and len(self.trainable) != self.size:
            raise ValueError(f"trainable needs {self.size} flags, got {len(self.trainable)}")

    @property
    def size(self) -> int:
        """K, the number of control points."""
        return curve.number_of_control_points(self.segments, self.degree)

    @property
    def mask(self) -> Tensor:
        """[K] bool, True where a control point is trained."""
        return torch.tensor(self.trainable or (True,) * self.size)

    @classmethod
    def anchored(cls, anchors: int, degree: int = 2, alignment: str = "none") -> CurveSpec:
        """A curve through `anchors` frozen adapters, one segment between each two."""
        if anchors < 2 or degree < 1:
            raise UserError(f"an anchored curve needs at least 2 anchors and degree 1, found {anchors} and {degree}")
        size = curve.number_of_control_points(anchors - 1, degree)
        return cls(anchors - 1, degree, tuple(k % degree != 0 for k in range(size)), alignment)

    @classmethod
    def slots(cls, adapters: int) -> CurveSpec:
        """M independent adapters; as a curve, the polygonal chain through them."""
        return cls(max(adapters - 1, 1), 1 if adapters > 1 else 0)
