"""Checkpoints of the loop."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from loracurve.training.checkpoint import LoopState, load_checkpoint, save_checkpoint


def test_a_checkpoint_comes_back_onto_the_device_of_the_factors(tmp_path: Path) -> None:
    """Moments and counts of steps too: a kernel that reads another device's memory ends the process."""
    factors = [torch.ones(2, 3, requires_grad=True)]
    optimizer = torch.optim.AdamW(factors, fused=True)
    factors[0].grad = torch.ones(2, 3)
    optimizer.step()
    state = LoopState(1, [torch.zeros(2, 3)], [0.5], [1], [0], [{"step": 1, "nll": 0.5}])
    save_checkpoint(tmp_path, factors, optimizer, state)
    elsewhere = [torch.ones(2, 3, device="meta", requires_grad=True)]
    other = torch.optim.AdamW(elsewhere, fused=True)
    found = LoopState(0, [torch.zeros(2, 3, device="meta")], [math.inf], [0], [0], [])
    load_checkpoint(tmp_path, elsewhere, other, found)
    assert found.step == 1 and found.best_nll == [0.5]
    assert {k: v.device.type for k, v in other.state[elsewhere[0]].items()} == dict.fromkeys(
        ("step", "exp_avg", "exp_avg_sq"), "meta"
    )
