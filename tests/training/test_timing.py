"""A few steps, timed: which ones, and what is made of them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.made import made_task, shared_points, vocabulary
from helpers.tiny import lora_config, tiny

from loracurve.curve.spec import CurveSpec
from loracurve.model.cuda_graphs import WARM_UP
from loracurve.model.curve_model import CurveModel
from loracurve.system.errors import UserError
from loracurve.training.config import LoopConfig, ObjectiveConfig
from loracurve.training.curves import CurveObjective
from loracurve.training.timing import time_anchors, time_curve


def ticking() -> Any:
    return itertools.count().__next__


def model_for(task: Any, spec: CurveSpec) -> CurveModel:
    return CurveModel(tiny("qwen2", vocabulary=vocabulary(task)), lora_config("qwen2"), spec)


def test_the_largest_batch_is_stepped_on_and_scaled_to_the_average(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = made_task(tmp_path, "qwen2")
    config = shared_points(batch_size=2, steps=9, evaluation_points=3, capture=False)  # graphs pad to a few lengths
    seen: list[int] = []
    loss = CurveObjective.loss

    def noting(self: CurveObjective, part: Any) -> Any:
        seen.append(part.batch.tokens)
        return loss(self, part)

    monkeypatch.setattr(CurveObjective, "loss", noting)
    model = model_for(task, CurveSpec(2, 2))
    program = CurveObjective(model, task.encode("train"), task.encode("validation"), config)
    sizes = [sum(part.batch.tokens for part in program.parts(step)) for step in range(9)]
    before = [p.detach().clone() for p in model.factors]
    found = time_curve(model, task, config, ticking())
    steps = 1 + 2 if model.device.type == "cpu" else WARM_UP + 1 + 3  # to warm up, and that are timed
    assert len(set(sizes)) > 1 and seen == [max(sizes)] * steps
    assert found.step == pytest.approx(sum(sizes) / 9 / max(sizes))
    assert found.token == pytest.approx(1 / (3 * task.encode("validation").total_size))
    assert any(not torch.equal(p, q.cpu()) for p, q in zip(before, model.factors, strict=True)), "these are real steps"
    assert all(p.grad is None for p in model.factors)


def test_at_most_64_rows_are_validated_on(tmp_path: Path) -> None:
    task = made_task(tmp_path, "qwen2", sizes={"train": 20, "validation": 150, "test": 3})
    found = time_anchors(model_for(task, CurveSpec.slots(2)), task, LoopConfig(batch_size=2), ticking())
    rows = task.encode("validation").sizes[::3]  # every third, 50 rows
    assert found.token == pytest.approx(1 / (2 * sum(rows)))


def test_a_hinge_measured_by_anchors_needs_none_that_have_learnt(tmp_path: Path) -> None:
    task = made_task(tmp_path, "qwen2")
    model = model_for(task, CurveSpec.slots(2))
    model.anchor()  # all adapters are begun alike: B = 0
    config = shared_points(objective=ObjectiveConfig("hinge", 5.0), batch_size=2, evaluation_points=3)
    assert time_curve(model, task, config, ticking()).step > 0


def test_steps_that_run_away_are_refused(tmp_path: Path) -> None:
    task = made_task(tmp_path, "qwen2")
    config = shared_points(batch_size=2, learning_rate=1e30, warmup=0.0, max_grad_norm=0.0)
    with pytest.raises(UserError, match="not finite in the first steps; lower learning_rate"):
        time_curve(model_for(task, CurveSpec(2, 2)), task, config, ticking())
