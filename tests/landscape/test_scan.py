"""Losses along paths equal those of the curve model, at the cost of merged evaluations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path as FilePath
from typing import Any

import pytest
import torch
from helpers.laid_out import setting

from loracurve.inference.prediction import predict
from loracurve.landscape.paths import curve_path, grid
from loracurve.landscape.scan import predict_merged, scan_paths


@pytest.mark.parametrize("scoring", ["letter", "text", "lm"])
def test_merged_points_predict_as_the_curve_does(scoring: str, tmp_path: FilePath) -> None:
    model, split = setting(tmp_path, scoring=scoring)
    (found,) = predict_merged(model, model.adapter(0.3), [split])
    lm = scoring == "lm"
    t = torch.tensor([0.3], dtype=torch.float64)
    expected = predict(model, split.batches, t, summarise=lm, examples=split.examples)
    name = "label_log_probs" if lm else "point_log_probs"
    torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-5)
    predict_merged(model, model.adapter(0.3), [split])
    assert model.runner.route.kind == "base" and all(layer._merged is None for layer in model.layers.values())


def test_a_scan_of_61_points_costs_61_merged_evaluations(tmp_path: FilePath, monkeypatch: pytest.MonkeyPatch) -> None:
    model, split = setting(tmp_path, dtype=torch.float32)
    path = curve_path(model)
    t = grid(1, 61)

    calls: Counter[str] = Counter()

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: object) -> Any:
            calls[name] += 1
            return function(*arguments)

        return call

    monkeypatch.setattr(model.runner, "scores", counted("passes", model.runner.scores))
    monkeypatch.setattr(type(path), "adapter", counted("adapters", type(path).adapter))
    for layer in model.layers.values():
        monkeypatch.setattr(layer, "fold", counted("folds", layer.fold))
    cost = scan_paths(model, {"curve": path}, [split], {"curve": t}).cost
    assert calls["passes"] == 61 * len(split.batches), "no forward pass but one for each point and batch"
    assert (calls["adapters"], calls["folds"]) == (61, 61 * len(model.layers)), "each point is folded once"
    assert cost["evaluations"] == 61 and cost["seconds_per_evaluation"] == pytest.approx(cost["seconds"] / 61)
