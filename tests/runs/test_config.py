"""Options of a run: shipped files, and what cannot work is known before training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.places import ROOT

from loracurve.curve.config import CurveConfig
from loracurve.curve.retired import LAST_COMMIT
from loracurve.inference.config import EvaluationConfig
from loracurve.model.config import ModelConfig
from loracurve.runs.config import RunConfig, load_config, save_config, without_retired_words
from loracurve.system.errors import UserError
from loracurve.tasks.config import TaskConfig


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "free", "segments": 1, "degree": 1}, "inference: expected curve for two control points"),
        ({"kind": "anchored", "degree": 1}, "curve.degree: expected at least 2 .* or set pieces to 2"),
        ({"kind": "free", "pieces": 2}, "curve.pieces: expected 1"),
        ({"kind": "anchored", "factors": "A"}, "curve.factors: expected both"),
    ],
)
def test_what_cannot_work_is_known_before_training(values: dict[str, Any], message: str) -> None:
    evaluation = EvaluationConfig(inference="tunnel")
    with pytest.raises(UserError, match=message):
        RunConfig(ModelConfig("m"), TaskConfig("d", "letter"), curve=CurveConfig(**values), evaluation=evaluation)


CONFIGS = sorted((ROOT / "src" / "loracurve" / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_parse(path: Path) -> None:
    load_config(path)


def test_some_configs_are_shipped() -> None:
    assert CONFIGS


# ---- files of the version that had more options

OLD = (ROOT / "tests" / "helpers" / "config_94813ef.yaml").read_text()


def test_a_file_with_the_defaults_of_retired_options_opens(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(OLD)
    found = load_config(tmp_path / "config.yaml")
    assert found == RunConfig(ModelConfig("m"), TaskConfig("d", "letter"))
    save_config(found, tmp_path / "new.yaml")
    assert load_config(tmp_path / "new.yaml") == found
    old, new = (yaml.safe_load(text) for text in (OLD, (tmp_path / "new.yaml").read_text()))
    assert set(old["curve"]) - set(new["curve"]) == {"smooth"}
    assert set(old["curve_training"]) - set(new["curve_training"]) == {"bootstrap", "compile"}
    assert set(old["anchor_training"]) - set(new["anchor_training"]) == {"compile"}


def test_what_only_made_steps_faster_is_left_out_with_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old = yaml.safe_load(OLD)
    old["curve_training"]["compile"] = True
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(old))
    assert load_config(tmp_path / "config.yaml") == RunConfig(ModelConfig("m"), TaskConfig("d", "letter"))
    assert [r.message for r in caplog.records] == ["compile: left out, steps are as fast without it now"]
    words = ["fit", "--anchor_training.compile", "true", "--lora.r=4"]
    assert without_retired_words(words) == ["fit", "--lora.r=4"]


@pytest.mark.parametrize(
    ("part", "values"),
    [
        ("curve", {"smooth": True}),
        ("curve_training", {"bootstrap": {"kind": "tied", "length_scale": 0.25, "features": 64}}),
        ("curve_training", {"bootstrap": {"kind": "everywhere"}}),
        ("curve_training", {"objective": {"jsd": "mixture", "weight": 0.5, "tau": 0.0, "tau_relative": 1.0}}),
        ("curve_training", {"sampling": "quasi-random"}),
    ],
)
def test_a_file_that_uses_a_retired_option_is_refused(part: str, values: dict[str, Any], tmp_path: Path) -> None:
    old = yaml.safe_load(OLD)
    old[part] |= values
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(old))
    with pytest.raises(UserError, match=f"{part}.{next(iter(values))}: .*commit {LAST_COMMIT} still has it") as said:
        load_config(tmp_path / "config.yaml")
    assert "\n" not in str(said.value)
