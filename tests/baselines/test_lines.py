"""Averages of models on lines between the anchors."""

from __future__ import annotations

import pytest
import torch
from helpers.made import vocabulary
from helpers.settings import members
from helpers.tiny import lora_config, tiny

from loracurve.baselines.lines import Line
from loracurve.baselines.method import Setting
from loracurve.curve.gauge import align
from loracurve.curve.lora_space import PREFIX
from loracurve.curve.spec import CurveSpec
from loracurve.inference.prediction import predict_split
from loracurve.model.curve_model import CurveModel


@pytest.mark.parametrize("path", ["straight", "balanced+procrustes", "delta_w"])
def test_lines_average_models_between_the_anchors(setting: Setting, path: str) -> None:
    fitted = Line(path, 3).fit(setting)  # type: ignore[arg-type]
    found = fitted.predict(setting.task.encode("test"))
    assert (fitted.passes, fitted.cost) == (5, 3)
    # t = 0, 1/4, 1/2, 3/4, 1 on two segments: anchors and the middles between them
    anchors = {n: p[:3] for n, p in setting.anchors.items()}
    if path == "balanced+procrustes":
        anchors = align(anchors)
    torch.testing.assert_close(found.point_probs[::2].double(), members(setting)[:3], atol=1e-5, rtol=1e-4)
    if path == "delta_w":
        # A model of the mean update: both anchors' updates in one adapter of rank 2 r, half of each.
        task = setting.task
        base = tiny("qwen2", vocabulary=vocabulary(task))
        middle = {}
        for name in setting.model.layers:
            a, b = (setting.anchors[f"{PREFIX}{name}.lora_{x}.weight"] for x in "AB")
            middle[f"{PREFIX}{name}.lora_A.weight"] = torch.cat([a[0], a[1]])[None]
            middle[f"{PREFIX}{name}.lora_B.weight"] = torch.cat([b[0], b[1]], dim=1)[None] / 2
        double = CurveModel(base, lora_config("qwen2", r=8, lora_alpha=16), CurveSpec.slots(1), middle)
        expected = predict_split(double, task.encode("test"), torch.zeros(1)).probs
    else:
        halves = {n: (p[:1] + p[1:2]) / 2 for n, p in anchors.items()}
        setting.model.set_curve(CurveSpec.slots(1), halves)
        expected = predict_split(setting.model, setting.task.encode("test"), torch.zeros(1)).probs
    torch.testing.assert_close(found.point_probs[1].double(), expected, atol=1e-5, rtol=1e-4)
