"""Whole data sets: merged points and points run together predict the same; the cheaper way is taken."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import matrix
from helpers.made import made_task, vocabulary
from helpers.matrix import SCORING
from helpers.tiny import lora_config, random_points, tiny

from loracurve.curve.spec import CurveSpec
from loracurve.inference import prediction
from loracurve.inference.prediction import folding_tokens, predict_splits
from loracurve.model import runner
from loracurve.model.curve_model import CurveModel
from loracurve.model.merging import Merger

T = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)


def build(architecture: str, tmp_path: Path, **options: object):
    task = made_task(tmp_path, architecture, SCORING[architecture])
    base = tiny(architecture, torch.float32, vocabulary(task), labels=2)
    model = CurveModel(base, lora_config(architecture, **options), CurveSpec(2, 2))
    model.set_curve(model.spec, random_points(model))
    return model, task


@matrix.architectures
def test_both_ways_predict_the_same(architecture: str, tmp_path: Path) -> None:
    model, task = build(architecture, tmp_path)
    sets = {name: task.encode(name) for name in ("validation", "test")}
    points, merged = (predict_splits(model, sets, T, way=way) for way in ("points", "merged"))
    for name in sets:
        found, expected = (x[name].point_log_probs for x in (merged, points))
        there = expected > -torch.inf
        assert torch.equal(found > -torch.inf, there)
        torch.testing.assert_close(found[there], expected[there], rtol=1e-4, atol=1e-4)
    assert model.runner.route.kind == "base" and all(layer._merged is None for layer in model.layers.values())


def test_tokens_from_which_folding_pays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, task = build("qwen2", tmp_path, target_modules=["q_proj", "down_proj"])
    # q_proj 32 x 32 and down_proj 64 -> 32: 4 (1024 + 2048) elements against (32 + 64) + (64 + 64) a token.
    assert folding_tokens(model) == pytest.approx(4 * 3072 / 224)
    calls: list[float] = []
    points = Merger.points
    monkeypatch.setattr(Merger, "points", lambda self: calls.append(1) or points(self))
    sets = {"test": task.encode("test")}
    predict_splits(model, sets, T)
    assert len(calls) == 1
    monkeypatch.setattr(prediction, "room_for_merged", lambda model: False)
    predict_splits(model, sets, T)
    assert len(calls) == 1
    upper, _ = build("qwen2", tmp_path / "upper", layers_to_transform=[2], target_modules=["q_proj"])
    assert folding_tokens(upper) == float("inf"), "points share the lower layers"


def test_language_models_run_their_points_together(tmp_path: Path) -> None:
    task = made_task(tmp_path, "qwen2", "lm")
    model = CurveModel(tiny("qwen2", vocabulary=vocabulary(task)), lora_config("qwen2"), CurveSpec(2, 2))
    model.set_curve(model.spec, random_points(model))
    (found,) = predict_splits(model, {"test": task.encode("test")}, T, way="merged").values()
    assert found.point_log_probs is None and len(found) == task.encode("test").token_offsets[-1]


def test_logits_of_texts_limit_the_points_of_a_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, task = build("llama", tmp_path)
    sets = {"test": task.encode("test")}
    (batch,) = prediction.laid_out_for(model, sets["test"])
    assert batch.answer_ids is None and batch.positions is not None
    assert model.runner.passes(batch, len(T)) == 1
    together = predict_splits(model, sets, T, way="points")["test"].point_log_probs
    logits = len(batch.positions) * vocabulary(task)
    monkeypatch.setattr(runner, "MOST_LOGITS", 2 * logits)
    assert model.runner.passes(batch, len(T)) == 2
    monkeypatch.setattr(runner, "MOST_LOGITS", logits - 1)
    assert model.runner.passes(batch, len(T)) == 3, "at least one point in a pass"
    one_by_one = predict_splits(model, sets, T, way="points")["test"].point_log_probs
    torch.testing.assert_close(one_by_one, together)
    # Scores of single tokens read out those alone.
    other, letters = build("qwen2", tmp_path / "letters")
    (batch,) = prediction.laid_out_for(other, letters.encode("test"))
    assert other.runner.passes(batch, len(T)) == 1
