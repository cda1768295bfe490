"""What all methods have in common: options in a dataclass, `fit` to a setting, a fitted thing that predicts splits.

Methods get the same base model, prompts, anchors and training options, and return the same `Predictive`, so that only
the method differs. Most of them end as a set of adapters, which run side by side like the slots of `CurveSpec.slots`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from loracurve.curve.anchored import slot_times
from loracurve.curve.lora_space import ControlPoints
from loracurve.curve.spec import CurveSpec
from loracurve.inference.prediction import predict_split
from loracurve.inference.predictive import Predictive
from loracurve.model.curve_model import CurveModel
from loracurve.system.errors import UserError
from loracurve.tasks.encoding import Encoded
from loracurve.tasks.task import Task
from loracurve.training.config import LoopConfig
from loracurve.training.fit import fit_anchors
from loracurve.training.loop import FitResult

__all__ = ["Along", "Fitted", "Method", "Setting", "Shelf", "along_curve", "fine_tune", "fit_notes", "from_adapters"]


@dataclass(frozen=True)
class Setting:
    """What a method is fitted to."""

    model: CurveModel
    """carries the base model; a method puts its own curve or adapters into it"""
    task: Task
    anchors: ControlPoints
    """[M, ...] independently fine-tuned adapters, each one cost unit, shared by all methods"""
    training: LoopConfig
    """options of one fine-tune"""
    samples: int = 10
    """forward passes that a prediction may take"""
    seed: int = 0
    folder: Path | None = None
    """for checkpoints of a method's own training, which then goes on where it was cut off; None: keep none"""
    progress: bool = False
    """show a bar while training"""
    shelf: Shelf = field(default_factory=lambda: Shelf())
    """methods of this task and seed that were fitted before"""

    @property
    def unit(self) -> int:
        """Examples x forward-backward passes of one fine-tune."""
        return self.training.steps * self.training.batch_size

    def first(self, count: int) -> ControlPoints:
        """The first `count` anchors; raises UserError where there are fewer."""
        there = len(next(iter(self.anchors.values())))
        if not 1 <= count <= there:
            raise UserError(f"expected 1 to {there} anchors, which are all that were trained, found {count}")
        return {name: points[:count] for name, points in self.anchors.items()}


@dataclass(frozen=True)
class Along:
    """Points of a curve, or adapters as slots, that are averaged."""

    spec: CurveSpec
    points: ControlPoints
    t: Tensor
    """[n], or coefficients [n, K] of points off the curve"""
    weights: Tensor | None
    """[n]; equal if None"""

    def put_into(self, model: CurveModel) -> None:
        """Put the curve into the model, once: captured graphs go with it."""
        if model.spec is not self.spec:
            model.set_curve(self.spec, self.points)


class Shelf:
    """Methods of one task and seed by their options, so that what is built on one does not fit it again."""

    def __init__(self) -> None:
        self.saved = 0.0
        """seconds of fitting that were not spent again"""
        self._fitted: dict[str, tuple[Fitted, float]] = {}

    def fit(self, method: Method, setting: Setting) -> Fitted:
        """`method.fit(setting)`, kept if it is an average of points."""
        key = repr(method)
        if key in self._fitted:
            fitted, seconds = self._fitted[key]
            self.saved += seconds
            return fitted
        started = time.perf_counter()
        fitted = method.fit(setting)
        if fitted.along is not None:
            self._fitted[key] = fitted, time.perf_counter() - started
        return fitted


@dataclass(frozen=True)
class Fitted:
    """A fitted method."""

    predict: Callable[[Encoded], Predictive]
    """predicts a split: per-sample probabilities [n, E, C] and their average"""
    passes: int
    """forward passes of a prediction"""
    cost: float
    """training in units of one fine-tune: examples x forward-backward passes"""
    notes: dict[str, Any] = field(default_factory=dict)
    """what the fit found, for the record; JSON-able"""
    along: Along | None = None
    """the points that it averages, if it is an average of points"""


class Method(Protocol):
    """A frozen dataclass whose fields are the method's options."""

    def fit(self, setting: Setting) -> Fitted:
        """Train what there is to train; raises UserError where the setting does not serve."""


def from_adapters(
    setting: Setting,
    adapters: ControlPoints,
    cost: float,
    weights: Tensor | None = None,
    notes: dict[str, Any] | None = None,
) -> Fitted:
    """The average of S adapters [S, ...], with `weights` [S] (equal if None)."""
    count = len(next(iter(adapters.values())))
    return along_curve(setting, CurveSpec.slots(count), adapters, slot_times(count), cost, weights, notes)


def along_curve(
    setting: Setting,
    spec: CurveSpec,
    points: ControlPoints,
    t: Tensor,
    cost: float,
    weights: Tensor | None = None,
    notes: dict[str, Any] | None = None,
) -> Fitted:
    """The average of the points t [n] of a curve, with `weights` [n] (equal if None)."""

    along = Along(spec, points, t, weights)

    def predict(encoded: Encoded) -> Predictive:
        along.put_into(setting.model)
        return predict_split(setting.model, encoded, t, weights)

    return Fitted(predict, len(t), cost, notes or {}, along)


def fine_tune(setting: Setting, training: LoopConfig, adapters: int = 1) -> Fitted:
    """Fine-tune adapters of the anchors' own seeds by other options; their average."""
    setting.model.set_curve(CurveSpec.slots(adapters), setting.first(adapters))
    folder = setting.folder / "training" if setting.folder else None
    result = fit_anchors(setting.model, setting.task, training, folder, progress=setting.progress)
    cost = adapters * result.steps * training.batch_size / setting.unit
    return from_adapters(setting, setting.model.control_points(), cost, notes=fit_notes(result))


def fit_notes(result: FitResult) -> dict[str, Any]:
    """What is recorded of a training run."""
    return {"steps": result.steps, "best_step": result.best_step, "validation_nll": result.validation_nll}
