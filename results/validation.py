"""NLL of every method on the validation rows, as they are stored, a column for each task: mean of the seeds.

python results/validation.py second_screen
python results/validation.py curve_tuning --kept    (of the state that training kept, by the points it validated)
"""

from __future__ import annotations

import sys
from pathlib import Path

from loracurve.bench.results import read_results
from loracurve.bench.suite import load_suite
from loracurve.system.escaping import markdown_cell

name, kept = sys.argv[1], "--kept" in sys.argv
here = Path(__file__).parent
suite = load_suite(here / "suites" / f"{name}.yaml")
results = read_results(suite, here / name)
print("method", *map(markdown_cell, suite.tasks), "mean", sep=" | ")
best: dict[str, float] = {}
for method in suite.methods:
    found, means = [], []
    for task in suite.tasks:
        done = results.seeds(task, method)
        each = [r.record["notes"]["validation_nll"][0] if kept else r.figures["validation"]["nll"] for r in done]
        if each:
            means.append(sum(each) / len(each))
            best[task] = min(best.get(task, means[-1]), means[-1])
        found.append(f"{sum(each) / len(each):.4f}" if each else "-")
    found.append(f"{sum(means) / len(means):.4f}" if len(means) == len(suite.tasks) else "-")
    print(markdown_cell(method), *found, sep=" | ")
lowest = [best[task] for task in suite.tasks if task in best]
print("the best of each", *(f"{v:.4f}" for v in lowest), f"{sum(lowest) / len(lowest):.4f}", sep=" | ")
