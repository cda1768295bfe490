"""A curve as a method: its cost, its anchors, its options."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.settings import TRAINING, members

from loracurve.baselines.curve import Curve
from loracurve.baselines.method import Setting
from loracurve.curve.config import CurveConfig
from loracurve.system.errors import UserError
from loracurve.training.config import ObjectiveConfig


def test_a_curve_spends_what_it_is_given_and_keeps_its_anchors(setting: Setting) -> None:
    fitted = Curve(CurveConfig("anchored", alignment="none"), {"points": 4, "batch_size": 2}, units=3).fit(setting)
    assert fitted.notes["steps"] == 6  # 3 units x 4 steps x 4 examples = 6 steps x 2 examples x 4 points
    assert (fitted.cost, fitted.passes) == (6, 5)
    found = fitted.predict(setting.task.encode("test"))
    torch.testing.assert_close(found.point_probs[::2].double(), members(setting)[:3], atol=1e-5, rtol=1e-4)
    free = Curve(training={"steps": 8}).fit(setting)  # the default: four segments, a point for each row
    assert setting.model.spec.size == 9 and free.cost == 2 and free.notes["average"]["points"] == 5


def test_changes_of_a_curves_training_reach_the_options_inside(setting: Setting) -> None:
    method = Curve(training={"points": 2, "objective": {"jsd": "bonus", "weight": 0.5}, "seed": 3})
    config = method.training_of(replace(setting, seed=7))
    assert config.objective == ObjectiveConfig("bonus", 0.5)
    assert (config.steps, config.learning_rate, config.seed) == (TRAINING.steps, TRAINING.learning_rate, 7)
    with pytest.raises(UserError, match="unknown option training.objective.jds; did you mean 'jsd'"):
        Curve(training={"objective": {"jds": "bonus"}})
