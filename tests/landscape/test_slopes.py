"""Slopes along paths and their bounds."""

from __future__ import annotations

from pathlib import Path as FilePath

import pytest
import torch
from helpers import matrix
from helpers.laid_out import setting

from loracurve.landscape.paths import anchor_paths, curve_path, joints
from loracurve.landscape.scan import LaidOut
from loracurve.landscape.slopes import loss_slopes, weight_gradients
from loracurve.tasks.batching import collate


@pytest.mark.parametrize("name", ["straight", "delta_w", "norm_matched", "curve"])
@matrix.decoder_and_encoder
def test_slope_bounds_hold_and_slopes_are_measured(name: str, architecture: str, tmp_path: FilePath) -> None:
    model, split = setting(tmp_path, architecture, "head" if architecture == "encoder" else "letter")
    lines = anchor_paths(joints(model.control_points(), 2), scalings=model.scalings)
    path = curve_path(model) if name == "curve" else lines[name]
    frame = loss_slopes(model, path, split, [0.1, 0.35, 0.5, 0.8, 1.0], step=1e-4)  # 0.5 is a joint
    assert (frame["bound"] >= frame["slope"].abs()).all() and (frame["bound"] >= frame["measured"].abs()).all()
    # One-sided quotients, at the joint and at the end, are accurate to first order only: their error goes with the
    # curvature, and so with the size of gradients, also where the slope is small by chance (tokens differ by process).
    for row, one_sided in zip(frame.itertuples(), (False, False, True, False, True), strict=True):
        tolerance = {"rel": 5e-2, "abs": max(1e-3, 4e-5 * row.bound)} if one_sided else {"rel": 2e-2, "abs": 1e-3}
        assert row.slope == pytest.approx(row.measured, **tolerance)
    assert frame["slope"].abs().max() > 1e-3
    assert all(p.grad is None for p in model.parameters()), "the model's own gradients stay as they were"


def test_weight_gradients_of_split_batches_add_up(tmp_path: FilePath) -> None:
    model, split = setting(tmp_path)
    packing = model.runner.takes_trees(split.encoded)
    halves = [collate(split.encoded, list(range(i, i + 6)), packing=packing) for i in (0, 6)]
    adapter = model.adapter(0.4)
    loss, whole = weight_gradients(model, adapter, split)
    apart, parts = weight_gradients(model, adapter, LaidOut("train", split.encoded, halves, split.labels))
    assert loss == pytest.approx(apart, rel=1e-9)
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-7)
