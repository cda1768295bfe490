"""The commands scan and report on runs of tiny models."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from made_runs import QUICK, base_folder, command, config_file, data_folder, tree_hash

from loracurve.cli import main, spell_out
from loracurve.landscape.config import PATHS
from loracurve.report.page import about
from loracurve.report.run_data import read_run

SCAN = ["--points", "5", "--plane", "3", "--slopes", "2", "--speeds", "2", "--sharpness", "2", "--resamples", "50"]
SCORINGS = {"letter": "qwen2", "head": "encoder", "lm": "llama"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A fitted run of each scoring, anchored but for lm, which is free."""
    root, made = tmp_path_factory.mktemp("runs"), {}
    for scoring, architecture in SCORINGS.items():
        base = base_folder(root / f"base-{scoring}", architecture)
        config = config_file(root / f"{scoring}.yaml", base, data_folder(root / f"data-{scoring}", scoring), scoring)
        kind = "free" if scoring == "lm" else "anchored"
        command("fit", config, "--out", root / scoring, f"--curve.kind={kind}", *QUICK)
        made[scoring] = root / scoring
    return made


@pytest.fixture
def run(runs: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the multiple-choice run."""
    return Path(shutil.copytree(runs["letter"], tmp_path / "letter"))


@pytest.fixture(scope="module")
def reported(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the multiple-choice run, scanned and reported."""
    run = Path(shutil.copytree(runs["letter"], tmp_path_factory.mktemp("reported") / "letter"))
    command("scan", run, *SCAN, "--hessian", "1")
    command("report", run)
    return run


@pytest.mark.parametrize("scoring", SCORINGS)
def test_scan_writes_its_tables(scoring: str, runs: dict[str, Path], tmp_path: Path) -> None:
    before, out = tree_hash(runs[scoring]), tmp_path / "scan"
    command("scan", runs[scoring], *SCAN, "--out", out)
    assert tree_hash(runs[scoring]) == before
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


def test_scan_of_the_curve_agrees_with_the_run(runs: dict[str, Path], tmp_path: Path) -> None:
    run = runs["letter"]
    command("scan", run, *SCAN, "--paths", "curve", "straight", "--rows", "0", "--out", tmp_path / "scan")
    paths = pd.read_parquet(tmp_path / "scan" / "paths.parquet")
    metrics = json.loads((run / "metrics.json").read_text())["methods"]
    for path, method in (("curve", "curve"), ("straight", "straight line")):
        found = paths[(paths["path"] == path) & (paths["split"] == "test") & paths["t"].isin([0, 0.5, 1])]
        assert found["nll"].tolist() == pytest.approx(metrics[method]["point_nll"], abs=2e-4)


def test_scan_of_adapters(runs: dict[str, Path], tmp_path: Path) -> None:
    run = runs["letter"]
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
        (["RUN", "--points", "2"], "points: expected at least 3, found 2"),
        (["RUN", "--paths", "straigth"], "paths"),
        (["RUN", "--pionts", "3"], "unknown option pionts; did you mean 'points'"),
        (["nowhere"], "nowhere: expected a run directory"),
    ],
)
def test_wrong_scans_are_told_in_one_line(
    arguments: list[str], message: str, runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["scan", *(str(runs["letter"]) if a == "RUN" else a for a in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


class Page(HTMLParser):
    """Tags that are opened and closed, addresses, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.cells: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [v or "" for k, v in attrs if k in ("src", "href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)
        if self.open and self.open[-1] == "td":
            self.cells.append(data)


def test_report_is_one_file_with_every_part(reported: Path) -> None:
    run = reported
    text = (run / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    # Nothing is fetched: images are inside, links stay on the page.
    assert all(a.startswith(("data:image/png;base64,", "#")) for a in page.addresses)
    assert not re.search(r"https?://|<script|@import|url\(", text)
    said = " ".join(page.words)
    for heading in ("Summary", "Loss along the paths", "Reliability", "Selective prediction", "Examples", "Settings"):
        assert heading in said
    assert "No scan yet" not in said
    figures = {p.stem for p in (run / "figures").glob("*.png")}
    assert figures >= {"scan_paths", "reliability", "uncertainty", "selective_prediction", "diversity_map", "plane"}
    assert figures >= {"scan_accuracy", "slopes", "speed", "sharpness", "hessian", "diversity_distance", "information"}
    assert figures == {p.stem for p in (run / "figures").glob("*.pdf")}
    # What the summary shows stands in metrics.json.
    methods = json.loads((run / "metrics.json").read_text())["methods"]
    for name, method in methods.items():
        assert name in said and f"{method['sets']['test']['nll']:.4f}" in said
    for barrier in json.loads((run / "scan" / "scan.json").read_text())["barriers"]:
        assert f"{barrier['excess']:+.4f} [{barrier['low']:+.4f}" in said
    numbers = json.loads((run / "figures" / "report.json").read_text())
    assert numbers["selective_accuracy"]["curve, entropy"]["1.0"] == pytest.approx(
        methods["curve"]["sets"]["test"]["acc"]
    )


def numbers_of(value: Any) -> list[float]:
    """Every number of a JSON value, and those inside its strings (versions, commands)."""
    if isinstance(value, dict):
        return [n for k, v in value.items() for n in (*numbers_of(k), *numbers_of(v))]
    if isinstance(value, list):
        return [n for v in value for n in numbers_of(v)] + [float(len(value))]
    if isinstance(value, str):
        return [float(n) for n in re.findall(r"\d+(?:\.\d+)?", value)]
    return [abs(float(value))] if isinstance(value, int | float) else []


def test_every_number_of_the_page_stands_in_a_file(reported: Path) -> None:
    names = ["metrics.json", "scan/scan.json", "figures/report.json", "environment.json", "config.yaml"]
    values = [yaml.safe_load((reported / name).read_text()) for name in names]  # JSON is YAML
    known = np.array(sorted(set(numbers_of(values))))
    cells = Page((reported / "report.html").read_text()).cells
    checked = 0
    for cell in cells:
        for text in re.findall(r"\d[\d,]*(?:\.\d+)?", cell):
            digits = len(text.partition(".")[2])
            value, tolerance = float(text.replace(",", "")), 0.51 * 10.0**-digits
            assert np.abs(known - value).min() <= tolerance, f"{text} in {cell!r}"
            checked += 1
    assert checked > 200
    items = [b["items"] for b in values[2]["reliability"] if b["method"] == "curve"]
    assert len(items) == 15 and sum(items) == values[0]["methods"]["curve"]["sets"]["test"]["examples"]


def test_report_of_a_scan_of_adapters(runs: dict[str, Path], tmp_path: Path) -> None:
    run, out = runs["letter"], tmp_path / "scan"
    adapters = [run / "anchors" / str(m) for m in (0, 1)]
    command("scan", "--adapters", *adapters, "--task", run.parent / "data-letter", *SCAN, "--out", out)
    command("report", out)
    said = " ".join(Page((out / "report.html").read_text()).words)
    assert "between 2 adapters of base-letter; nothing was trained" in said
    assert "Loss along the paths" in said and "Between anchors 0 and 1 the straight line" in said
    assert "Selective prediction" not in said, "adapters were not evaluated"
    assert {"scan_paths", "scan_accuracy", "diversity_map", "speed"} <= {
        p.stem for p in (out / "figures").glob("*.pdf")
    }


def test_the_notebook_example_runs(reported: Path) -> None:
    text = (Path(__file__).parents[1] / "docs" / "landscape.md").read_text()
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


def test_report_without_a_scan_says_so(run: Path) -> None:
    command("report", run)
    assert "No scan yet" in (run / "report.html").read_text()


def test_report_of_several_runs(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copies = [Path(shutil.copytree(runs[s], tmp_path / s)) for s in SCORINGS]
    page = tmp_path / "several.html"
    command("report", *copies, "--out", page)
    said = " ".join(Page(page.read_text()).words)
    assert all(scoring in said for scoring in SCORINGS)
    assert main(["report", *map(str, copies), "--out", str(page)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    command("report", copies[0], "--out", page, "--overwrite")
    assert main(["report", str(copies[0]), str(copies[0]), "--out", str(tmp_path / "x.html")]) == 2
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "x.html")]) == 2
    assert "no metrics.json" in capsys.readouterr().err


def test_text_of_the_data_cannot_break_the_page(run: Path) -> None:
    environment = json.loads((run / "environment.json").read_text())
    (run / "environment.json").write_text(json.dumps(environment | {"device": "<script>alert(1)</script>"}))
    command("report", run)
    text = (run / "report.html").read_text()
    assert "<script>" not in text and "&lt;script&gt;" in text


def test_lists_and_flags_are_spelled_out() -> None:
    found = spell_out(["--adapters", "a", "b", "--best", "--t", "1"], ["--adapters"], ["--best"])
    assert found == ['--adapters=["a", "b"]', "--best=true", "--t", "1"]
    assert spell_out(["--best", "false", "--x=1"], [], ["--best"]) == ["--best", "false", "--x=1"]
    assert spell_out(["--adapters", '["a"]'], ["--adapters"], []) == ['--adapters=["a"]']
