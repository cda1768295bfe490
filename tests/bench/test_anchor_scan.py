"""The landscape of a suite: the scan between its anchors, figures along its curves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.suites import OPTIONS, little, point_nll, record, tables_of

from loracurve.baselines.single import Single
from loracurve.bench.anchor_scan import along_curve
from loracurve.bench.config import LANDSCAPE, SuiteConfig
from loracurve.bench.results import read_results
from loracurve.bench.runner import run_suite
from loracurve.bench.shared import open_shared
from loracurve.bench.store import STEPS
from loracurve.curve.spec import CurveSpec
from loracurve.system.errors import UserError
from loracurve.system.tensors import read_tensors


def test_a_scan_runs_once_after_the_cells_of_its_task_and_seed(scanned: tuple[SuiteConfig, Path, list[str]]) -> None:
    suite, out, said = scanned
    order = [*suite.methods, "landscape"]
    assert [s.partition(":")[0] for s in said] == [f"made / seed {s} / {m}" for s in (0, 1) for m in order]
    again: list[str] = []
    run_suite(suite, out, jobs=1, say=again.append)
    assert again == []
    with pytest.raises(UserError, match="landscape was made with other options"):
        run_suite(replace(suite, landscape=replace(OPTIONS, points=5)), out, jobs=1)


def test_a_curve_records_its_geometry_and_sharpness(scanned: tuple[SuiteConfig, Path, list[str]]) -> None:
    suite, out, _ = scanned
    along = record(out, "curve")["along"]
    assert along["t"] == [0, 0.25, 0.5, 0.75, 1] and len(along["speed"]) == 5
    distances = torch.tensor(along["distances"])
    assert along["length"] == pytest.approx(float(distances.diagonal(1).sum())) and (distances.diagonal() == 0).all()
    between = record(out, LANDSCAPE)["distances"]
    assert distances[0, 4] == pytest.approx(between[0][2], rel=1e-3)  # of the first and the last anchor, in any gauge
    assert "along" not in record(out, "line") and along["sharpness"]["t"] == [0, 0.5, 1]
    # Without noise nothing rises, and the loss at the curve's ends is the anchors'.
    shared = open_shared(suite, "made", 0)
    shared.model.set_curve(CurveSpec.slots(3), read_tensors(out / "anchors" / "made" / "0" / "anchors.safetensors"))
    quiet = along_curve(shared.model, [0.0, 1.0], shared.sets["test"], replace(OPTIONS, noise=0.0), 0)["sharpness"]
    assert quiet["increase"] == pytest.approx([0, 0, 0], abs=1e-6)
    expected = point_nll(read_results(suite, out), "ensemble 3").mean(1)
    assert quiet["loss"] == pytest.approx(expected.tolist(), abs=0.1 / STEPS)


def test_a_scan_that_fails_is_told_and_tried_again(tmp_path: Path) -> None:
    suite = little(tmp_path, methods={"one": Single()})
    run_suite(suite, tmp_path / "out", jobs=1, say=lambda _: None)
    tensors = tmp_path / "out" / "anchors" / "made" / "0" / "anchors.safetensors"
    kept = tensors.read_bytes()
    tensors.write_bytes(kept[:100])
    asked, said = replace(suite, landscape=replace(OPTIONS, pairs=1)), list[str]()
    with pytest.raises(UserError, match="1 failed .*landscape"):
        run_suite(asked, tmp_path / "out", jobs=1, say=said.append)
    assert len(said) == 1 and "landscape: failed:" in said[0] and "damaged safetensors file" in said[0]
    assert [row[2] for row in tables_of(asked, tmp_path / "out")["left_out"].rows] == ["landscape"]
    assert (tmp_path / "out" / "tables" / "left_out.csv").exists()
    tensors.write_bytes(kept)
    run_suite(asked, tmp_path / "out", jobs=1, retry=True, say=said.append)
    assert len(said) == 2 and "predicted" in said[1]
    assert "barriers" in tables_of(asked, tmp_path / "out") and "left_out" not in tables_of(asked, tmp_path / "out")
    assert not (tmp_path / "out" / "tables" / "left_out.csv").exists()
