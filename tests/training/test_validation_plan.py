"""How often and on which rows a training is validated: by plain counts, and the same in every run."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.made import made_task, vocabulary
from helpers.tiny import lora_config, tiny

from loracurve.curve.anchored import slot_times
from loracurve.curve.spec import CurveSpec
from loracurve.inference.prediction import point_nll, predict_split
from loracurve.model.curve_model import CurveModel
from loracurve.tasks.encoding import Encoded, Example
from loracurve.tasks.task import Task
from loracurve.training.config import FitConfig, LoopConfig, passes_of
from loracurve.training.fit import fit, fit_anchors
from loracurve.training.loop import FitResult, batch_numbers
from loracurve.training.micro_batches import validation_points
from loracurve.training.validation_plan import plan_validation

QUIET = {"progress": False}


def encoded(lengths: Sequence[int]) -> Encoded:
    examples = [Example(f"row {i}", tuple(range(n)), (), i % 2, 2) for i, n in enumerate(lengths)]
    return Encoded(examples, "head", None, ("no", "yes"), "sum", 0)


@pytest.mark.parametrize(
    ("changes", "of", "every", "times", "rows", "share"),
    [
        # A fifth of 3 x 1500 x 16 rows pays for 14,400 of them at 7 points each: 10 x 205.
        ({"steps": 1500}, 2000, 150, 10, 205, 10 * 205 * 7 / 72000),
        # 2,880 of 7: not 10 x 100, but 4 x 102.
        ({"steps": 300}, 2000, 75, 4, 102, 4 * 102 * 7 / 14400),
        ({"steps": 300}, 50, 38, 8, 50, 8 * 50 * 7 / 14400),  # all rows 8 times
        ({"steps": 300}, 30, 30, 10, 30, 10 * 30 * 7 / 14400),  # nothing is given up
        ({"steps": 30}, 2000, 30, 1, 100, 100 * 7 / 1440),  # one look at a hundred rows stays
        ({"steps": 1500, "validation_share": 0.5}, 2000, 150, 10, 514, 10 * 514 * 7 / 72000),
        ({"steps": 300, "validation_share": None}, 2000, 30, 10, 2000, 10 * 2000 * 7 / 14400),
        ({"steps": 300, "evaluate_every": 40}, 2000, 40, 8, 2000, 8 * 2000 * 7 / 14400),
    ],
)
def test_rows_are_given_up_first_and_then_validations(
    changes: dict[str, Any], of: int, every: int, times: int, rows: int, share: float
) -> None:
    config = FitConfig(batch_size=16, **changes)
    plan = plan_validation(config, encoded([10] * 40), encoded([10] * of), config.evaluation_points, passes_of(config))
    assert (plan.every, plan.times, len(plan.rows), plan.of) == (every, times, rows, of)
    assert plan.share == pytest.approx(share)


def test_rows_come_by_the_hash_of_their_ids_in_their_order_and_count_by_their_tokens() -> None:
    lengths = [1 + i * 37 % 50 for i in range(600)]
    train, validation = encoded([7, 9]), encoded(lengths)
    plan = plan_validation(LoopConfig(steps=40, batch_size=20), train, validation)
    by_hash = sorted(range(600), key=lambda i: hashlib.sha256(f"0:row {i}".encode()).digest())
    assert [e.id for e in plan.rows.examples] == [f"row {i}" for i in sorted(by_hash[: len(plan.rows)])]
    trained = 3 * 40 * 20 * 8
    taken = [plan.times * sum(lengths[i] for i in by_hash[: len(plan.rows) + more]) for more in (0, 1)]
    assert taken[0] <= 0.2 * trained < taken[1] and 100 < len(plan.rows) < 600
    assert plan.share == taken[0] / trained
    assert plan_validation(LoopConfig(steps=40, batch_size=20, seed=3), train, validation).rows == plan.rows


def test_the_plan_in_words() -> None:
    config = FitConfig(steps=1500, evaluation_points=5)
    words = str(plan_validation(config, encoded([10] * 40), encoded([10] * 2000), config.evaluation_points))
    assert words == "288 of 2,000 rows, 10 times, 5 points: 20 % of the training's products"
    words = str(plan_validation(LoopConfig(steps=10, evaluate_every=10), encoded([10] * 40), encoded([10] * 60)))
    assert words == "60 of 60 rows, once: 12 % of the training's products"


def built(folder: Path, spec: CurveSpec) -> tuple[CurveModel, Task]:
    task = made_task(folder, "encoder", "head", {"train": 40, "validation": 150, "test": 2})
    model = CurveModel(tiny("encoder", vocabulary=vocabulary(task), labels=2), lora_config("encoder"), spec)
    return model, task


@pytest.mark.parametrize("kind", ["curve", "anchors"])
def test_a_fit_stays_within_the_share_and_goes_on_as_if_it_had_not_stopped(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of_curve = kind == "curve"
    loop = LoopConfig(steps=60, batch_size=20, learning_rate=1e-3)
    config = FitConfig(**vars(replace(loop, steps=120)), evaluation_points=3) if of_curve else loop
    model, task = built(tmp_path, spec := CurveSpec(1, 2) if of_curve else CurveSpec.slots(2))
    start = model.control_points()

    def run(folder: str, **options: Any) -> tuple[FitResult, dict[str, torch.Tensor]]:
        result: FitResult = (fit if of_curve else fit_anchors)(model, task, config, tmp_path / folder, **options)
        return result, model.control_points()

    result, points = run("whole")
    found = result.validation
    train, validation = task.encode("train"), task.encode("validation")
    tokens = {e.id: len(e.prompt) for e in (*train.examples, *validation.examples)}
    # Every adapter of several sees its own batches, and is validated at one point.
    trained = 3 * sum(
        tokens[train.examples[i].id] for step in range(config.steps) for i in batch_numbers(0, step, 40, 20)
    )
    ids = sorted((e.id for e in validation.examples), key=lambda i: hashlib.sha256(f"0:{i}".encode()).digest())
    drawn = set(ids[: found["rows"]])
    validated = [entry["validation_nll"] for entry in result.history if "validation_nll" in entry]
    taken = len(validated) * (3 if of_curve else 1) * sum(tokens[i] for i in drawn)
    assert found["share"] == taken / trained <= 0.2
    assert 1 < len(validated) == found["times"] < 10 and 100 <= found["rows"] < found["of"] == 150
    said = f"{kind}: validation: {found['rows']} of 150 rows, {found['times']} times"
    assert capsys.readouterr().out.startswith(said)

    looked_at = replace(validation, examples=[e for e in validation.examples if e.id in drawn])
    t, weights = validation_points(3, spec) if of_curve else (slot_times(2), None)
    model.set_curve(spec, points)
    predictive = predict_split(model, looked_at, t, weights)
    nll = (
        [predictive.negative_log_likelihood(looked_at.labels).mean()]
        if of_curve
        else point_nll(predictive, looked_at.labels).mean(1)
    )
    assert result.validation_nll == pytest.approx([float(x) for x in nll], abs=1e-5)

    for folder, stops in (("again", [None]), ("cut", [config.steps // 2, None])):
        model.set_curve(spec, start)
        for stop_after in stops:
            other, now = run(folder, stop_after=stop_after, **QUIET)
        assert [e.get("validation_nll") for e in other.history] == [e.get("validation_nll") for e in result.history]
        assert (other.best_step, other.validation) == (result.best_step, result.validation)
        assert all(torch.equal(p, now[name]) for name, p in points.items())
    assert capsys.readouterr().out == ""
