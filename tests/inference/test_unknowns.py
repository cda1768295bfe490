"""Gaussians and familiarity together: what one pass gives, and what comes back from a folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.made import made_task, vocabulary
from helpers.tiny import lora_config, random_points, tiny

from loracurve.curve.spec import CurveSpec
from loracurve.inference.config import UnknownsConfig
from loracurve.inference.hidden_states import states_of
from loracurve.inference.prediction import point_nll, predict_split
from loracurve.inference.unknowns import fit_unknowns, read_unknowns, write_unknowns
from loracurve.model.curve_model import CurveModel
from loracurve.system.errors import UserError

T, WEIGHTS = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64), torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
COSINE = {"measure": "cosine", "familiarity": "curve"}


def build(tmp_path: Path, scoring: str) -> tuple[CurveModel, Any]:
    architecture = "encoder" if scoring == "head" else "qwen2"
    task = made_task(tmp_path, architecture, scoring)
    base = tiny(architecture, torch.float32, vocabulary(task), labels=2)
    model = CurveModel(base, lora_config(architecture), CurveSpec(2, 2))
    model.set_curve(model.spec, random_points(model))
    return model, task


@pytest.mark.parametrize("scoring", ["letter", "label", "text", "head", "lm"])
def test_every_scoring_has_what_it_can_have(scoring: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, task = build(tmp_path, scoring)
    train, validation, test = (task.encode(name) for name in ("train", "validation", "test"))
    unknowns = fit_unknowns(model, train, validation, T, WEIGHTS, UnknownsConfig())
    assert (unknowns.gaussians is None) == (scoring == "lm") and unknowns.familiarity is not None
    assert ("without Gaussians: Gaussians: expected a task with classes" in caplog.text) == (scoring == "lm")
    assert (unknowns.familiarity.means.shape[1] > 0) == (scoring in ("label", "head"))
    found = unknowns.predict(model, {"test": test}, T, WEIGHTS)["test"]
    plain = predict_split(model, test, T, WEIGHTS)
    assert len(found) == len(plain) and found.distance is not None
    states = states_of(model, test, T)
    beside = states_of(model, test, unknowns.places(model, T))
    torch.testing.assert_close(found.distance, unknowns.familiarity.distance(beside.states), rtol=1e-3, atol=1e-3)
    parts = found.expected_entropy + found.within_points + found.between_points
    torch.testing.assert_close(parts, found.entropy, rtol=1e-4, atol=1e-5)
    assert bool(found.within_points.any()) == (scoring != "lm")
    # Paths show the points themselves.
    torch.testing.assert_close(point_nll(found, test.labels), point_nll(plain, test.labels), rtol=1e-3, atol=1e-4)
    if scoring == "lm":
        with pytest.raises(UserError, match="found language modelling"):
            fit_unknowns(model, train, validation, T, WEIGHTS, UnknownsConfig(gaussians="last_layer"))
        return
    assert unknowns.gaussians is not None
    # What an average over the Gaussians is, from the states of a pass of its own.
    expected = unknowns.gaussians.averaged(states.log_probs, states.states)
    assert found.point_log_probs is not None
    there = expected.log_probs > -torch.inf
    torch.testing.assert_close(found.point_log_probs[there], expected.log_probs[there], rtol=1e-3, atol=1e-3)
    # Of known inputs p-values are spread evenly; the smallest there is comes from farther than all of them.
    p = unknowns.familiarity.p_values(found.distance)
    assert p.min() >= 1 / (len(validation) + 1) and p.max() <= 1


@pytest.mark.parametrize("scoring", ["label", "text"])
def test_both_distances_are_the_sum_of_either_by_its_spread_among_validation_rows(scoring: str, tmp_path: Path) -> None:
    model, task = build(tmp_path, scoring)
    train, validation, test = (task.encode(name) for name in ("train", "validation", "test"))
    found = {}
    for which in ("curve", "base", "both"):
        config = UnknownsConfig(gaussians="none", familiarity=which)  # type: ignore[arg-type]
        unknowns = fit_unknowns(model, train, validation, T, WEIGHTS, config)
        predicted = unknowns.predict(model, {"known": validation, "test": test}, T, WEIGHTS)
        found[which] = {name: p.distance for name, p in predicted.items()}
    expected = sum(found[which]["test"] / found[which]["known"].std() for which in ("curve", "base"))
    both = found["both"]["test"]
    # Up to a scale of its own, which no p-value knows of.
    torch.testing.assert_close(both / both.abs().max(), expected / expected.abs().max(), rtol=1e-3, atol=1e-4)
    with pytest.raises(UserError, match="expected curve or base with measure cosine, found both"):
        UnknownsConfig(measure="cosine")


@pytest.mark.parametrize(
    "options", [{}, {"familiarity": "curve"}, {"familiarity": "base"}, {"gaussians": "none"}, COSINE]
)
@pytest.mark.parametrize("scoring", ["label", "text"])
def test_they_come_back_from_a_folder(scoring: str, options: dict[str, Any], tmp_path: Path) -> None:
    model, task = build(tmp_path, scoring)
    train, validation, test = (task.encode(name) for name in ("train", "validation", "test"))
    unknowns = fit_unknowns(model, train, validation, T, WEIGHTS, UnknownsConfig(**options), total=100)
    points = [[float(t), float(w)] for t, w in zip(T, WEIGHTS, strict=True)]
    write_unknowns(unknowns, points, tmp_path)
    back = read_unknowns(tmp_path)
    assert back is not None and back[1] == [tuple(p) for p in points]
    one, other = (u.predict(model, {"": test}, T, WEIGHTS)[""] for u in (unknowns, back[0]))
    for part in ("entropy", "within_points", "distance"):
        torch.testing.assert_close(getattr(one, part), getattr(other, part), rtol=1e-5, atol=1e-5)
    assert read_unknowns(tmp_path / "nothing") is None


def test_narrowed_gaussians_say_the_same(tmp_path: Path) -> None:
    model, task = build(tmp_path, "label")
    train, validation = task.encode("train"), task.encode("validation")
    whole = fit_unknowns(model, train, validation, T, None, UnknownsConfig(tau=1e-9)).gaussians
    assert whole is not None
    narrow = replace(whole, tau=1.0).narrowed(1.0)
    assert narrow.values.shape[1] < whole.values.shape[1]
    states = states_of(model, task.encode("test"), T)
    for i in range(len(T)):
        a, b = (g.covariance(i, states.states.read[i], states.log_probs[i]) for g in (replace(whole, tau=1.0), narrow))
        torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-5)


def test_damaged_files_are_told_in_one_line(tmp_path: Path) -> None:
    model, task = build(tmp_path, "label")
    unknowns = fit_unknowns(model, task.encode("train"), task.encode("validation"), T, None, UnknownsConfig())
    write_unknowns(unknowns, [[0.0, 1.0]] * 3, tmp_path)
    path = tmp_path / "unknowns.json"
    whole = json.loads(path.read_text())
    spoiled = [
        (whole | {"format": 2}, "of a newer loracurve"),
        (whole | {"average": [[0.0, 1.0]]}, "values of shape"),
        (whole | {"gaussians": whole["gaussians"] | {"classes": 4}}, "dimensions for 4 classes"),
        (whole | {"gaussians": whole["gaussians"] | {"tau": 0.0}}, "tau 0.0"),
        (whole | {"familiarity": {"measure": "euclid", "rows": 4}}, "measure 'euclid'"),
        (whole | {"on_base": False}, "of shape"),
        ({"format": 1}, "expected the entry 'average'"),
    ]
    for values, message in spoiled:
        path.write_text(json.dumps(values))
        with pytest.raises(UserError, match=message) as caught:
            read_unknowns(tmp_path)
        assert "\n" not in str(caught.value)
    path.write_text(json.dumps(whole))
    (tmp_path / "unknowns.safetensors").write_bytes(b"no tensors at all")
    with pytest.raises(UserError, match="safetensors"):
        read_unknowns(tmp_path)
