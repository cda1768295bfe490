"""Paths between adapters: the straight line in several gauges, the straight line in Delta W, and the trained curve.

A path runs through neighbouring anchors, one segment between each two, for t in [0, 1]. At every t it is one adapter in
PEFT's names, whose rank may differ from the anchors' (the line in Delta W has rank 2 r). Which of these paths has a
barrier tells a matter of the rescaling freedom (gauge) from a matter of loss: (A, B) and (R A, B R^-1) are one model,
but not one end of a straight line (docs/method.md; Frankle et al. 2020 for linear mode connectivity).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import pandas as pd
import torch
from torch import Tensor

from loracurve.curve import bezier, quadrature
from loracurve.curve.config import Alignment
from loracurve.curve.gauge import align, delta_w_gram
from loracurve.curve.lora_space import ControlPoints, adapter_at
from loracurve.landscape.config import PATHS
from loracurve.model.curve_model import CurveModel
from loracurve.system.errors import UserError, nearest

__all__ = [
    "Path",
    "anchor_paths",
    "curve_path",
    "grid",
    "joints",
    "scalings_of",
    "speed_frame",
    "stacked_at",
    "update_norms",
]


_A, _B = "lora_A.weight", "lora_B.weight"


def scalings_of(model: CurveModel) -> dict[str, float]:
    """`CurveModel.scalings`, under the name that it had until version 0.1."""
    warnings.warn(
        "scalings_of(model) is model.scalings now and goes in the next version", DeprecationWarning, stacklevel=2
    )
    return model.scalings


def grid(segments: int, points: int) -> Tensor:
    """`points` equally spaced positions on each segment, joints shared: ``[segments * (points - 1) + 1]`` float64.

    Raises:
        UserError: fewer than two points.
    """
    if points < 2:
        raise UserError(f"points: expected at least 2 on each segment, found {points}; ask for 61")
    steps = segments * (points - 1)
    # Each position divided once: steps added up could put a joint into the segment before it.
    return torch.arange(steps + 1, dtype=torch.float64) / steps


def joints(points: ControlPoints, degree: int) -> ControlPoints:
    """The ends of the segments, every `degree`-th control point: a curve's anchors, or a free curve's joints."""
    return {name: tensor[:: max(degree, 1)] for name, tensor in points.items()}


@dataclass(frozen=True, eq=False)
class Path:
    """A path through LoRA space: control points and how they are joined.

    *factors* interpolates A and B, theta(t) = sum_k c_k(t) P_k; *delta_w* interpolates their products,
    Delta W(t) = sum_k c_k(t) s B_k A_k, exactly, by concatenated factors. Dense heads are interpolated in both.
    """

    name: str
    points: ControlPoints
    """[K, ...] by PEFT name"""
    segments: int
    degree: int
    scalings: Mapping[str, float] = field(default_factory=dict)
    """alpha / r by the name of A, 1 where absent"""
    form: Literal["factors", "delta_w"] = "factors"
    norm_matched: bool = False
    """rescale Delta W of every map to the norm (1 - u) ||Delta W_0|| + u ||Delta W_1|| of the segment's ends"""

    def coefficients(self, t: float) -> Tensor:
        """c(t) ``[K]`` float64."""
        return bezier.coefficients(torch.tensor(t, dtype=torch.float64), self.segments, self.degree)

    def adapter(self, t: float) -> dict[str, Tensor]:
        """The adapter at t: A ``[q, n_in]``, B ``[n_out, q]``; q = r, or 2 r inside a segment of a *delta_w* path."""
        c = self.coefficients(t)
        if self.form == "factors":
            adapter = adapter_at(self.points, c)
            if self.norm_matched:
                for name, (scale, _) in self._norm_scales(t).items():
                    adapter[name] = adapter[name] * scale
            return adapter
        return self._products(c)

    def velocity(self, t: float) -> dict[str, Tensor]:
        """d Delta W / dt (by the product rule, as factors of rank up to 3 r) and d/dt of dense heads; same names.

        At a joint the right-hand derivative, at t = 1 the left-hand one.
        """
        at = torch.tensor(t, dtype=torch.float64)
        c, slope = (f(at, self.segments, self.degree) for f in (bezier.coefficients, bezier.derivative_coefficients))
        if self.form == "delta_w":
            return self._products(slope)
        here, change = adapter_at(self.points, c), adapter_at(self.points, slope)
        scales = self._norm_scales(t) if self.norm_matched else {}
        for name_a in [n for n in here if n.endswith(_A)]:
            name_b = name_a.replace(_A, _B)
            a, b, da, db = here[name_a], here[name_b], change[name_a], change[name_b]
            # (f B A)' = (f B') A + (f B) A' + (f' B) A
            scale, rate = scales.get(name_b, (1.0, 0.0))
            change[name_a] = torch.cat([a, da])
            change[name_b] = torch.cat([scale * db + rate * b, scale * b], dim=1)
        return change

    def speed(self, t: float) -> float:
        """||d Delta W / dt||_F over all adapted maps, from Gram matrices of the factors; dense heads are left out."""
        return _norm(self.velocity(t), self.scalings)

    def arc_length(self, nodes: int = 8) -> float:
        """Length of the path in ||Delta W||_F, by Gauss-Legendre quadrature of the speed within each segment."""
        x, weights = quadrature.gauss_legendre(nodes)
        inside = [
            weight * self.speed((s + u) / self.segments)
            for s in range(self.segments)
            for u, weight in zip(x.tolist(), weights.tolist(), strict=True)
        ]
        return sum(inside) / self.segments

    def distances(self, t: Sequence[float]) -> Tensor:
        """||Delta W(t_i) - Delta W(t_j)||_F, ``[n, n]`` float64; dense heads are left out."""
        gram = delta_w_gram(stacked_at(self, t), dict(self.scalings))
        squares = gram.diagonal()
        return (squares[:, None] + squares - 2 * gram).clamp_min(0).sqrt().fill_diagonal_(0)

    def _products(self, c: Tensor) -> dict[str, Tensor]:
        """sum_k c_k B_k A_k as concatenated factors."""
        used = [k for k in range(len(c)) if c[k] != 0]
        out = adapter_at({n: p for n, p in self.points.items() if "lora_" not in n}, c)
        for name_a, a in self.points.items():
            if name_a.endswith(_A):
                name_b = name_a.replace(_A, _B)
                out[name_a] = torch.cat([a[k] for k in used])
                out[name_b] = torch.cat([float(c[k]) * self.points[name_b][k] for k in used], dim=1)
        return out

    def _norm_scales(self, t: float) -> dict[str, tuple[float, float]]:
        """By name of B: the scale f(t) that gives Delta W of the factor line its norm, and f'(t); (1, 0) where it is 0.

        With N = ||Delta W|| and the target T: f = T / N, f' = T' / N - T N' / N^2, N' = <Delta W, Delta W'> / N.
        """
        plain = Path(self.name, self.points, self.segments, self.degree, self.scalings)
        here, change = plain.adapter(t), plain.velocity(t)
        chain = Path("", joints(self.points, self.degree), self.segments, 1)
        c = chain.coefficients(t)
        slope = bezier.derivative_coefficients(torch.tensor(t, dtype=torch.float64), self.segments, 1)
        scales = {}
        for name_a in [n for n in here if n.endswith(_A)]:
            name_b = name_a.replace(_A, _B)
            ends = delta_w_gram({n: chain.points[n] for n in (name_a, name_b)}).diagonal().clamp_min(0).sqrt()
            # <B A, B' A'> of factors of different rank: the change is padded to its own, the point with zeros.
            gram = delta_w_gram({n: _stack_ranks(here[n], change[n], dim=n.endswith(_B)) for n in (name_a, name_b)})
            norm = float(gram[0, 0].clamp_min(0).sqrt())
            target, rate = float(c @ ends), float(slope @ ends)
            flat = norm <= 1e-12 * float(ends.max())
            scales[name_b] = (1.0, 0.0) if flat else (target / norm, rate / norm - target * float(gram[0, 1]) / norm**3)
        return scales


def _stack_ranks(first: Tensor, second: Tensor, dim: int) -> Tensor:
    """``[2, ...]``: two factors of different rank, the smaller filled with zeros along the rank dimension."""
    shape = list(second.shape)
    shape[dim] -= first.shape[dim]
    return torch.stack([torch.cat([first, first.new_zeros(shape)], dim=int(dim)), second])


def stacked_at(path: Path, t: Sequence[float]) -> ControlPoints:
    """The adapters at several t, stacked; where ranks differ (*delta_w* at its anchors) they are filled with zeros."""
    adapters = [path.adapter(x) for x in t]
    for name in adapters[0]:
        dim = 1 if name.endswith(_B) else 0
        if "lora_" in name and len({a[name].shape[dim] for a in adapters}) > 1:
            rank = max(a[name].shape[dim] for a in adapters)
            for adapter in adapters:
                shape = list(adapter[name].shape)
                shape[dim] = rank - shape[dim]
                adapter[name] = torch.cat([adapter[name], adapter[name].new_zeros(shape)], dim=dim)
    return {name: torch.stack([a[name] for a in adapters]) for name in adapters[0]}


def update_norms(adapter: Mapping[str, Tensor], scalings: Mapping[str, float] | None = None) -> dict[str, float]:
    """||s B A||_F of each adapted map by the name of its A, and the norm of each dense tensor by its own name."""
    norms = {}
    for name, tensor in adapter.items():
        if name.endswith(_A):
            pair = {n: adapter[n][None] for n in (name, name.replace(_A, _B))}
            norms[name] = float(delta_w_gram(pair, dict(scalings or {}))[0, 0].clamp_min(0).sqrt())
        elif not name.endswith(_B):
            norms[name] = float(tensor.double().norm())
    return norms


def _norm(adapter: Mapping[str, Tensor], scalings: Mapping[str, float]) -> float:
    single = {n: p[None] for n, p in adapter.items()}
    return float(delta_w_gram(single, dict(scalings))[0, 0].clamp_min(0).sqrt())


def anchor_paths(
    anchors: ControlPoints, names: Sequence[str] = PATHS, scalings: Mapping[str, float] | None = None
) -> dict[str, Path]:
    """Untrained paths through adapters as they were saved, in the order given.

    Args:
        anchors: stacked adapters, leading dimension M >= 2, in their own gauges.
        names: of `PATHS`; "curve" is passed over, it needs training. norm_matched rescales the straight line.
        scalings: alpha / r by the name of A.

    Raises:
        UserError: an unknown name, or fewer than two anchors.
    """
    count = len(next(iter(anchors.values())))
    if count < 2:
        raise UserError(f"a path needs at least 2 adapters, found {count}")
    alignments: dict[str, Alignment] = {
        "balanced": "balanced",
        "procrustes": "procrustes",
        "balanced+procrustes": "balanced+procrustes",
    }
    out = {}
    for name in names:
        if name not in PATHS:
            raise UserError(f"paths: expected some of {', '.join(PATHS)}, found {name!r}{nearest(name, PATHS)}")
        if name != "curve":
            out[name] = Path(
                name,
                align(anchors, alignments.get(name, "none")),
                count - 1,
                1,
                dict(scalings or {}),
                "delta_w" if name == "delta_w" else "factors",
                name == "norm_matched",
            )
    return out


def curve_path(model: CurveModel) -> Path:
    """The curve that `model` carries."""
    return Path("curve", model.control_points(), model.spec.segments, model.spec.degree, model.scalings)


def speed_frame(paths: Mapping[str, Path], t: Mapping[str, Sequence[float]]) -> pd.DataFrame:
    """Speed ||d Delta W / dt||_F of several paths at positions of each: path, t, speed."""
    rows = [(name, x, path.speed(x)) for name, path in paths.items() for x in t[name]]
    return pd.DataFrame(rows, columns=["path", "t", "speed"])
