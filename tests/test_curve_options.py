import warnings

import pytest
import torch

from loracurve import curve
from loracurve.curve_options import free_points, reduction
from loracurve.errors import UserError

SHAPES = [(s, d, closed, smooth) for s in (1, 2, 3, 4) for d in (2, 3, 4) for closed in (0, 1) for smooth in (0, 1)]
# Closed and smooth: a constant, or a line run there and back.
DEGENERATE = {(1, 2, 1, 1), (1, 2, 1, 0), (1, 3, 1, 1), (2, 2, 1, 1)}
GOOD = [shape for shape in SHAPES if shape not in DEGENERATE]


def points(free, dim=4, seed=0):
    return torch.randn(free, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(a, b, atol=1e-9):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=atol)


@pytest.mark.parametrize("segments,degree,closed,smooth", GOOD)
def test_reduced_curves(segments, degree, closed, smooth):
    m = reduction(segments, degree, bool(closed), bool(smooth))
    free = free_points(segments, degree, bool(closed), bool(smooth))
    size = curve.number_of_control_points(segments, degree)
    assert m.shape == (size, len(free)) and m.dtype == torch.float64
    assert torch.equal(m[list(free)], torch.eye(len(free), dtype=torch.float64))
    close(m.sum(1), torch.ones(size, dtype=torch.float64))
    control = points(len(free))

    def theta(t):
        return curve.coefficients(t, segments, degree) @ m @ control

    t = torch.linspace(0, 1, 50, dtype=torch.float64)
    close((curve.coefficients(t, segments, degree) @ m).sum(-1), torch.ones(50, dtype=torch.float64))
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    first, last = theta(ends)
    assert torch.equal(first, last) == bool(closed)

    h = 1e-6
    joints = torch.arange(1, segments, dtype=torch.float64) / segments
    before, after = (theta(joints) - theta(joints - h)) / h, (theta(joints + h) - theta(joints)) / h
    if closed:
        before = torch.cat([before, (theta(ends[1:]) - theta(ends[1:] - h)) / h])
        after = torch.cat([after, (theta(ends[:1] + h) - theta(ends[:1])) / h])
    if len(before):
        jump = (before - after).norm(dim=1)
        assert (jump < 1e-3).all() if smooth else (jump > 0.1).all()


def test_known_matrices():
    assert torch.equal(reduction(2, 3), torch.eye(7, dtype=torch.float64))
    closed = reduction(2, 2, closed=True)
    assert torch.equal(closed, torch.eye(5, 4, dtype=torch.float64) + torch.tensor([[0.0] * 4] * 4 + [[1, 0, 0, 0]]))
    smooth = reduction(2, 2, smooth=True)
    expected = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, -1, 2, 0], [0, 0, 0, 1]]
    assert torch.equal(smooth, torch.tensor(expected, dtype=torch.float64))
    assert free_points(2, 2, smooth=True) == (0, 1, 2, 4)
    # A chain of mirror images: P5 = 2 P4 - P3 = 2 P4 - 2 P2 + P1.
    assert reduction(3, 2, smooth=True)[5].tolist() == [0, 1, -2, 2, 0]


@pytest.mark.parametrize("segments,degree", [(2, 2), (3, 2), (2, 3), (4, 3)])
@pytest.mark.parametrize("closed", [False, True])
def test_anchors_stay_free(segments, degree, closed):
    if closed and degree == 2 and segments % 2 == 0:
        pytest.skip("the joints of such a curve depend on each other")
    free = free_points(segments, degree, closed, smooth=True)
    joints = set(range(0, segments * degree + 1, degree)) - ({segments * degree} if closed else set())
    assert joints <= set(free)


def test_gradients_of_free_points_are_those_of_all_points_folded():
    m = reduction(2, 3, closed=True, smooth=True)
    control = points(m.shape[1]).requires_grad_()
    t = torch.tensor([0.1, 0.6, 0.9], dtype=torch.float64)
    (curve.coefficients(t, 2, 3) @ m @ control).square().sum().backward()
    full = (m @ control.detach()).requires_grad_()
    (curve.coefficients(t, 2, 3) @ full).square().sum().backward()
    close(control.grad, m.T @ full.grad)


def test_weight_decay_gram_folds():
    m = reduction(3, 3, smooth=True)
    x, w = curve.gauss_legendre(8)
    t = ((torch.arange(3).unsqueeze(1) + x) / 3).flatten()
    c = curve.coefficients(t, 3, 3) @ m
    close(m.T @ curve.coefficient_gram(3, 3) @ m, c.T @ (w.repeat(3)[:, None] / 3 * c))


def test_refusals():
    with pytest.raises(UserError, match="degree 2 or more"):
        reduction(2, 1, smooth=True)
    for shape in ((1, 1, True, False), (1, 2, True, True)):
        with pytest.raises(UserError, match="more than one free point"):
            reduction(*shape)
    for shape in ((1, 2, True, False), (2, 2, True, True), (1, 3, True, True)):
        with pytest.warns(UserWarning, match="retraces"):
            reduction(*shape)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(reduction(1, 1, smooth=True), torch.eye(2, dtype=torch.float64))
        assert reduction(3, 1, closed=True).shape == (4, 3)
