"""Drawing the points of a curve at which a training step looks.

Every way of drawing has the uniform marginal on [0, 1] (in t, or in arc length); they differ in how the points of one
draw are spread. Sources: stratified sampling and randomly shifted lattices, Owen, *Monte Carlo theory, methods and
examples*, sections 8.4 and 17.3; the golden-ratio recurrence, Niederreiter 1992, section 3.1; pairs half the curve
apart, the LoRA-Curve authors.
"""

from __future__ import annotations

from math import prod
from typing import Literal, get_args

import torch
from torch import Tensor

from loracurve.curve import arc_length_parameter
from loracurve.errors import UserError, nearest

__all__ = ["Sampling", "check_sampling", "sample_points"]

Sampling = Literal["stratified", "uniform", "arc-length", "quasi-random", "half-period"]

GOLDEN = (5**0.5 - 1) / 2


def check_sampling(sampling: str, points: int) -> None:
    """Refuse what cannot be drawn.

    Args:
        sampling: name of a way of drawing.
        points: points at which each example is seen, the first number of `sample_points`.

    Raises:
        UserError: an unknown way, or for half-period an odd number of points.
    """
    if sampling not in get_args(Sampling):
        ways = ", ".join(get_args(Sampling))
        raise UserError(f"sampling: expected one of {ways}, found {sampling!r}{nearest(sampling, get_args(Sampling))}")
    if sampling == "half-period" and points % 2:
        raise UserError(f"points: expected an even number with sampling half-period, found {points}; add one")


def sample_points(
    count: tuple[int, ...],
    sampling: Sampling,
    draw: torch.Generator,
    gram: Tensor | None = None,
    segments: int = 1,
    degree: int = 1,
    start: int = 0,
) -> Tensor:
    """Curve points t in [0, 1], float64 of shape `count`, on the CPU.

    - stratified: one from each of as many equal parts of [0, 1] as there are points.
    - uniform: independent.
    - arc-length: stratified by fractions of the curve's length instead of t.
    - quasi-random: frac(shift + i x golden ratio) with a random shift. Consecutive i belong to the points of one
      example (first dimension), which are so spread over the curve.
    - half-period: point i and point i + count[0] / 2 are t and t + 1/2; the t are stratified in [0, 1/2].

    Stratified, arc-length and half-period points ascend in reading order (last dimension fastest).

    Args:
        count: shape, at least one number, points of an example first.
        sampling: way of drawing.
        draw: CPU generator; the points depend on its state and the arguments only.
        gram: ``[K, K]`` Gram matrix of the control points under the inner product that measures length (arc-length).
        segments, degree: shape of the curve (arc-length).
        start: quasi-random only: i of the first point. With the same shift in every step (a generator at the start of
            its stream) and `start` counting on, the points of a whole run are one sequence.

    Raises:
        UserError: see `check_sampling`.
        ValueError: arc-length without a Gram matrix.
    """
    check_sampling(sampling, count[0])
    total = prod(count)
    if sampling == "quasi-random":
        shift = torch.rand(1, generator=draw, dtype=torch.float64)
        sequence = (shift + GOLDEN * torch.arange(start, start + total, dtype=torch.float64)) % 1
        return sequence.view(count[::-1]).permute(*range(len(count) - 1, -1, -1)).contiguous()
    if sampling == "half-period":
        half = sample_points((count[0] // 2, *count[1:]), "stratified", draw) / 2
        return torch.cat([half, half + 0.5])
    u = torch.rand(total, generator=draw, dtype=torch.float64)
    if sampling != "uniform":
        u = (torch.arange(total) + u) / total
    if sampling == "arc-length":
        if gram is None:
            raise ValueError("expected the control points' Gram matrix for arc-length points, found None")
        u = arc_length_parameter(u, gram.cpu(), segments, degree)
    return u.view(count)
