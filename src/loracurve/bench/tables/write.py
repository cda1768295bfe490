"""The tables of a suite, made from its store alone."""

from __future__ import annotations

from pathlib import Path

from loracurve.bench.config import SuiteConfig
from loracurve.bench.results import CellResult, Results, read_results, seed_of, stacked, write_metrics
from loracurve.bench.shared import anchors_folder
from loracurve.bench.tables.averages import averages
from loracurve.bench.tables.detection import detection, detection_differences, verdicts
from loracurve.bench.tables.ensembles import comparisons, deciding
from loracurve.bench.tables.goals import goals
from loracurve.bench.tables.landscape import along_curves, barriers
from loracurve.bench.tables.mixtures import against_discrete, weighted_points
from loracurve.bench.tables.page import write_suite_page
from loracurve.bench.tables.table import Table, Value, write_table
from loracurve.inference.intervals import bootstrap_interval
from loracurve.system.files import atomic_write, read_json

__all__ = ["write_tables"]


def write_tables(suite: SuiteConfig, out: str | Path, page: bool = False) -> list[Table]:
    """Read the store of a suite and write metrics.parquet, tables.md and tables/NAME.{md,tex,csv}.

    Everything but `costs` is a function of the predictions alone, equal to the byte whenever these are.

    Args:
        page: write report.html and the folder figures too.
    """
    out = Path(out)
    results = read_results(suite, out)
    write_metrics(results, out / "metrics.parquet")
    differences = detection_differences(results)
    decided = deciding(results, out)
    tables = [
        averages(results),
        summary(results),
        goals(results, decided[-1], differences),
        *decided,
        verdicts(results, differences),
    ]
    tables += [uncertainty(results), against_discrete(results), weighted_points(results)]
    tables += [*barriers(results, out), along_curves(results)]
    tables += [detection(results), differences, shift(results), comparisons(results), seeds(results)]
    tables += [costs(results, out), left_out(results)]
    for table in tables:
        write_table(table, out / "tables")
    tables = [t for t in tables if t.rows]
    text = "\n".join(t.markdown() for t in tables)
    atomic_write(out / "tables.md", lambda p: p.write_text(text))
    if page and results.done:
        write_suite_page(results, tables, out)
    return tables


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


def costs(results: Results, out: Path) -> Table:
    """Passes, training cost, time and memory."""
    table = Table(
        "costs",
        "Costs, means over seeds",
        ["task", "method", "passes", "cost", "fit s", "predict s / 1000 rows", "peak memory MiB", "device"],
        notes="cost: training in units of one fine-tune, its anchors included; fit s: without the shared anchors.",
    )
    for task in results.suite.tasks:
        found = [anchors_folder(out, task, seed) / "anchors.json" for seed in results.suite.seeds]
        records = [read_json(path) for path in found if path.is_file()]
        trained = [r["seconds"] for r in records if isinstance(r, dict) and isinstance(r.get("seconds"), int | float)]
        if trained:
            name, count = f"{results.suite.anchors} anchors in one pass", results.suite.anchors
            table.rows.append([task, name, None, float(count), sum(trained) / len(trained), None, None, None])
    for task, method, done in results.each():
        seconds = sum(1000 * r.record["predict_seconds"] / r.record["predicted_rows"] for r in done) / len(done)
        peaks = [r.record["peak_memory_bytes"] for r in done]
        peak = None if None in peaks else round(max(peaks) / 2**20)
        first = done[0].record
        row: list[Value] = [task, method, first["passes"], mean_of(done, "cost"), mean_of(done, "fit_seconds")]
        table.rows.append([*row, seconds, peak, first["environment"]["device"]])
    return table


def left_out(results: Results) -> Table:
    """Cells that failed or are still to be run."""
    table = Table("left_out", "Cells without results", ["task", "seed", "method", "reason"])
    reasons = results.failed | dict.fromkeys(results.missing, "not run yet")
    for cell, reason in reasons.items():
        table.rows.append([cell.task, cell.seed, cell.method, reason])
    return table


def mean_of(done: list[CellResult], key: str) -> float:
    return float(sum(r.record[key] for r in done) / len(done))
