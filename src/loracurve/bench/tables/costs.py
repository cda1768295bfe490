"""What a suite's methods cost, and which of its cells have no results."""

from __future__ import annotations

from pathlib import Path

from loracurve.bench.results import Results, mean_of
from loracurve.bench.shared import anchors_folder
from loracurve.bench.tables.table import Table, Value
from loracurve.system.files import read_json
from loracurve.system.paths import is_file

__all__ = ["costs", "left_out"]


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
        records = [read_json(path) for path in found if is_file(path)]
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
