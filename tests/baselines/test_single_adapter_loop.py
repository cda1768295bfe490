"""The loop that trains one adapter takes the steps of a fine-tune."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.settings import LOOP, posterior_setting
from torch import Tensor

from loracurve.baselines.single_adapter_loop import OneAdapter, fresh_adapter, train
from loracurve.baselines.swag import SWAG
from loracurve.curve.spec import CurveSpec
from loracurve.system.errors import UserError
from loracurve.training.fit import fit_anchors


def test_the_shared_loop_takes_the_steps_of_a_fine_tune(tmp_path: Path) -> None:
    from loracurve.baselines.swag import _Collecting

    of = posterior_setting(tmp_path, loop=replace(LOOP, accumulation=2, weight_decay=0.0, evaluate_every=3))
    of.model.set_curve(CurveSpec.slots(1), fresh_adapter(of))
    expected = fit_anchors(of.model, of.task, of.training, progress=False)
    points = of.model.control_points()
    one = OneAdapter(of.model, fresh_adapter(of))
    learner = _Collecting(one.values(), of.training, SWAG())
    train(of, one, learner, of.training, "again")
    found = one.stack([learner.adapter()])
    assert expected.best_step[0] > 0
    for name, tensor in points.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)


def test_training_ends_after_validations_without_improvement(tmp_path: Path) -> None:
    class Standing:
        def __init__(self, values: list[Tensor]) -> None:
            self.values = values

        def step(self, nll_at, step: int, factor: float) -> float:
            return nll_at(self.values)[0]

        def adapter(self) -> list[Tensor]:
            return self.values

        state = adapter

    of = posterior_setting(tmp_path)
    one = OneAdapter(of.model, fresh_adapter(of))
    loop = replace(LOOP, evaluate_every=2, patience=2)
    assert train(of, one, Standing(one.values()), loop, "standing").steps == 6

    class Bad(Standing):
        def step(self, nll_at, step: int, factor: float) -> float:
            return math.nan

    with pytest.raises(UserError, match="bad: the loss is not finite at step 1"):
        train(of, one, Bad(one.values()), loop, "bad")
