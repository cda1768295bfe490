"""Temperature scaling of any method's average (Guo et al. 2017), T from the validation rows."""

from __future__ import annotations

from dataclasses import dataclass

from loracurve.baselines.method import Fitted, Method, Setting
from loracurve.inference.calibration import fit_temperature, tempered
from loracurve.inference.predictive import Predictive
from loracurve.tasks.encoding import Encoded

__all__ = ["TemperatureScaled"]


@dataclass(frozen=True)
class TemperatureScaled:
    """Another method, its averaged prediction tempered: one distribution, so that it has no mutual information."""

    of: Method
    """The method, with its options."""

    def fit(self, setting: Setting) -> Fitted:
        fitted = setting.shelf.fit(self.of, setting)
        validation = setting.task.encode("validation")
        temperature = fit_temperature(fitted.predict(validation).log_probs, validation.labels)

        def predict(encoded: Encoded) -> Predictive:
            return tempered(fitted.predict(encoded), temperature)

        return Fitted(predict, fitted.passes, fitted.cost, fitted.notes | {"temperature": temperature})
