"""What a method's points do not know: Gaussians over their answer rows, and the distance from the training data."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from loracurve.baselines.method import Fitted, Method, Setting
from loracurve.baselines.single import Single
from loracurve.inference.config import UnknownsConfig
from loracurve.inference.predictive import Predictive
from loracurve.inference.unknowns import fit_unknowns, training_rows
from loracurve.system.errors import UserError
from loracurve.tasks.encoding import Encoded

__all__ = ["FamiliarityOf", "LaplaceCurve"]


@dataclass(frozen=True)
class LaplaceCurve(UnknownsConfig):
    """Another method with a Gaussian over the answer rows at each of its points or adapters."""

    of: Method = field(default_factory=Single)
    """The method, with its options: an average of points of a curve, or of adapters."""

    def fit(self, setting: Setting) -> Fitted:
        """Raises UserError where `of` is no average of points."""
        if self.gaussians == "none":
            raise UserError("gaussians: expected last_layer or auto, found none; take the method familiarity")
        return _fit(self, self.of, setting)


@dataclass(frozen=True)
class FamiliarityOf(UnknownsConfig):
    """Another method's probabilities, and the distance from its training data."""

    of: Method = field(default_factory=Single)
    """The method, with its options: an average of points of a curve, or of adapters."""

    def fit(self, setting: Setting) -> Fitted:
        """Raises UserError where `of` is no average of points."""
        if self.familiarity == "none":
            raise UserError("familiarity: expected curve or base, found none")
        return _fit(self, self.of, setting, gaussians="none")


def _fit(options: UnknownsConfig, of: Method, setting: Setting, **changes: Any) -> Fitted:
    fitted = setting.shelf.fit(of, setting)
    along = fitted.along
    if along is None:
        raise UserError(f"of: expected an average of points or adapters, found {type(of).__name__}")
    along.put_into(setting.model)
    model, task = setting.model, setting.task
    own = {f.name: getattr(options, f.name) for f in fields(UnknownsConfig)}
    config = UnknownsConfig(**own | changes)
    train, total = training_rows(task, config.rows)
    unknowns = fit_unknowns(model, train, task.encode("validation"), along.t, along.weights, config, total)

    def predict(encoded: Encoded) -> Predictive:
        along.put_into(model)
        return unknowns.predict(model, {"": encoded}, along.t, along.weights)[""]

    passes = fitted.passes + unknowns.on_base
    # A forward pass is a third of one with gradients.
    cost = fitted.cost + passes * (len(train) + len(task.encode("validation"))) / (3 * setting.unit)
    notes: dict[str, Any] = {"rows": len(train)}
    if unknowns.gaussians is not None:
        notes |= {"tau": unknowns.gaussians.tau, "form": unknowns.gaussians.form}
    return Fitted(predict, passes, cost, fitted.notes | notes)
