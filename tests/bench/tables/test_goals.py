"""Which goals the tables meet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loracurve.bench.config import SuiteConfig
from loracurve.bench.results import Results, read_results
from loracurve.bench.tables.goals import goals
from loracurve.bench.tables.landscape import heights
from loracurve.bench.tables.table import Table
from loracurve.inference.intervals import Interval


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
