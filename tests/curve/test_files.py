"""Folders of curves that an older version wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.tiny import lora_config, random_points, tiny
from safetensors.torch import load_file, save_file

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


@pytest.mark.parametrize(
    ("value", "dtype", "said"),
    [
        (2.0**64, torch.float32, "of at most 9.2e.18 in size, found 1.8e.19 in "),
        (-3e38, torch.bfloat16, "of at most 9.2e.18 in size, found 3e.38 in "),
        (float("nan"), torch.float32, "found others in "),
        (float("inf"), torch.float16, "found others in "),
    ],
)
def test_numbers_whose_products_are_infinite_are_refused(
    value: float, dtype: torch.dtype, said: str, saved: Path
) -> None:
    file = saved / "control_points.safetensors"
    points = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
    name = sorted(points)[0]
    points[name].view(-1)[3] = value
    save_file(points, file)
    with pytest.raises(UserError, match=f"control_points.safetensors: expected finite .* {said}{name}$"):
        load_curve(saved)


def test_large_numbers_of_half_precision_are_read(saved: Path) -> None:
    file = saved / "control_points.safetensors"
    points = {name: torch.full_like(tensor, 65504, dtype=torch.float16) for name, tensor in load_file(file).items()}
    save_file(points, file)
    assert all(bool((tensor == 65504).all()) for tensor in load_curve(saved)[2].values())
