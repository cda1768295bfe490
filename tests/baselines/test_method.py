"""Every posterior of one adapter learns, predicts and repeats itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import matrix
from helpers.settings import posterior_setting

from loracurve.baselines.blob import BLoB
from loracurve.baselines.flat_lora import FlatLoRA
from loracurve.baselines.ivon import IVON
from loracurve.baselines.mc_dropout import MCDropout
from loracurve.baselines.swag import SWAG

METHODS = [FlatLoRA(), MCDropout(0.2), SWAG(collect=6, rank=3), IVON(effective_samples=1e5, hessian=1e-2), BLoB()]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
@matrix.decoder_and_encoder
def test_methods_learn_predict_and_repeat_themselves(method, architecture: str, tmp_path: Path) -> None:
    if isinstance(method, IVON):
        pytest.importorskip("ivon")
    of = posterior_setting(tmp_path, architecture)
    fitted = method.fit(of)
    encoded = of.task.encode("test")
    predictive = fitted.predict(encoded)
    assert predictive.point_log_probs.shape[0] == fitted.passes == (1 if isinstance(method, FlatLoRA) else 4)
    assert len(predictive) == len(encoded)
    assert predictive.mutual_information.max() > 0 or fitted.passes == 1
    again = method.fit(of).predict(encoded)
    assert torch.equal(again.point_log_probs, predictive.point_log_probs)
    if architecture == "encoder":
        other = method.fit(replace(of, training=replace(of.training, seed=4))).predict(encoded)
        assert not torch.equal(other.point_log_probs, predictive.point_log_probs)
    assert fitted.cost == (2 if isinstance(method, SWAG) else 1)
