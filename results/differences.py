"""Paired difference of two methods in NLL after temperature scaling, over the sets that count, as they are stored.

    python results/differences.py final "free, 4 segments" "ensemble 3, five units" [SET TO LEAVE OUT ...]

On the seeds that both have; the 95 % interval resamples the rows of every set, as in the table `averages`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from loracurve.bench.results import read_results, shared_seeds
from loracurve.bench.suite import load_suite
from loracurve.bench.tables.averages import mean_difference

name, one, other, *left_out = sys.argv[1:]
here = Path(__file__).parent
results = read_results(load_suite(here / "suites" / f"{name}.yaml"), here / name)
counting = [t for t in results.counting if t not in left_out]
pairs = [(t, *shared_seeds(results.seeds(t, one), results.seeds(t, other))) for t in counting]
pairs = [p for p in pairs if p[1]]
print(f"{len(pairs)} sets: {mean_difference(pairs)}")
for pair in pairs:
    print(f"{pair[0]}, seeds {len(pair[1])}: {mean_difference([pair])}")
