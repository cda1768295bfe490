"""Curves trained side by side are what each becomes alone: data order, points, clipping, validation, best state."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from made import made_task, shared_points, vocabulary
from ranks import together
from tiny import lora_config, random_points, tiny
from torch import Tensor

from loracurve.batching import collate
from loracurve.bootstrap import BootstrapConfig
from loracurve.corruption import CorruptionConfig
from loracurve.errors import UserError
from loracurve.joining import join_batches
from loracurve.loop import FitResult
from loracurve.lora_space import ControlPoints
from loracurve.model import CurveModel, CurveSpec
from loracurve.objective import ObjectiveConfig
from loracurve.perturbation import PerturbationConfig
from loracurve.programs import CurveProgram
from loracurve.storage import read_json
from loracurve.tasks import Task
from loracurve.training import FitConfig, fit, fit_curves

QUIET = {"progress": False}
SEEDS = [5, 6]
SCORING = {"qwen2": "letter", "llama": "text", "encoder": "head", "lm": "lm"}
HINGE = ObjectiveConfig("hinge", 5.0, tau=0.02)
ANCHORED = CurveSpec.anchored(3, 2)
UNCLIPPED = {"max_grad_norm": 0.0}


def build(kind: str, spec: CurveSpec, folder: Path) -> tuple[CurveModel, Task, list[ControlPoints]]:
    architecture = "qwen2" if kind == "lm" else kind
    task = made_task(folder, architecture, SCORING[kind])
    base = tiny(architecture, torch.float64, vocabulary(task), labels=2)
    for m in base.modules():
        if isinstance(m, torch.nn.Dropout):
            m.p = 0.0
    model = CurveModel(base, lora_config(architecture), spec)
    return model, task, [spec.tie(random_points(model, seed, 0.1)) for seed in (1, 2)]


def options_of(**options: Any) -> FitConfig:
    quick = {"steps": 3, "batch_size": 5, "learning_rate": 3e-3, "evaluate_every": 1, "eps": 1e-3, "max_grad_norm": 0.1}
    return shared_points(**(quick | options))


def one_by_one(
    model: CurveModel, task: Task, config: FitConfig, curves: list[ControlPoints]
) -> list[tuple[FitResult, ControlPoints]]:
    spec, found = model.spec, []
    for points, seed in zip(curves, SEEDS, strict=True):
        model.set_curve(spec, points)
        found.append((fit(model, task, replace(config, seed=seed), **QUIET), model.control_points()))
    return found


def check(
    result: FitResult, points: list[ControlPoints], single: list[tuple[FitResult, ControlPoints]], tight: bool
) -> None:
    rtol, atol = (1e-9, 1e-12) if tight else (1e-5, 1e-7)
    assert result.best_step == [r.best_step[0] for r, _ in single]
    assert result.validation_nll == pytest.approx([r.validation_nll[0] for r, _ in single], rel=1e-6)
    for mine, (_, expected) in zip(points, single, strict=True):
        assert mine.keys() == expected.keys()
        for name, p in expected.items():
            torch.testing.assert_close(mine[name], p, rtol=rtol, atol=atol)
    for row, *rows in zip(result.history, *(r.history for r, _ in single), strict=False):
        assert row["nll"] == pytest.approx(sum(r["nll"] for r in rows) / len(rows), rel=1e-5)
        assert row["grad_norm"] == pytest.approx(max(r["grad_norm"] for r in rows), rel=1e-5)


CASES: dict[str, tuple[str, CurveSpec, dict[str, Any]]] = {
    "free": ("qwen2", CurveSpec(2, 2), {"weight_decay": 0.1, "row_tokens": 64, "accumulation": 2}),
    "anchored": ("llama", ANCHORED, {"objective": ObjectiveConfig("hinge", 5.0), "weight_decay": 0.1}),
    "mixture": ("encoder", CurveSpec(2, 2), {"objective": ObjectiveConfig("mixture", 0.5), **UNCLIPPED}),
    "head": ("encoder", ANCHORED, {"objective": ObjectiveConfig("hinge", 5.0), "weight_decay": 0.1}),
    "everywhere": ("llama", ANCHORED, {"sampling": "quasi-random", "bootstrap": BootstrapConfig("everywhere")}),
    "tied": ("encoder", ANCHORED, {"bootstrap": BootstrapConfig("tied"), **UNCLIPPED}),
    "closed": ("qwen2", CurveSpec(3, 2, closed=True), {"sampling": "arc-length", "row_tokens": 1}),
    "smooth": ("encoder", CurveSpec(2, 3, smooth=True), {"weight_decay": 0.1, **UNCLIPPED}),
    "one B": ("llama", CurveSpec(1, 2, factors="A"), {"objective": ObjectiveConfig("bonus", 0.5)}),
    "tokens": ("qwen2", CurveSpec(1, 2), {"objective": HINGE, "corruption": CorruptionConfig("tokens", 0.05)}),
    "attention": ("llama", CurveSpec(1, 2), {"objective": HINGE, "corruption": CorruptionConfig("attention", 0.05)}),
    "lm": ("lm", CurveSpec(1, 2), {"accumulation": 2, "sampling": "half-period"}),
    "passes": ("encoder", CurveSpec(1, 2), {"points": 3, "point_passes": 2, **UNCLIPPED}),
}


@pytest.mark.parametrize("case", list(CASES))
def test_curves_side_by_side_are_what_each_becomes_alone(case: str, tmp_path: Path) -> None:
    kind, spec, options = CASES[case]
    model, task, curves = build(kind, spec, tmp_path)
    config = options_of(**options)
    single = one_by_one(model, task, config, curves)
    model.set_curve(spec, curves[0])
    result, points = fit_curves(model, task, config, curves, SEEDS, **QUIET)
    # The RMSNorm of Llama and Qwen computes in float32 whatever the dtype, and so does the clipping of a curve alone.
    check(result, points, single, kind == "encoder" and not config.max_grad_norm)
    for mine, start in zip(points, curves, strict=True):
        for name, p in start.items():
            assert torch.equal(mine[name][~spec.mask], p[~spec.mask]), "anchors are bit-equal"
            assert not torch.equal(mine[name][spec.mask], p[spec.mask])
    for r, (own, _) in enumerate(single):
        for name, value in own.settled.items():
            assert result.settled[f"{name}_{r}"] == pytest.approx(value, rel=1e-6)
    assert model.spec == spec
    assert all(torch.equal(p, curves[0][n]) for n, p in model.control_points().items()), "the model is as it was"


def test_each_curve_stops_and_keeps_its_best_on_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, task, curves = build("encoder", CurveSpec(1, 2), tmp_path)
    # The second would stop after step 3, before it becomes better again; the first stops after step 5.
    given = {5: [4.0, 3.0, 2.0, 5.0, 5.0, 1.0, 1.0], 6: [2.0, 3.0, 3.0, 1.0, 0.5, 0.5, 0.5]}
    left: dict[CurveProgram, list[float]] = {}

    def validate(program: CurveProgram) -> list[float]:
        return [left.setdefault(program, [*given[program.config.seed]]).pop(0)]

    monkeypatch.setattr(CurveProgram, "validate", validate)
    config = options_of(steps=7, patience=2, **UNCLIPPED)
    single = one_by_one(model, task, config, curves)
    assert [(r.steps, r.best_step) for r, _ in single] == [(5, [3]), (3, [1])]
    result, points = fit_curves(model, task, config, curves, SEEDS, **QUIET)
    check(result, points, single, True)
    assert (result.steps, result.stopped_early, result.validation_nll) == (5, True, [2.0, 2.0])
    # Stopped in between, the first has waited none and the second long enough.
    left.clear()
    fit_curves(model, task, config, curves, SEEDS, tmp_path / "cut", stop_after=3, **QUIET)
    assert read_json(tmp_path / "cut" / "checkpoint.json")["stale"] == [0, 2]


def test_a_stopped_run_goes_on_to_the_bit(tmp_path: Path) -> None:
    model, task, curves = build("qwen2", ANCHORED, tmp_path)
    config = options_of(steps=4, objective=ObjectiveConfig("hinge", 5.0))
    whole, expected = fit_curves(model, task, config, curves, SEEDS, tmp_path / "whole", **QUIET)
    fit_curves(model, task, config, curves, SEEDS, tmp_path / "cut", stop_after=2, **QUIET)
    again, found = fit_curves(model, task, config, curves, SEEDS, tmp_path / "cut", **QUIET)
    assert again.history == whole.history
    assert again.settled == whole.settled
    for mine, other in zip(found, expected, strict=True):
        assert all(torch.equal(p, other[n]) for n, p in mine.items())
    with pytest.raises(UserError, match="does not fit this run"):
        fit_curves(model, task, config, curves[:1], SEEDS[:1], tmp_path / "cut", **QUIET)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"perturbation": PerturbationConfig("flat_lora")}, "perturbation.kind: expected none .* found flat_lora"),
        ({"share_points": False}, "share_points: expected true for several curves side by side, found false"),
        ({"layerwise": True}, "layerwise: expected false"),
        ({"keep": "last", "patience": 2}, "keep: expected best .* with patience, found last"),
    ],
)
def test_what_cannot_be_had_side_by_side_is_refused(options: dict[str, Any], line: str, tmp_path: Path) -> None:
    model, task, curves = build("qwen2", CurveSpec(1, 2), tmp_path)
    with pytest.raises(UserError, match=line) as error:
        fit_curves(model, task, options_of(**options), curves, SEEDS, **QUIET)
    assert "\n" not in str(error.value)


def test_curves_that_do_not_fit_are_refused_and_the_model_stays(tmp_path: Path) -> None:
    spec = CurveSpec(1, 2)
    model, task, curves = build("qwen2", spec, tmp_path)
    before = model.control_points()
    with pytest.raises(UserError, match="seeds: expected one for each of the curves, found 1 for 2"):
        fit_curves(model, task, options_of(), curves, [1], **QUIET)
    name = next(iter(curves[1]))
    short = {n: p[:2] if n == name else p for n, p in curves[1].items()}
    with pytest.raises(UserError, match=rf"curve 1: expected {name} of shape \[3, .*found \[2, "):
        fit_curves(model, task, options_of(), [curves[0], short], SEEDS, **QUIET)
    assert model.spec == spec
    assert all(torch.equal(p, before[n]) for n, p in model.control_points().items())


@pytest.mark.parametrize("kind", ["qwen2", "llama", "lm"])
def test_joined_batches_score_as_they_do_apart(kind: str, tmp_path: Path) -> None:
    model, task, _ = build(kind, CurveSpec(1, 2), tmp_path)
    encoded = task.encode("train")
    # Packed behind masks, plain rows, and read-outs that fill up the shape.
    batches = [
        collate(encoded, [0, 1, 2, 3, 4], 64),
        collate(encoded, [7, 9], 1),
        collate(encoded, [5, 8, 6], 1, pad_to=8),
    ]
    t = torch.tensor([0.2, 0.7], dtype=torch.float64)
    joined = join_batches(batches)
    assert len(joined.input_ids) == 3 * max(len(b.input_ids) for b in batches)
    expected = torch.cat([model.point_log_probs(b, t) for b in batches], 1)
    torch.testing.assert_close(model.point_log_probs(joined, t), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(joined.labels, torch.cat([b.labels for b in batches]))
    assert torch.equal(joined.index, torch.cat([b.index for b in batches]))


def in_one_pass(kind: str, corrupt: str, folder: Path, rank: int = 0) -> tuple[FitResult, list[dict[str, Tensor]]]:
    model, task, curves = build(kind, ANCHORED, folder / str(rank))
    corruption = CorruptionConfig(corrupt)  # type: ignore[arg-type]
    options = {"objective": ObjectiveConfig("hinge", 5.0), "accumulation": 2, "row_tokens": 1}
    return fit_curves(model, task, options_of(corruption=corruption, **options), curves, SEEDS, **QUIET)


@pytest.mark.parametrize(("kind", "corrupt"), [("encoder", "none"), ("qwen2", "tokens")])
def test_two_processes_train_what_one_does(kind: str, corrupt: str, tmp_path: Path) -> None:
    one, expected = in_one_pass(kind, corrupt, tmp_path / "one")
    for result, points in together(partial(in_one_pass, kind, corrupt, tmp_path / "two"), tmp_path / "ranks"):
        assert result.best_step == one.best_step
        assert result.validation_nll == pytest.approx(one.validation_nll, rel=1e-5)
        for mine, other in zip(points, expected, strict=True):
            for name, p in other.items():
                torch.testing.assert_close(mine[name], p, rtol=1e-5, atol=1e-7)
