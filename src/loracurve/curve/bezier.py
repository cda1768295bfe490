"""Geometry of a composite Bezier curve, as pure functions of t and of the control points' Gram matrix.

A curve has S `segments` of one `degree` d over K = S d + 1 control points P_0..P_{K-1}; neighbouring segments share
their joint. With segment s = min(floor(S t), S - 1) and local u = S t - s,

    theta(t) = sum_j bernstein_{j,d}(u) P_{s d + j} = sum_k c_k(t) P_k.

Lengths need no control points, only their Gram matrix ``G[i, j] = <P_i, P_j>`` under whichever inner product measures
them. Sources: Farin, *Curves and Surfaces for CAGD*, chapters on Bezier curves (basis, derivative, degree elevation,
convex hull); Garipov et al. 2018 (arXiv 1802.10026), section 3, for Bezier curves in weight space.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import comb

import torch
from torch import Tensor
from torch.nn.functional import pad

from loracurve.curve.quadrature import gauss_legendre
from loracurve.curve.spec import number_of_control_points

__all__ = [
    "arc_length",
    "arc_length_parameter",
    "chord_length",
    "coefficient_gram",
    "coefficients",
    "control_polygon_length",
    "derivative_coefficients",
    "gram",
    "lipschitz_bound",
    "on_line",
    "speed",
]


def coefficients(t: Tensor, segments: int, degree: int) -> Tensor:
    """The basis c(t): theta(t) = sum_k c_k(t) P_k.

    Args:
        t: positions in [0, 1], any shape, floating point.

    Returns:
        ``[*t.shape, K]`` in t's dtype, non-negative, summing to 1, differentiable in t.

    Raises:
        ValueError: t is not floating point or leaves [0, 1]. The range is only looked at on the CPU outside
            `torch.compile`; elsewhere looking would synchronise, and a t outside extends the end segments.
    """
    segment, u = _local(t, segments)
    return _place(_bernstein(u, degree), segment, segments, degree)


def derivative_coefficients(t: Tensor, segments: int, degree: int) -> Tensor:
    """d c/dt: theta'(t) = sum_k c'_k(t) P_k, at a joint the right-hand derivative, at t = 1 the left-hand one.

    Returns:
        ``[*t.shape, K]`` in t's dtype, summing to 0.

    Raises:
        ValueError: as for `coefficients`.
    """
    segment, u = _local(t, segments)
    if degree == 0:
        return _place(torch.zeros_like(u).unsqueeze(-1), segment, segments, degree)
    lower = _bernstein(u, degree - 1)
    return _place(segments * degree * (pad(lower, (1, 0)) - pad(lower, (0, 1))), segment, segments, degree)


def coefficient_gram(segments: int, degree: int) -> Tensor:
    """Integral over [0, 1] of c(t) c(t)^T dt in closed form.

    A product of Bernstein polynomials of degree d is C(d,i) C(d,j) / C(2d,i+j) times one of degree 2d, whose integral
    is 1 / (2d + 1).

    Returns:
        ``[K, K]`` float64, symmetric, positive definite, entries summing to 1.
    """
    total = torch.zeros(2 * (number_of_control_points(segments, degree),), dtype=torch.float64)
    indices = range(degree + 1)
    block = torch.tensor(
        [[comb(degree, i) * comb(degree, j) / comb(2 * degree, i + j) for j in indices] for i in indices],
        dtype=torch.float64,
    ) / (segments * (2 * degree + 1))
    for first in range(0, segments * degree, degree) if degree else [0] * segments:
        total[first : first + degree + 1, first : first + degree + 1] += block
    return total


def gram(control_points: Iterable[Tensor]) -> Tensor:
    """Gram matrix of the control points, summed over the tensors ``[K, ...]`` they consist of.

    Returns:
        ``[K, K]`` float64, entry (i, j) = <P_i, P_j>, on the first tensor's device.

    Raises:
        ValueError: no tensors, or leading dimensions that differ.
    """
    total: Tensor | None = None
    for tensor in control_points:
        flat = tensor.reshape(tensor.shape[0], -1).double()
        part = flat @ flat.T
        if total is not None and part.shape != total.shape:
            raise ValueError(f"expected {len(total)} control points in every tensor, found one with {len(part)}")
        total = part if total is None else total + part.to(total.device)
    if total is None:
        raise ValueError("expected at least one tensor of control points, found none")
    return total


def speed(t: Tensor, gram: Tensor, segments: int, degree: int) -> Tensor:
    """||theta'(t)|| by the control points' Gram matrix ``[K, K]``, for t of any shape.

    Returns:
        float64 of t's shape; length per unit of t, one-sided at joints as in `derivative_coefficients`.
    """
    derivative = derivative_coefficients(t.to(gram.device, torch.float64), segments, degree)
    return ((derivative @ gram.double()) * derivative).sum(-1).clamp_min(0).sqrt()


def arc_length(
    gram: Tensor, segments: int, degree: int, start: float = 0.0, end: float = 1.0, nodes: int = 32
) -> Tensor:
    """Length of the curve between t = `start` and t = `end`, by Gauss-Legendre quadrature within each segment.

    Returns:
        float64 scalar. The integrand is the root of a polynomial: exact to rounding unless the speed vanishes.

    Raises:
        ValueError: not 0 <= start <= end <= 1.
    """
    if not 0 <= start <= end <= 1:
        raise ValueError(f"expected 0 <= start <= end <= 1, found start={start}, end={end}")
    ends = torch.tensor([start, end], dtype=torch.float64, device=gram.device)
    to_start, to_end = _Lengths(gram, segments, degree, nodes)(ends)
    return to_end - to_start


def arc_length_parameter(fractions: Tensor, gram: Tensor, segments: int, degree: int) -> Tensor:
    """The t at which the given fractions of the whole arc length lie behind: Newton steps, halving where they are slow.

    Returns:
        t, float64 of the shape of `fractions`; the fractions themselves for a curve of length 0.

    Raises:
        ValueError: a fraction outside [0, 1].
    """
    fractions = fractions.to(gram.device, torch.float64)
    if ((fractions < 0) | (fractions > 1)).any():
        raise ValueError(f"expected fractions in [0, 1], found {fractions.min():g} to {fractions.max():g}")
    before = _Lengths(gram, segments, degree)
    whole = before.joints[-1]
    if whole == 0:
        return fractions.clone()
    t, low, high = fractions, torch.zeros_like(fractions), torch.ones_like(fractions)
    change, done = torch.ones_like(t), torch.zeros_like(t, dtype=torch.bool)
    for _ in range(100):
        missing = fractions * whole - before(t)
        low, high = torch.where(missing > 0, t, low), torch.where(missing > 0, high, t)
        step = torch.where(missing == 0, 0, missing / speed(t, gram, segments, degree))
        done |= (step.abs() <= 2**-52) | (high - low <= 2**-53)
        if done.all():
            break
        fits = (t + step >= low) & (t + step <= high) & (step.abs() <= change / 2)
        step = torch.where(fits, step, (low + high) / 2 - t)
        t, change = torch.where(done, t, t + step), step.abs()
    return torch.where((fractions == 0) | (fractions == 1), fractions, t)


def chord_length(gram: Tensor) -> Tensor:
    """Distance ||P_{K-1} - P_0|| between the curve's ends, float64 scalar."""
    return _distances(gram[[0, -1]][:, [0, -1]]).sum()


def control_polygon_length(gram: Tensor) -> Tensor:
    """sum_j ||P_{j+1} - P_j||, float64 scalar; never below the arc length."""
    return _distances(gram).sum()


def lipschitz_bound(gram: Tensor, segments: int, degree: int) -> Tensor:
    """Bound on the speed: ||theta'(t)|| <= S d max_j ||P_{j+1} - P_j||, float64 scalar.

    theta'(t) / (S d) is a convex combination of one segment's steps P_{j+1} - P_j.
    """
    return segments * degree * pad(_distances(gram), (0, 1)).max()


def on_line(anchors: Tensor, degree: int) -> Tensor:
    """Control points of M - 1 segments, evenly on the straight lines between consecutive anchors ``[M, ...]``.

    Returns:
        ``[(M - 1) d + 1, ...]``, every d-th row an anchor, exactly.

    Raises:
        ValueError: no anchors, or several at degree 0.
    """
    if len(anchors) < 1 or (degree < 1 and len(anchors) > 1):
        raise ValueError(f"expected anchors and degree >= 1, found {len(anchors)} anchors and degree={degree}")
    if len(anchors) == 1:
        return anchors.clone()
    u = (torch.arange(degree, dtype=torch.float64) / degree).to(anchors)
    u = u.reshape(1, degree, *[1] * (anchors.dim() - 1))
    inner = (1 - u) * anchors[:-1].unsqueeze(1) + u * anchors[1:].unsqueeze(1)
    return torch.cat([inner.flatten(0, 1), anchors[-1:]])


def _local(t: Tensor, segments: int) -> tuple[Tensor, Tensor]:
    """Segment number (long) and position u inside it, both of t's shape."""
    if not t.is_floating_point():
        raise ValueError(f"expected a floating-point t, found {t.dtype}")
    if not torch.compiler.is_compiling() and t.device.type == "cpu" and not ((t >= 0) & (t <= 1)).all():
        raise ValueError(f"expected t in [0, 1], found {t.min().item():g} to {t.max().item():g}")
    scaled = segments * t
    segment = scaled.detach().floor().long().clamp(0, segments - 1)
    return segment, scaled - segment


def _bernstein(u: Tensor, degree: int) -> Tensor:
    """Bernstein polynomials ``[*u.shape, d + 1]`` by their recurrence, which needs no powers of zero."""
    u = u.unsqueeze(-1)
    basis = torch.ones_like(u)
    for _ in range(degree):
        basis = pad((1 - u) * basis, (0, 1)) + pad(u * basis, (1, 0))
    return basis


def _place(values: Tensor, segment: Tensor, segments: int, degree: int) -> Tensor:
    """A segment's d + 1 values at their columns among all K control points."""
    columns = segment.unsqueeze(-1) * degree + torch.arange(degree + 1, device=values.device)
    zeros = values.new_zeros(*segment.shape, number_of_control_points(segments, degree))
    return zeros.scatter(-1, columns, values)


class _Lengths:
    """Arc lengths from 0 to each t."""

    def __init__(self, gram: Tensor, segments: int, degree: int, nodes: int = 32) -> None:
        self.gram, self.segments, self.degree = gram, segments, degree
        self.x, self.weights = (part.to(gram.device) for part in gauss_legendre(nodes))
        each = torch.arange(segments, device=gram.device)
        self.joints = pad(self._inside(each, torch.ones_like(each, dtype=torch.float64)).cumsum(0), (1, 0))
        """[S + 1]"""

    def __call__(self, t: Tensor) -> Tensor:
        segment, u = _local(t, self.segments)
        return self.joints[segment] + self._inside(segment, u)

    def _inside(self, segment: Tensor, u: Tensor) -> Tensor:
        at = (segment.unsqueeze(-1) + u.unsqueeze(-1) * self.x) / self.segments
        return speed(at, self.gram, self.segments, self.degree) @ self.weights * u / self.segments


def _distances(gram: Tensor) -> Tensor:
    """||P_{j+1} - P_j||, ``[K - 1]`` float64."""
    gram = gram.double()
    squares = gram.diagonal()
    return (squares[1:] + squares[:-1] - 2 * gram.diagonal(1)).clamp_min(0).sqrt()
