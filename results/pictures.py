"""Draws the pictures of the README and of docs/evidence from the stored results.

    python results/pictures.py

`docs/pictures/valley.svg` (two sets) and `valley-all.svg` (all eight): suite `final`, three seeds. NLL on test rows
along the straight line between neighbouring fine-tunes, and along the anchored curve through the same ones, above that
of the fine-tunes; mean of both pairs and of the seeds. The line was scanned on 200 of the rows, the curve on all. One
set is kept in the package, for the quickstart. `docs/pictures/rivals.svg`: suite `tuned`. NLL after a temperature minus
that of ten tuned fine-tunes, mean of eight sets, against the passes of a prediction and the seconds of training on a
GPU; bars, with their names beside them: 95 % intervals over rows and seeds.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.ticker import MultipleLocator
from points import quality

from loracurve.bench.results import CellResult, Results, read_results
from loracurve.bench.suite import load_suite
from loracurve.inference.prediction import point_nll
from loracurve.report.figures import GREY, drawing, panels
from loracurve.report.valley import CURVE, LINE, valley
from loracurve.system.yaml_files import dump_yaml

HERE = Path(__file__).parent
PICTURES = HERE.parent / "docs" / "pictures"
TITLES = {"sst2": "SST-2", "ag_news": "AG News", "subj": "SUBJ", "cr": "CR", "mrpc": "MRPC", "rte": "RTE"}
TITLES |= {"cola": "CoLA", "wic": "WiC"}
STORED = HERE.parent / "src" / "loracurve" / "report" / "valley.yaml"


def along_line(task: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """x in [0, 1] between two fine-tunes, and NLL above the straight line between theirs, mean of the pairs."""
    folder = HERE / "final" / "cells" / task / str(seed) / "landscape"
    frame = pd.read_parquet(folder / "paths.parquet")
    frame = frame[(frame.path == "straight") & (frame.split == "test")].sort_values("t")
    pairs = []
    for nll in (frame.nll[frame.t < 0.501].to_numpy(), frame.nll[frame.t > 0.499].to_numpy()):
        pairs.append(nll - np.linspace(nll[0], nll[-1], len(nll)))
    return np.linspace(0, 1, len(pairs[0])), np.mean(pairs, axis=0)


def along_curve(curve: CellResult, anchors: CellResult) -> tuple[np.ndarray, np.ndarray, float]:
    """The same at the curve's stored points, and for their average."""
    labels = curve.predictions.labels["test"]
    points = point_nll(curve.predictions.sets["test"], labels).mean(1).numpy()
    ends = point_nll(anchors.predictions.sets["test"], labels).mean(1).numpy()[:3]
    t = np.array(curve.record["notes"]["average"]["t"])
    above = points - np.interp(t, [0, 0.5, 1], ends)
    x = np.where(t <= 0.5, 2 * t, 2 * t - 1)
    order = np.argsort(x)
    return x[order], above[order], float(curve.figures["test"]["nll"] - ends.mean())


def valley_of(task: str, results: Results) -> dict[str, Any]:
    """As `report.valley.valley` draws it, mean of the seeds."""
    lines = [along_line(task, seed) for seed in results.suite.seeds]
    anchors = {r.cell.seed: r for r in results.seeds(task, "ensemble 10")}
    curves = [along_curve(r, anchors[r.cell.seed]) for r in results.seeds(task, "own points")]
    both = {"line": (lines[0][0], [y for _, y in lines]), "curve": (curves[0][0], [y for _, y, _ in curves])}
    drawn = {n: {"x": x.round(4).tolist(), "nll": np.mean(y, axis=0).round(4).tolist()} for n, (x, y) in both.items()}
    return {"title": TITLES[task], **drawn, "average": round(float(np.mean([a for _, _, a in curves])), 4)}


def passes(ax: Axes) -> Axes:
    found, _ = quality("tuned", ["curve", "ensemble 10"])
    # The names stand beside the bars of three passes.
    beside: dict[str, dict[str, Any]] = {
        "ensemble 10": {"color": LINE, "text": "fine-tunes", "xytext": (8, 0)},
        "curve": {"color": CURVE, "text": "curve", "xytext": (8, 9)},
    }
    for (method, place), shift in zip(beside.items(), (-0.08, 0.08), strict=True):
        mine = [q for q in found if q.method == method and 10 in q.against]
        values = [(q.count, q.against[10]) for q in mine]
        x = np.array([count for count, _ in values]) + shift
        y = np.array([i.estimate for _, i in values])
        bars = np.array([[i.estimate - i.low, i.high - i.estimate] for _, i in values]).T
        ax.errorbar(x, y, bars, fmt="o", color=place["color"], capsize=3)
        ax.annotate(xy=(x[0], y[0]), textcoords="offset points", va="center", fontsize=9, **place)
    ax.axhline(0, color=GREY, linewidth=0.8)
    ax.annotate(
        "ten fine-tunes", (10, 0), xytext=(-6, 4), textcoords="offset points", ha="right", fontsize=9, color=GREY
    )
    ax.yaxis.set_major_locator(MultipleLocator(0.005))
    ax.set(xlabel="passes of a prediction", xticks=[3, 5, 10], ylabel="NLL minus ten fine-tunes'")
    return ax


BELOW: dict[str, Any] = {"xytext": (0, -6), "ha": "center", "va": "top"}
RIGHT: dict[str, Any] = {"xytext": (7, 0), "ha": "left", "va": "center"}
LEFT: dict[str, Any] = {"xytext": (-7, 0), "ha": "right", "va": "center"}

SHOWN = {
    "ensemble 3": ("3 fine-tunes", RIGHT),
    "ensemble 5": ("5 fine-tunes", RIGHT),
    "ensemble 10": ("10 fine-tunes", BELOW),
    "ensemble 3, five units": ("3 fine-tunes,\ntrained longer", RIGHT),
    "MultiSWAG 3": ("MultiSWAG", RIGHT),
    "curve": ("curve", LEFT),
    "curve, Gaussians": ("curve with\nGaussians", RIGHT),
}


def seconds(ax: Axes) -> Axes:
    """Adapters of one pass share its seconds; the table `costs` has them set by set."""
    tables = HERE / "tuned" / "tables"
    costs: dict[str, list[float]] = {}
    whole: list[float] = []
    for line in (tables / "costs.md").read_text().splitlines():
        cells = [c.strip() for c in line.strip("|").split("|")]
        if len(cells) > 5 and re.fullmatch(r"[\d.]+", cells[4]):
            (whole if "anchors" in cells[1] else costs.setdefault(cells[1], [])).append(float(cells[4]))
    pattern = r"\| ensemble 10 \| nll_ts \| (.+?) \| \d+ \| .+? \| (-?[\d.]+) \[(-?[\d.]+), (-?[\d.]+)\]"
    rows = re.findall(pattern, (tables / "differences.md").read_text())
    differences = {name: tuple(map(float, values)) for name, *values in rows} | {"ensemble 10": (0.0, 0.0, 0.0)}
    for method, (name, place) in SHOWN.items():
        adapters = re.fullmatch(r"ensemble (\d+)", method)
        own = float(np.mean(costs[method]))
        x = float(np.mean(whole)) * int(adapters[1]) / 10 if adapters else own
        y, low, high = differences[method]
        colour = CURVE if "curve" in method else LINE
        ax.errorbar([x], [y], [[y - low], [high - y]], fmt="o", color=colour, capsize=3)
        ax.annotate(name, (x, y), textcoords="offset points", fontsize=9, color=colour, **place)
    ax.axhline(0, color=GREY, linewidth=0.8)
    ax.set(xlabel="training, GPU seconds a set", xlim=(0, 190))
    return ax


def write(name: str, draws: list, size: tuple[float, float], columns: int) -> None:  # type: ignore[type-arg]
    figure = panels(draws, size, columns=columns)
    with drawing(), rc_context({"svg.hashsalt": name}):
        figure.savefig(PICTURES / f"{name}.svg", metadata={"Date": None})


def main() -> None:
    results = read_results(load_suite(HERE / "suites" / "final.yaml"), HERE / "final")
    found = {task: valley_of(task, results) for task in TITLES}
    STORED.write_text(
        "# Written by results/pictures.py: CR of the suite `final`, SmolLM2-135M, three seeds.\n"
        + dump_yaml(found["cr"])
    )
    draw = {task: (lambda ax, of=of: valley(of, ax)) for task, of in found.items()}

    def first(ax: Axes) -> Axes:
        draw["cr"](ax).set_ylabel("NLL above the fine-tunes'")
        return ax

    write("valley", [first, draw["sst2"]], (8.4, 3.2), 2)
    write("valley-all", list(draw.values()), (10.4, 5.2), 4)
    write("rivals", [passes, seconds], (8.4, 3.4), 2)


if __name__ == "__main__":
    main()
