"""Averages over data sets."""

from __future__ import annotations

from pathlib import Path

import pytest

from loracurve.bench.config import SuiteConfig
from loracurve.bench.results import Results, read_results, stacked
from loracurve.bench.tables.averages import averages, differences
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


def test_differences_of_means_know_of_rows_seeds_and_sets(
    scanned: tuple[SuiteConfig, Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    suite, out, _ = scanned
    results = read_results(suite, out)
    assert differences(results).rows == []
    monkeypatch.setattr(Results, "singles", lambda self, task: (1.0, True))
    table = differences(results)
    rows = {(row[1], row[2]): dict(zip(table.columns, row, strict=True)) for row in table.rows}
    found = rows["nll_ts", "curve"]
    wanted = {r[0]: r[-1] for r in averages(results).rows}["curve"]
    assert found["difference, rows drawn"] == wanted and found["sets too"] is None and found["sets"] == 1
    seeds = found["seeds too"]
    assert isinstance(seeds, Interval) and isinstance(wanted, Interval)
    assert seeds.estimate == wanted.estimate and found["better on"] == f"{int(wanted.estimate < 0)} of 1"
    # Whole seeds are drawn: the interval is at least as wide as the seeds lie apart, and wider than that of rows alone.
    mine, other = (results.seeds("made", n) for n in ("curve", "ensemble 3"))
    each = [(a.per_example["nll_ts"] - b.per_example["nll_ts"]).mean().item() for a, b in zip(mine, other, strict=True)]
    assert seeds.high - seeds.low > max(wanted.high - wanted.low, abs(each[0] - each[1]))
    assert all(0 < row["p"] <= row["p Holm"] <= 1 for row in rows.values())  # type: ignore[operator]
    assert {m for m, _ in rows} == {"nll_ts", "nll", "brier_ts", "acc"}
