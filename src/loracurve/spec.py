"""The shape of a curve: segments, degree, and which control points are trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from loracurve import curve
from loracurve.curve_options import free_points, reduction
from loracurve.errors import UserError

__all__ = ["FREE_SEGMENTS", "CurveSpec"]

MOST_POINTS = 10_000
FREE_SEGMENTS = 4
"""of a free curve where nobody says how many: what did best at equal cost (results/NOTES.md, defaults)"""


def _check_size(segments: int, degree: int) -> None:
    whole = all(isinstance(n, int) and not isinstance(n, bool) for n in (segments, degree))
    if not whole or segments < 1 or degree < 0 or segments * degree >= MOST_POINTS:
        raise UserError(
            f"curve: expected whole numbers of segments and degree with at most {MOST_POINTS} control points, found "
            f"{segments!r} and {degree!r}"
        )


@dataclass(frozen=True)
class CurveSpec:
    """Shape of a curve: segments, degree, and which of its K = segments * degree + 1 control points are trained."""

    segments: int = 2
    degree: int = 2
    trainable: tuple[bool, ...] = ()
    """one flag for each control point; empty: all are trained (a free curve)"""
    alignment: str = "none"
    """gauge alignment that the anchors went through, for the record"""
    closed: bool = False
    """the curve ends where it begins"""
    smooth: bool = False
    """C1 joints: theta' is continuous (`loracurve.curve_options`)"""
    factors: Literal["both", "A", "B"] = "both"
    """which factors vary along the curve; the other one is trained as one for all control points"""

    def __post_init__(self) -> None:
        _check_size(self.segments, self.degree)
        if self.trainable and len(self.trainable) != self.size:
            raise ValueError(f"trainable needs {self.size} flags, got {len(self.trainable)}")
        if self.factors not in ("both", "A", "B"):
            raise UserError(f"factors: expected both, A or B, found {self.factors!r}; choose one")
        frozen = [k for k, flag in enumerate(self.trainable) if not flag]
        if frozen and self.factors != "both":
            raise UserError(
                f"factors: expected both for a curve through anchors, which differ in A and B, found {self.factors}; "
                "train a free curve"
            )
        if self.closed or self.smooth:
            free = free_points(self.segments, self.degree, self.closed, self.smooth)
            last = self.size - 1
            if any(k not in free for k in frozen if not (self.closed and k == last)):
                raise UserError(
                    f"smooth: expected joints that can be chosen freely, found {self.segments} segments of degree "
                    f"{self.degree} in a closed curve; raise the degree or give another number of anchors"
                )

    @property
    def size(self) -> int:
        """K, the number of control points."""
        return curve.number_of_control_points(self.segments, self.degree)

    @property
    def mask(self) -> Tensor:
        """[K] bool, True where a control point is trained."""
        return torch.tensor(self.trainable or (True,) * self.size)

    @property
    def anchor_times(self) -> tuple[float, ...]:
        """t of the frozen control points, ascending; of a closed curve both ends, which are one anchor."""
        return tuple(k / (self.size - 1) for k, flag in enumerate(self.trainable) if not flag)

    def dependence(self, shared: bool = False) -> Tensor | None:
        """E ``[K, K]`` float64 with P = E P: rows of free control points are unit vectors, others combine free ones.

        None where all are free. `shared`: of a factor that is one for the whole curve.
        """
        if not (shared or self.closed or self.smooth):
            return None
        matrix = torch.zeros(self.size, self.size, dtype=torch.float64)
        if shared:
            matrix[:, 0] = 1
        else:
            options = self.segments, self.degree, self.closed, self.smooth
            matrix[:, list(free_points(*options))] = reduction(*options)
        return matrix

    def is_shared(self, name: str) -> bool:
        """Whether the tensor of this PEFT name is one for the whole curve."""
        return self.factors != "both" and name.endswith({"A": "lora_B.weight", "B": "lora_A.weight"}[self.factors])

    def tie(self, points: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Control points by PEFT name, [K, ...], with those that depend on others made from them."""
        ties = {n: self.dependence(self.is_shared(n)) for n in points}
        return {n: p if (e := ties[n]) is None else torch.tensordot(e.to(p), p, dims=1) for n, p in points.items()}

    @classmethod
    def anchored(
        cls,
        anchors: int,
        degree: int = 2,
        alignment: str = "none",
        pieces: int = 1,
        closed: bool = False,
        smooth: bool = False,
    ) -> CurveSpec:
        """A curve through `anchors` frozen adapters, `pieces` segments between each two (closed: back to the first)."""
        if anchors < 2 or degree < 1 or pieces < 1:
            raise UserError(
                f"an anchored curve needs at least 2 anchors, degree 1 and 1 piece, found {anchors}, {degree} and "
                f"{pieces}"
            )
        segments = (anchors - 1 + closed) * pieces
        _check_size(segments, degree)
        size = curve.number_of_control_points(segments, degree)
        flags = tuple(k % (degree * pieces) != 0 for k in range(size))
        return cls(segments, degree, flags, alignment, closed, smooth)

    @classmethod
    def slots(cls, adapters: int) -> CurveSpec:
        """M independent adapters; as a curve, the polygonal chain through them."""
        return cls(max(adapters - 1, 1), 1 if adapters > 1 else 0)
