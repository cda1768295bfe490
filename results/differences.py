"""Paired difference of two methods in NLL, over the sets that count, as they are stored.

    python results/differences.py final "free, 4 segments" "ensemble 3, five units" --without mrpc
    python results/differences.py minilm curve "ensemble 10" --own mrpc minilm_own_rate "curve, 2.5e-4"

On the seeds that both have, after temperature scaling (`--measure nll`: before it); the 95 % intervals resample rows,
rows and seeds, and rows, seeds and sets, as in the table `differences`. `--own`: on this set the first method is
another one, of another suite.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from loracurve.bench.results import Results, read_results, shared_seeds
from loracurve.bench.suite import load_suite
from loracurve.bench.tables.averages import Pair, resampled
from loracurve.bench.tables.resampled import over_groups
from loracurve.inference.intervals import Interval, interval_of

HERE = Path(__file__).parent


def stored(name: str) -> Results:
    return read_results(load_suite(HERE / "suites" / f"{name}.yaml"), HERE / name)


def shown(interval: Interval) -> str:
    return f"{interval.estimate:.4f} [{interval.low:.4f}, {interval.high:.4f}]"


def line(pairs: list[Pair], measure: str) -> str:
    estimates, rows, seeds = resampled(pairs, measure)
    mean = estimates.mean().item()
    found = f"rows {shown(interval_of(mean, rows.mean(0)))}, seeds too {shown(interval_of(mean, seeds.mean(0)))}"
    if len(pairs) > 1:
        sets = interval_of(mean, over_groups(seeds, [task for task, *_ in pairs]))
        found += f", sets too {shown(sets)}, lower on {int((estimates < 0).sum())} of {len(pairs)}"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite")
    parser.add_argument("one")
    parser.add_argument("other")
    parser.add_argument("--without", nargs="+", default=[], metavar="SET")
    parser.add_argument("--own", nargs=3, action="append", default=[], metavar=("SET", "SUITE", "METHOD"))
    parser.add_argument("--measure", choices=["nll_ts", "nll"], default="nll_ts")
    options = parser.parse_args()
    results = {name: stored(name) for name in {options.suite, *(suite for _, suite, _ in options.own)}}
    own = {task: (suite, method) for task, suite, method in options.own}
    pairs: list[Pair] = []
    for task in results[options.suite].counting:
        suite, method = own.get(task, (options.suite, options.one))
        mine = results[suite].seeds(task, method)
        shared = shared_seeds(mine, results[options.suite].seeds(task, options.other))
        if task not in options.without and shared[0]:
            pairs.append((task, *shared))
    print(f"{len(pairs)} sets: {line(pairs, options.measure)}")
    for pair in pairs:
        print(f"{pair[0]}, {len(pair[1])} seeds: {line([pair], options.measure)}")


if __name__ == "__main__":
    main()
