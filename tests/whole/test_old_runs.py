"""A run that an earlier version made, kept in tests/fixtures: it opens and gives what it gave, from any place."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from helpers.made_runs import command, predictions
from helpers.places import ROOT
from helpers.read_runs import read, table

from loracurve.runs.run import open_run


def copied(name: str, target: Path) -> Path:
    """A copy of a run's folder, whose config says where base and data are now."""
    folder = Path(shutil.copytree(ROOT / "tests" / "fixtures" / name, target))
    config = folder / "run" / "config.yaml"
    text = config.read_text().replace("name: model", f"name: {folder / 'model'}")
    config.write_text(text.replace("data: data", f"data: {folder / 'data'}"))
    return folder


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return copied("run_0.1", tmp_path / "moved")


@pytest.fixture
def predicted(capsys: pytest.CaptureFixture[str]) -> Callable[..., list[dict[str, Any]]]:
    return partial(predictions, capsys)


def test_it_opens_and_predicts_what_it_did(old: Path, predicted: Any, caplog: pytest.LogCaptureFixture) -> None:
    (old / "run" / "calibration.json").rename(old / "calibration.json")
    for calibrated in (False, True):
        if calibrated:
            (old / "calibration.json").rename(old / "run" / "calibration.json")
        lines = (old / ("calibrated.jsonl" if calibrated else "expected.jsonl")).read_text().splitlines()
        found = predicted(old / "run", old / "rows.jsonl")
        for known, row in zip(map(json.loads, lines), found, strict=True):
            assert row["probs"] == pytest.approx(known["probs"], abs=1e-5)
            assert row["entropy"] == pytest.approx(known["entropy"], abs=1e-5)
            assert row["mutual_information"] == pytest.approx(known["mutual_information"], abs=1e-5)
            assert [row[key] for key in ("id", "label", "prediction")] == [
                known[k] for k in ("id", "label", "prediction")
            ]
            assert ("set" in row, "abstain" in row) == (calibrated, calibrated)
    assert caplog.text.count("made before runs kept an identity.json") == 2, "what cannot be checked is said"


def test_it_is_evaluated_exported_shared_and_reported(old: Path, tmp_path: Path) -> None:
    run = old / "run"
    command("evaluate", run, "--out", tmp_path / "evaluated")
    for name, row in table(tmp_path / "evaluated").items():
        assert row["probs"] == pytest.approx(table(run)[name]["probs"], abs=1e-5)
    command("export", run, "--out", tmp_path / "points")
    assert [entry["t"] for entry in read(tmp_path / "points" / "index.json")] == [0.0, 0.5, 1.0]
    command("calibrate", run, "--risk=0.4")
    command("share", run, "--base", "org/tiny", "--out", tmp_path / "shared")
    command("report", run)
    command("evaluate", run, "--base", old / "model", "--out", tmp_path / "based")


def test_its_classes_are_known_by_name_as_long_as_its_data_are_there(old: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(old / "data", tmp_path / "other"))
    for path in other.glob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(row | {"label": 1 - row["label"]}) + "\n" for row in rows))
    (other / "meta.json").write_text(json.dumps({"task": "classification", "labels": ["positive", "negative"]}))
    command("evaluate", old / "run", "--task", other, "--out", tmp_path / "turned")
    own = read(old / "run" / "metrics.json")["methods"]["curve"]["sets"]["test"]
    found = read(tmp_path / "turned" / "metrics.json")["methods"]["curve"]["sets"]["test"]
    assert (found["acc"], found["nll"]) == pytest.approx((own["acc"], own["nll"]), abs=1e-5)
    assert open_run(old / "run").task.classes == ("negative", "positive")


def test_a_classifier_whose_base_lacks_a_pooler_predicts_what_it_did(tmp_path: Path, predicted: Any) -> None:
    old = copied("run_0.1_head", tmp_path / "moved")
    lines = (old / "expected.jsonl").read_text().splitlines()
    for known, row in zip(map(json.loads, lines), predicted(old / "run", old / "rows.jsonl"), strict=True):
        assert row["probs"] == pytest.approx(known["probs"], abs=1e-5)
        assert row["mutual_information"] == pytest.approx(known["mutual_information"], abs=1e-5)
    command("evaluate", old / "run", "--out", tmp_path / "evaluated")
    for name, row in table(tmp_path / "evaluated").items():
        assert row["probs"] == pytest.approx(table(old / "run")[name]["probs"], abs=1e-5)
    command("export", old / "run", "--t=0.5", "--out", tmp_path / "adapter")
