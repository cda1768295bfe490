"""Points t and weights for averages over a curve."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from loracurve.curve.config import Rule, check_points

__all__ = ["gauss_legendre", "quadrature"]


_rule = lru_cache(maxsize=64)(np.polynomial.legendre.leggauss)  # an arc length asks for the same one many times


def gauss_legendre(nodes: int) -> tuple[Tensor, Tensor]:
    """Gauss-Legendre rule on [0, 1], exact for polynomials of degree 2 `nodes` - 1.

    Returns:
        Nodes, ascending, and weights summing to 1, both ``[nodes]`` float64.

    Raises:
        ValueError: `nodes` below 1.
    """
    if nodes < 1:
        raise ValueError(f"expected at least one node, found {nodes}")
    x, weights = _rule(nodes)
    return torch.from_numpy((1 + x) / 2), torch.from_numpy(weights / 2)


def quadrature(
    kind: Rule, points: int, segments: int, generator: torch.Generator | None = None, closed: bool = False
) -> tuple[Tensor, Tensor]:
    """Points t and weights, both ``[points]`` float64, for averages over t uniform on [0, 1]; the weights sum to 1.

    Args:
        kind: uniform is equally spaced with both ends and equal weights (one point: t = 0.5; closed curves: with one of
            the ends, which are the same), gauss-legendre puts points / segments nodes into each segment, monte-carlo
            draws from `generator`.
        points: how many.
        segments: of the curve (`model.spec.segments`).
        generator: of the draws, for monte-carlo only.
        closed: whether the curve ends where it begins (`model.spec.closed`).

    Raises:
        UserError: unknown kind, fewer than one point, or for gauss-legendre no multiple of `segments`.
        ValueError: monte-carlo without a generator.
    """
    points = check_points(kind, points, segments)
    weights = torch.full((points,), 1 / points, dtype=torch.float64)
    if kind == "uniform" and closed:
        return torch.arange(points, dtype=torch.float64) / points, weights
    if kind == "uniform":
        return (torch.linspace(0, 1, points, dtype=torch.float64) if points > 1 else weights / 2), weights
    if kind == "monte-carlo":
        if generator is None:
            raise ValueError("expected a torch.Generator for monte-carlo points, found None")
        return torch.rand(points, generator=generator, dtype=torch.float64, device=generator.device), weights
    nodes, node_weights = gauss_legendre(points // segments)
    t = (torch.arange(segments, dtype=torch.float64).unsqueeze(1) + nodes) / segments
    return t.flatten(), (node_weights / segments).repeat(segments)
