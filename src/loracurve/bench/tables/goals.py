"""The goals that methods are judged by, met or missed, from the tables of a suite."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from loracurve.bench.results import CellResult, Results, mean_of, seed_of, shared_seeds, stacked
from loracurve.bench.suite import full_ensemble
from loracurve.bench.tables.landscape import heights
from loracurve.bench.tables.table import Table, Value
from loracurve.inference.intervals import Interval, bootstrap_interval, interval_of, resample_counts, resampled_ece

__all__ = ["MARGIN", "goals"]


MARGIN = 0.01  # nats of test NLL by which the highest point may lie above the worst anchor


def goals(results: Results, equivalents: Table, differences: Table) -> Table:
    """Every method against the ensemble of all anchors, on the data sets that count.

    Args:
        equivalents: deep-ensemble equivalents, with their medians.
        differences: paired differences of detection.
    """
    whole, most = full_ensemble(results.suite), results.suite.anchors
    counting = results.counting
    table = Table(
        "goals",
        f"Goals, on the {results.counted_sets()}",
        [
            *("method", "cost", f"DEE NLL >= {most}", f"DEE Brier >= {most}"),
            *("error AURC, MI", "error AURC, entropy", "OOD AUROC, MI", "OOD AUROC, entropy"),
            *("ACC", "ECE", f"highest NLL <= worst anchor + {MARGIN:g}", "JSD with NLL held"),
        ],
        notes=f"Against {whole}. DEE: the median. Detection, ACC and ECE: met where no data set (and no "
        "out-of-distribution set) has a paired difference whose 95 % interval lies on the worse side; +: how many lie "
        "on the better side, -: on the worse side. Highest NLL: the largest difference over data sets and seeds, "
        "single points on test rows. JSD: pairwise JSD not below the ensemble's and NLL after temperature scaling not "
        "above beyond its interval, on how many data sets; met where on all.",
    )
    medians = {row[2]: row[3:5] for row in equivalents.rows if str(row[0]).startswith("median")}
    for method in [m for m in results.suite.methods if m in medians and m != whole]:
        pairs = [shared_seeds(results.seeds(t, method), results.seeds(t, whole)) for t in counting]
        there = [(t, *pair) for t, pair in zip(counting, pairs, strict=True) if pair[0]]
        row: list[Value] = [method, mean_of([r for _, mine, _ in there for r in mine], "cost")]
        row += [_equivalent(str(median), most) for median in medians[method]]
        for errors, column in ((True, "AURC"), (False, "AUROC")):
            for score in ("MI", "entropy"):
                found = [
                    r[differences.columns.index(column)]
                    for r in differences.rows
                    if r[0] == whole and r[1] in counting and r[2] == method
                    if r[4] == score and (r[3] == "errors") == errors
                ]
                row.append(_tally(found, larger=column == "AUROC"))
        row.append(_tally([_difference(t, a, b, "acc") for t, a, b in there], larger=True))
        row.append(_tally([_ece_difference(t, a, b) for t, a, b in there], larger=False))
        row += [_height(results, method, [t for t, *_ in there]), _diversity(results, method, whole, there)]
        table.rows.append(row)
    return table


def _verdict(met: bool, words: str) -> str:
    return f"{'met' if met else 'missed'}: {words}"


def _equivalent(median: str, most: int) -> str:
    return _verdict(median.startswith(">") or float(median) >= most, median)


def _tally(found: Sequence[Value], larger: bool) -> str | None:
    """How many intervals lie on the better and on the worse side of zero; None where there are none."""
    known = [v for v in found if isinstance(v, Interval) and not math.isnan(v.low)]
    above, below = sum(v.low > 0 for v in known), sum(v.high < 0 for v in known)
    better, worse = (above, below) if larger else (below, above)
    return _verdict(not worse, f"+{better} -{worse} of {len(known)}") if known else None


def _difference(task: str, mine: list[CellResult], other: list[CellResult], measure: str) -> Interval:
    return bootstrap_interval(stacked(mine, measure) - stacked(other, measure), seed_of(task, "comparison"))


def _ece_difference(task: str, mine: list[CellResult], other: list[CellResult]) -> Interval:
    counts = resample_counts(len(mine[0].test), seed_of(task, "test"))
    once = torch.ones(1, counts.shape[1], dtype=torch.float64)

    def mean(done: list[CellResult], rows: Tensor) -> Tensor:
        labels = done[0].predictions.labels["test"]
        return torch.stack([resampled_ece(r.test.confidence, r.test.correct(labels), rows) for r in done]).mean(0)

    return interval_of((mean(mine, once) - mean(other, once)).item(), mean(mine, counts) - mean(other, counts))


def _height(results: Results, method: str, tasks: list[str]) -> str | None:
    found = [h[0] for t in tasks if (h := heights(results, t, method))]
    return _verdict(max(found) <= MARGIN, f"{max(found):+.4f}") if found else None


def _diversity(
    results: Results, method: str, whole: str, there: list[tuple[str, list[CellResult], list[CellResult]]]
) -> str | None:
    held = []
    for task, mine, other in there:
        jsd, least = (results.figure(task, m, "test", "pairwise_jsd") for m in (method, whole))
        if jsd is None or least is None:
            return None
        held.append(jsd >= least and _difference(task, mine, other, "nll_ts").low <= 0)
    return _verdict(all(held), f"{sum(held)} of {len(held)}") if held else None
