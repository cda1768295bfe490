"""The page of a run: every part, every number stands in a file."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml
from helpers.made_runs import SCAN, SCORED, Maker, command
from safetensors.torch import load_file

from loracurve.cli import main
from loracurve.report.numbers import number, rounded
from loracurve.report.terminal import print_methods


def test_figures_of_a_run_show_loss_reliability_uncertainty_and_selection(
    fitted: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loracurve.report import frames
    from loracurve.report.page import write_page

    monkeypatch.setattr(frames, "LEAST", 4)  # there are 17 test rows
    out = tmp_path / "run"
    shutil.copytree(fitted("anchored", "letter"), out)
    write_page([out], out / "report.html")
    written = [*(out / "figures").glob("*.png")]
    named = ["loss_along_path", "differences", "reliability", "uncertainty", "selective_prediction"]
    assert sorted(p.stem for p in written) == sorted(named)
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
    assert figures >= {"scan_paths", "differences", "uncertainty", "diversity_map", "plane"}
    # 17 test rows are too few for figures of groups of them.
    assert not figures & {"reliability", "selective_prediction"} and "fewer than 20 test rows" in said
    assert figures >= {"scan_accuracy", "slopes", "speed", "sharpness", "hessian", "diversity_distance", "information"}
    assert figures == {p.stem for p in (run / "figures").glob("*.pdf")}
    # What the summary shows stands in metrics.json.
    methods = json.loads((run / "metrics.json").read_text())["methods"]
    for name, method in methods.items():
        assert name in said and f"{method['sets']['test']['nll']:.3f}" in said
    for barrier in json.loads((run / "scan" / "scan.json").read_text())["barriers"]:
        assert rounded({**barrier, "estimate": barrier["excess"]}) in said
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


def strings_of(value: Any) -> set[str]:
    """Every string of a JSON value."""
    if isinstance(value, dict | list):
        return {s for v in (value.values() if isinstance(value, dict) else value) for s in strings_of(v)}
    return {value} if isinstance(value, str) else set()


def test_every_number_of_the_page_stands_in_a_file(reported: Path) -> None:
    names = ["metrics.json", "scan/scan.json", "figures/report.json", "environment.json", "config.yaml"]
    values = [yaml.safe_load((reported / name).read_text()) for name in names]  # JSON is YAML
    known, strings = np.array(sorted(set(numbers_of(values)))), strings_of(values)
    cells = Page((reported / "report.html").read_text()).cells
    checked = 0
    assert values[3]["code"] in cells, "what was run"
    for cell in cells:
        if cell in strings:  # hashes have digits that are no numbers
            continue
        for text in re.findall(r"\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?", cell):
            digits, _, power = text.partition(".")[2].partition("e")
            value, tolerance = float(text.replace(",", "")), 0.51 * 10.0 ** (int(power or 0) - len(digits))
            assert np.abs(known - value).min() <= tolerance, f"{text} in {cell!r}"
            checked += 1
    assert checked > 200
    items = [b["items"] for b in values[2]["reliability"] if b["method"] == "curve"]
    assert sum(items) == values[0]["methods"]["curve"]["sets"]["test"]["examples"]


class Tables(HTMLParser):
    """The tables of a page by their captions: rows of cells, the headings first."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: dict[str, list[list[str]]] = {}
        self.place: str | None = None
        self.caption = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.place = "caption" if dict(attrs).get("class") == "caption" else tag if tag in ("th", "td") else None
        if self.place == "caption":
            self.caption = ""
        if tag == "tr":
            self.found.setdefault(self.caption, []).append([])
        if tag in ("th", "td"):
            self.found[self.caption][-1].append("")

    def handle_data(self, data: str) -> None:
        if self.place == "caption":
            self.caption += data
        elif self.place:
            self.found[self.caption][-1][-1] += data

    def handle_endtag(self, tag: str) -> None:
        self.place = None


THREE = ["expected", "within points", "between points"]


def test_the_three_parts_are_those_of_the_files(reported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a run that knows of unknown inputs, in every table, and in the terminal."""
    text = (reported / "report.html").read_text()
    tables = Tables(text).found
    metrics = json.loads((reported / "metrics.json").read_text())
    curve = metrics["methods"]["curve"]["sets"]
    heads, *rows = tables["Means of the curve by set, nats"]
    assert heads == ["set", "entropy", *THREE, "disagreement", "familiarity < 0.05"]
    predictions = pq.read_table(reported / "predictions.parquet").to_pandas().query("method == 'curve'")
    known = load_file(reported / "unknowns.safetensors")["familiarity.known"]
    assert [row[0] for row in rows] == list(curve)
    for name, *cells in rows:
        names = ("entropy", "expected_entropy", "within_points", "between_points")
        assert [float(cell) for cell in cells[:4]] == pytest.approx([curve[name][k] for k in names], abs=6e-4)
        total, *parts = (curve[name][k] for k in names)
        assert sum(parts) == pytest.approx(total, abs=1e-9) and parts[1] > 0
        # Familiarity by hand: the part of known rows that are at least as far, this one with them.
        own = predictions[predictions["set"] == name]["distance"]
        p = [(1 + int((known >= d).sum())) / (1 + len(known)) for d in own]
        assert float(cells[5]) == pytest.approx(np.mean([x < 0.05 for x in p]), abs=6e-4)
    (caption,) = [c for c in tables if c.startswith("Test split, ")]
    heads, *rows = tables[caption]
    assert heads == ["method", "passes", "ACC", "NLL", "Brier", "ECE", "MI", *THREE[1:], "pair JSD", "AURC"]
    shown = {row[0]: dict(zip(heads, row, strict=True)) for row in rows}
    best = min(("adapter 0", "adapter 1"), key=lambda name: metrics["methods"][name]["tempered"]["validation_nll"])
    assert f"{best} (best on validation)" in shown and best not in shown
    shown = {name.removesuffix(" (best on validation)"): row for name, row in shown.items()}
    assert shown["ensemble"]["within points"] == shown["adapter 0"]["between points"] == "–"
    assert shown["adapter 0"]["MI"] == "–" and shown["ensemble"]["MI"] == shown["ensemble"]["between points"]
    test = curve["test"]
    for name, key in (("MI", "mutual_information"), *zip(THREE[1:], ("within_points", "between_points"), strict=True)):
        assert shown["curve"][name] == number(test[key])
    chosen = {caption: rows for caption, rows in tables.items() if caption.startswith(("The ", "Far from"))}
    assert 1 <= len(chosen) <= 3 and all(heads[3:] == ["entropy", *THREE] for heads, *_ in chosen.values())
    for _, *rows in chosen.values():
        for row in rows:
            total, *parts = map(float, row[3:])
            assert total == pytest.approx(sum(parts), abs=2e-3)
    assert "large far from the training data" in text
    capsys.readouterr()
    print_methods(metrics["methods"])
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.split()[:2] == ["curve:", "test"]]
    parts = [test[k] for k in ("entropy", "expected_entropy", "within_points", "between_points")]
    assert line.split()[2:] == [number(value) for value in parts]
    assert "Entropy has three parts" in " ".join(lines)


def test_two_parts_stay_two(letter_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run without Gaussians and familiarity has no columns of them, and no words about them."""
    for name in ("unknowns.json", "unknowns.safetensors"):
        (letter_run / name).unlink()
    metrics = json.loads((letter_run / "metrics.json").read_text())
    for figures in metrics["methods"]["curve"]["sets"].values():
        figures |= {"mutual_information": figures["between_points"], "within_points": 0.0}
    (letter_run / "metrics.json").write_text(json.dumps(metrics))
    table = pq.read_table(letter_run / "predictions.parquet").to_pandas()
    table["mutual_information"] = table["between_points"]
    table.drop(columns=["within_points", "between_points", "distance"]).to_parquet(letter_run / "predictions.parquet")
    command("report", letter_run)
    text = (letter_run / "report.html").read_text()
    tables = Tables(text).found
    assert tables["Means of the curve by set, nats"][0] == ["set", "entropy", "expected", "MI", "disagreement"]
    said = text[: text.index("<h2>Settings and environment")]  # behind it stand the options
    assert not re.search("within|between points|amiliarity", re.sub("<style>.*?</style>", "", said, flags=re.DOTALL))
    capsys.readouterr()
    print_methods(metrics["methods"])
    assert not re.search("within|three parts", capsys.readouterr().out)


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


def test_a_free_curve_stands_beside_its_best_point_and_the_base_model(fitted: Maker, tmp_path: Path) -> None:
    out = fitted("free", "letter")
    command("report", out, "--out", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    tables, metrics = Tables(text).found, json.loads((out / "metrics.json").read_text())
    (caption,) = [c for c in tables if c.startswith("Test split, ")]
    _, *rows = tables[caption]
    assert [row[0] for row in rows] == ["base model", "best point", "curve"]
    for name, *cells in rows:
        assert cells[2] == number(metrics["methods"][name]["sets"]["test"]["nll"])
    (caption,) = [c for c in tables if c.startswith("Curve minus other")]
    assert [row[0] for row in tables[caption][1:]] == ["base model", "best point"]
    (caption,) = [c for c in tables if c.startswith("Test NLL of single points")]
    assert [row[0] for row in tables[caption][1:]] == ["curve"], "one point is no path"
    assert "its best single point, which validation rows chose (1 pass)" in text
    assert "the base model without fine-tuning" in text


def test_metrics_of_before_there_was_anything_to_compare_with_make_a_page(fitted: Maker, tmp_path: Path) -> None:
    run = shutil.copytree(fitted("free", "letter"), tmp_path / "run")
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["methods"] = {"curve": metrics["methods"]["curve"]}
    (run / "metrics.json").write_text(json.dumps(metrics | {"comparisons": []}))
    table = pq.read_table(run / "predictions.parquet")
    pq.write_table(table.filter(pc.equal(table["method"], "curve")), run / "predictions.parquet")
    command("report", run)
    text = (run / "report.html").read_text()
    assert "so the report compares with none" in text and "base model" not in text
