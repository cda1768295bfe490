"""Suites of the evidence run with what their tuning chose."""

from __future__ import annotations

import copy
import runpy

import pytest
import yaml
from helpers.places import ROOT

RESULTS = ROOT / "results"


@pytest.mark.parametrize(
    ("fine_tunes", "curves", "suite"),
    [
        ("minilm_tuning", "minilm_curve_tuning", "minilm"),
        ("choices_tuning", "choices_curve_tuning", "choices_tuned"),
        ("wider_tuning", "wider_curve_tuning", "wider"),
    ],
)
def test_steps_and_rates_of_a_suite_are_those_that_its_stored_tuning_chose(
    fine_tunes: str, curves: str, suite: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = yaml.safe_load((RESULTS / "suites" / f"{suite}.yaml").read_text())
    runpy.run_path(str(RESULTS / "picks.py"))["main"](RESULTS / fine_tunes, RESULTS / curves, copy.deepcopy(found))
    assert yaml.safe_load(capsys.readouterr().out) == found
