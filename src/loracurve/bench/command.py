"""The command `bench`, which `cli.py` offers."""

from __future__ import annotations

from pathlib import Path

from loracurve.bench.suite import Executor, SuiteConfig
from loracurve.errors import UserError

__all__ = ["bench"]


def bench(
    suite: SuiteConfig,
    out: str = "runs/bench",
    jobs: int = 0,
    seconds: float | None = None,
    retry: bool = False,
    tables_only: bool = False,
    executor: Executor = "processes",
    address: str | None = None,
) -> None:
    """Compare methods on tasks and seeds: SUITE.yaml, or smoke, small or paper; the same command resumes.

    Args:
        suite: all options of a suite, from a YAML file and the command line.
        out: folder for the results, new or begun by the same suite.
        jobs: cells that run side by side. Default: one for each GPU, without GPUs one (with Ray one for each node).
        seconds: start no further cell after this time.
        retry: run cells again that failed.
        tables_only: make tables and page from what is in the folder, without running anything.
        executor: processes of this machine, or the workers of a Ray cluster.
        address: address of the Ray cluster, auto for one started on this machine. Default: what RAY_ADDRESS says, else
            a cluster of this machine alone.
    """
    from loracurve.bench.reporting import write_tables
    from loracurve.bench.runner import run_suite
    from loracurve.bench.suite import cells_of, scans_of

    folder = Path(out)
    if tables_only and not (folder / "suite.yaml").is_file():
        raise UserError(f"{out}: expected the folder of a suite that was run, found none; run it without --tables_only")
    try:
        if not tables_only:
            run_suite(suite, folder, jobs, seconds, retry, progress=True, executor=executor, address=address)
    finally:
        if (folder / "suite.yaml").is_file():
            tables = write_tables(suite, folder, page=True)
            missing = sum(len(t.rows) for t in tables if t.name == "left_out")
            total = len(cells_of(suite)) + len(scans_of(suite))
            print(f"{total - missing} of {total} cells have results; tables.md and report.html are in {folder}")
