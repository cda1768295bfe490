"""The landscape of a suite: barriers between its anchors, figures along its curves, their tables."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from browser import CHROMIUM, Browser
from markupsafe import escape
from test_bench import anchored, little

from loracurve.baselines.curve import Curve
from loracurve.baselines.ensembles import ConvexMix, Ensemble
from loracurve.baselines.lines import Line
from loracurve.baselines.single import Single
from loracurve.baselines.swag import SWAG
from loracurve.bench.anchor_scan import along_curve
from loracurve.bench.config import LANDSCAPE, LandscapeConfig, SuiteConfig
from loracurve.bench.results import Results, read_results, stacked
from loracurve.bench.runner import run_suite
from loracurve.bench.shared import open_shared
from loracurve.bench.store import STEPS
from loracurve.bench.suite import Cell, load_suite
from loracurve.bench.tables.averages import averages
from loracurve.bench.tables.goals import goals
from loracurve.bench.tables.landscape import heights
from loracurve.bench.tables.table import Table, shown
from loracurve.bench.tables.write import write_tables
from loracurve.curve.spec import CurveSpec
from loracurve.inference.intervals import Interval, bootstrap_interval
from loracurve.system.errors import UserError
from loracurve.system.files import read_tensors

OPTIONS = LandscapeConfig(pairs=2, points=3, rows=0, local_rows=8, sharpness=3)


@pytest.fixture(scope="module")
def scanned(tmp_path_factory: pytest.TempPathFactory) -> tuple[SuiteConfig, Path, list[str]]:
    folder = tmp_path_factory.mktemp("landscape")
    methods = {
        "ensemble 3": Ensemble(3),
        "line": Line("straight"),
        "curve": anchored(units=2),
        "free": Curve(units=1),
        "mix": ConvexMix(3),
        "weighted": anchored(units=2, weights="likelihood"),
        "SWAG": SWAG(collect=2, rank=2),
    }
    suite = little(folder, methods=methods, samples=5, seeds=[0, 1], landscape=OPTIONS)
    said: list[str] = []
    run_suite(suite, folder / "out", jobs=1, say=said.append)
    return suite, folder / "out", said


def record(out: Path, method: str, seed: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Cell("made", seed, method).folder(out) / "cell.json").read_text())
    return found


def tables_of(suite: SuiteConfig, out: Path) -> dict[str, Table]:
    return {t.name: t for t in write_tables(suite, out)}


def point_nll(results: Results, method: str, seed: int = 0, split: str = "test") -> torch.Tensor:
    result = results.done[Cell("made", seed, method)]
    labels = result.predictions.labels[split]
    return -result.points(split).double()[:, torch.arange(len(labels)), labels]


def test_a_scan_runs_once_after_the_cells_of_its_task_and_seed(scanned: tuple[SuiteConfig, Path, list[str]]) -> None:
    suite, out, said = scanned
    order = [*suite.methods, "landscape"]
    assert [s.partition(":")[0] for s in said] == [f"made / seed {s} / {m}" for s in (0, 1) for m in order]
    again: list[str] = []
    run_suite(suite, out, jobs=1, say=again.append)
    assert again == []
    with pytest.raises(UserError, match="landscape was made with other options"):
        run_suite(replace(suite, landscape=replace(OPTIONS, points=5)), out, jobs=1)


def test_the_scan_agrees_with_the_line_that_was_predicted(scanned: tuple[SuiteConfig, Path, list[str]]) -> None:
    suite, out, _ = scanned
    profile = pd.read_parquet(Cell("made", 0, LANDSCAPE).folder(out) / "paths.parquet")
    straight = profile[(profile.path == "straight") & (profile.split == "test")]
    results = read_results(suite, out)
    line = point_nll(results, "line")  # the same five points
    assert straight.t.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert straight.nll.tolist() == pytest.approx(line.mean(1).tolist(), abs=0.3 / STEPS)
    # Three points on each piece: t* is its middle, and the excess there a difference of stored predictions.
    by_hand = [line[i] - (line[i - 1] + line[i + 1]) / 2 for i in (1, 3)]
    kept = pd.read_parquet(Cell("made", 0, LANDSCAPE).folder(out) / "excess.parquet")
    for segment, values in enumerate(by_hand):
        rows = kept[(kept.path == "straight") & (kept.segment == segment)]
        assert rows.excess.tolist() == pytest.approx(values.tolist(), abs=1.01 / STEPS)
    other = point_nll(results, "line", seed=1)
    pooled = torch.stack([*by_hand, *(other[i] - (other[i - 1] + other[i + 1]) / 2 for i in (1, 3))]).mean().item()
    table = tables_of(suite, out)["barriers"]
    row = dict(zip(table.columns, table.rows[0], strict=True))
    assert row["pairs"] == 4 and row["test rows"] == 24 and len(table.rows) == 1
    assert isinstance(row["straight"], Interval) and row["straight"].estimate == pytest.approx(pooled, abs=0.3 / STEPS)
    above = [n[i].mean() - max(n[i - 1].mean(), n[i + 1].mean()) for n in (line, other) for i in (1, 3)]
    assert row["straight, above both ends"] == pytest.approx(float(sum(above)) / 4, abs=0.3 / STEPS)
    verdicts = [v["verdict"] for s in (0, 1) for v in record(out, LANDSCAPE, s)["verdicts"]]
    summed = [part.rsplit(" ", 1) for part in str(row["the straight one's barrier"]).split(", ")]
    assert {name: int(count) for name, count in summed} == {v: verdicts.count(v) for v in verdicts}


def test_heights_are_differences_to_the_worst_anchor(scanned: tuple[SuiteConfig, Path, list[str]]) -> None:
    suite, out, _ = scanned
    results = read_results(suite, out)
    found = heights(results, "made", "curve")
    assert found is not None
    plain, chosen = [], []
    for seed in (0, 1):
        curve, anchors = (point_nll(results, m, seed) for m in ("curve", "ensemble 3"))
        plain.append(curve.mean(1).max() - anchors.mean(1).max())
        top, worst = (point_nll(results, m, seed, "validation").mean(1).argmax() for m in ("curve", "ensemble 3"))
        chosen.append((curve[top] - anchors[worst]).mean())
    assert found[0] == pytest.approx(float(max(plain)), abs=1e-9)
    assert found[1].estimate == pytest.approx(float(sum(chosen)) / 2, abs=1e-9)
    assert heights(results, "made", "free") is None and heights(results, "made", "ensemble 3") is None
    table = tables_of(suite, out)["along_curves"]
    assert [row[1] for row in table.rows] == ["line", "curve", "free", "weighted"]
    near = dict(zip(table.columns, table.rows[0], strict=True))["JSD near"]
    probs = [results.done[Cell("made", s, "line")].points("test").double().exp() for s in (0, 1)]

    def entropy(p: torch.Tensor) -> torch.Tensor:
        return -(p * p.log()).sum(-1)

    pairs = []
    for p in probs:
        between, own = entropy((p[1:] + p[:-1]) / 2), entropy(p)
        pairs.append((between - (own[1:] + own[:-1]) / 2).mean().item())
    assert near == pytest.approx(sum(pairs) / 2, abs=1e-7)


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


def named(table: Table, method: str) -> dict[str, Any]:
    (row,) = [r for r in table.rows if r[1] == method]
    return dict(zip(table.columns, row, strict=True))


def test_offline_questions_agree_with_cells_that_were_run(scanned: tuple[SuiteConfig, Path, list[str]]) -> None:
    suite, out, _ = scanned
    tables, results = tables_of(suite, out), read_results(suite, out)
    nll = {name: stacked(results.seeds("made", name), "nll") for name in suite.methods}
    # The curve trained with the same options and averaged with these weights is a cell of its own.
    weighted = named(tables["weighted_points"], "curve")
    assert weighted["NLL weighted"] == pytest.approx(nll["weighted"].mean().item(), abs=0.2 / STEPS)
    assert weighted["weighted minus unweighted"].estimate == pytest.approx(
        (nll["weighted"] - nll["curve"]).mean().item(), abs=0.2 / STEPS
    )
    hull = named(tables["against_discrete"], "curve")
    assert hull["mix of anchors"] == pytest.approx(nll["mix"].mean().item(), abs=0.2 / STEPS)
    assert hull["minus the mix"].estimate == pytest.approx((nll["curve"] - nll["mix"]).mean().item(), abs=0.2 / STEPS)
    assert hull["minus SWAG"].estimate == pytest.approx((nll["curve"] - nll["SWAG"]).mean().item(), abs=1e-9)
    assert hull["anchors' JSD"] == pytest.approx(results.figure("made", "ensemble 3", "test", "pairwise_jsd"), abs=1e-9)
    assert {r[1] for r in tables["against_discrete"].rows} == {"curve", "weighted"}  # a free curve has no anchors


def test_ensembles_of_each_size_end_at_the_whole_one(scanned: tuple[SuiteConfig, Path, list[str]]) -> None:
    suite, out, _ = scanned
    tables, results = tables_of(suite, out), read_results(suite, out)
    assert [r[1] for r in tables["ensembles"].rows] == [*(f"ensemble of {m}" for m in (1, 2, 3)), "SWAG"]
    largest, one = named(tables["ensembles"], "ensemble of 3"), named(tables["ensembles"], "ensemble of 1")
    for column, figure in (("error AUROC, MI", "error_auroc_mi"), ("error AUROC, entropy", "error_auroc_entropy")):
        assert largest[column] == pytest.approx(results.figure("made", "ensemble 3", "test", figure), abs=1e-5)
    assert one["error AUROC, MI"] is None and one["error AUROC, entropy"] is not None
    assert largest["NLL ts"] == pytest.approx(stacked(results.seeds("made", "ensemble 3"), "nll_ts").mean().item())


def test_goals_are_met_or_missed_by_the_tables(
    scanned: tuple[SuiteConfig, Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    suite, out, _ = scanned
    results = read_results(suite, out)
    monkeypatch.setattr(Results, "singles", lambda self, task: (1.0, True))  # so few rows would not count
    medians = Table("", "", [], [["median of those that count", "yes", "curve", "> 3", "2", None, None]])
    columns = ["reference", "task", "method", "set", "score", "AUROC", "AURC"]
    good, bad, open_ = Interval(0.2, 0.1, 0.3), Interval(-0.2, -0.3, -0.1), Interval(0.0, -0.1, 0.1)
    rows: list[Any] = [
        ["ensemble 3", "made", "curve", "errors", "MI", good, good],  # a larger AURC is worse
        ["ensemble 3", "made", "curve", "errors", "entropy", bad, bad],
        ["ensemble 3", "made", "curve", "ood:a", "MI", good, None],
        ["ensemble 3", "made", "curve", "ood:b", "MI", open_, None],
        ["ensemble 3", "made", "curve", "ood:a", "entropy", bad, None],
        ["ensemble 3", "made", "line", "ood:a", "entropy", good, None],
    ]
    table = goals(results, medians, Table("", "", columns, rows))
    (row,) = table.rows
    assert row[:2] == ["curve", 5] and row[2:4] == ["met: > 3", "missed: 2"]
    assert row[4:8] == ["missed: +0 -1 of 1", "met: +1 -0 of 1", "met: +1 -0 of 2", "missed: +0 -1 of 1"]
    height = heights(results, "made", "curve")
    assert height is not None and row[10] == f"{'met' if height[0] <= 0.01 else 'missed'}: {height[0]:+.4f}"
    assert isinstance(row[11], str) and row[11].endswith(("0 of 1", "1 of 1"))


def test_averages_are_means_over_the_sets_that_count_and_differences_paired(
    scanned: tuple[SuiteConfig, Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    suite, out, _ = scanned
    results = read_results(suite, out)
    assert averages(results).rows == [] and averages(results).title.endswith("over the 0 data sets that count")
    monkeypatch.setattr(Results, "singles", lambda self, task: (1.0, True))  # so few rows would not count
    table = averages(results)
    assert table.title.endswith("over the data set that counts")
    rows = {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    curve, whole = rows["curve"], rows["ensemble 3"]
    assert whole["NLL ts minus ensemble 3"] is None and (curve["sets"], curve["seeds"], curve["cost"]) == (1, "2", 5)
    for name, key in (("ACC", "acc"), ("NLL", "nll"), ("ECE ts", "ece_ts"), ("JSD", "pairwise_jsd")):
        assert curve[name] == pytest.approx(results.figure("made", "curve", "test", key))
    mine, other = (stacked(results.seeds("made", n), "nll_ts") for n in ("curve", "ensemble 3"))
    found = curve["NLL ts minus ensemble 3"]
    assert isinstance(found, Interval) and found.estimate == pytest.approx((mine - other).mean().item(), abs=1e-9)
    wanted = bootstrap_interval(mine - other, 0)
    assert found.low == pytest.approx(wanted.low, abs=0.2 * (wanted.high - wanted.low))
    assert found.high == pytest.approx(wanted.high, abs=0.2 * (wanted.high - wanted.low))


def test_the_page_has_the_tables_and_figures(scanned: tuple[SuiteConfig, Path, list[str]]) -> None:
    suite, out, _ = scanned
    tables = write_tables(suite, out, page=True)
    page = (out / "report.html").read_text()
    drawn = {p.stem for p in (out / "figures").glob("*.png")}
    names = (
        "barriers_made",
        "points_made",
        "reliability_made",
        "auroc_detection_of_errors",
        "auroc_detection_of_other_sets",
    )
    assert drawn == {*names, "ensembles_and_one_mode_made", "ensembles_and_curves_made"}
    assert page.count('<img src="data:image/png;base64,') == len(drawn)
    for table in tables:
        if table.name in ("goals", "summary", "barriers", "along_curves", "against_discrete", "weighted_points"):
            assert str(escape(table.title)) in page and str(escape(shown(table.rows[0][-1]))) in page


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_page_opens_without_complaints(scanned: tuple[SuiteConfig, Path, list[str]], tmp_path: Path) -> None:
    suite, out, _ = scanned
    write_tables(suite, out, page=True)
    browser = Browser(str(CHROMIUM), tmp_path)
    try:
        browser.call("Page.navigate", url=(out / "report.html").as_uri())
        browser.until("document.readyState == 'complete' && document.images.length > 0")
        assert browser.run("[...document.images].every(i => i.naturalWidth > 300)")
        assert browser.run(
            "document.documentElement.scrollWidth <= window.innerWidth"
        )  # wide tables scroll on their own
        assert browser.complaints == []
    finally:
        browser.close()


def test_a_scan_that_fails_is_told_and_tried_again(tmp_path: Path) -> None:
    suite = little(tmp_path, methods={"one": Single()})
    run_suite(suite, tmp_path / "out", jobs=1, say=lambda _: None)
    tensors = tmp_path / "out" / "anchors" / "made" / "0" / "anchors.safetensors"
    kept = tensors.read_bytes()
    tensors.unlink()
    asked, said = replace(suite, landscape=replace(OPTIONS, pairs=1)), list[str]()
    run_suite(asked, tmp_path / "out", jobs=1, say=said.append)
    assert len(said) == 1 and "landscape: failed:" in said[0] and "expected a safetensors file, found none" in said[0]
    assert [row[2] for row in tables_of(asked, tmp_path / "out")["left_out"].rows] == ["landscape"]
    assert (tmp_path / "out" / "tables" / "left_out.csv").exists()
    tensors.write_bytes(kept)
    run_suite(asked, tmp_path / "out", jobs=1, retry=True, say=said.append)
    assert len(said) == 2 and "predicted" in said[1]
    assert "barriers" in tables_of(asked, tmp_path / "out") and "left_out" not in tables_of(asked, tmp_path / "out")
    assert not (tmp_path / "out" / "tables" / "left_out.csv").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"landscape": {"pairs": 10}}, "landscape.pairs: expected fewer pairs than anchors, found 10 of 10"),
        ({"landscape": {"pairs": -1}}, "landscape: expected pairs, rows and sharpness >= 0, found -1"),
        ({"landscape": {"points": 2}}, "landscape: expected points >= 3"),
        ({"landscape": {"paths": ["curve"]}}, "landscape.paths: expected some of straight, .*, found curve"),
        ({"methods": {"landscape": {"method": "single"}}}, "too alike for folders"),
    ],
)
def test_faults_in_a_landscape_are_told_in_one_line(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    good = {"model": {"name": "m"}, "tasks": {"sst2": {}}, "methods": {"single": {}}}
    (tmp_path / "s.yaml").write_text(json.dumps(good | changes))
    with pytest.raises(UserError, match=message) as caught:
        load_suite(tmp_path / "s.yaml")
    assert "\n" not in str(caught.value)
