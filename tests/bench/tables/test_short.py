"""What one reads of a suite in ten seconds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from helpers.suites import tables_of

from loracurve.bench.config import SuiteConfig
from loracurve.bench.results import Results, read_results
from loracurve.bench.tables.short import short
from loracurve.inference.intervals import Interval


def test_the_first_curve_against_the_first_reference(
    scanned: tuple[SuiteConfig, Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    suite, out, _ = scanned
    monkeypatch.setattr(Results, "singles", lambda self, task: (1.0, True))  # so few rows would not count
    results, named = read_results(suite, out), tables_of(suite, out)
    block = short(results, named)
    columns = named["differences"].columns
    rows = {(r[1], r[2]): r[columns.index("seeds too")] for r in named["differences"].rows if r[0] == "ensemble 3"}
    found = rows["nll_ts", "curve"]
    assert isinstance(found, Interval)
    words = "cannot be told from"
    if found.distinguishable:
        words = "is better than" if found.estimate < 0 else "is worse than"
    (said,) = block.findings
    assert said.startswith("“curve” (") and f") {words} “ensemble 3” (3 passes" in said
    assert "training worth 5 fine-tunes" in said and ", on 1 data set." in said
    assert said.endswith(" This is not at equal cost: an answer takes 5 passes against 3.")
    expected = [rows[m, "curve"] for m in ("nll_ts", "acc", "brier_ts")]
    assert [Interval(**tile.found) for tile in block.tiles] == expected
    ((name, caption, drawn),) = block.figures
    labels = [t.get_text() for t in drawn.axes[0].get_yticklabels()]
    assert name == "differences" and "ensemble 3" in caption
    assert labels == [m for measure, m in rows if measure == "nll_ts"]


def test_suites_without_a_verdict(scanned: tuple[SuiteConfig, Path, list[str]]) -> None:
    suite, out, _ = scanned
    block = short(read_results(suite, out), tables_of(suite, out))
    assert block.notes == ["No verdict on curve against ensemble 3 yet: no data set counts."]
    assert not (block.findings or block.tiles or block.figures)
    none = replace(suite, methods={n: m for n, m in suite.methods.items() if n in ("ensemble 3", "line", "mix")})
    assert short(read_results(none, out), tables_of(none, out)).empty
