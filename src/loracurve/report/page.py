"""One self-contained HTML page about one or several runs, and its figures as files."""

from __future__ import annotations

import base64
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from loracurve.report import figures
from loracurve.report.blocks import Block
from loracurve.report.run_data import RunData, fitting_files, read_run
from loracurve.report.sections import SECTIONS, side_by_side
from loracurve.report.templates import render_html
from loracurve.report.terms import terms_of
from loracurve.system.errors import UserError
from loracurve.system.files import atomic_write, write_json
from loracurve.system.folders import locked, results_file

__all__ = ["about", "images_of", "render", "write_page"]


def write_page(folders: Sequence[Path], out: Path) -> Path:
    """Write the page, and every figure as PNG and PDF: for a page in the folder of its run into FOLDER/figures, else
    beside the page into PAGE-figures (of several runs into one folder each), so that the runs are only read.

    Numbers that stand in no other JSON file of the run (reliability bins, accuracy at coverage, the examples) go to
    report.json beside the figures. Parts that a run does not have are said to be missing.

    Args:
        folders: run directories, or folders of scans; side by side on the page.
        out: the page.

    Returns:
        `out`.

    Raises:
        UserError: no runs, the same one twice, or a folder that is neither an evaluated run nor a scan.
    """
    if not folders:
        raise UserError("report: expected at least one run directory, found none")
    if len({os.path.realpath(f) for f in folders}) < len(folders):
        raise UserError("report: expected different run directories, found one twice")
    runs = [read_run(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]
    within = len(folders) == 1 and os.path.realpath(out.parent) == os.path.realpath(folders[0])
    with locked(folders[0]) if within else nullcontext(), results_file(out, replace=True):
        place = out.parent / ("figures" if within else f"{out.stem}-figures")
        return _write_page(runs, out, place)


def _write_page(runs: Sequence[RunData], out: Path, place: Path) -> Path:
    """Write it with the figures of its run into a folder, those of several into folders in it by the runs' names."""
    places = {run.name: place if len(runs) == 1 else place / run.name for run in runs}
    numbers: dict[str, dict[str, Any]] = {run.name: {} for run in runs}
    with fitting_files([run.folder for run in runs]):
        parts = {
            "title": _title(runs),
            "runs": [{"name": run.name, "line": about(run)} for run in runs],
            "together": side_by_side(runs),
            "sections": _sections(runs, numbers, places),
        }
    for run in runs:
        write_json(places[run.name] / "report.json", numbers[run.name])
    return render(parts, f"metrics.json, scan/scan.json and {place.name}/report.json", out)


def render(parts: Mapping[str, Any], numbers: str, out: Path) -> Path:
    """Write a page of title, runs (name and line), sections (title, lead, blocks) and perhaps a table `together`.

    Args:
        numbers: the files in which the numbers are, for the footer.
    """
    made = time.strftime("%Y-%m-%d")
    said = set[str]()
    for section in parts["sections"]:
        section["terms"] = terms_of([s for block in section["blocks"] for s in block["block"].sheets], said)
    text = render_html("page.html", **parts, numbers=numbers, made=made, version=_version())
    atomic_write(out, lambda path: path.write_text(text, encoding="utf-8"))
    return out


def _sections(
    runs: Sequence[RunData], numbers: dict[str, dict[str, Any]], places: Mapping[str, Path]
) -> list[dict[str, Any]]:
    """Title, lead and blocks of each section; what the blocks count is added to `numbers`."""
    sections = []
    for section in SECTIONS:
        concerned = [run for run in runs if run.metrics or not section.evaluation]
        blocks = []
        for run in concerned:
            block = section.make(run)
            numbers[run.name] |= block.numbers
            if block.empty:
                continue
            blocks.append({"run": run.name, "block": block, "images": images_of(places[run.name], block)})
        if blocks:
            led = not section.of_scan or any(run.scan is not None for run in concerned)
            sections.append({"title": section.title, "lead": section.lead if led else "", "blocks": blocks})
    return sections


def _title(runs: Sequence[RunData]) -> str:
    """The tasks, and the folders of the runs."""
    tasks = dict.fromkeys(_task(run) for run in runs)
    return f"{', '.join(tasks)}: {', '.join(run.name for run in runs)}"


def _task(run: RunData) -> str:
    if run.metrics:
        return str(run.metrics["task"]["name"])
    assert run.scan is not None  # `read_run` finds one of both
    return Path(run.scan["subject"]["task"]).name


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' last parts, with so many more in front that they differ."""
    resolved = [Path(os.path.realpath(folder)).parts for folder in folders]
    for depth in range(1, max(map(len, resolved)) + 1):
        names = ["/".join(parts[-depth:]) for parts in resolved]
        if len(set(names)) == len(names):
            break
    return names


def images_of(folder: Path, block: Block) -> list[dict[str, str]]:
    """Save the figures of a block to a folder, and the PNGs as data addresses."""
    images = []
    for name, words, figure in block.figures:
        png, _ = figures.save(figure, folder, name)
        data = base64.b64encode(figures.embedded(png)).decode()
        width, height = (round(96 * inches) for inches in figure.get_size_inches())
        size = {"width": str(width), "height": str(height)}
        images.append({"words": words, "source": f"data:image/png;base64,{data}", **size})
    return images


def about(run: RunData) -> str:
    """What was fitted to what, in a line."""
    if run.scan is not None and not run.metrics:
        subject = run.scan["subject"]
        between = f"{_task(run)} between {len(run.scan['anchors'])} adapters of {Path(subject['base']).name}"
        return f"{between}; nothing was trained" if "adapters" in subject else f"{between}, and a curve through them"
    config, task = run.config, run.metrics["task"]
    curve, lora = config.get("curve", {}), config.get("lora", {})
    base = Path(str(config["model"]["name"])).name
    shape = (
        f"through {curve.get('anchors')} anchors"
        if curve.get("kind") == "anchored"
        else (f"of {curve.get('segments')} segments")
    )
    if config.get("adapters"):
        shape = f"through {len(config['adapters'])} given adapters"
    rank = f", rank {lora['r']}" if lora else ""  # a run that was saved from Python has no options of training
    return f"{task['name']} with {base}{rank}: " + (f"{curve.get('kind')} curve {shape}" if curve else "one adapter")


def _version() -> str:
    try:
        return version("loracurve")
    except PackageNotFoundError:
        return "0+unknown"
