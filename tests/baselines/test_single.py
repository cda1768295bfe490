"""One adapter, with options of its own."""

from __future__ import annotations

from dataclasses import replace

import torch
from helpers.settings import TRAINING

from loracurve.baselines.method import Setting
from loracurve.baselines.single import Single
from loracurve.curve.anchored import slot_times
from loracurve.curve.spec import CurveSpec
from loracurve.inference.prediction import predict_split
from loracurve.training.fit import fit_anchors


def test_other_options_of_a_single_adapter_are_the_first_anchor_trained_so(setting: Setting) -> None:
    for method, training in (
        (Single(keep="last"), replace(TRAINING, keep="last")),
        (Single(weight_decay=0.3), replace(TRAINING, weight_decay=0.3)),
    ):
        fitted = method.fit(setting)
        found = fitted.predict(setting.task.encode("test"))
        assert (fitted.passes, fitted.cost) == (1, 1)
        setting.model.set_curve(CurveSpec.slots(1), setting.first(1))
        fit_anchors(setting.model, setting.task, training, progress=False)
        same = predict_split(setting.model, setting.task.encode("test"), slot_times(1))
        torch.testing.assert_close(found.probs, same.probs, atol=1e-6, rtol=1e-6)
