import math

import pytest
import torch

from loracurve.bootstrap import _GOLDEN, BootstrapWeights, _splitmix
from loracurve.errors import UserError

N = 4000
NUMBERS = torch.arange(N)


def at(*t):
    return torch.tensor(t, dtype=torch.float64)


def kolmogorov_exponential(sample):
    """Largest distance between the empirical distribution and Exp(1)."""
    cdf = 1 - (-sample.sort().values).exp()
    steps = torch.arange(len(sample) + 1, dtype=torch.float64) / len(sample)
    return torch.maximum((steps[1:] - cdf).abs(), (cdf - steps[:-1]).abs()).max().item()


def correlation(a, b):
    return torch.corrcoef(torch.stack([a, b]))[0, 1].item()


def test_splitmix_known_values():
    # First outputs of the reference implementation from state 0.
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [x % 2**64 for x in _splitmix(torch.arange(1, 4) * _GOLDEN).tolist()] == expected


@pytest.mark.parametrize("features", [1, 64])
@pytest.mark.parametrize("seed", [0, 1])
def test_marginals_are_exponential_at_every_t(features, seed):
    w = BootstrapWeights(seed, 0.2, features).weights(NUMBERS, at(0, 0.13, 0.5, 1))
    assert w.shape == (4, N) and (w > 0).all()
    for values in w:
        assert values.mean().item() == pytest.approx(1, abs=4 / math.sqrt(N))
        assert values.var().item() == pytest.approx(1, abs=4 * math.sqrt(8 / N))  # Var of the squares: 9 - 1
        # Exceeded with probability 0.001 (Massart 1990).
        assert kolmogorov_exponential(values) < math.sqrt(math.log(2 / 0.001) / (2 * N))


def test_correlation_is_the_squared_kernel():
    length = 0.2
    lags = [0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8]
    w = BootstrapWeights(3, length).weights(NUMBERS, at(*(0.1 + lag for lag in lags)))
    for lag, values in zip(lags, w, strict=True):
        expected = math.exp(-((lag / length) ** 2))
        assert correlation(w[0], values) == pytest.approx(expected, abs=4 / math.sqrt(N) + 0.01)


def test_weights_are_smooth():
    weights = BootstrapWeights(4, 0.25)
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    for step in (1e-2, 1e-4):
        change = weights.weights(NUMBERS[:500], (t + step).clamp(max=1)) - weights.weights(NUMBERS[:500], t)
        # E (w' )^2 = 2 / l^2 in closed form: the mean square of the change is step^2 times that.
        assert change[:-2].square().mean().sqrt().item() == pytest.approx(math.sqrt(2) / 0.25 * step, rel=0.1)


def test_examples_are_independent_and_do_not_depend_on_their_company():
    weights = BootstrapWeights(5, 0.1)
    t = at(0.2, 0.9)
    w = weights.weights(NUMBERS, t)
    for shift in (1, 2, 7):
        assert abs(correlation(w[0, :-shift], w[0, shift:])) < 4 / math.sqrt(N)
    few = torch.tensor([2999, 0, 17])
    torch.testing.assert_close(weights.weights(few, t), w[:, few])
    assert abs(correlation(w[0], BootstrapWeights(6, 0.1).weights(NUMBERS, t)[0])) < 4 / math.sqrt(N)
    assert torch.equal(BootstrapWeights(5, 0.1).weights(NUMBERS, t), w)


def test_every_example_may_have_its_own_points():
    weights = BootstrapWeights(7, 0.1, tied_at=(0.0, 1.0))
    t = torch.rand(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    w = weights.weights(NUMBERS[:5], t)
    alone = [[weights.weights(NUMBERS[e : e + 1], t[i, e : e + 1]).item() for e in range(5)] for i in range(3)]
    torch.testing.assert_close(w, torch.tensor(alone, dtype=torch.float64))
    assert weights.weights(NUMBERS[:5], t.float()).dtype == torch.float32


def test_tied_weights_are_one_at_anchors_and_exponential_a_length_scale_away():
    length = 0.1
    tied, loose = BootstrapWeights(8, length, tied_at=(0.0, 0.5, 1.0)), BootstrapWeights(8, length)
    assert torch.equal(tied.weights(NUMBERS, at(0, 0.5, 1)), torch.ones(3, N, dtype=torch.float64))
    away = at(0.1, 0.25, 0.4, 0.6, 0.75, 0.9)
    torch.testing.assert_close(tied.weights(NUMBERS, away), loose.weights(NUMBERS, away))
    between = tied.weights(NUMBERS, at(0.03, 0.06, 0.47))
    assert (between > 0).all()
    for values, x in zip(between, (0.3, 0.6, 0.3), strict=True):
        spread = 10 * x**3 - 15 * x**4 + 6 * x**5
        assert values.mean().item() == pytest.approx(1, abs=4 * spread / math.sqrt(N))
        assert values.std().item() == pytest.approx(spread, rel=0.1)
    near = tied.weights(NUMBERS, at(1e-3))
    assert (near - 1).abs().max() < 1e-3, "smooth at the anchor"


def test_spread_along_the_curve_is_the_sandwich_covariance():
    """Weighted least squares at each t, errors whose variance depends on x: the model's own covariance is wrong."""
    draw = torch.Generator().manual_seed(9)
    x = torch.randn(N, 2, generator=draw, dtype=torch.float64)
    x[:, 0] = 1
    y = x @ at(0.5, -1.0) + torch.randn(N, generator=draw, dtype=torch.float64) * (0.3 + x[:, 1].abs())
    points = 1000
    t = torch.linspace(0, 1, points, dtype=torch.float64)
    w = BootstrapWeights(10, 1 / (4 * points), features=256).weights(NUMBERS, t)  # points four length scales apart
    hessian = torch.einsum("tn,ni,nj->tij", w, x, x)
    theta = torch.linalg.solve(hessian, torch.einsum("tn,ni,n->ti", w, x, y))
    residual = y - x @ torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
    bread = torch.linalg.inv(x.T @ x)
    sandwich = bread @ (x.T * residual.square() @ x) @ bread
    naive = bread * residual.square().mean()
    found = theta.T.cov()
    torch.testing.assert_close(found.diag(), sandwich.diag(), rtol=0.15, atol=0)
    assert found[1, 1] > 1.5 * naive[1, 1]
    # One standard error of the mean of independent draws is sqrt(v / points).
    centre = torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
    assert ((theta.mean(0) - centre).abs() < 4 * (sandwich.diag() / points).sqrt() + 2e-3).all()


def test_refusals():
    for options, message in (
        ({"length_scale": 0.0}, "length_scale"),
        ({"length_scale": math.nan}, "length_scale"),
        ({"length_scale": 0.1, "features": 0}, "features"),
        ({"length_scale": 0.1, "tied_at": (0.5, 1.5)}, "tied_at"),
    ):
        with pytest.raises(UserError, match=message):
            BootstrapWeights(0, **options)
