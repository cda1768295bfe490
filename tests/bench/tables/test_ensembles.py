"""Ensembles of each size, made of stored anchors."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.suites import named, tables_of

from loracurve.bench.config import SuiteConfig
from loracurve.bench.results import read_results, stacked


def test_ensembles_of_each_size_end_at_the_whole_one(scanned: tuple[SuiteConfig, Path, list[str]]) -> None:
    suite, out, _ = scanned
    tables, results = tables_of(suite, out), read_results(suite, out)
    assert [r[1] for r in tables["ensembles"].rows] == [*(f"ensemble of {m}" for m in (1, 2, 3)), "SWAG"]
    largest, one = named(tables["ensembles"], "ensemble of 3"), named(tables["ensembles"], "ensemble of 1")
    for column, figure in (("error AUROC, MI", "error_auroc_mi"), ("error AUROC, entropy", "error_auroc_entropy")):
        assert largest[column] == pytest.approx(results.figure("made", "ensemble 3", "test", figure), abs=1e-5)
    assert one["error AUROC, MI"] is None and one["error AUROC, entropy"] is not None
    assert largest["NLL ts"] == pytest.approx(stacked(results.seeds("made", "ensemble 3"), "nll_ts").mean().item())
