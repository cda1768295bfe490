"""Suites that several test modules look at; each worker runs them once."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.suites import OPTIONS, anchored, little

from loracurve.baselines.curve import Curve
from loracurve.baselines.ensembles import ConvexMix, Ensemble
from loracurve.baselines.lines import Line
from loracurve.baselines.swag import SWAG
from loracurve.bench.config import SuiteConfig
from loracurve.bench.runner import run_suite
from loracurve.bench.tables.write import write_tables


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[SuiteConfig, Path]:
    folder = tmp_path_factory.mktemp("bench")
    suite = little(folder)
    run_suite(suite, folder / "out", jobs=1)
    write_tables(suite, folder / "out")
    return suite, folder / "out"


@pytest.fixture(scope="session")
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
