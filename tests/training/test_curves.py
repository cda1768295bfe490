"""The loss of a step on a curve, by hand: passes, points of each text, other inputs, layers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import matrix
from helpers.made import made_task, shared_points, vocabulary
from helpers.matrix import QUIET, build
from helpers.tiny import lora_config, random_points, tiny

from loracurve.curve.spec import CurveSpec
from loracurve.inference.information import jensen_shannon, negative_log_likelihood
from loracurve.model.curve_model import CurveModel
from loracurve.model.routes import Layout
from loracurve.tasks.batching import collate
from loracurve.training.config import CorruptionConfig, FitConfig, ObjectiveConfig
from loracurve.training.corruption import ordinary_tokens, unlabelled
from loracurve.training.curves import CurveObjective
from loracurve.training.fit import fit
from loracurve.training.loop import batch_numbers


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("qwen2", {"objective": ObjectiveConfig("bonus", 0.5)}),
        ("llama", {"objective": ObjectiveConfig("hinge", 5.0, tau=0.5), "corruption": CorruptionConfig("tokens", 0.5)}),
        ("qwen2", {"share_points": False}),
        ("encoder", {"layerwise": True, "objective": ObjectiveConfig("bonus", 0.5)}),
    ],
)
def test_points_in_several_passes_have_the_same_gradients_in_less_memory(
    architecture: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model, _, task = build(architecture, tmp_path, CurveSpec(2, 2), torch.float64, lora_dropout=0.0)
    model.set_curve(model.spec, random_points(model))
    model.train()
    train, validation = task.encode("train"), task.encode("validation")
    found, kept_in_one = [], 0
    for passes in (1, 2, 4):
        config = shared_points(points=4, point_passes=passes, batch_size=6, seed=3, **options)
        program = CurveObjective(model, train, validation, config, ordinary_tokens(task.tokenizer), tau=0.5)
        (part,) = program.parts(2)
        kept: list[int] = []

        def keep(x: torch.Tensor, kept: list[int] = kept) -> torch.Tensor:
            kept.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss, figures = program.loss(part)
        found.append((loss, *figures, *torch.autograd.grad(loss, model.factors)))
        kept_in_one = sum(kept) if passes == 1 else kept_in_one
        assert passes == 1 or sum(kept) < 0.1 * kept_in_one
    for other in found[1:]:
        for value, expected in zip(other, found[0], strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)


def test_passes_draw_the_same_dropout_again(tmp_path: Path) -> None:
    model, _, task = build("qwen2", tmp_path, CurveSpec(1, 2), torch.float64, lora_dropout=0.5)
    model.set_curve(model.spec, random_points(model))
    model.train()
    train, validation = task.encode("train"), task.encode("validation")
    program = CurveObjective(model, train, validation, shared_points(points=2, point_passes=2, batch_size=4))
    (part,) = program.parts(0)

    def value() -> torch.Tensor:
        torch.manual_seed(1)
        return program.loss(part)[0]

    found = torch.autograd.grad(value(), model.factors)
    with torch.no_grad():
        for p, direction in zip(model.factors, found, strict=True):
            p += 1e-3 * direction
        up = value()
        for p, direction in zip(model.factors, found, strict=True):
            p -= 2e-3 * direction
        down = value()
    slope = sum(float(g.square().sum()) for g in found)
    assert float(up - down) / 2e-3 == pytest.approx(slope, rel=1e-2), "the gradient is that of the masks of the loss"


def test_each_text_of_a_packed_row_is_trained_at_its_own_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loracurve.tasks.packing.WORTH_PACKING", -1.0)  # pack texts of like length too
    task = made_task(tmp_path, "qwen2", "lm")
    model = CurveModel(tiny("qwen2", torch.float64, vocabulary(task)), lora_config("qwen2"), CurveSpec(2, 2))
    model.set_curve(model.spec, random_points(model))
    train = task.encode("train")
    config = FitConfig(steps=1, batch_size=5, points=2, row_tokens=500)
    program = CurveObjective(model, train, task.encode("validation"), config)
    (part,) = program.parts(3)
    assert part.layout == Layout("tokens", 2) and len(part.batch.input_ids) == 1
    numbers, t = batch_numbers(config.seed, 3, len(train), 5), program._points(5, 3, 0)
    assert t.shape == (2, 5) and len(t.unique()) == 10
    total = torch.zeros((), dtype=torch.float64)
    for e, i in enumerate(numbers):
        alone = collate(train, [i])
        for own in t[:, e]:
            log_probs = model.runner.scores(alone, model.coefficients(own[None])).log_softmax(-1)
            total = total + negative_log_likelihood(log_probs, alone.labels).sum() / 2
    torch.testing.assert_close(program.loss(part)[0], total / len(part.batch.labels), rtol=1e-6, atol=1e-9)


def other_config(kind: str, **values: Any) -> FitConfig:
    file = values.pop("file", None)
    corruption = CorruptionConfig(kind, 0.05, file)  # type: ignore[arg-type]
    return shared_points(batch_size=6, objective=ObjectiveConfig("bonus", 0.5), corruption=corruption, **values)


@matrix.architectures
def test_the_diversity_term_is_taken_on_unlabelled_text(architecture: str, tmp_path: Path) -> None:
    model, _, task = build(architecture, tmp_path, CurveSpec(1, 2))
    model.set_curve(model.spec, random_points(model))
    rows = ["it was great", "a truly dull", "quite fine", "the film is the film"]
    file = tmp_path / ("more.txt" if architecture == "encoder" else "more.jsonl")
    if architecture == "encoder":
        file.write_text("\n".join(rows))
    else:
        lines = [f'{{"id": "{i}", "question": "{r}", "choices": ["negative", "positive"]}}' for i, r in enumerate(rows)]
        file.write_text("\n".join(lines))
    others = unlabelled(task, file)
    assert len(others) == 4 and all(e.label is None for e in others.examples)
    config = other_config("text", file=str(file))
    program = CurveObjective(model, task.encode("train"), task.encode("validation"), config, others=others)
    (part,) = program.parts(0)
    assert part.other is not None and sorted(set(part.other.index.tolist())) == [0, 1, 2, 3]
    scores = model.runner.scores(part.batch, part.coefficients, part.layout).log_softmax(-1)
    nll = negative_log_likelihood(scores, part.batch.labels).mean()
    other = model.runner.scores(part.other, part.coefficients, part.layout).log_softmax(-1)
    torch.testing.assert_close(program.loss(part)[0], nll - 0.5 * jensen_shannon(other).mean())
    fit(model, task, replace(config, steps=2), **QUIET)


@pytest.mark.parametrize("kind", ["tokens", "attention"])
def test_training_with_corrupted_inputs(kind: str, tmp_path: Path) -> None:
    model, _, task = build("qwen2", tmp_path, CurveSpec(1, 2))
    result = fit(model, task, other_config(kind, steps=2, accumulation=2, share_points=False), **QUIET)
    assert result.steps == 2
    program = CurveObjective(
        model, task.encode("train"), task.encode("validation"), other_config(kind), ordinary_tokens(task.tokenizer)
    )
    first, again, later = (program.parts(s)[0].other for s in (0, 0, 1))
    name = "input_ids" if kind == "tokens" else "visible"
    assert torch.equal(getattr(first, name), getattr(again, name))
    assert getattr(first, name).shape != getattr(later, name).shape or not torch.equal(
        getattr(first, name), getattr(later, name)
    )


@matrix.architectures
def test_layers_have_points_of_their_own(architecture: str, tmp_path: Path) -> None:
    options = {} if architecture == "encoder" else {"target_modules": ["q_proj", "down_proj", "lm_head"]}
    model, _, task = build(architecture, tmp_path, CurveSpec(2, 2), torch.float64, **options)
    model.set_curve(model.spec, random_points(model))
    config = shared_points(steps=2, batch_size=4, layerwise=True)
    program = CurveObjective(model, task.encode("train"), task.encode("validation"), config)
    (part,) = program.parts(1)
    assert part.coefficients.shape == (len(model.layers), 2, 5)
    assert len({tuple(c) for c in part.coefficients[:, 0].tolist()}) == len(model.layers)
    found = model.runner.scores(part.batch, part.coefficients, part.layout)
    common = model.runner.scores(part.batch, model.coefficients(torch.tensor([0.2, 0.7])))
    points = model.control_points()
    for i in range(2):  # by hand: one adapter, each map at its own point, as a curve of equal control points
        adapter = {}
        for (name, layer), c in zip(model.layers.items(), part.coefficients[:, i], strict=True):
            for suffix in layer.factors():
                p = points[f"base_model.model.{name}.{suffix}"]
                adapter[f"base_model.model.{name}.{suffix}"] = torch.tensordot(c, p, dims=1).expand_as(p)
        model.set_curve(model.spec, adapter)
        single = model.runner.scores(part.batch, model.coefficients(torch.tensor([0.5])))[0]
        torch.testing.assert_close(found[i], single, rtol=1e-5, atol=1e-6)
        model.set_curve(model.spec, points)
    again = model.runner.scores(part.batch, model.coefficients(torch.tensor([0.2, 0.7])))
    assert torch.equal(again, common), "one t for the whole model afterwards"
    fit(model, task, config, **QUIET)
