"""Control points by PEFT name."""

from __future__ import annotations

from pathlib import Path

import torch
from helpers.matrix import build
from helpers.tiny import random_points

from loracurve.curve.lora_space import PREFIX, adapter_at
from loracurve.curve.spec import CurveSpec


def test_single_adapters_of_a_slot_model_are_its_control_points(tmp_path: Path) -> None:
    model, _, _ = build("qwen2", tmp_path, CurveSpec.slots(3))
    model.set_curve(model.spec, random_points(model))
    points = model.control_points()
    name = next(iter(points))
    assert name.startswith(PREFIX)
    assert torch.equal(adapter_at(points, torch.tensor([0.0, 1.0, 0.0]))[name], points[name][1])
