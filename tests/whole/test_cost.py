"""GPU hours of a full run, against numbers by hand."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
from helpers.places import ROOT

from loracurve.bench.suite import load_suite

BENCHMARKS = ROOT / "benchmarks"
MEASURED: dict[str, Any] = {
    "step/1 adapter": {"ms": 100.0, "peak_gib": 1.0},
    "step/1 adapter, 384 tokens": {"ms": 300.0, "peak_gib": 1.0},
    "step/10 adapters": {"ms": 500.0, "peak_gib": 2.0},
    "step/3 adapters": {"ms": 200.0, "peak_gib": 2.0},
    "step/curve of 2 segments": {"ms": 150.0, "peak_gib": 1.0},
    "evaluation": {"tokens_per_s": 1000.0, "points_per_s": 10.0},
}
LENGTHS: dict[str, Any] = {
    "row_tokens": {"1": 256.0, "3": 128.0, "10": 128.0},
    "sets": {"validation": {"rows": 3, "tokens": 100}, "test": {"rows": 9, "tokens": 260}},
}


@pytest.fixture
def cost(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import cost

    return cost


def test_hours_of_the_paper_suite(cost: ModuleType) -> None:
    suite = load_suite("paper")  # 10,000 steps of 4 micro-batches, ten validations
    lengths = dict.fromkeys(suite.tasks, LENGTHS)
    hours = {name: by["sst2"] for name, by in cost.hours(suite, cost.Times(MEASURED, 128), lengths).items()}
    predicted = 360 / 1000
    seconds = {
        "10 anchors, shared": 10_000 * 4 * 0.5 + 10 * 10 * 0.1,
        "single": predicted,
        "ensemble 5": 5 * predicted,
        "single, last step": 10_000 * 4 * 0.2 + 10 * 0.1 + predicted,
        "ensemble 3, five units": 16_667 * 4 * 0.2 + 10 * 3 * 0.1 + 3 * predicted,
        "anchored": 10_000 * 4 * 0.3 + 10 * 7 * 0.1 + 10 * predicted,
        "free": 25_000 * 4 * 0.3 + 10 * 7 * 0.1 + 10 * predicted,
    }
    for name, expected in seconds.items():
        assert hours[name] == pytest.approx(expected / 3600), name
    assert hours["Laplace"] is None and hours["SWAG"] is None, "what was not measured has no hours"


def test_every_kind_of_step_of_the_paper_suite_has_a_name(cost: ModuleType) -> None:
    suite = load_suite("paper")
    kinds = {name: cost.work_of(suite, "sst2", method).kind for name, method in suite.methods.items()}
    assert kinds["anchored, flat and JSD"] == "curve of 2 segments, flat_lora, hinge"
    assert kinds["anchored, one segment"] == kinds["free, one segment"] == "curve of 1 segment"
    untrained = {"single", "single, temperature", "ensemble 3", "ensemble 5", "ensemble 10", "convex mix 3"}
    assert {n for n, k in kinds.items() if k is None} == untrained | {"straight line", "aligned line", "Delta W line"}
