"""Questions that stored predictions answer, against cells that were run."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.suites import named, tables_of

from loracurve.bench.config import SuiteConfig
from loracurve.bench.results import read_results, stacked
from loracurve.bench.store import STEPS


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
