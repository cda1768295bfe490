"""Points and weights of averages along a curve."""

from __future__ import annotations

import pytest
import torch

from loracurve.curve import bezier
from loracurve.curve.quadrature import gauss_legendre, quadrature
from loracurve.system.errors import UserError


@pytest.mark.parametrize("nodes", [1, 2, 5, 32])
def test_gauss_legendre_integrates_powers(nodes):
    x, w = gauss_legendre(nodes)
    for power in range(2 * nodes):
        assert (w @ x**power).item() == pytest.approx(1 / (power + 1), abs=1e-13)


def test_a_closed_curve_has_no_point_twice() -> None:
    t, w = quadrature("uniform", 4, 2, closed=True)
    assert t.tolist() == [0, 0.25, 0.5, 0.75] and w.tolist() == [0.25] * 4


def test_uniform_quadrature():
    t, w = quadrature("uniform", 10, 2)
    torch.testing.assert_close(t, torch.arange(10, dtype=torch.float64) / 9)
    assert t[0] == 0 and t[-1] == 1 and torch.equal(w, torch.full((10,), 0.1, dtype=torch.float64))
    t, w = quadrature("uniform", 1, 2)
    assert t.tolist() == [0.5] and w.tolist() == [1]


@pytest.mark.parametrize("segments", [1, 2, 3])
def test_gauss_legendre_is_exact_for_piecewise_polynomials(segments):
    t, w = quadrature("gauss-legendre", 3 * segments, segments)
    assert t.dtype == w.dtype == torch.float64 and w.sum().item() == pytest.approx(1)
    c = bezier.coefficients(t, segments, 2)
    torch.testing.assert_close(c.T @ (w[:, None] * c), bezier.coefficient_gram(segments, 2))


def test_monte_carlo_needs_and_obeys_a_generator():
    first, w = quadrature("monte-carlo", 1000, 2, torch.Generator().manual_seed(3))
    again, _ = quadrature("monte-carlo", 1000, 2, torch.Generator().manual_seed(3))
    assert torch.equal(first, again) and abs(first.mean() - 0.5) < 0.05 and w.sum().item() == pytest.approx(1)
    with pytest.raises(ValueError, match="Generator"):
        quadrature("monte-carlo", 3, 1)


@pytest.mark.parametrize(
    "kind,points,message",
    [("gauss-legendre", 7, "ask for 6$"), ("gauss-legendre", 1, "ask for 3$"), ("uniform", 0, "points: expected")]
    + [("simpson", 3, "expected uniform")],
)
def test_bad_quadratures(kind, points, message):
    with pytest.raises(UserError, match=message):
        quadrature(kind, points, 3)
