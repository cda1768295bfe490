"""Reading calibration.json: older, newer, broken, and of something else."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from helpers.read_runs import read

from loracurve.runs.calibrate import calibrate_run
from loracurve.runs.calibration import calibration_for, read_calibration
from loracurve.runs.run import Run
from loracurve.system.errors import UserError
from loracurve.system.files import write_json


def test_a_calibration_of_something_else_is_warned_about(
    few_texts: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    calibrate_run(few_texts, 0.1, 0.1, 0.1, "entropy", few_texts.folder.parent / "cal.jsonl")
    run = dataclasses.replace(few_texts, folder=tmp_path)
    values = read(few_texts.folder / "calibration.json")

    def said(average: Any = None) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING, "loracurve"):
            calibration_for(run, average or run.average())
        return [record.getMessage() for record in caplog.records]

    assert said() == [], "no calibration"
    write_json(tmp_path / "calibration.json", values)
    assert said() == []
    (other,) = said(run.average(dataclasses.replace(run.config.evaluation, points=3)))
    assert "another average of 4 points, this one has 3" in other and "loracurve calibrate again" in other
    write_json(tmp_path / "calibration.json", values | {"rounding": values["rounding"] | {"device": "cuda"}})
    (elsewhere,) = said()
    assert f"on cuda, this is {run.config.model.dtype} on cpu" in elsewhere and "\n" not in elsewhere
    write_json(tmp_path / "calibration.json", values | {"rounding": values["rounding"] | {"dtype": "float16"}})
    assert "rounding in float16" in said()[0]


def test_older_and_newer_calibrations(few_texts: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    calibrate_run(few_texts, 0.1, 0.1, 0.1, "entropy", few_texts.folder.parent / "cal.jsonl")
    run = dataclasses.replace(few_texts, folder=tmp_path)
    values = read(few_texts.folder / "calibration.json")
    old = {key: values[key] for key in ("rows", "source", "temperature", "measure")}
    old["selective"] = {key: value for key, value in values["selective"].items() if key != "tolerance"}
    old["conformal"] = {key: value for key, value in values["conformal"].items() if key != "tolerance"}
    write_json(tmp_path / "calibration.json", old)
    with caplog.at_level(logging.WARNING, "loracurve"):
        found = calibration_for(run, run.average())
    assert found is not None and found.tolerance == found.selective.tolerance == 0
    (line,) = [record.getMessage() for record in caplog.records]
    assert "older version" in line and "loracurve calibrate again" in line
    write_json(tmp_path / "calibration.json", values | {"format": 3})
    with pytest.raises(UserError, match=r"format 2 or earlier, found 3 of a newer loracurve; .* calibrate again"):
        read_calibration(tmp_path)
    for broken in ({"format": "1"}, {"format": 1.5}, {"format": -1}, {"format": None}, {"rounding": {}}):
        write_json(tmp_path / "calibration.json", values | broken)
        with pytest.raises(UserError, match="expected a calibration"):
            read_calibration(tmp_path)
    for part in ("conformal", "selective"):
        for tolerance in (-0.1, "0.1x", None, 1e400 if part == "conformal" else -1):
            text = json.dumps(values | {part: values[part] | {"tolerance": tolerance}}).replace("Infinity", "1e400")
            (tmp_path / "calibration.json").write_text(text)
            with pytest.raises(UserError, match="expected a calibration"):
                read_calibration(tmp_path)
