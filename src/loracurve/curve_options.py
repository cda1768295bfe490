"""Closed curves and smooth joints, as linear dependences between control points.

Both are conditions C P = 0 on the K control points of `loracurve.curve`:

- closed: P_{K-1} = P_0, so that theta(0) = theta(1);
- smooth (C1): P_{j+1} - P_j = P_j - P_{j-1} at a joint j = s d, so that theta' is continuous there (Farin, *Curves and
  Surfaces for CAGD*, C1 joints of equal parameter length); for a closed curve at t = 0 = 1 too.

Solving for the dependent points gives P = M P_free and theta(t) = (c(t) M) P_free: everything that takes coefficients
takes c(t) M instead.
"""

from __future__ import annotations

import warnings
from fractions import Fraction

import torch
from torch import Tensor

from loracurve.curve import number_of_control_points
from loracurve.errors import UserError

__all__ = ["free_points", "reduction"]


def reduction(segments: int, degree: int, closed: bool = False, smooth: bool = False) -> Tensor:
    """The matrix M with P = M P_free.

    Dependent points are, in this order of preference: the last of a closed curve, those right behind a joint, other
    inner ones, joints. So anchors stay free, except on closed smooth curves of degree 2 with evenly many segments,
    whose joints cannot be chosen independently.

    Returns:
        ``[K, K_free]`` float64; rows sum to 1, and row k of a free point is a unit vector (`free_points`). Of neither
        closed nor smooth curves the identity. Entries of smooth curves may be negative: theta(t) is an affine
        combination of the free points, no longer a convex one.

    Raises:
        UserError: smooth joints of degree 1, which leave a straight line, or a closed curve that is a single point.
    """
    matrix, free = _solve(segments, degree, closed, smooth)
    return torch.tensor([[float(x) for x in row] for row in matrix], dtype=torch.float64).view(-1, len(free))


def free_points(segments: int, degree: int, closed: bool = False, smooth: bool = False) -> tuple[int, ...]:
    """Numbers of the control points that are free, ascending: the columns of `reduction`.

    Raises:
        UserError: as for `reduction`.
    """
    return _solve(segments, degree, closed, smooth)[1]


def _solve(segments: int, degree: int, closed: bool, smooth: bool) -> tuple[list[list[Fraction]], tuple[int, ...]]:
    """M and its columns' numbers, by Gauss-Jordan elimination in exact arithmetic."""
    size = number_of_control_points(segments, degree)
    if smooth and degree < 2 and (segments > 1 or closed):
        raise UserError(f"smooth: expected degree 2 or more, found {degree}; raise the degree")
    conditions: list[dict[int, int]] = []
    if closed:
        conditions.append({size - 1: 1, 0: -1})
    if smooth:
        conditions += [{j + 1: 1, j: -2, j - 1: 1} for j in range(degree, size - 1, degree)]
    if smooth and closed:
        conditions.append(_sum({1: 1, 0: -1}, {size - 1: -1, size - 2: 1}))
    rows = [[Fraction(condition.get(k, 0)) for k in range(size)] for condition in conditions]

    def preference(k: int) -> tuple[int, int]:
        if closed and k == size - 1:
            return 0, k
        if degree and k % degree == 0:
            return 3, -k
        return (1 if k % degree == 1 else 2), -k

    dependent: dict[int, list[Fraction]] = {}
    for k in sorted(range(size), key=preference):
        pivot = next((row for row in rows if row[k]), None)
        if pivot is None:
            continue
        rows.remove(pivot)
        pivot = [x / pivot[k] for x in pivot]
        rows = [_eliminate(row, pivot, k) for row in rows]
        dependent = {i: _eliminate(row, pivot, k) for i, row in dependent.items()} | {k: pivot}
    free = tuple(k for k in range(size) if k not in dependent)
    if closed and len(free) < 2:
        raise UserError(f"closed: expected more than one free point, found {segments} segments of degree {degree}")
    if closed and len(free) < 3:
        warnings.warn("a closed curve of two free control points lies on a line and retraces itself", stacklevel=3)
    matrix = [[-dependent[k][f] if k in dependent else Fraction(k == f) for f in free] for k in range(size)]
    return matrix, free


def _eliminate(row: list[Fraction], pivot: list[Fraction], k: int) -> list[Fraction]:
    return [x - row[k] * p for x, p in zip(row, pivot, strict=True)]


def _sum(first: dict[int, int], second: dict[int, int]) -> dict[int, int]:
    return {k: first.get(k, 0) + second.get(k, 0) for k in first.keys() | second.keys()}
