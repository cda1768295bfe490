"""Piecewise Bezier curves: known values, and properties of any curve."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loracurve.curve import bezier
from loracurve.curve.quadrature import gauss_legendre
from loracurve.curve.spec import number_of_control_points

few = settings(max_examples=40)
segments_, degrees, seeds = st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**31)


def points(seed, segments, degree, dim=3):
    generator = torch.Generator().manual_seed(seed)
    k = number_of_control_points(segments, degree)
    return torch.randn(k, dim, dtype=torch.float64, generator=generator)


def grid(n=101):
    return torch.linspace(0, 1, n, dtype=torch.float64)


def close(a, b, atol=1e-10):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=atol)


@few
@given(segments_, st.integers(0, 4))
def test_basis_is_a_partition_of_unity_and_non_negative(segments, degree):
    c = bezier.coefficients(grid().reshape(1, -1), segments, degree)
    assert c.shape == (1, 101, segments * degree + 1) and c.dtype == torch.float64
    assert (c >= 0).all()
    close(c.sum(-1), torch.ones(1, 101, dtype=torch.float64))
    assert ((c > 0).sum(-1) <= degree + 1).all()


def test_quadratic_basis_known_values():
    half = torch.tensor([0.25, 0.5], dtype=torch.float64)
    expected = torch.tensor([[0.25, 0.5, 0.25, 0, 0], [0, 0, 1, 0, 0]], dtype=torch.float64)
    close(bezier.coefficients(half, 2, 2), expected)
    assert bezier.coefficients(half.float(), 2, 2).dtype == torch.float32


@few
@given(segments_, degrees, seeds)
def test_ends_and_joints_are_interpolated(segments, degree, seed):
    control = points(seed, segments, degree)
    joints = torch.arange(segments + 1, dtype=torch.float64) / segments
    close(bezier.coefficients(joints, segments, degree) @ control, control[::degree])
    assert torch.equal(bezier.coefficients(joints[[0, -1]], segments, degree) @ control, control[[0, -1]])


@few
@given(segments_, degrees, seeds)
def test_continuous_at_joints(segments, degree, seed):
    control = points(seed, segments, degree)
    joints = torch.arange(1, segments, dtype=torch.float64) / segments
    before, after = (bezier.coefficients(joints + step, segments, degree) @ control for step in (-1e-9, 1e-9))
    close(before, after, atol=1e-6)


@few
@given(segments_, degrees, seeds)
def test_collinear_points_are_a_straight_line(segments, degree, seed):
    ends = points(seed, 1, 1)
    control = bezier.on_line(ends, segments * degree)
    assert len(control) == segments * degree + 1
    t = grid().unsqueeze(1)
    close(bezier.coefficients(grid(), segments, degree) @ control, (1 - t) * ends[0] + t * ends[1])


@few
@given(st.integers(2, 5), degrees, seeds)
def test_on_line_is_the_polygonal_chain(anchors, degree, seed):
    chain = points(seed, anchors - 1, 1)
    control = bezier.on_line(chain, degree)
    assert torch.equal(control[::degree], chain)
    close(
        bezier.coefficients(grid(), anchors - 1, degree) @ control, bezier.coefficients(grid(), anchors - 1, 1) @ chain
    )


def test_on_line_shapes_and_errors():
    assert bezier.on_line(torch.zeros(3, 2, 5, dtype=torch.bfloat16), 2).shape == (5, 2, 5)
    assert bezier.on_line(torch.zeros(3, 2, dtype=torch.bfloat16), 2).dtype == torch.bfloat16
    assert torch.equal(bezier.on_line(torch.ones(1, 2), 0), torch.ones(1, 2))
    with pytest.raises(ValueError, match="degree"):
        bezier.on_line(torch.ones(2, 2), 0)


@few
@given(segments_, degrees, seeds)
def test_derivative_is_the_finite_difference(segments, degree, seed):
    control = points(seed, segments, degree)
    t = (torch.arange(40, dtype=torch.float64) + 0.37) / 40  # no joint within the step
    ahead, behind = (bezier.coefficients(t + step, segments, degree) @ control for step in (1e-6, -1e-6))
    close(bezier.derivative_coefficients(t, segments, degree) @ control, (ahead - behind) / 2e-6, atol=1e-6)


def test_derivative_at_joints_and_ends():
    control = torch.tensor([[0.0], [1.0], [5.0]], dtype=torch.float64)
    at = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    close(bezier.derivative_coefficients(at, 2, 1) @ control, torch.tensor([[2.0], [8.0], [8.0]], dtype=torch.float64))
    assert torch.equal(bezier.derivative_coefficients(at, 2, 0), torch.zeros(3, 1, dtype=torch.float64))


@pytest.mark.parametrize("segments,degree", [(1, 1), (2, 2), (3, 4)])
def test_gradients_through_t(segments, degree):
    t = torch.tensor([0.0, 0.1, 0.45, 0.9, 1.0], dtype=torch.float64)
    inner = t[1:-1].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: bezier.coefficients(x, segments, degree), inner)
    assert torch.autograd.gradcheck(lambda x: bezier.derivative_coefficients(x, segments, degree), inner)
    everywhere = torch.autograd.functional.jacobian(lambda x: bezier.coefficients(x, segments, degree).sum(0), t)
    close(everywhere.T, bezier.derivative_coefficients(t, segments, degree))


def test_gradient_to_a_control_point_is_its_coefficient():
    control = points(0, 2, 2).requires_grad_()
    c = bezier.coefficients(torch.tensor(0.3, dtype=torch.float64), 2, 2)
    (c @ control).sum().backward()
    close(control.grad, c.unsqueeze(1).expand(5, 3))


@few
@given(segments_, st.integers(0, 4))
def test_coefficient_gram_is_the_integral(segments, degree):
    x, w = gauss_legendre(8)
    t = ((torch.arange(segments).unsqueeze(1) + x) / segments).flatten()
    c = bezier.coefficients(t, segments, degree)
    close(bezier.coefficient_gram(segments, degree), c.T @ (w.repeat(segments)[:, None] / segments * c))


def test_coefficient_gram_known_values():
    close(bezier.coefficient_gram(1, 1), torch.tensor([[2, 1], [1, 2]], dtype=torch.float64) / 6)
    close(bezier.coefficient_gram(3, 0), torch.ones(1, 1, dtype=torch.float64))


def test_gram_sums_over_tensors():
    parts = [torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0)), torch.ones(4, 5)]
    flat = torch.cat([part.flatten(1) for part in parts], 1).double()
    close(bezier.gram(iter(parts)), flat @ flat.T)
    with pytest.raises(ValueError, match="at least one"):
        bezier.gram([])
    with pytest.raises(ValueError, match="expected 4 control points"):
        bezier.gram([torch.ones(4, 1), torch.ones(3, 1)])


@few
@given(segments_, degrees, seeds)
def test_speed_is_the_norm_of_the_derivative_and_bounded(segments, degree, seed):
    control = points(seed, segments, degree)
    gram = bezier.gram([control])
    measured = bezier.speed(grid(), gram, segments, degree)
    close(measured, (bezier.derivative_coefficients(grid(), segments, degree) @ control).norm(dim=1), atol=1e-6)
    assert measured.max() <= bezier.lipschitz_bound(gram, segments, degree) * (1 + 1e-9)


@few
@given(segments_, degrees, seeds)
def test_chord_arc_polygon(segments, degree, seed):
    gram = bezier.gram([points(seed, segments, degree)])
    chord, arc, polygon = (
        bezier.chord_length(gram),
        bezier.arc_length(gram, segments, degree),
        bezier.control_polygon_length(gram),
    )
    assert chord <= arc * (1 + 1e-6) and arc <= polygon * (1 + 1e-6)
    assert polygon <= bezier.lipschitz_bound(gram, segments, degree) * (1 + 1e-9)


@few
@given(segments_, degrees, seeds)
def test_arc_length_of_a_straight_line_is_its_chord(segments, degree, seed):
    gram = bezier.gram([bezier.on_line(points(seed, 1, 1), segments * degree)])
    arc = bezier.arc_length(gram, segments, degree)
    close(arc, bezier.chord_length(gram), atol=1e-6)
    close(bezier.arc_length(gram, segments, degree, 0.2, 0.7), arc / 2, atol=1e-6)


def test_arc_length_of_a_parabola():
    # (t, t^2) as a quadratic Bezier curve; its length is sqrt(5)/2 + asinh(2)/4.
    gram = bezier.gram([torch.tensor([[0, 0], [0.5, 0], [1, 1]], dtype=torch.float64)])
    assert bezier.arc_length(gram, 1, 2).item() == pytest.approx(math.sqrt(5) / 2 + math.asinh(2) / 4, abs=1e-10)
    with pytest.raises(ValueError, match="start <= end"):
        bezier.arc_length(gram, 1, 2, 0.5, 0.4)


@few
@given(segments_, degrees, seeds)
def test_arc_length_parameter_inverts_the_arc_length(segments, degree, seed):
    gram = bezier.gram([points(seed, segments, degree)])
    fractions = torch.tensor([0.0, 0.21, 0.5, 0.8, 1.0], dtype=torch.float64)
    t = bezier.arc_length_parameter(fractions, gram, segments, degree)
    whole = bezier.arc_length(gram, segments, degree)
    behind = torch.stack([bezier.arc_length(gram, segments, degree, 0.0, at) for at in t.tolist()])
    close(behind, fractions * whole, atol=1e-9)
    assert t[0] == 0 and t[-1] == 1 and (t.diff() > 0).all()


def test_arc_length_parameter_of_a_point_and_errors():
    fractions = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    still = bezier.gram([torch.zeros(3, 2)])
    assert torch.equal(bezier.arc_length_parameter(fractions, still, 1, 2), fractions)
    with pytest.raises(ValueError, match="fractions"):
        bezier.arc_length_parameter(fractions + 0.1, still, 1, 2)


@pytest.mark.parametrize("bad", [-0.01, 1.01, math.nan])
def test_t_outside_is_refused(bad):
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        bezier.coefficients(torch.tensor([0.5, bad]), 1, 2)
    with pytest.raises(ValueError, match="floating-point"):
        bezier.coefficients(torch.tensor([0, 1]), 1, 2)


def test_basis_traces_without_looking_at_t():
    compiled = torch.compile(lambda t: bezier.coefficients(t, 2, 2), backend="eager", fullgraph=True)
    close(compiled(grid()), bezier.coefficients(grid(), 2, 2))


def test_weight_decay_is_the_gradient_of_the_mean_squared_norm_along_the_curve() -> None:
    gram = bezier.coefficient_gram(2, 2)
    points = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    t = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    (0.5 * (bezier.coefficients(t, 2, 2) @ points).pow(2).sum(1).mean()).backward()
    torch.testing.assert_close(gram @ points.detach(), points.grad, rtol=1e-5, atol=1e-6)
