"""Detection of errors and of out-of-distribution rows, and paired differences of it, with bootstrap intervals."""

from __future__ import annotations

import math

from loracurve.bench.results import CellResult, Results, references_of, shared_seeds
from loracurve.bench.tables.resampled import FIGURES, mean_over_seeds, resampled, scores_of
from loracurve.bench.tables.table import Table, Value
from loracurve.inference.intervals import Interval

__all__ = ["detection", "detection_differences", "verdicts"]


def detection(results: Results) -> Table:
    """Detection by each score that a method gives (`resampled.SCORES`)."""
    table = Table(
        "detection",
        "Detection of errors and of out-of-distribution rows, means over seeds",
        ["task", "method", "set", "score", "AUROC", "AURC", "AUPR", "FPR95"],
        notes="Positives are errors on test rows, or the rows of the set. W: mutual information within points. AUPR: "
        "as if there were as many positives as negatives. Intervals: 95 % bootstrap over rows.",
    )
    for task, method, done in results.each():
        for where, score in _scores_of(done):
            values: list[Value] = [mean_over_seeds([resampled(r, where, score, "auroc") for r in done])]
            if where == "errors":
                values += [mean_over_seeds([resampled(r, where, score, "aurc") for r in done]), None, None]
            else:
                found = [results.figure(task, method, where, f"{n}_{FIGURES[score]}") for n in ("aupr", "fpr95")]
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
            for where, score in [pair for pair in _scores_of(mine) if pair in _scores_of(other)]:
                values: list[Value] = []
                for measure in ("auroc", "aurc") if where == "errors" else ("auroc",):
                    found = [[resampled(r, where, score, measure) for r in group] for group in (mine, other)]
                    values.append(mean_over_seeds(*found))
                values += [None] * (2 - len(values))
                table.rows.append([reference, task, method, where, score, *values])
    return table


def verdicts(results: Results, differences: Table) -> Table:
    """How often a method detects better or worse than a reference, from the rows of `detection_differences`."""
    table = Table(
        "detection_verdicts",
        "Detection: intervals that exclude zero, on the data sets that count",
        ["reference", "method", "measure", "better", "worse", "undecided"],
        notes="Errors and out-of-distribution sets of every task, by each score, each counted once.",
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
    """Sets and scores."""
    places = ["errors", *(n for n in done[0].predictions.sets if n.startswith("ood:"))]
    return [(where, score) for where in places for score in scores_of(done[0].test)]
