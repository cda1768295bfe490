"""The curve itself as a method: anchored or free, trained by any options, averaged over points."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal, TypeVar

from loracurve.baselines.base import Fitted, Setting, along_curve, fit_notes
from loracurve.config import CurveConfig, EvaluationConfig
from loracurve.errors import UserError, nearest
from loracurve.evaluation import choose_average
from loracurve.inference import Rule
from loracurve.model import CurveSpec
from loracurve.training import FitConfig, fit

__all__ = ["Curve", "with_changes"]

T = TypeVar("T")


@dataclass(frozen=True)
class Curve:
    """A curve of adapters and the average of its points."""

    curve: CurveConfig = field(default_factory=CurveConfig)
    training: dict[str, Any] = field(default_factory=dict)
    """Options of the curve's training (those of `FitConfig`) that differ from one fine-tune's."""
    units: float | None = None
    """The curve's own training in units of one fine-tune; sets training.steps."""
    quadrature: Rule = "uniform"
    """uniform, gauss-legendre or monte-carlo points."""
    weights: Literal["uniform", "arc-length", "likelihood"] = "uniform"
    """Weights of the points."""
    temperature: float = 0.0
    """T of the likelihood weights; 0: fitted to the validation NLL of the average."""

    def __post_init__(self) -> None:
        with_changes(FitConfig(), self.training, "training")
        if self.units is not None and (self.units <= 0 or "steps" in self.training):
            raise UserError("units: expected a positive number and no training.steps, which it sets; leave one out")

    def fit(self, setting: Setting) -> Fitted:
        model, shape = setting.model, self.curve
        training = self.training_of(setting)
        anchors = 0
        if shape.kind == "free":
            spec = CurveSpec(shape.segments, shape.degree)
            model.set_curve(spec, model.fresh_points(spec, setting.seed))
        else:
            anchors = shape.anchors
            model.set_curve(CurveSpec.slots(anchors), setting.first(anchors))
            model.anchor(shape.degree, shape.alignment, shape.inner, setting.seed)
        folder = setting.folder / "training" if setting.folder else None
        result = fit(model, setting.task, training, folder, progress=setting.progress)
        evaluation = EvaluationConfig(
            setting.samples, self.quadrature, self.weights, self.temperature, seed=setting.seed
        )
        average = choose_average(model, evaluation, setting.task.encode("validation"))
        cost = anchors + result.steps * training.batch_size * training.points / setting.unit
        notes = fit_notes(result) | {"average": average.record}
        return along_curve(setting, model.spec, model.control_points(), average.t, cost, average.weights, notes)

    def training_of(self, setting: Setting) -> FitConfig:
        """One fine-tune's options with this curve's changes, and as many steps as `units` pays for."""
        training = with_changes(FitConfig(**vars(setting.training)), self.training, "training")
        training = replace(training, seed=setting.seed)
        if self.units is None:
            return training
        steps = round(self.units * setting.unit / (training.batch_size * training.points))
        return replace(training, steps=max(steps, 1))


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
