"""Verdicts on detecting errors and other sets."""

from __future__ import annotations

import math
from types import SimpleNamespace

from loracurve.bench.results import Results
from loracurve.bench.tables.detection import verdicts
from loracurve.bench.tables.table import Table
from loracurve.inference.intervals import Interval


def test_verdicts_count_intervals_on_the_sets_that_count() -> None:
    class Judged(Results):
        def singles(self, task: str) -> tuple[float, bool]:
            return 0.9, task == "a"

    up, down, none, unknown = Interval(1, 0.5, 2), Interval(-1, -2, -0.5), Interval(1, -1, 2), Interval(1, math.nan, 1)
    differences = Table("d", "", [])
    differences.rows = [
        ["ref", "a", "curve", "errors", "MI", up, down],
        ["ref", "a", "curve", "errors", "entropy", down, none],
        ["ref", "a", "curve", "ood:x", "MI", unknown, None],
        ["ref", "b", "curve", "errors", "MI", up, up],
    ]
    judged = Judged(SimpleNamespace(tasks={"a": 0, "b": 0}), {}, {}, [])  # type: ignore[arg-type]
    found = verdicts(judged, differences)
    assert found.rows == [["ref", "curve", "AUROC", 1, 1, 1], ["ref", "curve", "AURC", 1, 0, 1]]
