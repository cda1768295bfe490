"""Averages over a tunnel around a fitted curve."""

from __future__ import annotations

from pathlib import Path

import torch
from helpers.matrix import build
from helpers.tiny import random_points

from loracurve.curve.spec import CurveSpec
from loracurve.experimental.tunnel_average import tunnel_average
from loracurve.inference.config import EvaluationConfig, TunnelConfig
from loracurve.inference.prediction import point_nll, predict_split
from loracurve.system.randomness import generator


def test_a_tunnel_samples_the_tempered_likelihood_of_a_fixed_subset(tmp_path: Path) -> None:
    model, _, task = build("qwen2", tmp_path, CurveSpec(2, 2))
    model.set_curve(model.spec, random_points(model))
    options = TunnelConfig(0.05, temperature=5.0, split="train", rows=12, warm_up=3, thin=1)
    config = EvaluationConfig(points=4, inference="tunnel", tunnel=options)
    average, again = (tunnel_average(model, config, task) for _ in range(2))
    rows = average.coefficients
    assert rows is not None and rows.shape == (4, 5) and average.where is rows
    torch.testing.assert_close(rows.sum(1), torch.ones(4, dtype=torch.float64))
    assert torch.equal(rows, again.coefficients) and average.record["dimension"] == 3
    train = task.encode("train")
    nll = point_nll(predict_split(model, train, rows), train.labels)
    order = torch.randperm(40, generator=generator(0, "tunnel rows"))
    expected = -nll[:, order[:12]].sum(1) * 40 / 12
    torch.testing.assert_close(
        torch.tensor(average.record["log_likelihood"], dtype=torch.float64), expected, rtol=1e-4, atol=1e-3
    )
    fitted = tunnel_average(model, EvaluationConfig(points=2, tunnel=TunnelConfig(warm_up=0, thin=1)), task)
    assert fitted.record["temperature"] > 0 and fitted.record["rows"] == 13
