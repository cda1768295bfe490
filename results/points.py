"""Quality against passes: NLL after a temperature of averages of 3, 5 and 10 stored points of a curve, and of adapters.

    python results/points.py tuned curve "ensemble 10" ["another method of ten points" ...]

A prediction takes a pass for each point. Of ten evenly spaced points those are taken that lie nearest to the middles of
3 or 5 equal parts of the curve; where two are as near, both sides are tried and the mean is shown (of adapters: the
same places, any would do). Mean of the sets that count, each the mean of the seeds that all the methods have.
Differences to as many and to ten of the last method have 95 % intervals over rows and seeds.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from loracurve.bench.results import CellResult, read_results
from loracurve.bench.statistics import tempered_average
from loracurve.bench.suite import load_suite
from loracurve.bench.tables.resampled import means_over_rows, over_seeds
from loracurve.bench.tables.table import shown
from loracurve.inference.information import negative_log_likelihood
from loracurve.inference.intervals import Interval, interval_of

TAKEN = {3: ((1, 4, 7), (2, 5, 8)), 5: ((1, 3, 4, 6, 8), (1, 3, 5, 6, 8)), 10: (tuple(range(10)),)}


def tempered_nll(cell: CellResult, count: int) -> Tensor:
    """[E] NLL of the test rows, the mean of both ways to take the points."""
    labels = cell.predictions.labels
    found = []
    for taken in map(list, TAKEN[count]):
        validation, test = (cell.points(name)[taken] for name in ("validation", "test"))
        average = tempered_average(validation, labels["validation"], test)
        found.append(negative_log_likelihood(average, labels["test"]))
    return torch.stack(found).mean(0)


@dataclass(frozen=True)
class Quality:
    """A method with so many of its points."""

    method: str
    count: int
    nll: float
    """after a temperature, mean of the sets"""
    against: dict[int, Interval]
    """minus so many of the last method"""


def quality(name: str, methods: list[str]) -> tuple[list[Quality], list[int]]:
    """All methods with 3, 5 and 10 points, and how many seeds each set has."""
    here = Path(__file__).parent
    results = read_results(load_suite(here / "suites" / f"{name}.yaml"), here / name)
    scores: dict[tuple[str, int], list[Tensor]] = {}  # a tensor [seeds, rows] for each set
    tasks = []
    for task in results.counting:
        by_seed = [{r.cell.seed: r for r in results.seeds(task, method)} for method in methods]
        seeds = sorted(set.intersection(*(set(found) for found in by_seed)))
        if not seeds:
            continue
        tasks.append(task)
        for method, found in zip(methods, by_seed, strict=True):
            for count in TAKEN:
                scores.setdefault((method, count), []).append(
                    torch.stack([tempered_nll(found[s], count) for s in seeds])
                )
    rival, out = methods[-1], []
    for (method, count), mine in scores.items():
        against = {}
        for other in {count, 10} - ({count} if method == rival else set()):
            each = [a - b for a, b in zip(mine, scores[rival, other], strict=True)]
            drawn = [over_seeds(means_over_rows(d, t)) for t, d in zip(tasks, each, strict=True)]
            estimate = sum(float(d.mean()) for d in each) / len(each)
            against[other] = interval_of(estimate, torch.stack(drawn).mean(0))
        out.append(Quality(method, count, sum(float(x.mean()) for x in mine) / len(mine), against))
    return out, [len(x) for x in scores[rival, 10]]


def main(name: str, methods: list[str]) -> None:
    found, seeds = quality(name, methods)
    print(f"{len(seeds)} sets, seeds {' '.join(map(str, seeds))}")
    print("method", "passes", "NLL ts", f"minus as many of {methods[-1]}", f"minus ten of {methods[-1]}", sep=" | ")
    for q in found:
        differences = [shown(q.against[other]) if other in q.against else "-" for other in (q.count, 10)]
        print(q.method, q.count, f"{q.nll:.4f}", *differences, sep=" | ")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
