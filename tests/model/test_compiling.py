"""Compiled layers compute what the layers compute, one of a stack serves all, and failing to compile is no failure."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.made import shared_points
from helpers.matrix import build as build_task
from helpers.tiny import lora_config, random_points, tiny
from torch import Tensor

from loracurve.curve.spec import CurveSpec
from loracurve.model.curve_model import CurveModel
from loracurve.tasks.batching import Batch
from loracurve.training.config import PerturbationConfig
from loracurve.training.fit import fit


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def build() -> CurveModel:
    targets = ["q_proj", "k_proj", "down_proj"]
    model = CurveModel(tiny("llama"), lora_config("llama", target_modules=targets), CurveSpec(2, 2))
    model.set_curve(model.spec, random_points(model))
    return model


def batch(rows: int = 4, size: int = 6) -> Batch:
    ids = torch.randint(3, 300, (rows, size), generator=torch.Generator().manual_seed(0))
    count, last = torch.arange(rows), torch.arange(rows) * size + size - 1
    return Batch(ids, "answer", count, count, torch.zeros_like(count), positions=last, answer_ids=torch.tensor([5, 6]))


def step(model: CurveModel, coefficients: Tensor) -> list[Tensor]:
    """Log-probabilities and gradients."""
    log_probs = model.train().runner.scores(batch(), coefficients).log_softmax(-1)
    return [log_probs, *torch.autograd.grad(log_probs[..., 0].sum(), model.factors)]


def test_compiled_layers_compute_the_same_and_are_compiled_once(caplog: pytest.LogCaptureFixture) -> None:
    model = build()
    rows = model.coefficients((torch.arange(4, dtype=torch.float64)[None] + 0.5) / 4)
    others = model.coefficients((torch.arange(4, dtype=torch.float64)[None] + 0.25) / 4)
    plain = [step(model, c) for c in (rows, others)]
    model.runner.compile_layers(backend="aot_eager", fullgraph=True)
    for c, expected in zip((rows, others), plain, strict=True):
        for found, value in zip(step(model, c), expected, strict=True):
            torch.testing.assert_close(found, value)
    # Three layers: the first, whose input needs no gradient, and one for the two others.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert not [r for r in caplog.records if r.name == "loracurve"]


def test_where_nothing_can_be_compiled_layers_run_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler here")

    model = build()
    points = model.coefficients(torch.tensor([0.2, 0.7], dtype=torch.float64))
    expected = step(model, points)
    model.runner.compile_layers(backend=broken)
    with caplog.at_level(logging.WARNING, "loracurve"):
        for _ in range(2):
            for found, value in zip(step(model, points), expected, strict=True):
                assert torch.equal(found, value)
    (record,) = (r for r in caplog.records if r.name == "loracurve")
    assert "without compiled layers" in record.message and "no compiler here" in record.message


def test_layers_run_as_they_are_again_for_noise(tmp_path: Path) -> None:
    model, _, task = build_task("llama", tmp_path, CurveSpec(1, 2))
    model.runner.compile_layers(backend="aot_eager")
    layer = model.model.get_decoder().layers[0]
    assert layer._compiled_call_impl is not None
    noise = PerturbationConfig("lora_space", 0.1)
    fit(model, task, shared_points(steps=1, batch_size=4, points=1, perturbation=noise), progress=False)
    assert layer._compiled_call_impl is None
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0
