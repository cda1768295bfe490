"""Opened runs: points exported as adapters."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.made_runs import SCORINGS, Maker, command
from helpers.read_runs import log_point_nll, logits, peft_logits, read, some_ids, table

from loracurve.cli import main
from loracurve.model.base_model import load_base
from loracurve.model.config import ModelConfig
from loracurve.model.curve_model import CurveModel
from loracurve.runs.config import RunConfig
from loracurve.runs.run import base_and_task, open_run
from loracurve.tasks.config import TaskConfig


@pytest.mark.parametrize(("kind", "scoring"), [("anchored", "letter"), ("free", "text"), ("anchored", "head")])
def test_exported_points_are_adapters_that_peft_loads(kind: str, scoring: str, fitted: Maker, tmp_path: Path) -> None:
    out, ids = fitted(kind, scoring), some_ids()
    opened = open_run(out)
    command("export", out, "--points=3", "--out", tmp_path / "points")
    command("export", out, "--t=0.3", "--out", tmp_path / "one")
    command("export", out, "--out", tmp_path / "own")
    index = read(tmp_path / "points" / "index.json")
    assert [entry["t"] for entry in index] == [0.0, 0.5, 1.0]
    assert [entry["weight"] for entry in index] == pytest.approx([1 / 3] * 3)
    assert len(read(tmp_path / "own" / "index.json")) == 3, "by default the run's own points"
    assert read(tmp_path / "one" / "index.json") == [{"folder": "point-00", "t": 0.3, "weight": 1.0}]
    for folder, t in [*((tmp_path / "points" / e["folder"], e["t"]) for e in index), (tmp_path / "one/point-00", 0.3)]:
        expected = logits(opened.model, ids, t)
        torch.testing.assert_close(peft_logits(opened, folder, ids), expected, rtol=1e-4, atol=1e-5)


def test_the_best_point_has_the_lowest_validation_nll(fitted: Maker, tmp_path: Path) -> None:
    out = fitted("anchored", "letter")
    command("evaluate", out, "--points=21", "--split=validation", "--out", tmp_path / "v")
    nll = log_point_nll(table(tmp_path / "v", split="validation")).mean(1)
    command("export", out, "--best", "--out", tmp_path / "best")
    (entry,) = read(tmp_path / "best" / "index.json")
    assert nll[round(entry["t"] * 20)] == pytest.approx(float(nll.min()), abs=1e-6)
    assert float(nll.max() - nll.min()) > 1e-3, "or any point would do"


@pytest.mark.parametrize(
    ("dtype", "able", "warned"), [("bfloat16", False, 1), ("bfloat16", True, 0), ("float32", False, 0)]
)
def test_slow_arithmetic_is_said_before_training(
    dtype: Any,
    able: bool,
    warned: int,
    fitted: Maker,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("loracurve.runs.run.multiplies_bfloat16", lambda: able)
    model = ModelConfig(str(fitted.base(SCORINGS["letter"])), dtype=dtype)
    with caplog.at_level(logging.WARNING, "loracurve"):
        base_and_task(RunConfig(model, TaskConfig(str(fitted.data("letter")), "letter")))
    assert sum("several times faster" in r.message for r in caplog.records) == warned


def test_points_on_the_curve_of_a_run_that_averages_off_it(fitted: Maker, tmp_path: Path) -> None:
    """Those of `--points`, as the refusal of the run's own advises."""
    out = Path(shutil.copytree(fitted("anchored", "letter"), tmp_path / "run"))
    text = (out / "config.yaml").read_text()
    assert "inference: curve" in text
    (out / "config.yaml").write_text(text.replace("inference: curve", "inference: tunnel"))
    command("export", out, "--points=2", "--out", tmp_path / "ends")
    points = read(tmp_path / "ends" / "index.json")
    assert [(p["t"], p["weight"]) for p in points] == [(0.0, 0.5), (1.0, 0.5)]


def test_unknowns_of_another_curve_are_refused(
    fitted: Maker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two runs average the same points: only the curves differ."""
    run = Path(shutil.copytree(fitted("anchored", "letter"), tmp_path / "run"))
    other = Path(shutil.copytree(fitted("free", "letter"), tmp_path / "other"))
    for name in ("unknowns.json", "unknowns.safetensors"):
        shutil.copy(other / name, run / name)
    capsys.readouterr()
    assert main(["evaluate", str(run), "--out", str(tmp_path / "again")]) == 2
    assert "expected numbers of this run's curve, found those of another" in capsys.readouterr().err


def test_exported_points_are_anchors_of_another_run(fitted: Maker, tmp_path: Path) -> None:
    out = fitted("free", "letter")
    command("export", out, "--points=2", "--out", tmp_path / "ends")
    base, _ = load_base(str(fitted.base("qwen2")))
    model = CurveModel.from_adapters(base, [tmp_path / "ends" / f"point-{i:02d}" for i in range(2)])
    ids = some_ids()
    ends = open_run(out).model
    for t in (0.0, 1.0):
        torch.testing.assert_close(logits(model, ids, t), logits(ends, ids, t), rtol=1e-4, atol=1e-5)
