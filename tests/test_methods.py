"""The simple methods: against the anchors they are made of, plain loops, and planted answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from made import made_task, vocabulary
from tiny import lora_config, random_points, tiny

from loracurve.baselines.curve import Curve
from loracurve.baselines.ensembles import ConvexMix, Ensemble, LongerEnsemble, mixture_weights
from loracurve.baselines.lines import Line
from loracurve.baselines.method import Method, Setting
from loracurve.baselines.single import Single
from loracurve.baselines.temperature import TemperatureScaled
from loracurve.curve.anchored import slot_times
from loracurve.curve.config import CurveConfig
from loracurve.curve.gauge import align
from loracurve.curve.lora_space import PREFIX
from loracurve.curve.spec import CurveSpec
from loracurve.inference.calibration import fit_temperature
from loracurve.inference.prediction import labels_of, predict_split
from loracurve.inference.predictive import Predictive
from loracurve.model.curve_model import CurveModel
from loracurve.system.errors import UserError
from loracurve.training.config import LoopConfig, ObjectiveConfig
from loracurve.training.fit import fit_anchors

TRAINING = LoopConfig(steps=4, batch_size=4, learning_rate=1e-2, evaluate_every=2)


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    """Random anchors, so that their predictions differ."""
    task = made_task(tmp_path, "qwen2", "label")
    base = tiny("qwen2", vocabulary=vocabulary(task))
    model = CurveModel(base, lora_config("qwen2"), CurveSpec.slots(4))
    return Setting(model, task, random_points(model), TRAINING, samples=5)


def of(setting: Setting, method: Method) -> Predictive:
    return method.fit(setting).predict(setting.task.encode("test"))


def members(setting: Setting) -> torch.Tensor:
    """[4, E, C] probabilities of the anchors, one by one."""
    out = []
    for m in range(4):
        setting.model.set_curve(CurveSpec.slots(1), {n: p[m : m + 1] for n, p in setting.anchors.items()})
        out.append(predict_split(setting.model, setting.task.encode("test"), torch.zeros(1)).probs)
    return torch.stack(out)


def test_an_ensemble_averages_probabilities(setting: Setting) -> None:
    fitted = Ensemble(3).fit(setting)
    found = fitted.predict(setting.task.encode("test"))
    torch.testing.assert_close(found.probs, members(setting)[:3].mean(0), atol=1e-5, rtol=1e-5)
    assert (fitted.passes, fitted.cost) == (3, 3)
    torch.testing.assert_close(of(setting, Single()).probs, members(setting)[0], atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="expected 1 to 4 anchors.*found 5"):
        Ensemble(5).fit(setting)


def test_other_options_of_a_single_adapter_are_the_first_anchor_trained_so(setting: Setting) -> None:
    for method, training in (
        (Single(keep="last"), replace(TRAINING, keep="last")),
        (Single(weight_decay=0.3), replace(TRAINING, weight_decay=0.3)),
    ):
        fitted = method.fit(setting)
        found = fitted.predict(setting.task.encode("test"))
        assert (fitted.passes, fitted.cost) == (1, 1)
        setting.model.set_curve(CurveSpec.slots(1), setting.first(1))
        fit_anchors(setting.model, setting.task, training, progress=False)
        same = predict_split(setting.model, setting.task.encode("test"), slot_times(1))
        torch.testing.assert_close(found.probs, same.probs, atol=1e-6, rtol=1e-6)


def test_longer_ensembles_share_their_budget(setting: Setting) -> None:
    fitted = LongerEnsemble(2, 5.0).fit(setting)
    assert fitted.cost == 5 and fitted.passes == 2 and fitted.notes["steps"] == 10
    with pytest.raises(UserError, match="at least one for each of 3"):
        LongerEnsemble(3, 2.0)


def test_mixture_weights_find_planted_ones() -> None:
    # Two classes; component 0 says .9 and component 1 says .2 for class 1, which has share .6 = .9 w + .2 (1 - w).
    labels = torch.tensor([1] * 60 + [0] * 40)
    class_one = torch.tensor([0.9, 0.2])
    probs = torch.where(labels == 1, class_one[:, None], 1 - class_one[:, None])
    assert mixture_weights(probs.log()).tolist() == pytest.approx([4 / 7, 3 / 7], abs=1e-6)
    assert mixture_weights(torch.tensor([[0.8, 0.7], [0.3, 0.2]]).log()).tolist() == pytest.approx([1, 0], abs=1e-6)


def test_the_best_mix_is_no_worse_than_any_other_on_validation_rows(setting: Setting) -> None:
    validation = setting.task.encode("validation")
    labels = labels_of(validation)
    fitted = ConvexMix(4).fit(setting)
    best = fitted.predict(validation).negative_log_likelihood(labels).mean()
    assert sum(fitted.notes["weights"]) == pytest.approx(1)
    points = Ensemble(4).fit(setting).predict(validation).point_probs.double()
    for seed in range(50):
        weights = torch.rand(4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        other = torch.einsum("n,nec->ec", weights / weights.sum(), points)
        assert best <= -other[torch.arange(len(labels)), labels].log().mean() + 1e-6


def test_temperature_is_that_of_the_average_on_validation_rows(setting: Setting) -> None:
    validation = setting.task.encode("validation")
    plain = Ensemble(3).fit(setting)
    scaled = TemperatureScaled(Ensemble(3)).fit(setting)
    t = fit_temperature(plain.predict(validation).log_probs, labels_of(validation))
    assert scaled.notes["temperature"] == pytest.approx(t) and (scaled.passes, scaled.cost) == (3, 3)
    expected = (plain.predict(setting.task.encode("test")).log_probs / t).softmax(-1)
    found = scaled.predict(setting.task.encode("test"))
    torch.testing.assert_close(found.probs, expected, atol=1e-6, rtol=1e-6)
    assert found.mutual_information.abs().max() < 1e-9


@pytest.mark.parametrize("path", ["straight", "balanced+procrustes", "delta_w"])
def test_lines_average_models_between_the_anchors(setting: Setting, path: str) -> None:
    fitted = Line(path, 3).fit(setting)  # type: ignore[arg-type]
    found = fitted.predict(setting.task.encode("test"))
    assert (fitted.passes, fitted.cost) == (5, 3)
    # t = 0, 1/4, 1/2, 3/4, 1 on two segments: anchors and the middles between them
    anchors = {n: p[:3] for n, p in setting.anchors.items()}
    if path == "balanced+procrustes":
        anchors = align(anchors)
    torch.testing.assert_close(found.point_probs[::2].double(), members(setting)[:3], atol=1e-5, rtol=1e-4)
    if path == "delta_w":
        # A model of the mean update: both anchors' updates in one adapter of rank 2 r, half of each.
        task = setting.task
        base = tiny("qwen2", vocabulary=vocabulary(task))
        middle = {}
        for name in setting.model.layers:
            a, b = (setting.anchors[f"{PREFIX}{name}.lora_{x}.weight"] for x in "AB")
            middle[f"{PREFIX}{name}.lora_A.weight"] = torch.cat([a[0], a[1]])[None]
            middle[f"{PREFIX}{name}.lora_B.weight"] = torch.cat([b[0], b[1]], dim=1)[None] / 2
        double = CurveModel(base, lora_config("qwen2", r=8, lora_alpha=16), CurveSpec.slots(1), middle)
        expected = predict_split(double, task.encode("test"), torch.zeros(1)).probs
    else:
        halves = {n: (p[:1] + p[1:2]) / 2 for n, p in anchors.items()}
        setting.model.set_curve(CurveSpec.slots(1), halves)
        expected = predict_split(setting.model, setting.task.encode("test"), torch.zeros(1)).probs
    torch.testing.assert_close(found.point_probs[1].double(), expected, atol=1e-5, rtol=1e-4)


def test_a_curve_spends_what_it_is_given_and_keeps_its_anchors(setting: Setting) -> None:
    fitted = Curve(CurveConfig("anchored", alignment="none"), {"points": 4, "batch_size": 2}, units=3).fit(setting)
    assert fitted.notes["steps"] == 6  # 3 units x 4 steps x 4 examples = 6 steps x 2 examples x 4 points
    assert (fitted.cost, fitted.passes) == (6, 5)
    found = fitted.predict(setting.task.encode("test"))
    torch.testing.assert_close(found.point_probs[::2].double(), members(setting)[:3], atol=1e-5, rtol=1e-4)
    free = Curve(training={"steps": 8}).fit(setting)  # the default: four segments, a point for each row
    assert setting.model.spec.size == 9 and free.cost == 2 and free.notes["average"]["points"] == 5


def test_changes_of_a_curves_training_reach_the_options_inside(setting: Setting) -> None:
    method = Curve(training={"points": 2, "objective": {"jsd": "mixture", "weight": 0.5}, "seed": 3})
    config = method.training_of(replace(setting, seed=7))
    assert config.objective == ObjectiveConfig("mixture", 0.5)
    assert (config.steps, config.learning_rate, config.seed) == (TRAINING.steps, TRAINING.learning_rate, 7)
    with pytest.raises(UserError, match="unknown option training.objective.jds; did you mean 'jsd'"):
        Curve(training={"objective": {"jds": "mixture"}})
