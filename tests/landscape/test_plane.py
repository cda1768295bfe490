"""Planes through three adapters."""

from __future__ import annotations

from pathlib import Path as FilePath

import pytest
import torch
from helpers.laid_out import setting

from loracurve.curve import bezier
from loracurve.curve.lora_space import adapter_at
from loracurve.curve.spec import CurveSpec
from loracurve.landscape.plane import choose_corners, plane_frames, plane_through
from loracurve.landscape.scan import mean_loss
from loracurve.system.errors import UserError


def test_plane_projection_by_hand() -> None:
    # Control points in R^3: corners (0,0,0), (2,0,0), (1,3,0) and one point at (1,1,4) above the plane.
    points = torch.tensor([[0, 0, 0], [2, 0, 0], [1, 3, 0], [1, 1, 4]], dtype=torch.float64)
    plane = plane_through(bezier.gram([points]), (0, 1, 2))
    xy, outside = plane.project(torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(xy, points[:, :2], rtol=1e-12, atol=1e-12)
    expected = torch.tensor([0, 0, 0, 4 / 18**0.5], dtype=torch.float64)
    torch.testing.assert_close(outside, expected, rtol=1e-12, atol=1e-7)
    back = plane.coefficients(xy[:3])
    torch.testing.assert_close(back @ points, points[:3], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(back.sum(1), torch.ones(3, dtype=torch.float64))
    with pytest.raises(UserError, match="on one line"):
        plane_through(bezier.gram([points[[0, 1, 1]] * torch.tensor([[1.0], [1.0], [2.0]])]), (0, 1, 2))
    # Any isometric or shifted copy of the points has the same coordinates up to the origin.
    shifted = points + torch.tensor([5.0, -1.0, 2.0])
    again = plane_through(bezier.gram([shifted]), (0, 1, 2)).project(torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(again[0], xy, rtol=1e-9, atol=1e-9)


def test_a_curve_inside_the_plane_has_nothing_outside(tmp_path: FilePath) -> None:
    model, split = setting(tmp_path)
    points = {n: p[[0, 1, 2]] for n, p in model.control_points().items()}
    model.set_curve(CurveSpec(1, 2), points)
    surface, drawn = plane_frames(model, split, side=3, points=7)
    assert len(surface) == 9 and drawn["outside"].max() < 1e-6
    assert choose_corners(1, 2) == (0, 1, 2) and choose_corners(4, 3) == (0, 6, 12)
    with pytest.raises(UserError, match="straight line"):
        choose_corners(1, 1)
    # A grid point at a control point's coordinates has that control point's loss.
    plane = plane_through(bezier.gram(points.values()), (0, 1, 2))
    place = plane.coefficients(torch.tensor(drawn[drawn["kind"] == "control"][["x", "y"]].to_numpy())[1])
    expected = mean_loss(model, {n: p[1] for n, p in points.items()}, split)
    assert mean_loss(model, adapter_at(points, place), split) == pytest.approx(expected, abs=1e-6)
