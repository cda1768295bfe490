"""Noise on weights: the same wherever it is used, independent of the rescaling freedom of the factors."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.noise import DOUBLE, epsilon, randn, seeded
from torch import Tensor

from loracurve.curve.gauge import balanced
from loracurve.model import weight_noise
from loracurve.model.weight_noise import flat_lora, perturb_factors


def test_steps_maps_and_seeds_are_independent_and_repeatable() -> None:
    scale = torch.ones(8, dtype=DOUBLE)
    draws = [seeded(), seeded(step=1), seeded("other"), seeded(seed=1)]
    noises = [epsilon(scale, 2000, d).flatten() for d in draws]
    limit = 5 / math.sqrt(len(noises[0]))
    for i, a in enumerate(noises):
        for b in noises[i + 1 :]:
            assert abs(float((a * b).mean())) < limit
    assert torch.equal(epsilon(scale, 2000, seeded()).flatten(), noises[0])
    again = draws[1]
    again.reseed(0, 0)
    assert torch.equal(epsilon(scale, 2000, again).flatten(), noises[0]), "a draw depends on its step alone"


def test_the_same_noise_for_all_tokens_points_and_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_noise, "NOISE_CHUNK", 50)  # several blocks, the last one smaller
    scale = randn(2, 7).abs()
    draws = seeded()
    x = randn(2, 3, 12, seed=5)
    out = flat_lora(torch.zeros(2, 3, 7, dtype=DOUBLE), x, scale, draws)
    z = epsilon(torch.ones(7, dtype=DOUBLE), 12, draws)
    for point in range(2):
        torch.testing.assert_close(out[point], x[point] @ (scale[point][:, None] * z).mT)


def test_backward_draws_the_noise_of_the_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_noise, "NOISE_CHUNK", 50)
    x, y, scale = (t.requires_grad_() for t in (randn(4, 3, 12), randn(4, 3, 7, seed=1), randn(2, 7, seed=2)))

    def run(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        return flat_lora(y, x, scale, seeded())

    # Against finite differences: right only if both passes see one noise.
    assert torch.autograd.gradcheck(run, (x, y, scale))
    grad = randn(4, 3, 7, seed=4)
    (found,) = torch.autograd.grad(run(x, y, scale), x, grad)
    z = epsilon(torch.ones(7, dtype=DOUBLE), 12, seeded())
    expected = torch.cat([grad[2 * g : 2 * g + 2] @ (scale[g][:, None] * z) for g in range(2)])
    torch.testing.assert_close(found, expected)


def test_bfloat16_sums_blocks_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    def gradient(dtype: torch.dtype) -> Tensor:
        x = randn(4, 16).to(dtype).requires_grad_()
        flat_lora(torch.zeros(4, 600, dtype=dtype), x, torch.ones(1, 600), seeded()).sum().backward()
        assert x.grad is not None
        return x.grad

    whole = gradient(torch.bfloat16)
    monkeypatch.setattr(weight_noise, "NOISE_CHUNK", 16 * 16 * 4)  # 16 at least: a CPU draws short tensors otherwise
    torch.testing.assert_close(gradient(torch.bfloat16), whole, rtol=0.02, atol=0.2)


def product_moments(a: Tensor, b: Tensor, rho: float, count: int) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the noise of B A, entries flattened."""
    draw = torch.Generator().manual_seed(0)
    noises = []
    for _ in range(count):
        na, nb = perturb_factors(a, b, rho, draw)
        noises.append((nb.mT @ na - b.mT @ a).flatten())
    stacked = torch.stack(noises)
    return stacked.mean(0), stacked.mT.cov()


def test_the_noise_of_the_product_does_not_depend_on_the_gauge() -> None:
    a, b = randn(2, 4), randn(2, 3, seed=1)
    r = torch.tensor([[3.0, 2.0], [-1.0, 0.5]], dtype=DOUBLE)
    moved = r @ a, torch.linalg.inv(r).mT @ b
    rho, count = 0.3, 20000
    delta = b.mT @ a
    rows, columns = delta.square().sum(1) / 4, delta.square().sum(0) / 3
    variance = rho**2 * (rows[:, None] + columns) + rho**4 * delta.square().sum() / 12
    found = [product_moments(*factors, rho, count) for factors in ((a, b), moved)]
    size = variance.flatten().sqrt()
    for mean, covariance in found:
        assert (mean.abs() / size).max() < 5 / math.sqrt(count)
        torch.testing.assert_close(covariance.diagonal().view_as(variance), variance, rtol=0.08, atol=0)
    correlation = [c / size[:, None] / size for _, c in found]
    assert (correlation[0] - correlation[1]).abs().max() < 0.08
    # Without care for the gauge it would not be so: noise relative to rows as they are.
    naive = [(f[1].mT.square() @ (f[0].square().mean(1))) for f in ((a, b), moved)]
    assert (naive[0] / naive[1] - 1).abs().max() > 0.3


def test_the_noise_is_that_of_the_balanced_gauge() -> None:
    a, b = randn(3, 40), randn(3, 30, seed=1)
    balanced_a, balanced_b = balanced(a, b.mT)
    into = balanced_a @ torch.linalg.pinv(a)  # A_balanced = into A
    size_a = torch.diag(balanced_a.square().mean(1))  # of row i of A, and of column i of B
    size_b = torch.diag(balanced_b.square().mean(0))
    out = torch.linalg.inv(into)
    torch.testing.assert_close(out @ size_a @ out.mT, a @ a.mT / 40)
    torch.testing.assert_close(into.mT @ size_b @ into, b @ b.mT / 30)
    draw = torch.Generator().manual_seed(0)
    noises = torch.stack([perturb_factors(a, b, 0.1, draw)[0] - a for _ in range(300)], 1).flatten(1)
    torch.testing.assert_close(noises.cov(), 0.01 * a @ a.mT / 40, rtol=0.1, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_degenerate_factors_stay_finite(dtype: torch.dtype) -> None:
    a = randn(2, 4, 16, dtype=dtype)
    b = torch.zeros(2, 4, 12, dtype=dtype)  # the LoRA initialisation
    draw = torch.Generator().manual_seed(0)
    na, nb = perturb_factors(a, b, 0.1, draw)
    assert na.isfinite().all() and nb.abs().max() < 1e-20 and not torch.equal(na, a)
    b[:, :2] = randn(2, 2, 12, dtype=dtype)
    b[:, 1] = b[:, 0]
    na, nb = perturb_factors(a, b, 0.1, draw)
    assert nb.isfinite().all() and nb[:, 2:].abs().max() < 1e-20
    torch.testing.assert_close(nb[:, 1], nb[:, 0], rtol=0, atol=1e-4)


def test_no_gradient_through_the_scale_of_lora_space() -> None:
    a, b, g = randn(2, 4, 9).requires_grad_(), randn(2, 4, 6, seed=1).requires_grad_(), randn(2, 4, 9, seed=2)
    noisy, _ = perturb_factors(a, b, 0.3, torch.Generator().manual_seed(0))
    (found,) = torch.autograd.grad((noisy * g).sum(), a)
    assert torch.equal(found, g)
