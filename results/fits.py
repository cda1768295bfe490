"""Did a curve fail? Its validation NLL, of the state that training kept, minus the mean of its task's adapters.

python results/fits.py tuned choices_seeds

A fit failed, in the notes, where this is above .05. The two best and the two worst are printed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import fmean

from loracurve.baselines.curve import Curve
from loracurve.bench.results import read_results
from loracurve.bench.shared import anchors_folder
from loracurve.bench.suite import load_suite, method_of
from loracurve.system.files import read_json

FAILED = 0.05
here = Path(__file__).parent
for name in sys.argv[1:]:
    suite = load_suite(here / "suites" / f"{name}.yaml")
    results = read_results(suite, here / name)
    found = []
    for method in suite.methods:
        if not isinstance(method_of(suite, method), Curve):
            continue
        for task in suite.tasks:
            for one in results.seeds(task, method):
                adapters = read_json(anchors_folder(here / name, task, one.record["seed"]) / "anchors.json")
                above = one.record["notes"]["validation_nll"][0] - fmean(adapters["validation_nll"])
                found.append((above, f"{task} / seed {one.record['seed']} / {method}"))
    found.sort()
    print(f"{name}: {len(found)} curves, {sum(above > FAILED for above, _ in found)} failed")
    for above, which in found[:2] + found[-2:]:
        print(f"  {above:+.4f}  {which}")
