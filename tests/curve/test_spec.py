"""Shapes of curves: sizes, closed curves, shared factors, and what cannot be."""

from __future__ import annotations

import warnings

import pytest
import torch

from loracurve.curve import bezier
from loracurve.curve.config import CurveConfig
from loracurve.curve.quadrature import gauss_legendre
from loracurve.curve.spec import CurveSpec, number_of_control_points
from loracurve.system.errors import UserError


def test_number_of_control_points():
    assert [number_of_control_points(*sd) for sd in ((2, 2), (1, 3), (4, 1), (1, 0), (3, 0))] == [
        5,
        4,
        5,
        1,
        1,
    ]
    for bad in ((0, 1), (1, -1)):
        with pytest.raises(ValueError, match="expected segments"):
            number_of_control_points(*bad)


def test_shapes_that_cannot_be_are_refused() -> None:
    with pytest.raises(UserError, match="factors: expected both"):
        CurveSpec(1, 2, (False, True, False), factors="A")


@pytest.mark.parametrize(
    "spec",
    [
        CurveSpec(3, 2),
        CurveSpec(2, 3, closed=True),
        CurveSpec(2, 2, factors="A"),
        CurveSpec.slots(3),
        CurveSpec.anchored(3),
        CurveSpec.anchored(2, 3, "balanced"),
        CurveSpec.anchored(3, 1, pieces=2),
        CurveSpec.anchored(2, closed=True),
    ],
)
def test_options_are_found_of_a_shape(spec: CurveSpec) -> None:
    found = CurveConfig.of(spec)
    assert found.spec(found.anchors) == spec and (found.kind == "anchored") == bool(spec.trainable)


@pytest.mark.parametrize("spec", [CurveSpec.anchored(3, 1), CurveSpec(2, 2, (False, True, True, False, False))])
def test_shapes_that_no_options_make_have_those_of_their_segments(spec: CurveSpec) -> None:
    assert CurveConfig.of(spec) == CurveConfig(segments=2, degree=spec.degree)


# ---- closed curves

CLOSED = [(s, d) for s in (1, 2, 3, 4) for d in (2, 3, 4) if (s, d) != (1, 2)]


def close(a: torch.Tensor, b: torch.Tensor, atol: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=atol)


def points(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("segments", "degree"), CLOSED)
def test_closed_curves_end_where_they_begin(segments: int, degree: int) -> None:
    spec = CurveSpec(segments, degree, closed=True)
    e = spec.dependence()
    assert e is not None and e.shape == (spec.size, spec.size) and e.dtype == torch.float64
    free = list(range(spec.size - 1))
    assert torch.equal(e[free][:, free], torch.eye(spec.size - 1, dtype=torch.float64)) and not e[:, -1].any()
    assert torch.equal(e[-1], e[0]), "the last point is the first"
    close(e @ e, e)
    close(e.sum(1), torch.ones(spec.size, dtype=torch.float64))
    control = e @ points(spec.size)

    def theta(t: torch.Tensor) -> torch.Tensor:
        return bezier.coefficients(t, segments, degree) @ control

    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert torch.equal(*theta(ends))
    # Joints, the closing one too, stay kinks.
    h = 1e-6
    joints = torch.arange(1, segments, dtype=torch.float64) / segments
    before = torch.cat([theta(joints) - theta(joints - h), theta(ends[1:]) - theta(ends[1:] - h)]) / h
    after = torch.cat([theta(joints + h) - theta(joints), theta(ends[:1] + h) - theta(ends[:1])]) / h
    assert ((before - after).norm(dim=1) > 0.1).all()


def test_known_dependences() -> None:
    assert CurveSpec(2, 3).dependence() is None and CurveSpec(2, 3, factors="A").dependence() is None
    closed = CurveSpec(2, 2, closed=True).dependence()
    assert closed is not None
    expected = [[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [1, 0, 0, 0, 0]]
    assert torch.equal(closed, torch.tensor(expected, dtype=torch.float64))
    shared = CurveSpec(2, 1, factors="A").dependence(shared=True)
    assert shared is not None
    assert torch.equal(shared, torch.tensor([[1, 0, 0]] * 3, dtype=torch.float64))


def test_dependent_points_are_made_from_free_ones() -> None:
    spec = CurveSpec(2, 2, factors="B", closed=True)
    free = {name: points(5, seed).view(5, 2, 2) for seed, name in enumerate(("m.lora_A.weight", "m.lora_B.weight"))}
    tied = spec.tie(free)
    assert spec.is_shared("m.lora_A.weight") and not spec.is_shared("m.lora_B.weight")
    assert torch.equal(tied["m.lora_A.weight"], free["m.lora_A.weight"][:1].expand(5, 2, 2))
    assert torch.equal(tied["m.lora_B.weight"][:4], free["m.lora_B.weight"][:4])
    assert torch.equal(tied["m.lora_B.weight"][4], free["m.lora_B.weight"][0])


def test_anchors_of_closed_curves_are_joints_and_stay_free() -> None:
    for anchors, degree in ((2, 2), (3, 2), (2, 3), (4, 3)):
        spec = CurveSpec.anchored(anchors, degree, closed=True)
        assert spec.segments == anchors and spec.anchor_times == tuple(k / anchors for k in range(anchors + 1))
        e = spec.dependence()
        assert e is not None
        free = e.diagonal() == 1
        assert free.nonzero().flatten().tolist() == list(range(spec.size - 1)), "the last anchor is the first"


def test_gradients_of_free_points_are_those_of_all_points_folded() -> None:
    spec = CurveSpec(2, 3, closed=True)
    e = spec.dependence()
    assert e is not None
    control = points(spec.size).requires_grad_()
    t = torch.tensor([0.1, 0.6, 0.9], dtype=torch.float64)
    (bezier.coefficients(t, 2, 3) @ e @ control).square().sum().backward()
    full = (e @ control.detach()).requires_grad_()
    (bezier.coefficients(t, 2, 3) @ full).square().sum().backward()
    assert control.grad is not None and full.grad is not None
    close(control.grad, e.T @ full.grad)


def test_weight_decay_gram_folds() -> None:
    e = CurveSpec(3, 3, closed=True).dependence()
    assert e is not None
    x, w = gauss_legendre(8)
    t = ((torch.arange(3).unsqueeze(1) + x) / 3).flatten()
    c = bezier.coefficients(t, 3, 3) @ e
    close(e.T @ bezier.coefficient_gram(3, 3) @ e, c.T @ (w.repeat(3)[:, None] / 3 * c))


def test_closed_curves_that_cannot_be_or_lie_on_a_line() -> None:
    with pytest.raises(UserError, match="more than one free point, found 1 segments of degree 1"):
        CurveSpec(1, 1, closed=True)
    for shape in ((1, 2), (2, 1)):
        with pytest.warns(UserWarning, match="retraces"):
            CurveSpec(*shape, closed=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert CurveSpec(1, 1).dependence() is None
        e = CurveSpec(3, 1, closed=True).dependence()
    assert e is not None and e.shape == (4, 4) and torch.linalg.matrix_rank(e) == 3
