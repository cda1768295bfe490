"""How good a suite's methods are on test rows: accuracy, likelihood, calibration, uncertainty."""

from __future__ import annotations

from loracurve.bench.results import Results, mean_of, seed_of, stacked
from loracurve.bench.tables.table import Table, Value
from loracurve.inference.intervals import bootstrap_interval

__all__ = ["seeds", "shift", "summary", "uncertainty"]


def summary(results: Results) -> Table:
    """Accuracy, likelihood and calibration on the test rows, means over seeds."""
    measures = {"ACC": "acc", "NLL": "nll", "Brier": "brier", "NLL ts": "nll_ts", "Brier ts": "brier_ts"}
    table = Table(
        "summary",
        "Test rows, means over seeds",
        ["task", "method", "passes", "cost", *measures, "ECE", "ECE ts"],
        notes="NLL in nats; Brier summed over classes; ECE of 15 bins; ts: after temperature scaling, T from "
        "validation rows; cost: training in units of one fine-tune; intervals: 95 % bootstrap over test rows.",
    )
    for task, method, done in results.each():
        values: list[Value] = [
            bootstrap_interval(stacked(done, name), seed_of(task, "summary")) for name in measures.values()
        ]
        errors = [results.figure(task, method, "test", name) for name in ("ece", "ece_ts")]
        table.rows.append([task, method, done[0].record["passes"], mean_of(done, "cost"), *values, *errors])
    return table


def seeds(results: Results) -> Table:
    """The same, each seed."""
    names = ("acc", "nll", "brier", "ece", "nll_ts", "brier_ts", "ece_ts", "temperature")
    table = Table("seeds", "Test rows, each seed", ["task", "method", "seed", *names])
    for task, method, done in results.each():
        for r in done:
            table.rows.append([task, method, r.cell.seed, *(r.figures["test"][n] for n in names)])
    return table


def uncertainty(results: Results) -> Table:
    """Mean uncertainties and diversity, on test and on training rows."""
    columns = {"entropy": "entropy", "expected entropy": "expected_entropy", "MI": "mutual_information"}
    columns |= {"MI n/(n-1)": "mutual_information_corrected", "disagreement": "disagreement"}
    table = Table(
        "uncertainty",
        "Uncertainty and diversity, means over rows and seeds",
        ["task", "method", *columns, "pairwise JSD", "pairwise JSD train"],
        notes="nats. MI grows with the number of points, pairwise JSD does not.",
    )
    for task, method, _ in results.each():
        figures = [results.figure(task, method, "test", n) for n in (*columns.values(), "pairwise_jsd")]
        table.rows.append([task, method, *figures, results.figure(task, method, "train", "pairwise_jsd")])
    return table


def shift(results: Results) -> Table:
    """Accuracy and calibration on sets of the same label space."""
    names = ("acc", "nll", "ece", "nll_ts", "ece_ts")
    table = Table("shift", "Shifted sets of the same classes, means over seeds", ["task", "method", "set", *names])
    for task, method, done in results.each():
        for where in (s for s in done[0].predictions.sets if s.startswith("shift:")):
            table.rows.append([task, method, where, *(results.figure(task, method, where, n) for n in names)])
    return table
