"""NLL of every method on the validation rows, as they are stored, a column for each task: mean of the seeds.

python results/validation.py second_screen
"""

from __future__ import annotations

import sys
from pathlib import Path

from loracurve.bench.results import read_results
from loracurve.bench.suite import load_suite
from loracurve.system.escaping import markdown_cell

name = sys.argv[1]
here = Path(__file__).parent
suite = load_suite(here / "suites" / f"{name}.yaml")
results = read_results(suite, here / name)
print("method", *map(markdown_cell, suite.tasks), sep=" | ")
for method in suite.methods:
    found = []
    for task in suite.tasks:
        each = [r.figures["validation"]["nll"] for r in results.seeds(task, method)]
        found.append(f"{sum(each) / len(each):.4f}" if each else "-")
    print(markdown_cell(method), *found, sep=" | ")
