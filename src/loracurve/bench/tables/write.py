"""The tables of a suite, made from its store alone."""

from __future__ import annotations

from pathlib import Path

from loracurve.bench.config import SuiteConfig
from loracurve.bench.results import read_results, write_metrics
from loracurve.bench.tables.averages import averages, differences
from loracurve.bench.tables.costs import costs, left_out
from loracurve.bench.tables.detection import detection, detection_differences, verdicts
from loracurve.bench.tables.ensembles import comparisons, ensembles
from loracurve.bench.tables.foreign import foreign, stream
from loracurve.bench.tables.goals import goals
from loracurve.bench.tables.landscape import along_curves, barriers
from loracurve.bench.tables.mixtures import against_discrete, weighted_points
from loracurve.bench.tables.page import write_suite_page
from loracurve.bench.tables.summary import seeds, shift, summary, uncertainty
from loracurve.bench.tables.table import Table, write_table
from loracurve.system.files import atomic_write

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
    of_detection = detection_differences(results)
    of_ensembles = ensembles(results, out)
    tables = [
        averages(results),
        differences(results),
        summary(results),
        goals(results, of_ensembles[-1], of_detection),
        *of_ensembles,
        verdicts(results, of_detection),
    ]
    tables += [uncertainty(results), against_discrete(results), weighted_points(results)]
    tables += [*barriers(results, out), along_curves(results)]
    tables += [
        foreign(results),
        stream(results),
        detection(results),
        of_detection,
        shift(results),
        comparisons(results),
        seeds(results),
    ]
    tables += [costs(results, out), left_out(results)]
    for table in tables:
        write_table(table, out / "tables")
    tables = [t for t in tables if t.rows]
    text = "\n".join(t.markdown() for t in tables)
    atomic_write(out / "tables.md", lambda p: p.write_text(text, encoding="utf-8"))
    if page and results.done:
        write_suite_page(results, tables, out)
    return tables
