"""Suites that name retired options: they parse, their stored results stay readable, and running them is refused."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.places import ROOT
from helpers.suites import anchored, little

from loracurve.bench.config import LANDSCAPE, SuiteConfig
from loracurve.bench.provenance import fingerprint, made_with, options_of, plain
from loracurve.bench.retired import RetiredCurve
from loracurve.bench.runner import run_suite
from loracurve.bench.store import record_of
from loracurve.bench.suite import Cell, cells_of, load_suite, method_from
from loracurve.bench.suite_files import shipped
from loracurve.bench.tables.write import write_tables
from loracurve.curve.retired import LAST_COMMIT
from loracurve.system.errors import UserError
from loracurve.system.files import read_json

RESULTS = ROOT / "results"
STORES = sorted(path.parent.name for path in RESULTS.glob("*/cells"))

# Each retired option as a suite names it, and what is said of it.
OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "smooth": ({"curve": {"kind": "free", "smooth": True}}, "curve.smooth"),
    "bootstrap tied": ({"training": {"bootstrap": {"kind": "tied"}}}, "training.bootstrap"),
    "bootstrap everywhere": ({"training": {"bootstrap": {"kind": "everywhere"}}}, "training.bootstrap"),
    "mixture": ({"training": {"objective": {"jsd": "mixture", "weight": 0.5}}}, "training.objective"),
    "quasi-random": ({"training": {"sampling": "quasi-random", "points": 2}}, "training.sampling"),
}


def with_method(suite: SuiteConfig, options: dict[str, Any]) -> SuiteConfig:
    return replace(suite, methods={"m": method_from({"method": "curve", **options}, "m", "methods.m")})


def old_record(suite: SuiteConfig, options: dict[str, Any]) -> dict[str, Any]:
    """The options that commit 94813ef recorded of a curve: every option by name, those that are retired with them."""
    defaults: dict[str, Any] = {
        "curve": {"smooth": False},
        "training": {"bootstrap": {"kind": "none", "length_scale": 0.25, "features": 64}},
    }
    plain_options = {
        part: {
            k: v for k, v in options.get(part, {}).items() if k not in ("smooth", "bootstrap", "objective", "sampling")
        }
        for part in ("curve", "training")
    }
    found = copy.deepcopy(options_of(with_method(suite, plain_options), Cell("made", 0, "m")))
    for part, values in defaults.items():
        found["method"][part] |= values
        for name, value in options.get(part, {}).items():
            old = found["method"][part].get(name)
            found["method"][part][name] = old | value if isinstance(old, dict) else value
    return found


@pytest.mark.parametrize("name", OPTIONS)
def test_a_suite_parses_and_its_old_records_match(name: str, tmp_path: Path) -> None:
    options, _ = OPTIONS[name]
    suite, cell = with_method(little(tmp_path), options), Cell("made", 0, "m")
    assert isinstance(suite.methods["m"], RetiredCurve)
    recorded = old_record(little(tmp_path), options)
    assert made_with(recorded, suite, cell)
    # Not with another value, and not with the option turned off.
    changed = copy.deepcopy(recorded)
    for part, values in options.items():
        for key, value in values.items():
            if key in ("smooth", "bootstrap", "objective", "sampling"):
                inside = changed["method"][part][key]
                if isinstance(value, dict):
                    inside[next(iter(value))] = "other"
                else:
                    changed["method"][part][key] = "other"
    assert not made_with(changed, suite, cell)
    assert not made_with(old_record(little(tmp_path), {}), suite, cell)
    assert not made_with(recorded, with_method(little(tmp_path), {}), cell)


def test_defaults_of_retired_options_match_a_suite_that_does_not_name_them(tmp_path: Path) -> None:
    cell = Cell("made", 0, "m")
    for options in ({}, {"curve": {"kind": "anchored"}}, {"training": {"points": 2, "share_points": True}}):
        suite = with_method(little(tmp_path), options)
        assert made_with(old_record(little(tmp_path), options), suite, cell)
    # Nor does it matter whether a suite names them with their defaults.
    named = {"curve": {"smooth": False}, "training": {"bootstrap": {"kind": "none"}}}
    suite = with_method(little(tmp_path), named)
    assert not isinstance(suite.methods["m"], RetiredCurve)
    assert fingerprint(suite, cell) == fingerprint(with_method(little(tmp_path), {}), cell)


def test_a_curve_inside_another_method_is_read_too(tmp_path: Path) -> None:
    inner = {"method": "curve", "training": {"bootstrap": {"kind": "tied"}}}
    suite = replace(little(tmp_path), methods={"m": method_from({"method": "temperature", "of": inner}, "m", "m")})
    recorded = options_of(suite, Cell("made", 0, "m"))
    assert recorded["method"]["of"]["training"]["bootstrap"]["kind"] == "tied"
    assert made_with(recorded, suite, Cell("made", 0, "m"))


def test_running_its_cell_is_refused_in_one_line(tmp_path: Path) -> None:
    retired = {name: method_from({"method": "curve", **o}, name, "methods.m") for name, (o, _) in OPTIONS.items()}
    suite = little(tmp_path, methods=retired | {"curve": anchored(units=4)})
    said: list[str] = []
    with pytest.raises(UserError, match=f"{len(OPTIONS)} failed .*/ smooth: "):
        run_suite(suite, tmp_path / "out", jobs=1, say=said.append)
    for name, (_, named) in OPTIONS.items():
        (refused,) = [line for line in said if f" / {name}: " in line]
        assert refused.startswith(f"made / seed 0 / {name}: failed: ") and "\n" not in refused
        assert named in refused and f"commit {LAST_COMMIT} still has it" in refused
        record = record_of(suite, Cell("made", 0, name), tmp_path / "out")
        assert record is not None and record["status"] == "failed" and named in record["reason"]
    (left_out,) = [table for table in write_tables(suite, tmp_path / "out") if table.name == "left_out"]
    assert [row[2] for row in left_out.rows] == [*OPTIONS]
    # The suite is kept beside its results: what is written there is read back.
    (tmp_path / "again.yaml").write_text(json.dumps(plain(suite)))
    again = load_suite(tmp_path / "again.yaml")
    assert {name: plain(again.methods[name]) for name in retired} == {n: plain(m) for n, m in retired.items()}


@pytest.mark.parametrize("suite", [*shipped("suites"), *sorted((RESULTS / "suites").glob("*.yaml"))], ids=str)
def test_every_suite_parses(suite: str | Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = load_suite(suite)
    assert load_suite(suite).methods == found.methods and cells_of(found)


@pytest.mark.parametrize("store", STORES)
def test_committed_stores_match_cell_by_cell(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    out = RESULTS / store
    records = sorted(out.glob("cells/*/*/*/cell.json"))
    model = read_json(records[0])["options"]["model"]["name"]
    suite = load_suite(RESULTS / "suites" / f"{store}.yaml", [f"--model.name={model}"])
    cells = cells_of(suite)
    scans = {Cell(cell.task, cell.seed, LANDSCAPE) for cell in cells}
    found = [cell for cell in (*cells, *scans) if record_of(suite, cell, out)]
    assert len(found) == len(records)
    retired = [cell for cell in found if isinstance(suite.methods.get(cell.method), RetiredCurve)]
    for cell in retired:  # with the option turned off they would be results of something else
        method = suite.methods[cell.method]
        plain_suite = replace(suite, methods=suite.methods | {cell.method: method.present})
        with pytest.raises(UserError, match="made with other options"):
            record_of(plain_suite, cell, out)
    assert bool(retired) == (store in ("choices", "encoder", "final", "second_screen"))
