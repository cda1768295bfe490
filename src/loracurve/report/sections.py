"""The sections of a report: for each run figures, tables and sentences, made from what its files hold."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import yaml

from loracurve.report import figures, frames, prediction_plots
from loracurve.report.adapters import chosen_adapter, chosen_name
from loracurve.report.blocks import Block, Section, Sheet
from loracurve.report.landscape_sections import diversity, landscape, loss_paths
from loracurve.report.numbers import number, rounded, star
from loracurve.report.parts import DETECTORS, EXPLAINED, HEADINGS, THREE, detectors_of, has_three, parts_of
from loracurve.report.run_data import RunData, texts_of
from loracurve.report.short import short, verdict
from loracurve.system.tables import records

__all__ = ["SECTIONS", "side_by_side"]


COUNTS = 0.1
"""Share of an example's entropy below which a part of it is negligible."""

COVERAGES = (0.5, 0.7, 0.8, 0.9, 0.95, 1.0)

_NO_PREDICTIONS = "No predictions were kept (language modelling)."

FOREIGN = 0.05
"""Familiarity below which a row counts as foreign here, as in `calibrate`."""

# Figures of the summary and their headings. The parts of MI stand beside it where it has any.
_BEFORE = {"acc": "ACC", "nll": "NLL", "brier": "Brier", "ece": "ECE"}
_AFTER = {"pairwise_jsd": "pair JSD", "aurc_entropy": "AURC"}


def _columns(methods: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    parts = ("mutual_information", *(THREE[1:] if parts_of(methods) == THREE else ()))
    return _BEFORE | {name: HEADINGS[name] for name in parts} | _AFTER


def _method_row(method: Mapping[str, Any], columns: Mapping[str, str]) -> list[str]:
    test = method["sets"]["test"]
    # One point has no information between points, and models without Gaussians none within; zeros would read as
    # findings.
    hidden = {"between_points", "pairwise_jsd"} if method["passes"] == 1 else set()
    if not has_three(test):
        hidden |= {"within_points"} | ({"mutual_information"} if method["passes"] == 1 else set())
    shown = (number(None if name in hidden else test.get(name)) for name in columns)
    return [str(method["passes"]), *shown]


def side_by_side(runs: Sequence[RunData]) -> Sheet | None:
    """Ensemble or best point, and curve, of every evaluated run in one table; None for a single run."""
    methods = {
        f"{run.name}: {name}": run.metrics["methods"][name]
        for run in runs
        for name in ("best point", "ensemble", "curve")
        if name in run.metrics.get("methods", {})
    }
    if len(runs) < 2 or not methods:
        return None
    return _summary_sheet("Test split of each run", "run: method", methods)


def _summary_sheet(caption: str, first: str, methods: Mapping[str, Mapping[str, Any]]) -> Sheet:
    columns = _columns(methods.values())
    named = {best: chosen_name(best)} if (best := chosen_adapter(methods)) else {}
    rows = [[named.get(name, name), *_method_row(method, columns)] for name, method in methods.items()]
    return Sheet(caption, [first, "passes", *columns.values()], rows)


def summary(run: RunData) -> Block:
    """Every method on the test split, and the curve's paired differences."""
    methods = run.metrics["methods"]
    examples = next(iter(methods.values()))["sets"]["test"]["examples"]
    block = Block(sheets=[_summary_sheet(f"Test split, {examples:,} examples", "method", methods)])
    comparisons = run.metrics.get("comparisons", [])
    block.findings = [verdict(run)] if comparisons else []
    compared = [
        [c["second"], *(rounded(c[k]) + star(c[k]) if k in c else number(None) for k in ("nll", "acc", "brier"))]
        for c in comparisons
    ]
    if compared:
        caption = "Curve minus other on the same examples, 95 % bootstrap interval; * excludes 0"
        block.sheets.append(Sheet(caption, ["other", "NLL", "ACC", "Brier"], compared))
    else:
        block.notes.append("No baselines: this run was compared with nothing.")
    return block


def methods_of(run: RunData) -> Block:
    """`summary` without the verdict, which stands above it on the page."""
    return replace(summary(run), findings=[])


def reliability(run: RunData) -> Block:
    """Reliability diagram of the ensemble or the best point, and the curve."""
    if run.predictions is None:
        return Block(notes=[_NO_PREDICTIONS])
    # The intervals of more than two would hide each other.
    frame = frames.reliability_frame(run.predictions, frames.compared(run.predictions)[-2:])
    least, most = frame["items"].min(), frame["items"].max()
    size = f"{least:,}" if least == most else f"{least:,} to {most:,}"
    caption = f"Accuracy against confidence, in groups of {size} test rows of like confidence; bars are 95 % intervals"
    own = frame[frame["method"] == frame["method"].iloc[-1]]
    groups = [
        [f"{row.items:,}", number(row.confidence), number(row.accuracy), f"{row.low:.3f} to {row.high:.3f}"]
        for row in own.itertuples(index=False)
    ]
    heads = ["rows", "confidence", "accuracy", "95 % interval"]
    block = Block()
    if least >= frames.LEAST:
        drawn = figures.figure_of(prediction_plots.reliability, frame, size=(5.2, 4.2))
        block.figures.append(("reliability", caption, drawn))
    else:
        block.notes.append(f"No figure: fewer than {frames.LEAST} test rows.")
    block.sheets.append(Sheet(f"Groups of like rows, of the {own['method'].iloc[0]}", heads, groups, texts=0))
    block.numbers["reliability"] = records(frame)
    return block


def uncertainty(run: RunData) -> Block:
    """Distributions of the uncertainties by set, and how well they tell sets apart."""
    block, foreign = Block(), dict[str, float]()
    methods = run.metrics["methods"]
    if run.predictions is not None:
        frame = frames.uncertainty_frame(run.predictions)
        measures = list(frame["measure"].unique())
        draws = [partial(prediction_plots.uncertainty, frame, measure=m) for m in measures]
        drawn = figures.panels(draws, (5.2, 2.1 * len(draws)))
        words = "Share of each set's rows whose uncertainty is at most so large: further right, more uncertain"
        block.figures.append(("uncertainty", words, drawn))
        block.numbers["items"] = frame.groupby("set", sort=False)["items"].first().to_dict()
        if run.known is not None and "distance" in run.predictions:
            foreign = block.numbers["foreign"] = frames.foreign_share(run.predictions, run.known, FOREIGN)
    sets_of_curve = methods["curve"]["sets"]
    parts = parts_of([methods["curve"]])
    rows = [
        [
            name,
            *(number(found.get(k)) for k in ("entropy", *parts)),
            number(found.get("disagreement")),
            *([number(foreign.get(name))] if foreign else []),
        ]
        for name, found in sets_of_curve.items()
    ]
    heads = ["set", *(HEADINGS[k] for k in ("entropy", *parts)), "disagreement"]
    heads += [f"familiarity < {FOREIGN:g}"] if foreign else []
    block.sheets.append(Sheet("Means of the curve by set, nats", heads, rows))
    if parts == THREE:
        block.notes.append(EXPLAINED)
    if foreign:
        block.notes.append(
            "Familiarity is the part of known rows that are at least as far from the training data as this one. Below "
            f"{FOREIGN:g} calibrate takes a row for foreign; of known rows about as large a share lies there."
        )
    block.sheets += _detection(methods)
    if len(block.sheets) < 2:
        block.notes.append("No set out of distribution was evaluated (evaluation.ood).")
    return block


def _detection(methods: Mapping[str, Any]) -> list[Sheet]:
    """How well each score tells other sets from the test split, where there are any."""
    scores = detectors_of(methods.values())
    rows = [
        [f"{method}: {name}", *(number(_shown(found, score, values)) for score in scores)]
        for method, values in methods.items()
        for name, found in values["detection"].items()
    ]
    caption = "AUROC of telling a set from the test split (.5 is chance), by"
    return [Sheet(caption, ["method: set", *(DETECTORS[s] for s in scores)], rows)] if rows else []


def _shown(found: Mapping[str, Any], score: str, method: Mapping[str, Any]) -> float | None:
    """An AUROC; None for the information of one point without a Gaussian."""
    if score == "mi" and method["passes"] == 1 and "auroc_within" not in found:
        return None
    value: float | None = found.get(f"auroc_{score}")
    return value


def selective(run: RunData) -> Block:
    """Accuracy against coverage when the most uncertain examples are left out."""
    if run.predictions is None:
        return Block(notes=[_NO_PREDICTIONS])
    frame = frames.selective_frame(run.predictions)
    rows, kept = [], {}
    for (method, measure), part in frame.groupby(["method", "measure"], sort=False):
        accuracy = part["accuracy"].to_numpy()
        at = [float(accuracy[max(math.ceil(c * len(accuracy)) - 1, 0)]) for c in COVERAGES]
        name = f"{method}, {prediction_plots.MEASURE_LABELS[measure]}"
        kept[name] = dict(zip(map(str, COVERAGES), at, strict=True))
        rows.append([name, *(number(a) for a in at)])
    heads = ["ranked by", *(f"{100 * c:.0f} %" for c in COVERAGES)]
    block = Block()
    # The accuracy of a handful of answers is noise.
    firm = frame[frame["items"] >= frames.LEAST]
    if len(firm):
        drawn = figures.figure_of(prediction_plots.selective_prediction, firm)
        words = f"Accuracy among the rows answered, from {frames.LEAST} rows on; shaded: 95 % interval of the curve"
        block.figures.append(("selective_prediction", words, drawn))
    else:
        block.notes.append(f"No figure: fewer than {frames.LEAST} test rows.")
    block.sheets.append(Sheet("Accuracy at coverage", heads, rows))
    block.numbers["selective_accuracy"] = kept
    return block


def examples(run: RunData, count: int = 6) -> Block:
    """Among the more uncertain half the rows of which one part of the uncertainty is an unusually large share."""
    if run.predictions is None:
        return Block(notes=[_NO_PREDICTIONS])
    table = run.predictions[run.predictions["method"] == "curve"].reset_index(drop=True)
    measures = frames.measures_of(table)
    texts = texts_of(run)
    # Shares of rows of which every point is certain say nothing.
    uncertain = table[(table["entropy"] >= table["entropy"].median()) & (table["entropy"] > 0)]
    share = {name: uncertain[name] / uncertain["entropy"] for name in measures[1:]}
    disagreement = measures[-1]
    titles = {disagreement: "The points disagree", "within_points": "Far from the training data"}
    chosen, absent = {}, []
    for part in [name for name in titles if name in share]:
        large = share[part][share[part] >= COUNTS].nlargest(count)
        if large.empty:
            absent.append(HEADINGS[part])
        else:
            chosen[f"{titles[part]}: the rows with the largest share of {HEADINGS[part]} in their entropy"] = large
    agreed = uncertain[share[disagreement] < COUNTS]
    if len(agreed):
        caption = f"The text is ambiguous and the points agree on it: little {HEADINGS[disagreement]}"
        chosen[caption] = agreed["expected_entropy"].nlargest(count)
    block = Block(notes=[] if texts else ["The data set cannot be opened here, so ids stand for texts."])
    if absent:
        parts = " or ".join(absent)
        block.notes.append(f"No row has {100 * COUNTS:.0f} % of its entropy or more {parts}: no list of these.")
    kept = block.numbers["examples"] = {}
    for caption, order in chosen.items():
        rows, kept[caption] = [], []
        for i in order.index:
            row = table.loc[i]
            text = texts.get((row["set"], row["id"]), f"id {row['id']}")
            best = int(np.argmax(row["probs"]))
            named = run.classes[best] if best < len(run.classes) else str(best)
            values = {k: float(row[k]) for k in measures}
            found = {"id": str(row["id"]), "set": str(row["set"]), "prediction": named}
            kept[caption].append(found | {"probability": float(row["probs"][best])} | values)
            shown = text if len(text) <= 160 else text[:157] + "..."
            predicted = f"{named} {row['probs'][best]:.2f}"
            rows.append([shown, str(row["set"]), predicted, *(number(v) for v in values.values())])
        heads = ["text", "set", "prediction", *(HEADINGS[k] for k in measures)]
        block.sheets.append(Sheet(caption, heads, rows, texts=2))
    return block


def settings(run: RunData) -> Block:
    """Configuration, environment and times."""
    environment = {k: v for k, v in run.environment.items() if k != "packages"}
    rows = [[k, str(v)] for k, v in {**environment, **run.environment.get("packages", {})}.items()]
    rows += [[f"seconds, {k}", number(v, 2)] for k, v in run.metrics.get("seconds", {}).items()]
    task = run.metrics.get("task", {"sizes": {}})
    rows += [[f"rows, {k}", f"{v:,}"] for k, v in task["sizes"].items()]
    configured = [[k, v] for k, v in _flat(run.config)]
    if run.scan is not None:
        rows.append(["seconds, scan", number(run.scan["seconds"], 2)])
        rows += [[f"rows, scan of {k}", f"{v:,}"] for k, v in run.scan["rows"].items()]
        if not run.metrics:
            configured += [[k, v] for k, v in _flat(run.scan["subject"])]
    if run.scan is not None:
        configured += [[f"scan.{k}", str(v)] for k, v in run.scan["settings"].items()]
    notes = [str(task[k]) for k in ("notes", "source") if task.get(k)]
    return Block(
        sheets=[Sheet("Environment and sizes", ["", ""], rows, 2), Sheet("Settings", ["option", ""], configured, 2)],
        notes=notes,
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", yaml.safe_dump(value, default_flow_style=True).splitlines()[0]


SECTIONS = (
    Section("Summary", "", short, evaluation=True),
    Section(
        "Every method",
        "A curve of n points costs n forward passes and must be compared at equal passes. MI counts only where NLL and "
        "ACC are not worse. Small test sets leave a point of accuracy as noise: look at the intervals.",
        methods_of,
        evaluation=True,
    ),
    Section(
        "Loss along the paths",
        "A barrier on the straight line in (A, B) that the line in ΔW and the aligned lines (balanced, Procrustes, "
        "both alignments) do not have comes from the adapters' rescaling freedom (gauge), not from the loss.",
        loss_paths,
        of_scan=True,
    ),
    Section(
        "Reliability",
        "On the diagonal, confidence is right on average. Below it the model is too sure, above it too cautious.",
        reliability,
        evaluation=True,
    ),
    Section(
        "Uncertainty by set",
        "Total uncertainty is what the data leave open (aleatoric: expected entropy) plus what more data could settle "
        "(epistemic: MI).",
        uncertainty,
        evaluation=True,
    ),
    Section(
        "Selective prediction", "The most uncertain examples are left to someone else.", selective, evaluation=True
    ),
    Section(
        "Diversity along the curve",
        "Different predictions at low loss are what a curve is for. Diversity on train rows that is not there on test "
        "rows was bought, and does not generalise.",
        diversity,
    ),
    Section("Around the curve", "Train loss over a plane, slopes and their bound, sharpness.", landscape),
    Section(
        "Examples",
        "Rows whose uncertainty comes from one part more than that of others, among the more uncertain half.",
        examples,
        evaluation=True,
    ),
    Section("Settings and environment", "", settings),
)
