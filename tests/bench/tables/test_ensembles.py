"""Ensembles of each size, made of stored anchors."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.suites import anchored, little, named, tables_of

from loracurve.baselines.ensembles import Ensemble
from loracurve.baselines.single import Single
from loracurve.baselines.unknowns import LaplaceCurve
from loracurve.bench.config import SuiteConfig
from loracurve.bench.results import read_results, stacked
from loracurve.bench.runner import run_suite
from loracurve.bench.tables.write import write_tables


def test_ensembles_of_each_size_end_at_the_whole_one(scanned: tuple[SuiteConfig, Path, list[str]]) -> None:
    suite, out, _ = scanned
    tables, results = tables_of(suite, out), read_results(suite, out)
    assert [r[1] for r in tables["ensembles"].rows] == [*(f"ensemble of {m}" for m in (1, 2, 3)), "SWAG"]
    largest, one = named(tables["ensembles"], "ensemble of 3"), named(tables["ensembles"], "ensemble of 1")
    for column, figure in (("error AUROC, MI", "error_auroc_mi"), ("error AUROC, entropy", "error_auroc_entropy")):
        assert largest[column] == pytest.approx(results.figure("made", "ensemble 3", "test", figure), abs=1e-5)
    assert one["error AUROC, MI"] is None and one["error AUROC, entropy"] is not None
    assert largest["NLL ts"] == pytest.approx(stacked(results.seeds("made", "ensemble 3"), "nll_ts").mean().item())


def test_of_many_classes_averages_make_all_tables_but_those_of_points(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("store", "results"):
        monkeypatch.setattr(f"loracurve.bench.{module}.WIDE", 1)
    methods = {
        "one": Single(),
        "ensemble 3": Ensemble(3),
        "curve": anchored(units=2),
        "Gaussian": LaplaceCurve(of=Single()),
    }
    suite = little(tmp_path, methods=methods)
    run_suite(suite, tmp_path / "out", jobs=1)
    write_tables(suite, tmp_path / "out", page=True)
    tables, results = tables_of(suite, tmp_path / "out"), read_results(suite, tmp_path / "out")
    assert not any(result.keeps_points for result in results.done.values() if result.record["passes"] > 1)
    assert {"ensembles", "deep_ensemble_equivalents", "against_discrete", "along_curves"}.isdisjoint(tables)
    (row,) = tables["data_sets"].rows
    assert row[3] == pytest.approx(results.figure("made", "one", "test", "acc"))
    scored = {(row[0], row[1]) for row in tables["foreign"].rows}
    assert ("Gaussian", "W") in scored
    assert scored.isdisjoint({("curve", "W"), ("ensemble 3", "W"), ("one", "W")})
