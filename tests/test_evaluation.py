"""Averages along and beside a fitted curve: weights by the likelihood, tunnels, temperatures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from made_runs import QUICK, base_folder, command, config_file, data_folder
from test_training import build
from tiny import random_points

from loracurve.curve.config import CurveConfig
from loracurve.curve.quadrature import quadrature
from loracurve.curve.spec import CurveSpec
from loracurve.experimental.tunnel_average import tunnel_average
from loracurve.inference.calibration import fit_temperature
from loracurve.inference.config import EvaluationConfig, TunnelConfig
from loracurve.inference.information import mixture_log_probs
from loracurve.inference.model_average import effective_points, fit_likelihood_temperature, likelihood_weights
from loracurve.inference.prediction import labels_of, point_nll, predict_split
from loracurve.inference.predictive import Predictive
from loracurve.model.config import ModelConfig
from loracurve.runs.config import RunConfig
from loracurve.runs.run import open_run
from loracurve.system.errors import UserError
from loracurve.system.randomness import generator
from loracurve.tasks.batching import evaluation_batches
from loracurve.tasks.config import TaskConfig

SHAPES = [
    CurveSpec(2, 2),
    CurveSpec(2, 3, smooth=True),
    CurveSpec.anchored(3, closed=True),
    CurveSpec(2, 2, factors="A"),
]


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


def test_a_closed_curve_has_no_point_twice() -> None:
    t, w = quadrature("uniform", 4, 2, closed=True)
    assert t.tolist() == [0, 0.25, 0.5, 0.75] and w.tolist() == [0.25] * 4


@pytest.mark.parametrize("spec", SHAPES)
@pytest.mark.parametrize("architecture", ["qwen2", "encoder"])
def test_points_rows_merged_and_coefficients_agree(architecture: str, spec: CurveSpec, tmp_path: Path) -> None:
    model, _, task = build(architecture, tmp_path, spec)
    model.set_curve(spec, spec.tie(random_points(model)))
    model.eval()
    test, t = task.encode("test"), torch.tensor([0.0, 0.3, 0.9], dtype=torch.float64)
    expected = predict_split(model, test, t).point_log_probs
    assert expected is not None
    found = predict_split(model, test, model.coefficients(t)).point_log_probs
    torch.testing.assert_close(found, expected)
    (batch,) = evaluation_batches(test, packing=model.supports_trees)
    for i, at in enumerate(t.tolist()):
        with model.merged(at), torch.no_grad():
            merged = model.scores(batch, None).log_softmax(-1)[0]
        torch.testing.assert_close(merged, expected[i, batch.index], rtol=1e-3, atol=1e-4)


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
    nll = point_nll(predict_split(model, train, rows), labels_of(train))
    order = torch.randperm(40, generator=generator(0, "tunnel rows"))
    expected = -nll[:, order[:12]].sum(1) * 40 / 12
    torch.testing.assert_close(
        torch.tensor(average.record["log_likelihood"], dtype=torch.float64), expected, rtol=1e-4, atol=1e-3
    )
    fitted = tunnel_average(model, EvaluationConfig(points=2, tunnel=TunnelConfig(warm_up=0, thin=1)), task)
    assert fitted.record["temperature"] > 0 and fitted.record["rows"] == 13


def test_a_run_with_every_form_of_inference(tmp_path: Path) -> None:
    base, data = base_folder(tmp_path / "base", "qwen2"), data_folder(tmp_path / "data", "letter")
    config = config_file(tmp_path / "c.yaml", base, data, "letter")
    out = tmp_path / "run"
    tunnel = ["--evaluation.inference=tunnel", "--evaluation.tunnel.warm_up=1", "--evaluation.tunnel.thin=1"]
    command("fit", config, "--out", out, *QUICK, "--evaluation.weights=likelihood", *tunnel)
    metrics = json.loads((out / "metrics.json").read_text())
    assert list(metrics["methods"]) == [
        *("adapter 0", "adapter 1", "ensemble", "tunnel", "straight line", "aligned line", "curve")
    ]
    assert metrics["average"]["effective"] == pytest.approx(1 / sum(w * w for w in metrics["average"]["w"]))
    assert metrics["average"]["prior"] == pytest.approx([1 / 3] * 3)
    assert (out / "figures" / "posterior_over_t.png").stat().st_size > 1000
    assert metrics["tunnel"]["evaluations"] >= 4 and len(metrics["tunnel"]["xi"]) == 3
    run = open_run(out)
    validation = run.task.encode("validation")
    table = pq.read_table(out / "predictions.parquet").to_pylist()
    for name, entry in metrics["methods"].items():
        tempered = entry["tempered"]
        assert tempered["rows"] == 24 and tempered["temperature"] > 0
        rows = [r for r in table if (r["method"], r["set"]) == (name, "test")]
        scaled = [torch.tensor(r["probs"], dtype=torch.float64).log() / tempered["temperature"] for r in rows]
        nll = [-float(p.log_softmax(0)[r["label"]]) for p, r in zip(scaled, rows, strict=True)]
        assert tempered["sets"]["test"]["nll"] == pytest.approx(sum(nll) / len(nll), rel=1e-4)
    average = run.average()
    assert average.coefficients is not None, "what predict uses"
    predicted = predict_split(run.model, validation, average.where, average.weights)
    expected = fit_temperature(predicted.log_probs, labels_of(validation))
    assert metrics["methods"]["tunnel"]["tempered"]["temperature"] == pytest.approx(expected, rel=1e-3)
    command("evaluate", out, "--inference=tunnel", "--points=2")
    assert (out / "evaluations" / "data-test-2-likelihood-tunnel" / "metrics.json").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "free", "segments": 1, "degree": 1}, "inference: expected curve for two control points"),
        ({"kind": "free", "degree": 1, "smooth": True}, "smooth: expected degree 2"),
        ({"kind": "anchored", "degree": 1}, "curve.degree: expected at least 2 .* or set pieces to 2"),
        ({"kind": "free", "pieces": 2}, "curve.pieces: expected 1"),
        ({"kind": "anchored", "factors": "A"}, "curve.factors: expected both"),
        ({"kind": "anchored", "anchors": 4, "closed": True, "smooth": True}, "joints that can be chosen freely"),
    ],
)
def test_what_cannot_work_is_known_before_training(values: dict[str, Any], message: str) -> None:
    evaluation = EvaluationConfig(inference="tunnel")
    with pytest.raises(UserError, match=message):
        RunConfig(ModelConfig("m"), TaskConfig("d", "letter"), curve=CurveConfig(**values), evaluation=evaluation)
