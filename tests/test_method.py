"""Every option of training, and all of them together: they train, resume to the bit and leave anchors alone."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from loracurve.errors import UserError
from loracurve.objective import ObjectiveConfig
from loracurve.perturbation import PerturbationConfig
from loracurve.sampling import Sampling
from loracurve.training import FitConfig


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
    ],
)
def test_options_that_do_not_go_together_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        FitConfig(**values)
    assert "\n" not in str(error.value)


def test_sampling_names_are_those_of_the_module() -> None:
    assert [FitConfig(sampling=way).sampling for way in get_args(Sampling)] == list(get_args(Sampling))
