"""Detection of other sets, as a suite's store has it: mean AUROC over all of them, and how often a reference is beaten.

python results/detection.py final "ensemble 3, five units"

Takes some minutes, because every interval is resampled.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd

from loracurve.bench.results import read_results
from loracurve.bench.suite import load_suite
from loracurve.bench.tables.detection import detection, detection_differences
from loracurve.inference.intervals import Interval

name, reference = sys.argv[1:]
here = Path(__file__).parent
results = read_results(load_suite(here / "suites" / f"{name}.yaml"), here / name)
results = replace(results, suite=replace(results.suite, references=[reference]))
auroc = pd.DataFrame(
    [
        (score, method, found.estimate)
        for _, method, place, score, found, *_ in detection(results).rows
        if place != "errors" and isinstance(found, Interval)
    ],
    columns=["score", "method", "AUROC"],
)
print(auroc.groupby(["score", "method"], sort=False)["AUROC"].agg(["mean", "count"]).round(3).to_string())
paired = pd.DataFrame(
    [
        (score, method, found.low > 0, found.high < 0)
        for _, _, method, place, score, found, _ in detection_differences(results).rows
        if place != "errors" and isinstance(found, Interval)
    ],
    columns=["score", "method", "better", "worse"],
)
print(f"\nagainst {reference}")
print(paired.groupby(["score", "method"], sort=False)[["better", "worse"]].sum().to_string())
