"""Averages over data sets."""

from __future__ import annotations

from pathlib import Path

import pytest

from loracurve.bench.config import SuiteConfig
from loracurve.bench.results import Results, read_results, stacked
from loracurve.bench.tables.averages import averages
from loracurve.inference.intervals import Interval, bootstrap_interval


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
