"""One line for each method: means over the data sets that count."""

from __future__ import annotations

import torch
from torch import Tensor

from loracurve.bench.results import CellResult, Results, mean_of, seed_of, shared_seeds, stacked
from loracurve.bench.statistics import mean_or_none
from loracurve.bench.suite import full_ensemble
from loracurve.bench.tables.table import Table
from loracurve.inference.intervals import Interval, interval_of, resample_counts

__all__ = ["averages", "mean_difference"]


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


def mean_difference(pairs: list[tuple[str, list[CellResult], list[CellResult]]]) -> Interval | None:
    """Mean over sets of the difference in NLL after temperature scaling, with an interval over their rows."""
    if not pairs:
        return None
    estimates, resampled = [], []
    for task, mine, other in pairs:
        values: Tensor = stacked(mine, "nll_ts") - stacked(other, "nll_ts")
        counts = resample_counts(len(values), seed_of(task, "averages"))
        estimates.append(values.double().mean())
        resampled.append(counts @ values.double() / len(values))
    return interval_of(torch.stack(estimates).mean().item(), torch.stack(resampled).mean(0))
