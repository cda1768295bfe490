"""Temperature scaling of another method."""

from __future__ import annotations

import pytest
import torch

from loracurve.baselines.ensembles import Ensemble
from loracurve.baselines.method import Setting
from loracurve.baselines.temperature import TemperatureScaled
from loracurve.inference.calibration import fit_temperature


def test_temperature_is_that_of_the_average_on_validation_rows(setting: Setting) -> None:
    validation = setting.task.encode("validation")
    plain = Ensemble(3).fit(setting)
    scaled = TemperatureScaled(Ensemble(3)).fit(setting)
    t = fit_temperature(plain.predict(validation).log_probs, validation.labels)
    assert scaled.notes["temperature"] == pytest.approx(t) and (scaled.passes, scaled.cost) == (3, 3)
    expected = (plain.predict(setting.task.encode("test")).log_probs / t).softmax(-1)
    found = scaled.predict(setting.task.encode("test"))
    torch.testing.assert_close(found.probs, expected, atol=1e-6, rtol=1e-6)
    assert found.mutual_information.abs().max() < 1e-9
