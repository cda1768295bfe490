"""Folders of curves that an older version wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.tiny import lora_config, random_points, tiny

from loracurve.curve.files import load_curve
from loracurve.curve.retired import LAST_COMMIT
from loracurve.curve.spec import CurveSpec
from loracurve.model.curve_model import CurveModel
from loracurve.system.errors import UserError


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = CurveModel(tiny("qwen2"), lora_config("qwen2"), CurveSpec(2, 2, closed=True))
    model.set_curve(model.spec, model.spec.tie(random_points(model)))
    model.save_pretrained(tmp_path / "curve")
    return tmp_path / "curve"


def with_option(folder: Path, **options: object) -> None:
    path = folder / "curve_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"curve": values["curve"] | options}))


def test_a_curve_with_the_defaults_of_retired_options_opens(saved: Path) -> None:
    _, spec, points = load_curve(saved)
    with_option(saved, smooth=False)
    _, found, again = load_curve(saved)
    assert found == spec == CurveSpec(2, 2, closed=True)
    assert all(torch.equal(p, points[name]) for name, p in again.items())


def test_a_curve_that_uses_a_retired_option_is_refused(saved: Path) -> None:
    with_option(saved, smooth=True)
    with pytest.raises(UserError, match=f"curve_config.json: .*smooth: .*commit {LAST_COMMIT} still has it") as said:
        load_curve(saved)
    assert "\n" not in str(said.value)
