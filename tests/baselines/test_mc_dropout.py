"""MC dropout: one mask for all tokens of a pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.settings import posterior_setting
from torch import Tensor, nn

from loracurve.baselines.mc_dropout import masked_adapters
from loracurve.curve.anchored import slot_times
from loracurve.curve.spec import CurveSpec
from loracurve.tasks.batching import collate


def test_a_pass_of_mc_dropout_is_the_layer_with_one_mask_for_all_tokens(tmp_path: Path) -> None:
    of = posterior_setting(tmp_path)
    model, encoded = of.model, of.task.encode("test")
    adapter = {n: p[:1] for n, p in of.anchors.items()}
    masked = masked_adapters(adapter, 0.3, 3, seed=5)
    model.set_curve(CurveSpec.slots(3), masked)
    batch = collate(encoded, range(6))
    found = model.point_log_probs(batch, slot_times(3))

    class Mask(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * self.keep

    model.set_curve(CurveSpec.slots(1), adapter)
    for s in range(3):
        for name, layer in model.layers.items():
            a = masked[f"base_model.model.{name}.lora_A.weight"][s]
            layer.dropout = Mask()
            layer.dropout.keep = (a != 0).any(0).float() / 0.7
        torch.testing.assert_close(model.point_log_probs(batch, slot_times(1))[0], found[s], rtol=1e-5, atol=1e-5)


def test_masks_drop_columns_at_the_asked_rate_and_keep_the_mean() -> None:
    adapter = {"x.lora_A.weight": torch.ones(1, 4, 500), "x.lora_B.weight": torch.ones(1, 3, 4)}
    masked = masked_adapters(adapter, 0.25, 20, seed=0)
    a = masked["x.lora_A.weight"]
    assert torch.equal(a, a[:, :1].expand_as(a)), "a feature is dropped for all rows of A at once"
    assert (a == 0).float().mean() == pytest.approx(0.25, abs=0.02)
    assert a.mean() == pytest.approx(1, abs=0.02)
    assert torch.equal(masked["x.lora_B.weight"], torch.ones(20, 3, 4))
    assert not torch.equal(a[0], a[1])
