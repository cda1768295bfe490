"""Weights of the points in a model average."""

from __future__ import annotations

import math

import pytest
import torch

from loracurve.curve import bezier
from loracurve.curve.quadrature import quadrature
from loracurve.inference.information import mixture_log_probs
from loracurve.inference.model_average import (
    arc_length_weights,
    effective_points,
    fit_likelihood_temperature,
    likelihood_weights,
)
from loracurve.inference.predictive import Predictive
from loracurve.system.errors import UserError


def test_likelihood_weights_of_thousands_of_rows() -> None:
    rows, draw = 5000, torch.Generator().manual_seed(0)
    nll = torch.rand(4, rows, generator=draw, dtype=torch.float64) * torch.tensor([[1.0], [1.0], [1.3], [900.0]])
    prior = torch.full((4,), 0.25, dtype=torch.float64)
    for temperature in (1e-3, 1.0, 1e6):
        w = likelihood_weights(nll.sum(1), prior, temperature)
        assert w.isfinite().all() and float(w.sum()) == pytest.approx(1, abs=1e-12)
        difference = float(nll[0].sum() - nll[1].sum()) / temperature
        if abs(difference) < 600:  # beyond, one of the two is zero in float64
            assert float(w[1].log() - w[0].log()) == pytest.approx(difference, rel=1e-9, abs=1e-9)
    one = likelihood_weights(nll.sum(1), prior, 1.0)
    assert effective_points(one) == pytest.approx(1.0, abs=1e-6) and float(one[3]) == 0
    temperature = fit_likelihood_temperature(nll, prior)
    w = likelihood_weights(nll.sum(1), prior, temperature)
    for other in (temperature / 10, temperature * 10):
        v = likelihood_weights(nll.sum(1), prior, other)
        assert -mixture_log_probs(-nll, w).mean() <= -mixture_log_probs(-nll, v).mean() + 1e-12
    points = torch.rand(4, 30, 3, generator=draw).log_softmax(-1)
    average = Predictive.from_log_probs(points, one)
    assert average.entropy.isfinite().all() and average.mutual_information.abs().max() < 1e-3


def test_arc_length_weights_follow_the_speed():
    gram = bezier.gram([torch.tensor([[0.0], [1.0], [4.0]], dtype=torch.float64)])  # second segment 3 times as long
    t, w = quadrature("gauss-legendre", 4, 2)
    weights = arc_length_weights(t, w, gram, 2, 1)
    torch.testing.assert_close(weights, torch.tensor([1, 1, 3, 3], dtype=torch.float64) / 8)
    assert torch.equal(arc_length_weights(t, w, torch.zeros(3, 3), 2, 1), w)


def test_likelihood_weights():
    prior = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64)
    weights = likelihood_weights(torch.tensor([9000.0, 9000 + math.log(2), 9e5]), prior, 1.0)
    torch.testing.assert_close(weights, torch.tensor([0.5, 0.5, 0], dtype=torch.float64), atol=1e-3, rtol=0)
    torch.testing.assert_close(likelihood_weights(torch.tensor([1.0, 2, 3]), prior, math.inf), prior)
    tempered = likelihood_weights(torch.tensor([0.0, 20.0]), torch.tensor([0.5, 0.5]), 10.0)
    assert tempered[0].item() == pytest.approx(1 / (1 + math.exp(-2)))
    assert likelihood_weights(torch.tensor([1.0, math.inf]), prior[:2], 1.0).tolist() == [1, 0]
    with pytest.raises(UserError, match="temperature"):
        likelihood_weights(torch.ones(3), prior, 0.0)
    with pytest.raises(ValueError, match="finite"):
        likelihood_weights(torch.full((3,), math.inf), prior, 1.0)


def test_effective_points():
    assert effective_points(torch.full((8,), 0.125)) == pytest.approx(8)
    assert effective_points(torch.tensor([1.0, 0])) == 1
