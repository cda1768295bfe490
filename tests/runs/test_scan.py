"""The command scan on runs of tiny models and on adapters."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from helpers.made_runs import SCAN, SCORED, command, tree_hash
from helpers.places import ROOT

from loracurve.cli import main
from loracurve.landscape.config import PATHS
from loracurve.report.page import about
from loracurve.report.run_data import read_run


@pytest.mark.parametrize("scoring", SCORED)
def test_scan_writes_its_tables(scoring: str, scored_runs: dict[str, Path], tmp_path: Path) -> None:
    before, out = tree_hash(scored_runs[scoring]), tmp_path / "scan"
    command("scan", scored_runs[scoring], *SCAN, "--out", out)
    assert tree_hash(scored_runs[scoring]) == before
    scan = json.loads((out / "scan.json").read_text())
    segments = 2 if scoring == "lm" else 1
    assert {b["path"] for b in scan["barriers"]} == set(PATHS) and len(scan["barriers"]) == 7 * segments
    paths = pd.read_parquet(out / "paths.parquet")
    assert set(paths["path"]) == set(PATHS) and set(paths["split"]) == {"test", "validation", "train"}
    assert len(paths) == 7 * 3 * (4 * segments + 1) and scan["cost"]["evaluations"] == 7 * (4 * segments + 1)
    ends = paths[(paths["t"] == 0) & (paths["split"] == "test")]["nll"]
    # A free curve's ends are its control points, so all paths begin at one adapter; so do those from saved anchors.
    assert ends.max() - ends.min() < 1e-4
    for point in scan["slopes"]["points"]:
        assert point["bound"] >= abs(point["slope"]) and point["bound"] >= abs(point["measured"])
    if scoring == "lm":
        assert not (out / "predictions.parquet").exists()
    else:
        kept = pd.read_parquet(out / "predictions.parquet")
        assert set(kept["path"]) == set(PATHS) and len(kept["point_probs"].iloc[0]) == 5
        assert {"distance", "jsd", "within"} <= set(pd.read_parquet(out / "diversity.parquet").columns)
    speeds = pd.read_parquet(out / "speeds.parquet")
    assert set(speeds["path"]) == set(PATHS) and (speeds["speed"] > 0).all() and len(speeds) == 7 * 2
    # Mid-points of equal cells: their mean speed is about the length, exactly so on the line in Delta W.
    straight = speeds[speeds["path"] == "delta_w"]["speed"].mean()
    assert straight == pytest.approx(scan["paths"]["delta_w"]["arc_length"], rel=1e-5)
    for record in scan["paths"].values():
        assert record["arc_length"] >= record["chord"] * (1 - 1e-6)


def test_scan_of_the_curve_agrees_with_the_run(scored_runs: dict[str, Path], tmp_path: Path) -> None:
    run = scored_runs["letter"]
    command("scan", run, *SCAN, "--paths", "curve", "straight", "--rows", "0", "--out", tmp_path / "scan")
    paths = pd.read_parquet(tmp_path / "scan" / "paths.parquet")
    metrics = json.loads((run / "metrics.json").read_text())["methods"]
    for path, method in (("curve", "curve"), ("straight", "straight line")):
        found = paths[(paths["path"] == path) & (paths["split"] == "test") & paths["t"].isin([0, 0.5, 1])]
        assert found["nll"].tolist() == pytest.approx(metrics[method]["point_nll"], abs=2e-4)


def test_scan_of_adapters(scored_runs: dict[str, Path], tmp_path: Path) -> None:
    run = scored_runs["letter"]
    adapters = [run / "anchors" / str(m) for m in (0, 1)]
    data = run.parent / "data-letter"
    command("scan", "--adapters", *adapters, "--task", data, *SCAN, "--out", tmp_path / "scan")
    scan = json.loads((tmp_path / "scan" / "scan.json").read_text())
    assert {b["path"] for b in scan["barriers"]} == set(PATHS) - {"curve"}
    assert scan["subject"]["scoring"] == "letter" and scan["geometry"] is None
    command("scan", run, *SCAN, "--out", tmp_path / "again")
    again = json.loads((tmp_path / "again" / "scan.json").read_text())
    for name in set(PATHS) - {"curve"}:
        assert scan["paths"][name]["nll"]["test"]["mean"] == pytest.approx(
            again["paths"][name]["nll"]["test"]["mean"], abs=1e-6
        )
    for folder, end in (("scan", "; nothing was trained"), ("again", ", and a curve through them")):
        line = about(read_run(tmp_path / folder, folder))
        assert line == f"data-letter between 2 adapters of base-letter{end}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected a run directory or --adapters"),
        (["RUN", "--adapters", "a", "b"], "found both or neither"),
        (["--adapters", "a", "--task", "t"], "at least 2 folders, found 1"),
        (["--adapters", "a", "b"], "found no --task"),
        (["RUN", "--task", "t"], "--task goes with --adapters"),
        (["RUN", "--points", "2"], "points: expected a whole number in [3, 100000], found 2"),
        (["RUN", "--paths", "straigth"], "paths"),
        (["RUN", "--pionts", "3"], "unknown option pionts; did you mean 'points'"),
        (["nowhere"], "nowhere: expected a run directory"),
    ],
)
def test_wrong_scans_are_told_in_one_line(
    arguments: list[str], message: str, scored_runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["scan", *(str(scored_runs["letter"]) if a == "RUN" else a for a in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_the_notebook_example_runs(reported: Path) -> None:
    text = (ROOT / "docs" / "landscape.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    source = "\n".join(blocks).replace('"runs/sst2"', repr(str(reported))).replace("61)", "5)")
    names: dict[str, Any] = {}
    try:
        exec(source, names)
    finally:
        names["plt"].close("all")
    assert {"straight (A, B)", "curve"} <= {line.get_label() for line in names["axes"][0].lines}
    kept = pd.read_parquet(reported / "scan" / "paths.parquet").query("split == 'test'")
    found = names["scan"].frame().query("split == 'test'")
    nll = [dict(iter(frame.groupby("path")["nll"])) for frame in (found, kept)]
    for name in ("straight", "delta_w", "curve"):
        assert nll[0][name].tolist() == pytest.approx(nll[1][name].tolist())
