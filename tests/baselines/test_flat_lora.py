"""Flat-LoRA without noise is a fine-tune."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.settings import posterior_setting

from loracurve.baselines.flat_lora import FlatLoRA
from loracurve.curve.spec import CurveSpec
from loracurve.system.errors import UserError
from loracurve.training.config import PerturbationConfig
from loracurve.training.fit import fit_anchors


def test_flat_lora_without_noise_is_the_fine_tune_of_anchor_0(tmp_path: Path) -> None:
    of = posterior_setting(tmp_path)
    of.model.set_curve(CurveSpec.slots(2), of.anchors)
    fit_anchors(of.model, of.task, of.training, progress=False)
    anchors = of.model.control_points()
    FlatLoRA(PerturbationConfig("flat_lora", 0.0)).fit(of)
    found = of.model.control_points()
    for name, tensor in anchors.items():
        torch.testing.assert_close(found[name], tensor[:1], rtol=1e-3, atol=1e-5)
    FlatLoRA().fit(of)
    assert any(not torch.allclose(p, found[n], atol=1e-3) for n, p in of.model.control_points().items())
    with pytest.raises(UserError, match="perturbation.kind: expected flat_lora"):
        FlatLoRA(PerturbationConfig())
