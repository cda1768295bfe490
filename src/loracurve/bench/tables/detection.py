"""Detection of errors and of out-of-distribution rows, and paired differences of it, with bootstrap intervals."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from loracurve.bench.results import CellResult, Results, references_of, seed_of, shared_seeds
from loracurve.bench.tables.table import Table, Value
from loracurve.inference import metrics
from loracurve.inference.intervals import Interval, interval_of, resample_counts, resampled_aurc, resampled_auroc

__all__ = ["detection", "detection_differences", "verdicts"]


_SCORES = {"MI": "mutual_information", "entropy": "entropy"}

_KEYS = {"MI": "mi", "entropy": "entropy"}

Resampled = tuple[float | None, Tensor]


def detection(results: Results) -> Table:
    """Detection by mutual information and by entropy."""
    table = Table(
        "detection",
        "Detection of errors and of out-of-distribution rows, means over seeds",
        ["task", "method", "set", "score", "AUROC", "AURC", "AUPR", "FPR95"],
        notes="Positives are errors on test rows, or the rows of the set. Intervals: 95 % bootstrap over rows.",
    )
    for task, method, done in results.each():
        for where, score in _scores_of(done):
            values: list[Value] = [_mean([_resampled(r, where, score, "auroc") for r in done])]
            if where == "errors":
                values += [_mean([_resampled(r, where, score, "aurc") for r in done]), None, None]
            else:
                found = [results.figure(task, method, where, f"{n}_{_KEYS[score]}") for n in ("aupr", "fpr95")]
                values += [None, *found]
            table.rows.append([task, method, where, score, *values])
    return table


def detection_differences(results: Results) -> Table:
    """Paired differences of AUROC and AURC to the references."""
    table = Table(
        "detection_differences",
        "Detection: method minus reference, means over seeds",
        ["reference", "task", "method", "set", "score", "AUROC", "AURC"],
        notes="Positive AUROC and negative AURC: the method is better. 95 % paired bootstrap intervals over rows.",
    )
    for reference in references_of(results.suite):
        for task, method, done in results.each():
            mine, other = shared_seeds(done, results.seeds(task, reference))
            if method == reference or not mine:
                continue
            for where, score in _scores_of(mine):
                values: list[Value] = []
                for measure in ("auroc", "aurc") if where == "errors" else ("auroc",):
                    found = [[_resampled(r, where, score, measure) for r in group] for group in (mine, other)]
                    values.append(_mean(*found))
                values += [None] * (2 - len(values))
                table.rows.append([reference, task, method, where, score, *values])
    return table


def verdicts(results: Results, differences: Table) -> Table:
    """How often a method detects better or worse than a reference, from the rows of `detection_differences`."""
    table = Table(
        "detection_verdicts",
        "Detection: intervals that exclude zero, on the data sets that count",
        ["reference", "method", "measure", "better", "worse", "undecided"],
        notes="Errors and out-of-distribution sets of every task, by MI and by entropy, each counted once.",
    )
    counting = results.counting
    tallies: dict[tuple[Value, Value, str], list[int]] = {}
    for reference, task, method, _, _, *found in differences.rows:
        for measure, value in zip(("AUROC", "AURC"), found, strict=True):
            if task in counting and isinstance(value, Interval):
                tally = tallies.setdefault((reference, method, measure), [0, 0, 0])
                better = (value.estimate > 0) == (measure == "AUROC")
                told_apart = value.distinguishable and not math.isnan(value.low)
                tally[(0 if better else 1) if told_apart else 2] += 1
    table.rows = [[*key, *tally] for key, tally in tallies.items()]
    return table


def _scores_of(done: list[CellResult]) -> list[tuple[str, str]]:
    """Sets and scores: one distribution has no mutual information."""
    scores = [s for s in _SCORES if s == "entropy" or len(done[0].test.weights) > 1]
    return [(w, s) for w in ["errors", *(n for n in done[0].predictions.sets if n.startswith("ood:"))] for s in scores]


def _resampled(result: CellResult, where: str, score: str, measure: str) -> Resampled:
    """A measure of a cell and its values over resamples, which are the same for all methods and seeds."""
    key = (where, score, measure)
    if key not in result.resampled:
        result.resampled[key] = _resample(result, *key)
    return result.resampled[key]


def _resample(result: CellResult, where: str, score: str, measure: str) -> Resampled:
    test, task = result.test, result.cell.task
    scores, counts = getattr(test, _SCORES[score]), _counts(task, "test", len(test))
    if where == "errors":
        positive = ~test.correct(result.predictions.labels["test"])
    else:
        other = result.predictions.sets[where]
        scores = torch.cat([scores, getattr(other, _SCORES[score])])
        positive = torch.cat([torch.zeros(len(test)), torch.ones(len(other))]).bool()
        counts = torch.cat([counts, _counts(task, where, len(other))], dim=1)
    if measure == "aurc":
        return metrics.aurc(scores, positive), resampled_aurc(scores, positive, counts)
    return metrics.auroc(scores, positive).value, resampled_auroc(scores, positive, counts)


@lru_cache(maxsize=8)
def _counts(task: str, where: str, examples: int) -> Tensor:
    return resample_counts(examples, seed_of(task, where))


def _mean(found: list[Resampled], minus: list[Resampled] | None = None) -> Interval | None:
    """Mean over seeds, or mean difference, with its interval; None where a seed leaves it undefined."""
    estimates = [e for e, _ in found]
    values = torch.stack([v for _, v in found]).mean(0)
    if minus is not None:
        others = [e for e, _ in minus]
        estimates = [None if a is None or b is None else a - b for a, b in zip(estimates, others, strict=True)]
        values = values - torch.stack([v for _, v in minus]).mean(0)
    known = [e for e in estimates if e is not None]
    return interval_of(sum(known) / len(known), values) if len(known) == len(estimates) else None
