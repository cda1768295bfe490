"""SWAG: moments of the iterates, and the covariance of its samples."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.settings import LOOP, posterior_setting

from loracurve.baselines.swag import SWAG, Iterates, MultiSWAG
from loracurve.curve.anchored import slot_times
from loracurve.curve.spec import CurveSpec
from loracurve.inference.prediction import predict_split
from loracurve.system.errors import UserError


def test_moments_of_iterates_and_covariance_of_samples() -> None:
    draw = torch.Generator().manual_seed(0)
    thetas = [3 + torch.randn(6, generator=draw, dtype=torch.float64) for _ in range(9)]
    iterates = Iterates(rank=4)
    for theta in thetas:
        iterates.add([theta[:2], theta[2:]])
    stacked = torch.stack(thetas)
    torch.testing.assert_close(torch.cat(iterates.mean), stacked.mean(0))
    torch.testing.assert_close(torch.cat(iterates.variance()), stacked.var(0, unbiased=False))
    deviations = torch.stack([theta - stacked[: i + 1].mean(0) for i, theta in enumerate(thetas)][-4:], dim=1)
    torch.testing.assert_close(torch.stack([torch.cat(d) for d in iterates.deviations], dim=1), deviations)
    expected = 0.5 * (stacked.var(0, unbiased=False).diag() + deviations @ deviations.T / 3)
    samples = torch.stack([torch.cat(iterates.sample(draw)) for _ in range(3000)])
    torch.testing.assert_close(samples.mean(0), stacked.mean(0), atol=0.08, rtol=0)
    torch.testing.assert_close(torch.cov(samples.T), expected, atol=0.08, rtol=0.08)
    wide = torch.stack([torch.cat(iterates.sample(draw, scale=4.0)) for _ in range(3000)])
    torch.testing.assert_close(torch.cov(wide.T), 4 * expected, atol=0.32, rtol=0.08)


def test_swag_collects_evenly_from_the_anchor_at_a_constant_rate(tmp_path: Path) -> None:
    from loracurve.baselines.swag import _Collecting

    of = posterior_setting(tmp_path)
    learner = _Collecting([torch.zeros(1)], replace(LOOP, steps=10), SWAG(collect=4, rank=2))
    assert learner.due == {2, 5, 7, 10}
    tiny_rate = SWAG(anchor=1, collect=6, rank=3, rate=1e-9).fit(of)
    encoded = of.task.encode("test")
    of.model.set_curve(CurveSpec.slots(1), {n: p[1:2] for n, p in of.anchors.items()})
    anchor = predict_split(of.model, encoded, slot_times(1))
    torch.testing.assert_close(tiny_rate.predict(encoded).probs, anchor.probs, rtol=0, atol=1e-4)
    with pytest.raises(UserError, match="expected 1 to 2 anchors"):
        SWAG(anchor=2).fit(of)
    with pytest.raises(UserError, match="collect: expected at most one iterate a step, found 20 in 12 steps"):
        SWAG().fit(of)
    with pytest.raises(UserError, match="2 <= rank <= collect"):
        SWAG(collect=3)


def test_multiswag_shares_the_samples_between_anchors(tmp_path: Path) -> None:
    of = posterior_setting(tmp_path, samples=5)
    encoded = of.task.encode("test")
    options = {"collect": 6, "rank": 3, "rate": 1e-9}
    found = MultiSWAG(modes=2, **options).fit(of)  # type: ignore[arg-type]
    assert found.along is not None and found.along.weights is not None
    # Three samples around the first anchor, two around the second, half of the weight each.
    torch.testing.assert_close(found.along.weights, torch.tensor([1 / 6] * 3 + [1 / 4] * 2, dtype=torch.float64))
    assert (found.passes, found.cost) == (5, pytest.approx(2 * SWAG(**options).fit(of).cost))  # type: ignore[arg-type]
    of.model.set_curve(CurveSpec.slots(2), of.anchors)
    both = predict_split(of.model, encoded, slot_times(2))
    torch.testing.assert_close(found.predict(encoded).probs, both.probs, rtol=0, atol=1e-4)
    with pytest.raises(UserError, match="expected 1 to 2 anchors"):
        MultiSWAG(modes=3, **options).fit(of)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="modes: expected at most one a sample, found 9 for 5 samples"):
        MultiSWAG(modes=9, **options).fit(of)  # type: ignore[arg-type]
