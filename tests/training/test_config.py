"""Options of training: what goes together, what each means, and what is refused."""

from __future__ import annotations

import math
import warnings
from typing import Any, get_args

import pytest
from helpers.made import shared_points

from loracurve.curve.config import Sampling
from loracurve.curve.spec import CurveSpec
from loracurve.system.errors import UserError
from loracurve.training.config import (
    CorruptionConfig,
    ObjectiveConfig,
    PerturbationConfig,
    needs_shared_points,
    needs_single_point,
    resolve_tau,
    strength,
)


def test_options_of_corruption():
    with pytest.raises(UserError, match="none, tokens, attention or text"):
        CorruptionConfig("token")  # type: ignore[arg-type]
    for rate in (-0.1, 1.1, float("nan")):
        with pytest.raises(UserError, match=r"corruption.rate: expected a number in \[0, 1\]"):
            CorruptionConfig("tokens", rate)
    with pytest.warns(UserWarning, match="may change what inputs mean"):
        CorruptionConfig("attention", 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CorruptionConfig("tokens", 0.05)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"perturbation": PerturbationConfig("flat_lora"), "share_points": False}, "share_points: expected true"),
        ({"perturbation": PerturbationConfig("sam")}, "points: expected 1 with perturbation.kind sam"),
        (
            {"perturbation": PerturbationConfig("sam"), "points": 1, "objective": ObjectiveConfig("bonus", 0.5)},
            "objective.jsd: expected none with perturbation.kind sam",
        ),
        ({"perturbation": PerturbationConfig("flat_lora", schedule="cyclic"), "steps": 60}, "lower cycles to 10"),
        ({"sampling": "half-period", "points": 3}, "even number"),
        ({"layerwise": True, "share_points": False}, "share_points: expected shared points"),
        ({"corruption": CorruptionConfig("tokens")}, "corruption.kind: expected none with objective.jsd 'none'"),
        (
            {
                "corruption": CorruptionConfig("text", file="more.txt"),
                "objective": ObjectiveConfig("bonus", 1.0),
                "share_points": False,
            },
            "share_points: expected true with corruption.kind text",
        ),
    ],
)
def test_options_that_do_not_go_together_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        shared_points(**values)
    assert "\n" not in str(error.value)


def test_sampling_names_are_those_of_the_module() -> None:
    assert [shared_points(sampling=way).sampling for way in get_args(Sampling)] == list(get_args(Sampling))


@pytest.mark.parametrize(
    ("spec", "values", "message"),
    [
        (CurveSpec(2, 2), {"objective": ObjectiveConfig("hinge", 5.0)}, "objective.tau: expected a target"),
    ],
)
def test_options_that_a_curve_cannot_have_are_named(spec: CurveSpec, values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        shared_points(**values).check_curve(spec)
    shared_points(**values).check_curve(CurveSpec.anchored(3))


@pytest.mark.parametrize(("anchors", "points"), [(3, 3), (3, 1), (2, 2), (11, 11)])
def test_a_curve_is_not_validated_at_its_anchors_alone(anchors: int, points: int) -> None:
    with pytest.raises(UserError, match="evaluation_points: expected some between the anchors"):
        shared_points(evaluation_points=points).check_curve(CurveSpec.anchored(anchors))
    shared_points().check_curve(CurveSpec.anchored(anchors))
    shared_points(evaluation_points=points).check_curve(CurveSpec(anchors - 1))


def test_passes_that_cannot_be_had_are_refused() -> None:
    with pytest.raises(UserError, match="point_passes: expected 1 to 2"):
        shared_points(point_passes=3)
    with pytest.raises(UserError, match="point_passes: expected 1 with perturbation.kind flat_lora"):
        shared_points(point_passes=2, perturbation=PerturbationConfig("flat_lora", 0.1))


@pytest.mark.parametrize(
    "jsd,weight",
    [("bonus", -1), ("bonus", math.inf), ("none", 1)] + [("hinge", -1), ("hinge", math.nan)],
)
def test_bad_weights_are_refused(jsd, weight):
    with pytest.raises(UserError, match=r"objective\.weight: expected"):
        ObjectiveConfig(jsd, weight)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"jsd": "hinge", "weight": 5, "tau": -0.1}, r"objective\.tau: expected a number >= 0, found"),
        ({"jsd": "hinge", "weight": 5, "tau": math.nan}, r"objective\.tau: expected a number >= 0, found"),
        ({"jsd": "hinge", "weight": 5, "tau_relative": 0}, r"objective\.tau_relative: expected"),
        ({"jsd": "hinge", "weight": 5, "tau": 0.1, "tau_relative": 2}, "leave one out"),
        ({"jsd": "bonus", "weight": 1, "tau": 0.1}, "set jsd to hinge"),
        ({"tau_relative": 2}, "set jsd to hinge"),
    ],
)
def test_bad_targets_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        ObjectiveConfig(**options)


def test_bad_form_is_refused_and_risky_settings_warn():
    with pytest.raises(UserError, match="one of none, bonus, hinge"):
        ObjectiveConfig("hing")
    with pytest.warns(UserWarning, match="more diversity"):
        ObjectiveConfig("bonus", 2)
    with pytest.warns(UserWarning, match="no pair of points reaches"):
        ObjectiveConfig("hinge", 5, tau=0.7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ObjectiveConfig("bonus", 1)
        ObjectiveConfig("hinge", 5, tau=0.1)


def test_resolve_tau():
    assert resolve_tau(ObjectiveConfig("hinge", 5, tau=0.1), None) == 0.1
    assert resolve_tau(ObjectiveConfig("hinge", 5, tau=0.1), 0.5) == 0.1
    assert resolve_tau(ObjectiveConfig("hinge", 5), 0.03) == 0.03
    assert resolve_tau(ObjectiveConfig("hinge", 5, tau_relative=3), 0.02) == pytest.approx(0.06)
    assert resolve_tau(ObjectiveConfig("bonus", 1), None) == 0
    with pytest.raises(UserError, match="free curve"):
        resolve_tau(ObjectiveConfig("hinge", 5), None)
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(UserError, match="whose predictions differ"):
            resolve_tau(ObjectiveConfig("hinge", 5), bad)


def test_schedules() -> None:
    assert [strength(PerturbationConfig("flat_lora", 0.05), s, 10) for s in (0, 9)] == [0.05, 0.05]
    ramp = [strength(PerturbationConfig("flat_lora", 0.05, "ramp"), s, 10) for s in range(10)]
    assert ramp == sorted(ramp) and ramp[0] == pytest.approx(0.005) and ramp[-1] == pytest.approx(0.05)
    cyclic = [strength(PerturbationConfig("flat_lora", 0.25, "cyclic"), s, 1000) for s in range(1000)]
    assert cyclic[0] == 0 and max(cyclic) == pytest.approx(0.5) and sum(cyclic) / 1000 == pytest.approx(0.25)
    assert cyclic[:20] == pytest.approx(cyclic[20:40]), "50 cycles of 20 steps"
    with pytest.raises(UserError, match="at least 100 steps, found 60; lower cycles to 10"):
        strength(PerturbationConfig("flat_lora", 0.25, "cyclic"), 0, 60)


@pytest.mark.parametrize("values", [{"kind": "flatlora"}, {"schedule": "cosine"}, {"rho": -1.0}, {"cycles": 0}])
def test_wrong_options_are_named(values: dict[str, object]) -> None:
    with pytest.raises(UserError, match=f"perturbation.{next(iter(values))}: expected"):
        PerturbationConfig(**values)  # type: ignore[arg-type]


def test_what_the_kinds_need() -> None:
    kinds = ["none", "flat_lora", "lora_space", "sam"]
    assert [needs_shared_points(PerturbationConfig(k)) for k in kinds] == [False, True, True, True]  # type: ignore[arg-type]
    assert [needs_single_point(PerturbationConfig(k)) for k in kinds] == [False, False, False, True]  # type: ignore[arg-type]
