"""The loss over a plane through three control points, with the curve projected onto it (Garipov et al. 2018, fig. 1).

Everything is a sum of control points, so a place in LoRA space is a vector of coefficients, and projections need only
the control points' Gram matrix. The plane lies in factor space (A, B) in the curve's own gauge.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from loracurve.curve import bezier
from loracurve.curve.lora_space import adapter_at
from loracurve.landscape.scan import LaidOut, mean_loss
from loracurve.model.curve_model import CurveModel
from loracurve.system.errors import UserError

__all__ = ["Plane", "choose_corners", "plane_frames", "plane_through"]


@dataclass(frozen=True, eq=False)
class Plane:
    """The plane through three of K control points; coordinates are lengths in LoRA space, corner 0 is (0, 0)."""

    corners: tuple[int, int, int]
    basis: Tensor
    """[2, K] coefficients of two orthonormal directions; the first points from corner 0 to corner 1"""
    gram: Tensor
    """[K, K] of the control points"""

    def coefficients(self, xy: Tensor) -> Tensor:
        """Coordinates ``[..., 2]`` to coefficients of control points ``[..., K]``, summing to 1."""
        origin = torch.zeros(len(self.gram), dtype=torch.float64)
        origin[self.corners[0]] = 1
        return origin + xy.double() @ self.basis

    def project(self, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        """Project places ``[n, K]`` (coefficients summing to 1) onto the plane.

        Returns:
            Coordinates ``[n, 2]``, and the fraction ``[n]`` of the norm of (place - corner 0) that is outside the
            plane, 0 at corner 0 itself.
        """
        offset = coefficients.double() - self.coefficients(torch.zeros(2))
        xy = offset @ self.gram @ self.basis.T
        square = ((offset @ self.gram) * offset).sum(-1).clamp_min(0)
        outside = (square - xy.square().sum(-1)).clamp_min(0)
        scale = self.gram.diagonal().max()
        return xy, torch.where(square > 1e-12 * scale, (outside / square.clamp_min(1e-300)).sqrt(), 0)


def choose_corners(segments: int, degree: int) -> tuple[int, int, int]:
    """First, middle and last joint of a curve; of one segment its ends and an inner control point.

    Raises:
        UserError: a straight line, which lies in no one plane.
    """
    last = segments * degree
    if segments >= 2:
        return 0, (segments // 2) * degree, last
    if degree >= 2:
        return 0, degree // 2, last
    raise UserError("a plane needs three control points, found a straight line; fit a curve of degree 2")


def plane_through(gram: Tensor, corners: tuple[int, int, int]) -> Plane:
    """The plane through three control points, by Gram and Schmidt.

    Args:
        gram: ``[K, K]`` of all control points (`bezier.gram`).
        corners: their numbers.

    Raises:
        UserError: corners on one line.
    """
    gram = gram.double().cpu()
    steps = torch.zeros(2, len(gram), dtype=torch.float64)
    for row, corner in enumerate(corners[1:]):
        steps[row, corner], steps[row, corners[0]] = 1, -1
    basis: list[Tensor] = []
    for step in steps:
        length = (step @ gram @ step).clamp_min(0).sqrt()
        for known in basis:
            step = step - (known @ gram @ step) * known
        rest = (step @ gram @ step).clamp_min(0).sqrt()
        if rest <= 1e-6 * length or length == 0:
            raise UserError(f"control points {corners} lie on one line; choose three others")
        basis.append(step / rest)
    return Plane(corners, torch.stack(basis), gram)


def plane_frames(
    model: CurveModel,
    split: LaidOut,
    side: int = 11,
    margin: float = 0.25,
    points: int = 61,
    corners: tuple[int, int, int] | None = None,
    progress: Callable[[str], None] | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The loss on a side x side grid over a plane, and the curve and control points projected onto it.

    Args:
        split: rows the loss is taken on.
        side: grid points in each direction; each is one merged evaluation.
        margin: room around corners and curve, as a fraction of their extent.
        points: of the curve.
        corners: control points; default `choose_corners`.
        progress: called after every grid point.

    Returns:
        x, y, loss (nats) of the grid; and kind (curve, control), t, x, y, outside (fraction of the norm outside the
        plane) of the projections, t missing for control points.
    """
    spec, control = model.spec, model.control_points()
    plane = plane_through(bezier.gram(control.values()), corners or choose_corners(spec.segments, spec.degree))
    t = torch.linspace(0, 1, points, dtype=torch.float64)
    places = torch.cat([model.coefficients(t), torch.eye(spec.size, dtype=torch.float64)])
    xy, outside = plane.project(places)
    low, high = xy.min(0).values, xy.max(0).values
    room = margin * (high - low)
    axes = [
        torch.linspace(float(a), float(b), side, dtype=torch.float64)
        for a, b in zip(low - room, high + room, strict=True)
    ]
    rows = []
    for x in axes[0]:
        for y in axes[1]:
            adapter = adapter_at(control, plane.coefficients(torch.stack([x, y])))
            rows.append((float(x), float(y), mean_loss(model, adapter, split)))
            if progress is not None:
                progress("plane")
    kinds = ["curve"] * points + ["control"] * spec.size
    times: list[float | None] = [*t.tolist(), *[None] * spec.size]
    drawn = zip(kinds, times, xy[:, 0].tolist(), xy[:, 1].tolist(), outside.tolist(), strict=True)
    return (
        pd.DataFrame(rows, columns=["x", "y", "loss"]),
        pd.DataFrame(drawn, columns=["kind", "t", "x", "y", "outside"]),
    )
