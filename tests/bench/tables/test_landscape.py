"""Tables of the landscape: barriers, and heights above the worst anchor."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from helpers.suites import point_nll, record, tables_of

from loracurve.bench.config import LANDSCAPE, SuiteConfig
from loracurve.bench.results import read_results
from loracurve.bench.store import STEPS
from loracurve.bench.suite import Cell
from loracurve.bench.tables.landscape import heights
from loracurve.inference.intervals import Interval


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
