"""Means over the data sets that count, and differences of them to the references."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loracurve.bench.results import CellResult, Results, mean_of, references_of, shared_seeds
from loracurve.bench.statistics import holm, mean_or_none, two_sided
from loracurve.bench.suite import full_ensemble
from loracurve.bench.tables.resampled import means_over_rows, over_groups, over_seeds
from loracurve.bench.tables.table import Table, Value
from loracurve.inference.intervals import Interval, interval_of

__all__ = ["Pair", "averages", "differences", "mean_difference", "resampled"]

Pair = tuple[str, list[CellResult], list[CellResult]]
"""A task, and cells of two methods with the same seeds."""


_FIGURES = {"ACC": "acc", "NLL": "nll", "NLL ts": "nll_ts", "ECE": "ece", "ECE ts": "ece_ts", "JSD": "pairwise_jsd"}


def averages(results: Results) -> Table:
    """Figures of the test rows, averaged over seeds and then over data sets, each of which weighs the same.

    The difference to the ensemble of all anchors is paired and on the seeds that both have; its interval resamples the
    rows of every set and knows nothing of the choice of sets and seeds.
    """
    whole, counting = full_ensemble(results.suite), results.counting
    table = Table(
        "averages",
        f"Test rows, means over the {results.counted_sets()}",
        ["method", "sets", "seeds", "cost", *_FIGURES, f"NLL ts minus {whole}"],
        notes="NLL in nats; ts: after temperature scaling, T from validation rows. Methods with other sets or fewer "
        "seeds do not compare by their means; the last column compares on the same ones.",
    )
    for method in dict.fromkeys([*results.suite.methods, whole]):
        there = [(t, done) for t in counting if (done := results.seeds(t, method))]
        if not there:
            continue
        means = [mean_or_none([results.figure(t, method, "test", n) for t, _ in there]) for n in _FIGURES.values()]
        pairs = [(t, *shared_seeds(done, results.seeds(t, whole))) for t, done in there]
        difference = mean_difference([p for p in pairs if p[1]]) if method != whole else None
        seeds = "-".join(str(n) for n in sorted({min(len(d) for _, d in there), max(len(d) for _, d in there)}))
        cost = mean_of([r for _, done in there for r in done], "cost")
        table.rows.append([method, len(there), seeds, cost, *means, difference])
    return table


def mean_difference(pairs: Sequence[Pair]) -> Interval | None:
    """Mean over sets of the difference in NLL after temperature scaling, with an interval over their rows."""
    if not pairs:
        return None
    estimates, rows, _ = resampled(pairs, "nll_ts")
    return interval_of(estimates.mean().item(), rows.mean(0))


def differences(results: Results) -> Table:
    """Differences of the means over data sets to the references, with intervals that know of rows, of seeds too, and of
    the choice of data sets too."""
    table = Table(
        "differences",
        f"Method minus reference, means over the {results.counted_sets()}",
        [
            *("reference", "measure", "method", "sets", "difference, rows drawn", "seeds too", "sets too"),
            *("better on", "p", "p Holm"),
        ],
        notes="Negative NLL and Brier, positive ACC: the method is better. Intervals: 95 % bootstrap over rows; over "
        "seeds and rows; over sets, seeds and rows. better on: sets with the better estimate. p: two-sided, from the "
        "resamples of seeds and rows; Holm's correction over the methods of one reference and measure.",
    )
    for reference in references_of(results.suite):
        for measure in ("nll_ts", "nll", "brier_ts", "acc"):
            rows, p_values = [], []
            for method in dict.fromkeys(m for _, m, _ in results.each() if m != reference):
                pairs = [
                    (t, *shared_seeds(results.seeds(t, method), results.seeds(t, reference))) for t in results.counting
                ]
                pairs = [p for p in pairs if p[1]]
                if not pairs:
                    continue
                estimates, of_rows, of_seeds = resampled(pairs, measure)
                mean = estimates.mean().item()
                tasks = [t for t, *_ in pairs]
                sets = interval_of(mean, over_groups(of_seeds, tasks)) if len(tasks) > 1 else None
                better = int(((estimates > 0) if measure == "acc" else (estimates < 0)).sum())
                values: list[Value] = [len(tasks), interval_of(mean, of_rows.mean(0))]
                values += [interval_of(mean, of_seeds.mean(0)), sets, f"{better} of {len(tasks)}"]
                rows.append([reference, measure, method, *values])
                p_values.append(two_sided(of_seeds.mean(0)))
            for row, p, corrected in zip(rows, p_values, holm(p_values), strict=True):
                table.rows.append([*row, p, corrected])
    return table


def resampled(pairs: Sequence[Pair], measure: str) -> tuple[Tensor, Tensor, Tensor]:
    """Mean differences over seeds and rows ``[P]``, and over resamples ``[P, R]`` of rows, and of seeds and rows."""
    estimates, of_rows, of_seeds = [], [], []
    for task, mine, other in pairs:
        values = torch.stack(
            [a.per_example[measure] - b.per_example[measure] for a, b in zip(mine, other, strict=True)]
        ).double()
        each = means_over_rows(values, task)
        estimates.append(values.mean())
        of_rows.append(each.mean(0))
        of_seeds.append(over_seeds(each))
    return torch.stack(estimates), torch.stack(of_rows), torch.stack(of_seeds)
