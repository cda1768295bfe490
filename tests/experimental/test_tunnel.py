from __future__ import annotations

import math

import pytest
import torch

from loracurve.curve import bezier
from loracurve.curve.spec import number_of_control_points
from loracurve.experimental.tunnel import Tunnel, sample_tunnel
from loracurve.system.errors import UserError
from loracurve.system.randomness import generator

SHAPES = [(2, 2), (1, 3), (2, 3), (3, 2)]


def points(segments, degree, dim=12, seed=0):
    k = number_of_control_points(segments, degree)
    return torch.randn(k, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def tunnel_of(control, segments, degree, sigma=0.1, **options):
    return Tunnel(bezier.gram([control]), segments, degree, sigma, **options)


def vectors(tunnel, t, control):
    """e_j(t) as vectors [n, D, dim]."""
    return torch.einsum("nkd,kp->ndp", tunnel.frame(t), control)


def close(a, b, atol=1e-9):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=atol)


@pytest.mark.parametrize("segments,degree", SHAPES)
def test_frame_is_orthonormal_and_normal_to_the_curve(segments, degree):
    control = points(segments, degree)
    tunnel = tunnel_of(control, segments, degree)
    assert tunnel.dimension == len(control) - 2
    t = torch.cat([torch.linspace(0, 1, 37, dtype=torch.float64), torch.arange(segments + 1).double() / segments])
    e = vectors(tunnel, t, control)
    close(e @ e.transpose(1, 2), torch.eye(tunnel.dimension, dtype=torch.float64).expand(len(t), -1, -1))
    velocity = bezier.derivative_coefficients(t, segments, degree) @ control
    close(torch.einsum("ndp,np->nd", e, velocity), torch.zeros(len(t), tunnel.dimension, dtype=torch.float64))
    close(tunnel.frame(t).sum(1), torch.zeros(len(t), tunnel.dimension, dtype=torch.float64))


@pytest.mark.parametrize("segments,degree", SHAPES)
def test_frame_does_not_turn_around_the_tangent(segments, degree):
    control = points(segments, degree)
    tunnel = tunnel_of(control, segments, degree)
    t, h = (torch.arange(40, dtype=torch.float64) + 0.37) / 40, 1e-5
    before, at, after = (vectors(tunnel, t + step, control) for step in (-h, 0, h))
    change = (after - before) / (2 * h)
    assert change.norm(dim=-1).max() > 1, "the frame does move"
    assert (change @ at.transpose(1, 2)).abs().max() < 1e-4


def test_frame_of_a_plane_curve_is_its_normal():
    control = torch.tensor([[0, 0], [1, 2], [3, 0]], dtype=torch.float64)
    t = torch.linspace(0, 1, 20, dtype=torch.float64)
    e = vectors(tunnel_of(control, 1, 2), t, control)[:, 0]
    velocity = bezier.derivative_coefficients(t, 1, 2) @ control
    normal = torch.stack([-velocity[:, 1], velocity[:, 0]], 1) / velocity.norm(dim=1, keepdim=True)
    close(e, normal * (e[0] @ normal[0]).sign())


def test_frame_is_carried_over_a_kink_in_the_plane_of_the_tangents():
    # Right angle in the first two coordinates; the third point out of the plane comes in the last segment.
    control = torch.tensor([[0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]], dtype=torch.float64)
    tunnel = tunnel_of(control, 3, 1)
    first, second = vectors(tunnel, torch.tensor([0.2, 0.5], dtype=torch.float64), control)
    turn = torch.tensor([[0, -1, 0], [1, 0, 0], [0, 0, 1]], dtype=torch.float64)
    close(second, first @ turn.T)


def test_frame_is_continuous_on_smooth_curves_and_across_nodes():
    control = points(3, 3)
    for joint in (3, 6):  # as fast and in the same direction on both sides
        control[joint + 1] = 2 * control[joint] - control[joint - 1]
    tunnel = tunnel_of(control, 3, 3)
    joints = torch.cat([torch.tensor([1, 2]) / 3, torch.arange(1, 192) / 192]).double()
    step = vectors(tunnel, joints + 1e-9, control) - vectors(tunnel, joints - 1e-9, control)
    assert step.abs().max() < 1e-6


@pytest.mark.parametrize("segments,degree", SHAPES)
def test_coordinates(segments, degree):
    control = points(segments, degree)
    tunnel = tunnel_of(control, segments, degree)
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    zero = torch.zeros(11, tunnel.dimension, dtype=torch.float64)
    close(tunnel.coefficients(t, zero), bezier.coefficients(t, segments, degree))
    xi = torch.randn(11, tunnel.dimension, dtype=torch.float64, generator=generator(0))
    beside = tunnel.coefficients(t, xi)
    close(beside.sum(1), torch.ones(11, dtype=torch.float64))
    distance = ((beside - bezier.coefficients(t, segments, degree)) @ control).norm(dim=1)
    close(distance, xi.norm(dim=1))


def test_control_points_far_away_or_flat():
    control = points(2, 2, dim=500)
    far = control + 1e3
    t = torch.tensor([0.1, 0.7], dtype=torch.float64)
    e = vectors(tunnel_of(far, 2, 2), t, far)
    close(e @ e.transpose(1, 2), torch.eye(3, dtype=torch.float64).expand(2, -1, -1), atol=1e-4)
    plane = control[:3].new_tensor([[0, 0], [1, 2], [3, 0], [2, 2], [0, 1]])
    assert tunnel_of(plane, 2, 2).dimension == 1
    still = torch.cat([control[:1], control])[:5]  # P_0 = P_1: no speed at t = 0
    e = vectors(tunnel_of(still, 2, 2), torch.tensor([0.0, 0.3], dtype=torch.float64), still)
    close(e @ e.transpose(1, 2), torch.eye(2, dtype=torch.float64).expand(2, -1, -1))


@pytest.mark.parametrize(("temperature", "prior"), [(1.0, "uniform"), (3.0, "arc-length")])
def test_posterior_of_a_gaussian_toy(temperature, prior):
    """Likelihood N(target; theta, 0.4^2 I) in the plane: the posterior of (t, xi) by quadrature."""
    control = torch.tensor([[0, 0], [0.5, 2], [3, 0]], dtype=torch.float64)
    target = torch.tensor([1.9, 1.2], dtype=torch.float64)
    tunnel = tunnel_of(control, 1, 2, 0.5, prior=prior, nodes=16)

    def log_likelihood(rows):
        return -((rows @ control - target) ** 2).sum(-1) / (2 * 0.4**2)

    t = torch.linspace(0, 1, 801, dtype=torch.float64)
    xi = torch.linspace(-2.5, 2.5, 201, dtype=torch.float64)
    grid_t, grid_xi = (x.flatten() for x in torch.meshgrid(t, xi, indexing="ij"))
    rows = tunnel.coefficients(grid_t, grid_xi[:, None])
    log_weight = log_likelihood(rows) / temperature - (grid_xi / 0.5) ** 2 / 2
    if prior == "arc-length":
        log_weight += bezier.speed(grid_t, bezier.gram([control]), 1, 2).log()
    weight = log_weight.softmax(0)

    count = 1000 if prior == "uniform" else 400
    found = sample_tunnel(tunnel, lambda c: log_likelihood(c).item(), count, generator(2), temperature)
    assert found.coefficients.shape == (count, 3) and found.evaluations > count
    close(found.log_likelihood, log_likelihood(found.coefficients))
    close(found.coefficients, tunnel.coefficients(found.t, found.xi))
    # The chain's states are correlated: some ten of them are worth one.
    for exact, sample in (
        (grid_t, found.t),
        (grid_xi, found.xi[:, 0]),
        ((rows @ control)[:, 0], (found.coefficients @ control)[:, 0]),
        ((rows @ control)[:, 1], (found.coefficients @ control)[:, 1]),
    ):
        mean = (weight @ exact).item()
        spread = math.sqrt((weight @ exact.square()).item() - mean**2)
        assert sample.mean().item() == pytest.approx(mean, abs=4 * spread * math.sqrt(10 / count))
        assert sample.std().item() == pytest.approx(spread, rel=4 * math.sqrt(10 / (2 * count)))


def test_flat_likelihood_gives_the_prior():
    tunnel = tunnel_of(points(2, 2), 2, 2, 0.2, nodes=8)
    found = sample_tunnel(tunnel, lambda c: 0.0, 1500, generator(3), warm_up=0)
    assert found.evaluations == 1501, "every first proposal is taken"
    assert found.t.mean().item() == pytest.approx(0.5, abs=0.04)
    assert found.xi.std().item() == pytest.approx(0.2, rel=0.06)


def test_chains_are_reproducible_and_thinned():
    tunnel = tunnel_of(points(1, 3), 1, 3, nodes=8)

    def run(seed, **options):
        return sample_tunnel(tunnel, lambda c: -(c[0].item() ** 2), generator=generator(seed), **options)

    whole = run(0, samples=12, warm_up=3)
    assert torch.equal(run(0, samples=12, warm_up=3).t, whole.t) and not torch.equal(run(1, samples=12).t, whole.t)
    assert torch.equal(run(0, samples=4, warm_up=3, thin=3).t, whole.t[2::3])


def test_refusals():
    gram = bezier.gram([points(2, 2)])
    with pytest.raises(UserError, match="tunnel.sigma: expected a number > 0"):
        Tunnel(gram, 2, 2, 0.0)
    with pytest.raises(UserError, match="uniform or arc-length"):
        Tunnel(gram, 2, 2, 0.1, prior="arc")
    for flat in (torch.ones(5, 3), bezier.on_line(points(1, 1), 4)):
        with pytest.raises(UserError, match="span a plane"):
            Tunnel(bezier.gram([flat]), 2, 2, 0.1)
    tunnel = Tunnel(gram, 2, 2, 0.1)
    with pytest.raises(UserError, match="temperature"):
        sample_tunnel(tunnel, lambda c: 0.0, 1, generator(0), temperature=0.0)
    with pytest.raises(UserError, match="samples"):
        sample_tunnel(tunnel, lambda c: 0.0, 0, generator(0))
    with pytest.raises(ValueError, match="finite"):
        sample_tunnel(tunnel, lambda c: math.nan, 1, generator(0))
    falling = iter(range(0, -(10**6), -1))
    with pytest.raises(ValueError, match="same log-likelihood"):
        sample_tunnel(tunnel, lambda c: 50.0 * next(falling), 5, generator(0))
