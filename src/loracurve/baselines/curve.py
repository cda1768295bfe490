"""The curve itself as a method: anchored or free, trained by any options, averaged over points."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal, TypeVar

from loracurve.baselines.method import Fitted, Setting, along_curve, fit_notes
from loracurve.curve.config import CurveConfig, Rule
from loracurve.curve.spec import CurveSpec
from loracurve.inference.config import EvaluationConfig, TunnelConfig
from loracurve.inference.model_average import average_of
from loracurve.system.errors import UserError, nearest
from loracurve.system.ranges import NonNegative, Positive, check_ranges
from loracurve.training.config import FitConfig, LoopConfig, passes_of
from loracurve.training.fit import fit

__all__ = ["Curve", "own_options", "with_changes"]


T = TypeVar("T")


@dataclass(frozen=True)
class Curve:
    """A curve of adapters and the average of its points."""

    curve: CurveConfig = field(default_factory=CurveConfig)
    training: dict[str, Any] = field(default_factory=dict)
    """Options of the curve's training (those of `FitConfig`) that differ from one fine-tune's."""
    units: Positive | None = None
    """The curve's own training in units of one fine-tune; sets training.steps."""
    quadrature: Rule = "uniform"
    """uniform, gauss-legendre or monte-carlo points."""
    weights: Literal["uniform", "arc-length", "likelihood"] = "uniform"
    """Weights of the points."""
    temperature: NonNegative = 0.0
    """T of the likelihood weights; 0: fitted to the validation NLL of the average."""
    inference: Literal["curve", "tunnel"] = "curve"
    """curve: average points of the curve. tunnel: as many posterior samples in a tube around it."""
    tunnel: TunnelConfig = field(default_factory=TunnelConfig)
    """The tube and its sampler."""

    def __post_init__(self) -> None:
        check_ranges(self)
        with_changes(FitConfig(steps=10**6), self.training, "training")  # a suite's own steps are not known yet
        if self.units is not None and "steps" in self.training:
            raise UserError("units: expected no training.steps, which it sets; leave one out")

    def fit(self, setting: Setting) -> Fitted:
        """Train the curve; raises UserError for options that do not go together or suit the curve."""
        model, task, training = setting.model, setting.task, self.training_of(setting)
        cost = self._start(setting, training)
        folder = setting.folder / "training" if setting.folder else None
        result = fit(model, task, training, folder, progress=setting.progress)
        cost += result.steps * training.batch_size * passes_of(training) / setting.unit
        evaluation = EvaluationConfig(
            points=setting.samples,
            quadrature=self.quadrature,
            weights=self.weights,
            temperature=self.temperature,
            inference=self.inference,
            tunnel=self.tunnel,
            seed=setting.seed,
        )
        average = average_of(model, evaluation, task)
        notes = fit_notes(result) | result.settled | {"average": average.record}
        return along_curve(setting, model.spec, model.control_points(), average.where, cost, average.weights, notes)

    def _start(self, setting: Setting, training: FitConfig) -> float:
        """Put the curve into the model as it is before training; returns what its anchors cost."""
        model, shape = setting.model, self.curve
        spec = shape.spec(shape.anchors)
        training.check_curve(spec)  # before anchors of its own are trained
        if shape.kind == "free":
            model.set_curve(spec, model.fresh_points(spec, setting.seed))
            return 0.0
        model.set_curve(CurveSpec.slots(shape.anchors), setting.first(shape.anchors))
        model.anchor(shape.degree, shape.alignment, shape.inner, setting.seed, shape.pieces, shape.closed)
        return float(shape.anchors)

    def training_of(self, setting: Setting) -> FitConfig:
        """One fine-tune's options with this curve's changes, and as many steps as `units` pays for."""
        training = with_changes(FitConfig(**vars(setting.training)), self.training, "training")
        training = replace(training, seed=setting.seed)
        if self.units is None:
            return training
        steps = round(self.units * setting.unit / (training.batch_size * passes_of(training)))
        return replace(training, steps=max(steps, 1))


def own_options(curve: Curve) -> dict[str, Any]:
    """All options of a curve's training that a fine-tune does not have, and the changes to those that it has."""
    training = with_changes(FitConfig(steps=10**6), curve.training, "training")
    shared = {f.name for f in fields(LoopConfig)} - set(curve.training)
    return {f.name: getattr(training, f.name) for f in fields(FitConfig) if f.name not in shared}


def with_changes(options: T, changes: Mapping[str, Any], where: str) -> T:
    """A dataclass with other values; mappings change the dataclasses inside. Raises UserError for an unknown name."""
    known = {f.name for f in fields(options)}  # type: ignore[arg-type]
    values = {}
    for name, value in changes.items():
        if name not in known:
            raise UserError(f"unknown option {where}.{name}{nearest(name, known)}")
        now = getattr(options, name)
        inside = is_dataclass(now) and isinstance(value, Mapping)
        values[name] = with_changes(now, value, f"{where}.{name}") if inside else value
    return replace(options, **values)  # type: ignore[type-var]
