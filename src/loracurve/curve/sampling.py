"""Drawing the points of a curve at which a training step looks.

Every way of drawing has the uniform marginal on [0, 1] (in t, or in arc length); they differ in how the points of one
draw are spread. Sources: stratified sampling, Owen, *Monte Carlo theory, methods and
examples*, section 8.4; pairs half the curve apart, the LoRA-Curve authors.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from loracurve.curve.bezier import arc_length_parameter
from loracurve.curve.config import Sampling, check_sampling

__all__ = ["sample_points"]


def sample_points(
    count: tuple[int, ...],
    sampling: Sampling,
    draw: torch.Generator,
    gram: Tensor | None = None,
    segments: int = 1,
    degree: int = 1,
) -> Tensor:
    """Curve points t in [0, 1], float64 of shape `count`, on the CPU.

    - stratified: one from each of as many equal parts of [0, 1] as there are points.
    - uniform: independent.
    - arc-length: stratified by fractions of the curve's length instead of t.
    - half-period: point i and point i + count[0] / 2 are t and t + 1/2; the t are stratified in [0, 1/2].

    Stratified, arc-length and half-period points ascend in reading order (last dimension fastest).

    Args:
        count: shape, at least one number, points of an example first.
        sampling: way of drawing.
        draw: CPU generator; the points depend on its state and the arguments only.
        gram: ``[K, K]`` Gram matrix of the control points under the inner product that measures length (arc-length).
        segments, degree: shape of the curve (arc-length).

    Raises:
        UserError: see `check_sampling`.
        ValueError: arc-length without a Gram matrix.
    """
    check_sampling(sampling, count[0])
    total = prod(count)
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
