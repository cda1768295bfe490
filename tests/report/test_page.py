"""The page of a run: every part, every number stands in a file."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from helpers.made_runs import SCAN, SCORED, Maker, command

from loracurve.cli import main


def test_figures_of_a_run_show_loss_reliability_uncertainty_and_selection(fitted: Maker, tmp_path: Path) -> None:
    from loracurve.report.page import write_figures

    out = tmp_path / "run"
    shutil.copytree(fitted("anchored", "letter"), out)
    written = write_figures(out)
    assert [p.stem for p in written] == ["loss_along_path", "reliability", "uncertainty", "selective_prediction"]
    assert all(p.stat().st_size > 1000 and p.with_suffix(".pdf").stat().st_size > 1000 for p in written)


@pytest.fixture
def letter_run(scored_runs: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the multiple-choice run."""
    return Path(shutil.copytree(scored_runs["letter"], tmp_path / "letter"))


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
        for text in re.findall(r"\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?", cell):
            digits, _, power = text.partition(".")[2].partition("e")
            value, tolerance = float(text.replace(",", "")), 0.51 * 10.0 ** (int(power or 0) - len(digits))
            assert np.abs(known - value).min() <= tolerance, f"{text} in {cell!r}"
            checked += 1
    assert checked > 200
    items = [b["items"] for b in values[2]["reliability"] if b["method"] == "curve"]
    assert len(items) == 15 and sum(items) == values[0]["methods"]["curve"]["sets"]["test"]["examples"]


def test_report_of_a_scan_of_adapters(scored_runs: dict[str, Path], tmp_path: Path) -> None:
    run, out = scored_runs["letter"], tmp_path / "scan"
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


def test_report_without_a_scan_says_so(letter_run: Path) -> None:
    command("report", letter_run)
    assert "No scan yet" in (letter_run / "report.html").read_text()


def test_report_of_several_runs(
    scored_runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copies = [Path(shutil.copytree(scored_runs[s], tmp_path / s)) for s in SCORED]
    page = tmp_path / "several.html"
    command("report", *copies, "--out", page)
    said = " ".join(Page(page.read_text()).words)
    assert all(scoring in said for scoring in SCORED)
    assert main(["report", *map(str, copies), "--out", str(page)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    command("report", copies[0], "--out", page, "--overwrite")
    assert main(["report", str(copies[0]), str(copies[0]), "--out", str(tmp_path / "x.html")]) == 2
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "x.html")]) == 2
    assert "no metrics.json" in capsys.readouterr().err


def test_text_of_the_data_cannot_break_the_page(letter_run: Path) -> None:
    environment = json.loads((letter_run / "environment.json").read_text())
    (letter_run / "environment.json").write_text(json.dumps(environment | {"device": "<script>alert(1)</script>"}))
    command("report", letter_run)
    text = (letter_run / "report.html").read_text()
    assert "<script>" not in text and "&lt;script&gt;" in text
