"""Several curves of one shape side by side: their control points in one stack, their micro-batches in one pass.

Curve r of R has control points r K to (r + 1) K - 1 of the stack, and rows of its own in every batch. A `CurveProgram`
for each sees the model through a `CurveView`, as if it carried this curve alone; the forward passes are made together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from loracurve import curve
from loracurve.batching import Batch
from loracurve.errors import UserError
from loracurve.fit_config import FitConfig
from loracurve.joining import join_batches
from loracurve.lora_space import ControlPoints
from loracurve.model import CurveModel
from loracurve.programs import CurveProgram
from loracurve.spec import CurveSpec
from loracurve.stepping import Part
from loracurve.tasks import Encoded

__all__ = ["CurveView", "CurvesProgram", "StackedSpec", "check_side_by_side"]


def check_side_by_side(config: FitConfig) -> None:
    """Refuse what curves cannot have side by side; raises UserError."""
    for name, expected, found in (
        ("perturbation.kind", "none", config.perturbation.kind),  # its draws are made for all rows
        ("share_points", "true", str(config.share_points).lower()),  # rows would cost the control points of all curves
        ("layerwise", "false", str(config.layerwise).lower()),
        ("keep", "best", config.keep if config.patience else "best"),  # the last state is not that of one's own end
    ):
        if found != expected:
            patience = " with patience" if name == "keep" else ""
            raise UserError(
                f"{name}: expected {expected} for several curves side by side{patience}, found {found}; change it, or "
                "fit one after the other"
            )


@dataclass(frozen=True)
class StackedSpec(CurveSpec):
    """The control points of `count` independent curves of one shape; as a curve, the polygonal chain through all."""

    shape: CurveSpec = field(default_factory=CurveSpec)
    """of each of the curves"""
    count: int = 1

    @classmethod
    def of(cls, shape: CurveSpec, count: int) -> StackedSpec:
        chain = CurveSpec.slots(shape.size * count)
        return cls(chain.segments, chain.degree, shape=shape, count=count)

    def stacked(self, curves: Sequence[ControlPoints]) -> ControlPoints:
        """The curves' control points [K, ...], by PEFT name, as [R K, ...]; raises UserError where some lack."""
        for r, points in enumerate(curves):
            for name, first in curves[0].items():
                found = [*points[name].shape] if name in points else None
                if found != (expected := [self.shape.size, *first.shape[1:]]):
                    raise UserError(f"curve {r}: expected {name} of shape {expected}, found {found}")
        return {name: torch.cat([points[name] for points in curves]) for name in curves[0]}

    def apart(self, points: ControlPoints) -> list[ControlPoints]:
        """The other way round."""
        size = self.shape.size
        return [{n: p[r * size : (r + 1) * size].clone() for n, p in points.items()} for r in range(self.count)]

    @property
    def mask(self) -> Tensor:
        return self.shape.mask.repeat(self.count)

    def dependence(self, shared: bool = False) -> Tensor | None:
        own = self.shape.dependence(shared)
        return None if own is None else torch.block_diag(*[own] * self.count)

    def is_shared(self, name: str) -> bool:
        return self.shape.is_shared(name)


class CurveView:
    """Curve `number` of a model that carries a `StackedSpec`, as a program uses a model; the rest is the model's.

    Coefficients are those of the curve alone, [.., K].
    """

    def __init__(self, model: CurveModel, number: int) -> None:
        assert isinstance(model.spec, StackedSpec)
        self._whole, self.number, self.spec, self.count = model, number, model.spec.shape, model.spec.count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole, name)

    @property
    def factors(self) -> list[Tensor]:
        """The curve's control points, a stacked tensor [K, ...] for each factor."""
        size = self.spec.size
        return [p[self.number * size : (self.number + 1) * size] for p in self._whole.factors]

    def coefficients(self, t: Tensor) -> Tensor:
        return curve.coefficients(t, self.spec.segments, self.spec.degree)

    def among_all(self, coefficients: Tensor) -> Tensor:
        """[.., K] -> [.., R K]: 0 at the control points of other curves."""
        before, size = self.number * self.spec.size, self.spec.size * self.count
        return F.pad(coefficients, (before, size - self.spec.size - before))

    def point_log_probs(self, batch: Batch, t: Tensor) -> Tensor:
        return self._whole.point_log_probs(batch, self.among_all(self.coefficients(t.to("cpu", torch.float64))))


@dataclass
class JoinedPart(Part):
    """Micro-batches of several curves in one batch."""

    labels: tuple[Tensor, ...] = ()
    """[E] of each curve"""
    shares: tuple[Tensor, ...] = ()
    own_weights: tuple[Tensor | None, ...] = ()
    others: tuple[int, ...] = ()
    """how many inputs of each curve the diversity term is taken on; empty: the micro-batch's own"""


class CurvesProgram:
    """R curves at once, each with its own data order, points, draws, target and validation; the loss is their sum."""

    figures = CurveProgram.figures

    def __init__(
        self,
        model: CurveModel,
        train: Encoded,
        validation: Encoded,
        config: FitConfig,
        seeds: Sequence[int],
        **more: Any,
    ) -> None:
        self.groups = len(seeds)
        self.views = [CurveView(model, r) for r in range(len(seeds))]
        own: list[Any] = [(v, replace(config, seed=s)) for v, s in zip(self.views, seeds, strict=True)]
        self.programs = [CurveProgram(view, train, validation, c, **more) for view, c in own]
        self.synchronises = self.programs[0].synchronises
        for program in self.programs:
            # Where draws are made by token, rows stay as they are for a curve alone.
            program.even_rows = config.corruption.kind not in ("tokens", "attention")

    def parts(self, step: int) -> list[Part]:
        return [self._joined(parts) for parts in zip(*(p.parts(step) for p in self.programs), strict=True)]

    def _joined(self, parts: Sequence[Part]) -> Part:
        coefficients = [v.among_all(p.coefficients) for v, p in zip(self.views, parts, strict=True)]
        part = JoinedPart(
            join_batches([p.batch for p in parts]),
            # Rows lie in equal groups by point, and by curve within.
            torch.stack(coefficients, 1).flatten(0, 1),
            parts[0].layout,
            torch.ones(()),
            labels=tuple(p.batch.labels for p in parts),
            shares=tuple(p.share for p in parts),
            own_weights=tuple(p.weights for p in parts),
        )
        others = [p.other for p in parts if p.other is not None]
        if others:
            part.other, part.others = join_batches(others), tuple(len(b.labels) for b in others)
        return part

    def loss(self, part: Part) -> tuple[Tensor, Tensor]:
        assert isinstance(part, JoinedPart)

        def apart(batch: Batch, examples: Sequence[int]) -> Sequence[Tensor]:
            return self.programs[0].log_probs(batch, part.coefficients, part.layout).split([*examples], dim=1)

        each = apart(part.batch, [len(labels) for labels in part.labels])
        others = [None] * self.groups if part.other is None else apart(part.other, part.others)
        given = zip(self.programs, each, others, part.labels, part.own_weights, part.shares, strict=True)
        losses, figures = zip(*(program.loss_of(*own) for program, *own in given), strict=True)
        return torch.stack(losses).sum(), torch.stack(figures).mean(0)

    def validate(self) -> list[float]:
        return [nll for program in self.programs for nll in program.validate()]

    def decay_gram(self) -> Tensor:
        return torch.block_diag(*(program.decay_gram() for program in self.programs))
