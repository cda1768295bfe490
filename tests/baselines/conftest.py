"""A tiny setting with random anchors."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.made import made_task, vocabulary
from helpers.settings import TRAINING
from helpers.tiny import lora_config, random_points, tiny

from loracurve.baselines.method import Setting
from loracurve.curve.spec import CurveSpec
from loracurve.model.curve_model import CurveModel


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    """Random anchors, so that their predictions differ."""
    task = made_task(tmp_path, "qwen2", "label")
    base = tiny("qwen2", vocabulary=vocabulary(task))
    model = CurveModel(base, lora_config("qwen2"), CurveSpec.slots(4))
    return Setting(model, task, random_points(model), TRAINING, samples=5)
