"""The shape of a curve: segments, degree, and which control points are trained.

Options are made from it before torch is imported, so torch is imported where tensors are made.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from loracurve.system.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FREE_SEGMENTS", "CurveSpec", "number_of_control_points"]

MOST_POINTS = 10_000

FREE_SEGMENTS = 4
"""of a free curve where nobody says how many: what did best at equal cost (results/NOTES.md, defaults)"""


def number_of_control_points(segments: int, degree: int) -> int:
    """K = S d + 1. Degree 0 is one constant point, K = 1.

    Raises:
        ValueError: `segments` below 1 or `degree` below 0.
    """
    if segments < 1 or degree < 0:
        raise ValueError(f"expected segments >= 1 and degree >= 0, found segments={segments}, degree={degree}")
    return segments * degree + 1


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
    """alignment (`loracurve.align`) that the anchors went through, for the record"""
    closed: bool = False
    """the curve ends where it begins: P_{K-1} = P_0"""
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
        if self.closed and self.size < 3:
            raise UserError(
                f"closed: expected more than one free point, found {self.segments} segments of degree {self.degree}"
            )
        if self.closed and self.size < 4:
            warnings.warn("a closed curve of two free control points lies on a line and retraces itself", stacklevel=3)

    @property
    def size(self) -> int:
        """K, the number of control points."""
        return number_of_control_points(self.segments, self.degree)

    @property
    def mask(self) -> Tensor:
        """[K] bool, True where a control point is trained."""
        import torch

        return torch.tensor(self.trainable or (True,) * self.size)

    @property
    def anchor_times(self) -> tuple[float, ...]:
        """t of the frozen control points, ascending; of a closed curve both ends, which are one anchor."""
        return tuple(k / (self.size - 1) for k, flag in enumerate(self.trainable) if not flag)

    def dependence(self, shared: bool = False) -> Tensor | None:
        """E ``[K, K]`` float64 with P = E P: rows of free control points are unit vectors, others combine free ones.

        None where all are free. `shared`: of a factor that is one for the whole curve.
        """
        import torch

        if not (shared or self.closed):
            return None
        matrix = torch.eye(self.size, dtype=torch.float64)
        if shared:
            matrix.zero_()[:, 0] = 1
        else:
            matrix[-1] = matrix[0]
        return matrix

    def is_shared(self, name: str) -> bool:
        """Whether the tensor of this PEFT name is one for the whole curve."""
        return self.factors != "both" and name.endswith({"A": "lora_B.weight", "B": "lora_A.weight"}[self.factors])

    def tie(self, points: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Control points by PEFT name, [K, ...], with those that depend on others made from them."""
        import torch

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
    ) -> CurveSpec:
        """A curve through `anchors` frozen adapters, `pieces` segments between each two (closed: back to the first).

        Raises:
            UserError: fewer than 2 anchors, degree 1 or piece.
        """
        if anchors < 2 or degree < 1 or pieces < 1:
            raise UserError(
                f"an anchored curve needs at least 2 anchors, degree 1 and 1 piece, found {anchors}, {degree} and "
                f"{pieces}"
            )
        segments = (anchors - 1 + closed) * pieces
        _check_size(segments, degree)
        size = number_of_control_points(segments, degree)
        flags = tuple(k % (degree * pieces) != 0 for k in range(size))
        return cls(segments, degree, flags, alignment, closed)

    @classmethod
    def slots(cls, adapters: int) -> CurveSpec:
        """M independent adapters; as a curve, the polygonal chain through them."""
        return cls(max(adapters - 1, 1), 1 if adapters > 1 else 0)
