"""Suites of the evidence run with what their tuning chose."""

from __future__ import annotations

import subprocess
import sys

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
    fine_tunes: str, curves: str, suite: str
) -> None:
    path = RESULTS / "suites" / f"{suite}.yaml"
    command = [sys.executable, RESULTS / "picks.py", RESULTS / fine_tunes, RESULTS / curves, path]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert yaml.safe_load(printed) == yaml.safe_load(path.read_text())
