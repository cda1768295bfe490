"""The commands `scan` and `report`, which `cli.py` offers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from loracurve.errors import UserError
from loracurve.scanning import ScanConfig

__all__ = ["report", "scan", "spell_out"]


def scan(
    options: ScanConfig,
    run: str | None = None,
    adapters: list[str] | None = None,
    task: str | None = None,
    base: str | None = None,
    scoring: Literal["letter", "label", "text", "head", "lm"] | None = None,
    out: str | None = None,
) -> None:
    """Scan the loss along paths between adapters and along the curve: RUN, or --adapters A B C --task T.

    Args:
        options: how finely.
        run: run directory; comes first, without --run.
        adapters: PEFT adapter folders instead of a run, at least two; nothing is trained.
        task: their data: a folder, the name of a hub data set, or word_sentiment.
        base: their base model. Default: the one they name.
        scoring: how answers are scored. Default: head for classifiers, letter for multiple choice, else label.
        out: new folder. Default: RUN/scan, or scan.
    """
    from loracurve.report.tables import print_barriers
    from loracurve.scanning import scan_to_folder
    from loracurve.subjects import adapters_to_scan, run_to_scan

    if (run is None) == (adapters is None):
        raise UserError("expected a run directory or --adapters A B C --task T, found both or neither")
    folder = Path(out) if out else Path(run, "scan") if run else Path("scan")
    if adapters is not None:
        if task is None:
            raise UserError("expected the adapters' data, found no --task; give --task FOLDER")
        subject = adapters_to_scan(adapters, task, base, scoring, options.dtype)
    else:
        assert run is not None
        for name, value in (("task", task), ("base", base), ("scoring", scoring)):
            if value is not None:
                raise UserError(f"--{name} goes with --adapters; a run has its own")
        subject = run_to_scan(run, options.dtype)
    print_barriers(scan_to_folder(subject, folder, options))
    print(f"Written to {folder}")


def report(runs: list[str], out: str | None = None, overwrite: bool = False) -> None:
    """Write one self-contained HTML page about one or several runs, and their figures as PNG and PDF in RUN/figures.

    Args:
        runs: run directories or folders of scans, side by side on the page; they come first, without --runs.
        out: the page. Default: RUN/report.html for one run, report.html for several.
        overwrite: replace a page that is there.
    """
    from loracurve.report.page import write_page

    page = Path(out) if out else Path(runs[0], "report.html") if len(runs) == 1 else Path("report.html")
    if page.exists() and not overwrite:
        raise UserError(f"{page} exists already; choose another --out, or replace it by --overwrite")
    write_page([Path(run) for run in runs], page)
    print(f"Written to {page}")


def spell_out(arguments: Sequence[str], lists: Sequence[str], flags: Sequence[str]) -> list[str]:
    """Options as the parser takes them: `--adapters A B` as `--adapters=["A", "B"]`, `--best` as `--best=true`.

    A value given to a flag (`--best false`) stays.
    """
    out: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word in lists:
            values = []
            while rest and not rest[0].startswith("-"):
                values.append(rest.pop(0))
            listed = len(values) == 1 and values[0].startswith("[")
            word = f"{word}={values[0] if listed else json.dumps(values)}"
        elif word in flags and not (rest and rest[0].lower() in ("true", "false")):
            word = f"{word}=true"
        out.append(word)
    return out
