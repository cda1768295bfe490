"""Fitting a curve: all options together, resuming to the bit, anchors frozen, faults reported."""

from __future__ import annotations

import math
import warnings
from dataclasses import asdict, replace
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import matrix
from helpers.made import shared_points
from helpers.matrix import QUIET, build
from helpers.tiny import random_points

from loracurve.curve import bezier
from loracurve.curve.lora_space import column
from loracurve.curve.spec import CurveSpec
from loracurve.inference.prediction import predict_split
from loracurve.system.errors import UserError
from loracurve.training.config import ObjectiveConfig, PerturbationConfig
from loracurve.training.curves import CurveObjective
from loracurve.training.fit import fit
from loracurve.training.loop import recomputing

JSD = ["none", "bonus", "hinge"]
NOISE = ["none", "flat_lora", "lora_space"]
# Rows of (curve, segments, jsd, noise, architecture).
CASES = [
    ("anchored", 1, "none", "lora_space", "qwen2"),
    ("anchored", 2, "hinge", "flat_lora", "qwen2"),
    ("free", 1, "bonus", "none", "qwen2"),
    ("anchored", 2, "hinge", "none", "llama"),
    ("anchored", 2, "bonus", "lora_space", "llama"),
    ("free", 1, "none", "flat_lora", "llama"),
    ("anchored", 2, "none", "none", "encoder"),
    ("free", 2, "bonus", "flat_lora", "encoder"),
    ("free", 1, "hinge", "lora_space", "encoder"),
]


def test_the_cases_cover_all_pairs() -> None:
    levels = [matrix.KINDS, matrix.SEGMENTS, JSD, NOISE, matrix.ARCHITECTURES]
    for a, b in combinations(range(5), 2):
        assert {(c[a], c[b]) for c in CASES} == set(product(levels[a], levels[b]))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One tiny model and task for each architecture; a case only exchanges the curve."""
    made = {}
    for architecture in matrix.ARCHITECTURES:
        folder = tmp_path_factory.mktemp(architecture)
        model, _, task = build(architecture, folder, CurveSpec(1, 2), r=2)
        made[architecture] = model, task
    return made


@pytest.mark.parametrize(("kind", "segments", "jsd", "noise", "architecture"), CASES)
def test_options_train_together_resume_to_the_bit_and_keep_anchors(
    kind: str, segments: int, jsd: str, noise: str, architecture: str, models: dict[str, Any], tmp_path: Path
) -> None:
    """9 of the 108 combinations, in which every pair of options occurs: all of them would take minutes."""
    model, task = models[architecture]
    spec = matrix.curve_of(kind, segments)
    model.set_curve(spec, model.fresh_points(spec))
    start = random_points(model)
    model.set_curve(spec, start)
    forms = {"none": (0.0, 0.0), "bonus": (0.5, 0.0), "hinge": (5.0, 0.05 if kind == "free" else 0.0)}
    config = shared_points(
        steps=4,
        batch_size=4,
        learning_rate=3e-3,
        weight_decay=0.01,
        checkpoint_every=2,
        evaluate_every=2,
        evaluation_points=4,
        objective=ObjectiveConfig(jsd, *forms[jsd]),  # type: ignore[arg-type]
        perturbation=PerturbationConfig(noise, 0.1, "ramp"),  # type: ignore[arg-type]
    )
    before = {n: p.cpu().clone() for n, p in model.model.state_dict().items() if "base_layer" in n}
    result = fit(model, task, config, tmp_path / "whole", **QUIET)
    whole = model.control_points()
    assert result.steps == 4 and all(h["loss"] < float("inf") for h in result.history)
    assert (result.settled["tau"] > 0) if jsd == "hinge" else result.settled == {}
    for name, p in whole.items():
        assert torch.equal(p[~spec.mask], start[name][~spec.mask]), "anchors are bit-equal"
        assert not torch.equal(p[spec.mask], start[name][spec.mask])
    assert all(torch.equal(p.cpu(), before[n]) for n, p in model.model.state_dict().items() if n in before)
    model.set_curve(spec, start)
    fit(model, task, config, tmp_path / "cut", stop_after=2, **QUIET)
    again = fit(model, task, config, tmp_path / "cut", **QUIET)
    assert all(torch.equal(p, whole[n]) for n, p in model.control_points().items())
    assert [h["loss"] for h in again.history] == [h["loss"] for h in result.history]


def test_sam_trains_and_resumes_to_the_bit(models: dict[str, Any], tmp_path: Path) -> None:
    model, task = models["llama"]
    spec = CurveSpec(2, 2)
    model.set_curve(spec, start := model.fresh_points(spec))
    found = []
    for rho in (0.2, 0.0):
        config = shared_points(
            steps=3, batch_size=4, points=1, perturbation=PerturbationConfig("sam", rho), checkpoint_every=1
        )
        model.set_curve(spec, start)
        fit(model, task, config, tmp_path / f"{rho}", **QUIET)
        found.append(model.control_points())
        model.set_curve(spec, start)
        fit(model, task, config, tmp_path / f"cut {rho}", stop_after=1, **QUIET)
        fit(model, task, config, tmp_path / f"cut {rho}", **QUIET)
        assert all(torch.equal(p, found[-1][n]) for n, p in model.control_points().items())
    model.set_curve(spec, start)
    fit(model, task, replace(config, perturbation=PerturbationConfig()), **QUIET)
    assert all(torch.equal(p, found[1][n]) for n, p in model.control_points().items()), "no ascent, no change"
    assert not any(torch.equal(p, found[1][n]) for n, p in found[0].items())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("noise", ["none", "flat_lora", "lora_space", "sam"])
def test_captured_steps_are_those_that_are_not(noise: str, models: dict[str, Any]) -> None:
    model, task = models["qwen2"]
    spec = CurveSpec(2, 2, closed=True)
    model.set_curve(spec, start := model.fresh_points(spec))
    found = []
    for capture in (False, True):
        model.set_curve(spec, start)
        config = shared_points(
            steps=12, batch_size=4, points=1, capture=capture, keep="last", perturbation=PerturbationConfig(noise, 0.1)
        )
        result = fit(model, task, config, **QUIET)
        found.append([h["loss"] for h in result.history])
    assert found[0] == pytest.approx(found[1], rel=1e-3), "replayed graphs follow the seeds of their step"


def test_the_hinge_measures_its_target_by_the_anchors(tmp_path: Path) -> None:
    model, _, task = build("llama", tmp_path, CurveSpec.anchored(3))
    model.set_curve(model.spec, random_points(model))
    t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    expected = float(predict_split(model, task.encode("validation"), t).pairwise_jsd.mean())
    config = shared_points(steps=1, batch_size=4, objective=ObjectiveConfig("hinge", 5.0, tau_relative=1.5))
    assert fit(model, task, config, **QUIET).settled == pytest.approx({"tau": 1.5 * expected, "anchor_jsd": expected})
    config = replace(config, objective=ObjectiveConfig("hinge", 5.0, tau=0.02))
    assert fit(model, task, config, **QUIET).settled == {"tau": 0.02}


@matrix.shapes
def test_shapes_stay_what_they_are_and_resume_to_the_bit(spec: CurveSpec, tmp_path: Path) -> None:
    model, _, task = build("llama", tmp_path, spec, target_modules=["q_proj", "down_proj"])
    start = spec.tie(random_points(model))
    model.set_curve(spec, start)
    config = shared_points(steps=4, batch_size=4, learning_rate=1e-2, weight_decay=0.1, checkpoint_every=2, keep="last")
    fit(model, task, config, tmp_path / "whole", **QUIET)
    whole = model.control_points()
    for name, p in whole.items():
        assert torch.equal(p[~spec.mask], start[name][~spec.mask]), "anchors are bit-equal"
        assert not torch.equal(p, start[name])
        if spec.is_shared(name):
            assert torch.equal(p, p[:1].expand_as(p))
        if spec.closed:
            assert torch.equal(p[0], p[-1])
    model.set_curve(spec, start)
    fit(model, task, config, tmp_path / "cut", stop_after=2, **QUIET)
    fit(model, task, config, tmp_path / "cut", **QUIET)
    assert all(torch.equal(p, whole[n]) for n, p in model.control_points().items())
    model.save_pretrained(tmp_path / "saved")
    from loracurve.curve.files import load_curve

    _, found, points = load_curve(tmp_path / "saved")
    assert asdict(found) == asdict(spec) and all(torch.equal(p, whole[n]) for n, p in points.items())


@matrix.shapes
def test_a_step_is_adam_on_the_free_points(spec: CurveSpec, tmp_path: Path) -> None:
    model, _, task = build("llama", tmp_path, spec, torch.float64, target_modules=["q_proj", "down_proj"])
    start = {n: p.double() for n, p in spec.tie(random_points(model)).items()}
    model.set_curve(spec, start)
    config = shared_points(
        steps=1, batch_size=4, learning_rate=1e-2, warmup=0, weight_decay=0.5, keep="last", max_grad_norm=0.05
    )
    program = CurveObjective(model, task.encode("train"), task.encode("validation"), config)
    (part,) = program.parts(0)
    # By hand: free points are the leaves, control points are made from them, the penalty is that along the curve.
    ties = {n: spec.dependence(spec.is_shared(n)) for n in start}
    eye = torch.eye(spec.size, dtype=torch.float64)
    made = {n: eye if e is None else e for n, e in ties.items()}
    moving = {n: (e.diagonal() == 1) & spec.mask for n, e in made.items()}
    for p in model.factors:
        p.grad = None
    program.loss(part)[0].backward()
    raw = dict(zip(start, (p.grad for p in model.factors), strict=True))
    grads = {}
    for n, g in raw.items():
        g = g.mT if n.endswith("lora_B.weight") else g
        grads[n] = torch.tensordot(made[n].mT, g, dims=1) * moving[n].view(-1, 1, 1)
    norm = torch.cat([g.flatten() for g in grads.values()]).norm()
    gram = bezier.coefficient_gram(spec.segments, spec.degree)
    expected = {}
    for n, g in grads.items():
        g = g * min(1.0, 0.05 / (norm + 1e-6))
        p = start[n] - 1e-2 * g / (g.abs() + 1e-8)
        leaf = p.clone().requires_grad_()
        along = torch.tensordot(made[n], leaf, dims=1).flatten(1)
        (0.5 * (along * (gram @ along)).sum()).backward()
        p = p - 1e-2 * 0.5 * leaf.grad * moving[n].view(-1, 1, 1)
        expected[n] = torch.tensordot(made[n], p, dims=1)
    fit(model, task, config, **QUIET)
    # Adam divides a gradient by its size: where that is small, a GPU's rounding of Llama's float32 norms shows.
    atol = 1e-4 if torch.cuda.is_available() else 1e-7
    for n, p in model.control_points().items():
        torch.testing.assert_close(p, expected[n], rtol=1e-5, atol=atol)


@pytest.mark.parametrize("share", [True, False])
@matrix.segments
@matrix.kinds
@matrix.architectures
def test_curves_train_resume_to_the_bit_and_keep_anchors(
    architecture: str, kind: str, segments: int, share: bool, tmp_path: Path
) -> None:
    spec = matrix.curve_of(kind, segments)
    model, _, task = build(architecture, tmp_path, spec)
    if kind == "anchored":
        model.set_curve(spec, random_points(model, scale=0.05))
    start = model.control_points()
    config = shared_points(
        steps=6, batch_size=4, points=2, share_points=share, learning_rate=3e-3, evaluate_every=2, checkpoint_every=3,
        weight_decay=0.01, objective=ObjectiveConfig("bonus", 0.5),
    )  # fmt: skip
    result = fit(model, task, config, tmp_path / "whole", **QUIET)
    whole = model.control_points()
    assert result.steps == 6 and result.validation_nll[0] < float("inf")
    frozen = ~spec.mask
    for name in start:
        assert torch.equal(whole[name][frozen], start[name][frozen]), "anchors are bit-equal"
        assert not torch.equal(whole[name][spec.mask], start[name][spec.mask])
    model.set_curve(spec, start)
    fit(model, task, config, tmp_path / "cut", stop_after=3, **QUIET)
    # What is in memory must not matter, but for the anchors, which make it this training.
    others = random_points(model, seed=9)
    model.set_curve(spec, {n: torch.where(column(spec.mask, p).bool(), p, start[n]) for n, p in others.items()})
    again = fit(model, task, config, tmp_path / "cut", **QUIET)
    for name, tensor in model.control_points().items():
        assert torch.equal(tensor, whole[name])
    assert [h["loss"] for h in again.history] == [h["loss"] for h in result.history]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_changes_nothing(tmp_path: Path, dropout: float) -> None:
    found = []
    for checkpointing in (False, True):
        model, _, task = build("qwen2", tmp_path / str(checkpointing), CurveSpec(1, 2), lora_dropout=dropout)
        fit(model, task, shared_points(steps=3, batch_size=4, gradient_checkpointing=checkpointing), **QUIET)
        found.append(model.control_points())
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])

    def recomputes() -> bool:
        return any(getattr(module, "gradient_checkpointing", False) for module in model.model.modules())

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with recomputing(model.model, True):
            assert recomputes()
    assert not recomputes()
    embeddings = model.model.get_input_embeddings()
    assert not embeddings(torch.tensor([0], device=model.device)).requires_grad, "transformers' hook is gone again"


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(tmp_path: Path) -> None:
    model, _, task = build("qwen2", tmp_path, CurveSpec(1, 2))
    run = tmp_path / "run"
    wild = shared_points(steps=50, batch_size=4, learning_rate=1e30, max_grad_norm=0)
    with pytest.raises(UserError, match=r"at step \d+; no step is kept; lower learning_rate") as error:
        fit(model, task, wild, run, **QUIET)
    assert "\n" not in str(error.value) and not list(run.glob("*")), "a step that was not validated yet is not good"


def test_a_step_after_which_nothing_can_be_predicted_is_told_in_one_line(tmp_path: Path) -> None:
    model, _, task = build("qwen2", tmp_path, CurveSpec(1, 2))
    with pytest.raises(UserError, match=r"not finite after step 1.*lower learning_rate"):
        fit(model, task, shared_points(steps=1, batch_size=4, learning_rate=1e30, max_grad_norm=0), **QUIET)


def test_a_gradient_that_is_not_finite_moves_nothing(tmp_path: Path) -> None:
    model, _, task = build("qwen2", tmp_path, CurveSpec(1, 2))
    before = [p.detach().clone() for p in model.factors]
    spoilt = model.factors[0].register_hook(lambda grad: grad * math.nan)
    with pytest.raises(UserError, match="at step 1"):
        fit(model, task, shared_points(steps=2, batch_size=4), **QUIET)
    spoilt.remove()
    assert all(torch.equal(p.cpu(), b) for p, b in zip(model.factors, before, strict=True))


def test_nothing_trainable_is_refused(tmp_path: Path) -> None:
    model, _, task = build("qwen2", tmp_path, CurveSpec.slots(2))
    model.anchor(degree=1)
    with pytest.raises(UserError, match="no control point is trainable"):
        fit(model, task, **QUIET)
