"""Sharpness-aware minimisation at a curve point (Foret et al. 2021, "SAM")."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from loracurve.system.distributed import sum_over_processes, world

__all__ = ["sam_ascent", "sam_backward", "shifted"]


Extra = TypeVar("Extra")


def sam_ascent(gradients: Sequence[Tensor], coefficients: Tensor, rho: Tensor | float) -> list[Tensor]:
    """SAM's ascent step e = rho g / ||g|| at theta(t) (Foret et al. 2021, eq. 2), the norm over all factors together.

    Args:
        gradients: of the control points, each [K, ...]: c_k(t) g, as theta(t) = sum_k c_k(t) P_k.
        coefficients: c(t) [K], on the gradients' device.
        rho: length of the step.

    Returns:
        The step by factor, without the leading K; all zero where g is.
    """
    weights = coefficients / (coefficients @ coefficients)
    point = [torch.tensordot(weights.to(g), g, dims=1) for g in gradients]
    scale = rho / (torch.stack([g.norm() for g in point]).norm() + 1e-12)
    return [g * scale.to(g) for g in point]


@contextmanager
def shifted(factors: Sequence[Tensor], offsets: Sequence[Tensor]) -> Iterator[None]:
    """Move every curve point by the offsets, and back to the bit.

    The coefficients sum to 1, so adding e to all control points adds e to theta(t), whatever the route and the kind of
    layer. A backward pass of what is computed inside belongs inside.

    Args:
        factors: control points, each [K, ...]. offsets: without the leading K.
    """
    kept = [p.detach().clone() for p in factors]
    try:
        with torch.no_grad():
            for p, e in zip(factors, offsets, strict=True):
                p.add_(e)
        yield
    finally:
        with torch.no_grad():
            for p, k in zip(factors, kept, strict=True):
                p.copy_(k)


def sam_backward(
    loss: Callable[[], tuple[Tensor, Extra]], factors: Sequence[Tensor], coefficients: Tensor, rho: Tensor | float
) -> tuple[Tensor, Extra]:
    """Add SAM's gradient, the loss gradient at theta(t) + e, to the `.grad` of the factors.

    Args:
        loss: computes the scalar loss at one t, and anything else; called twice (dropout draws anew).
        factors: control points, each [K, ...].
        coefficients: c(t) [K], on the factors' device.
        rho: length of the ascent step.

    Returns:
        The loss at theta(t), detached, and what came with it.
    """
    first, extra = loss()
    gradients = torch.autograd.grad(first, factors, allow_unused=True, materialize_grads=True)
    if world()[1] > 1:  # the loss is that of all processes
        sums = sum_over_processes(torch.cat([g.flatten() for g in gradients]))
        parts = sums.split([g.numel() for g in gradients])
        gradients = tuple(part.view_as(g) for part, g in zip(parts, gradients, strict=True))
    with shifted(factors, sam_ascent(gradients, coefficients, rho)):
        loss()[0].backward()
    return first.detach(), extra
