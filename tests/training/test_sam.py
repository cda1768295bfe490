"""Sharpness-aware steps by hand."""

from __future__ import annotations

import pytest
import torch
from helpers.noise import DOUBLE, ids, noisy_model, randn
from torch import Tensor, nn

from loracurve.training.sam import sam_ascent, sam_backward, shifted


def test_sam_on_a_quadratic_by_hand() -> None:
    p = randn(3, 2, 5).requires_grad_()
    c = torch.tensor([0.2, 0.5, 0.3], dtype=DOUBLE)
    target, curvature, rho = randn(2, 5, seed=1), randn(2, 5, seed=2).abs(), 0.4

    def loss() -> tuple[Tensor, str]:
        return (curvature * (torch.tensordot(c, p, dims=1) - target).square()).sum(), "more"

    before = p.detach().clone()
    value, extra = sam_backward(loss, [p], c, rho)
    theta = torch.tensordot(c, before, dims=1)
    g = 2 * curvature * (theta - target)
    second = 2 * curvature * (theta + rho * g / g.norm() - target)
    assert p.grad is not None and extra == "more"
    torch.testing.assert_close(p.grad, c[:, None, None] * second)
    torch.testing.assert_close(value, (curvature * (theta - target).square()).sum())
    assert torch.equal(p, before)
    assert all(not e.any() for e in sam_ascent([torch.zeros(3, 2)], c, rho)), "no gradient, no step"


def test_points_are_moved_and_brought_back_even_after_an_error() -> None:
    p = nn.Parameter(randn(3, 4, dtype=torch.float32))
    before, e = p.detach().clone(), randn(4, seed=1, dtype=torch.float32)
    with pytest.raises(ZeroDivisionError), shifted([p], [e]):
        assert torch.equal(p.detach(), before + e)
        raise ZeroDivisionError
    assert torch.equal(p, before)


def test_sam_in_a_model_equals_two_passes_by_hand() -> None:
    model, t, rho = noisy_model("encoder").eval(), 0.3, 0.3
    c = model.coefficients(torch.tensor(t, dtype=DOUBLE))
    head = lambda: (model(t, input_ids=ids()).logits.log_softmax(-1)[:, 1].mean().neg(), None)  # noqa: E731
    start = {n: p.clone() for n, p in model.control_points().items()}
    sam_backward(head, model.factors, c, rho)
    found = [p.grad.clone() for p in model.factors if p.grad is not None]
    assert all(torch.equal(p, start[n]) for n, p in model.control_points().items())
    # By hand: one adapter, theta(t), as a curve of equal control points, whose gradients sum to that at theta(t).
    theta = [torch.tensordot(c, p.detach(), dims=1) for p in model.factors]

    def gradient(point: list[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            for p, value in zip(model.factors, point, strict=True):
                p.copy_(value.expand_as(p))
        return [g.sum(0) for g in torch.autograd.grad(head()[0], model.factors)]

    first = gradient(theta)
    norm = torch.cat([g.flatten() for g in first]).norm()
    second = gradient([p + rho * g / norm for p, g in zip(theta, first, strict=True)])
    for f, g in zip(found, second, strict=True):
        torch.testing.assert_close(f, c.view(-1, *[1] * g.dim()) * g, rtol=1e-6, atol=1e-10)
