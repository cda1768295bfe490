"""Paths between anchors: ends, norms, velocities and lengths have known answers."""

from __future__ import annotations

from pathlib import Path as FilePath

import pytest
import torch
from helpers import matrix
from helpers.laid_out import products, setting

from loracurve.curve.gauge import delta_w_gram
from loracurve.landscape.config import PATHS
from loracurve.landscape.paths import Path, anchor_paths, curve_path, grid, joints, update_norms
from loracurve.landscape.scan import mean_loss
from loracurve.system.errors import UserError

LINES = [name for name in PATHS if name != "curve"]


@pytest.mark.parametrize("name", LINES)
@matrix.decoder_and_encoder
def test_every_control_is_the_anchor_at_the_anchors(name: str, architecture: str, tmp_path: FilePath) -> None:
    model, split = setting(tmp_path, architecture, "head" if architecture == "encoder" else "letter")
    anchors = joints(model.control_points(), 2)
    path = anchor_paths(anchors, [name], model.scalings)[name]
    for m, t in enumerate((0.0, 0.5, 1.0)):
        expected = {n: p[m] for n, p in anchors.items()}
        found = path.adapter(t)
        for key, product in products(expected).items():
            torch.testing.assert_close(products(found)[key], product, rtol=1e-9, atol=1e-9)
        assert mean_loss(model, found, split) == pytest.approx(mean_loss(model, expected, split), abs=1e-5)


def test_the_delta_w_line_is_exact_and_of_rank_2r(tmp_path: FilePath) -> None:
    model, _ = setting(tmp_path)
    anchors = joints(model.control_points(), 2)
    path = anchor_paths(anchors, ["delta_w"], model.scalings)["delta_w"]
    ends = [products({n: p[m] for n, p in anchors.items()}) for m in (0, 1)]
    adapter = path.adapter(0.125)  # a quarter of the first segment
    for name, product in products(adapter).items():
        torch.testing.assert_close(product, 0.75 * ends[0][name] + 0.25 * ends[1][name], rtol=1e-12, atol=1e-12)
        assert len(adapter[name]) == 8
    # A straight line in Delta W is as long as the distances between its anchors, at constant speed.
    assert path.arc_length() == pytest.approx(float(path.distances([0, 0.5, 1]).diagonal(1).sum()), rel=1e-12)
    assert path.speed(0.1) == pytest.approx(path.speed(0.4), rel=1e-9)


def test_norm_matched_line_has_the_norms_it_is_given(tmp_path: FilePath) -> None:
    model, _ = setting(tmp_path)
    anchors = joints(model.control_points(), 2)
    paths = anchor_paths(anchors, ["straight", "norm_matched"], model.scalings)
    ends = [update_norms({n: p[m] for n, p in anchors.items()}) for m in (1, 2)]
    found, plain = (update_norms(paths[n].adapter(0.6)) for n in ("norm_matched", "straight"))
    for name in found:
        assert found[name] == pytest.approx(0.8 * ends[0][name] + 0.2 * ends[1][name], rel=1e-9)
    assert sum(plain.values()) < 0.9 * sum(found.values()), "the factor line loses norm between unrelated adapters"


@pytest.mark.parametrize("name", PATHS)
def test_velocity_is_the_derivative(name: str, tmp_path: FilePath) -> None:
    model, _ = setting(tmp_path, "encoder", "head")
    path = (
        curve_path(model)
        if name == "curve"
        else anchor_paths(joints(model.control_points(), 2), [name], model.scalings)[name]
    )
    t, h = 0.3, 1e-5
    velocity = path.velocity(t)
    low, high = path.adapter(t - h), path.adapter(t + h)
    for key, product in products(velocity).items():
        torch.testing.assert_close(product, (products(high)[key] - products(low)[key]) / (2 * h), rtol=1e-5, atol=1e-7)
    for key in velocity:
        if "lora_" not in key:
            torch.testing.assert_close(velocity[key], (high[key] - low[key]) / (2 * h), rtol=1e-5, atol=1e-7)
    assert path.speed(t) == pytest.approx(float(path.distances([t - h, t + h])[0, 1]) / (2 * h), rel=1e-4)


def test_speed_in_delta_w_obeys_the_bound_of_the_theory_page(tmp_path: FilePath) -> None:
    """docs/theory.md, statement 2: ||Delta W_m'||_F <= s_m R_m Lambda_m for every map, at every t."""
    model, _ = setting(tmp_path)
    path, scalings = curve_path(model), model.scalings
    for name_a, a in path.points.items():
        if "lora_A" not in name_a:
            continue
        b = path.points[name_a.replace("lora_A", "lora_B")]
        steps = (a.diff(dim=0).square().sum((1, 2)) + b.diff(dim=0).square().sum((1, 2))).sqrt()
        largest = max(
            float(torch.linalg.matrix_norm(x, 2) + torch.linalg.matrix_norm(y, 2)) for x, y in zip(a, b, strict=True)
        )
        bound = scalings[name_a] * largest * 2 * 2 * float(steps.max())
        one = {name_a: a, name_a.replace("lora_A", "lora_B"): b}
        speeds = [Path("", one, 2, 2, scalings).speed(t) for t in (0.0, 0.2, 0.5, 0.9, 1.0)]
        assert 0.01 * bound < max(speeds) <= bound


def test_lengths_agree_with_polygons_and_gram_matrices(tmp_path: FilePath) -> None:
    model, _ = setting(tmp_path)
    path = curve_path(model)
    t = grid(2, 51)
    polygon = float(path.distances(t.tolist()).diagonal(1).sum())
    assert path.arc_length() == pytest.approx(polygon, rel=1e-3) and polygon < path.arc_length()
    gram = delta_w_gram({n: p for n, p in path.points.items()}, model.scalings)
    squares = gram.diagonal()
    torch.testing.assert_close(
        path.distances([0, 0.5, 1]) ** 2, (squares[:, None] + squares - 2 * gram)[::2, ::2], rtol=1e-9, atol=1e-9
    )


def test_grid_holds_the_joints() -> None:
    for segments in range(1, 12):
        t = grid(segments, 61)
        assert len(t) == segments * 60 + 1
        for s in range(segments + 1):
            assert float(t[s * 60]) == pytest.approx(s / segments, abs=1e-15)
    with pytest.raises(UserError, match="at least 2"):
        grid(1, 1)


def test_wrong_paths_are_named(tmp_path: FilePath) -> None:
    model, _ = setting(tmp_path)
    anchors = joints(model.control_points(), 2)
    with pytest.raises(UserError, match="did you mean 'straight'"):
        anchor_paths(anchors, ["straigth"])
    with pytest.raises(UserError, match="at least 2 adapters, found 1"):
        anchor_paths({n: p[:1] for n, p in anchors.items()})
    with model.merger.adapter(model.adapter(0.0)):
        pass
    assert Path("x", anchors, 2, 1).adapter(0.25).keys() == anchors.keys()
