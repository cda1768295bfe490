"""The sections of a report: for each run figures, tables and sentences, made from what its files hold."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import yaml

from loracurve.report import figures, frames, prediction_plots
from loracurve.report.blocks import Block, Section, Sheet
from loracurve.report.landscape_sections import diversity, landscape, loss_paths
from loracurve.report.numbers import interval, number, star
from loracurve.report.run_data import RunData, texts_of
from loracurve.system.tables import records

__all__ = ["SECTIONS", "side_by_side"]


COVERAGES = (0.5, 0.7, 0.8, 0.9, 0.95, 1.0)

_NO_PREDICTIONS = "No predictions were kept (language modelling)."

_SUMMARY = {"acc": 3, "nll": 4, "brier": 4, "ece": 3, "mutual_information": 4, "pairwise_jsd": 4, "aurc_entropy": 4}

_HEADS = ["passes", "ACC", "NLL", "Brier", "ECE", "MI", "pair JSD", "AURC"]


def _method_row(method: Mapping[str, Any]) -> list[str]:
    test = method["sets"]["test"]
    # One point has no information between points; zeros would read as findings.
    hidden = ("mutual_information", "pairwise_jsd") if method["passes"] == 1 else ()
    return [str(method["passes"]), *(number(None if k in hidden else test.get(k), d) for k, d in _SUMMARY.items())]


def side_by_side(runs: Sequence[RunData]) -> Sheet | None:
    """Ensemble and curve of every evaluated run in one table; None for a single run."""
    rows = [
        [f"{run.name}: {name}", *_method_row(run.metrics["methods"][name])]
        for run in runs
        for name in ("ensemble", "curve")
        if name in run.metrics.get("methods", {})
    ]
    if len(runs) < 2 or not rows:
        return None
    return Sheet("Test split of each run", ["run: method", *_HEADS], rows)


def summary(run: RunData) -> Block:
    """Every method on the test split, and the curve's paired differences."""
    methods = run.metrics["methods"]
    rows = [[name, *_method_row(method)] for name, method in methods.items()]
    examples = next(iter(methods.values()))["sets"]["test"]["examples"]
    block = Block(sheets=[Sheet(f"Test split, {examples:,} examples", ["method", *_HEADS], rows)])
    comparisons = run.metrics.get("comparisons", [])
    block.findings = [_verdict(c, methods) for c in comparisons if c["second"] == "ensemble"]
    compared = [
        [c["second"], *(interval(c[k]) + star(c[k]) if k in c else number(None) for k in ("nll", "acc", "brier"))]
        for c in comparisons
    ]
    if compared:
        caption = "Curve minus other on the same examples, 95 % bootstrap interval; * excludes 0"
        block.sheets.append(Sheet(caption, ["other", "NLL", "ACC", "Brier"], compared))
    else:
        block.notes.append("No baselines: a free curve has no anchors to compare with.")
    return block


def _verdict(comparison: Mapping[str, Any], methods: Mapping[str, Any]) -> str:
    """What the paired difference of NLL says, in a sentence."""
    found = comparison["nll"]
    words = "not distinguishable from"
    if found["distinguishable"]:
        words = "better than" if found["estimate"] < 0 else "worse than"
    passes = [methods[comparison[k]]["passes"] for k in ("first", "second")]
    return f"The curve ({passes[0]} passes) has a test NLL {words} the ensemble's of its anchors ({passes[1]} passes)."


def reliability(run: RunData) -> Block:
    """Reliability diagram of single adapter, ensemble and curve."""
    if run.predictions is None:
        return Block(notes=[_NO_PREDICTIONS])
    frame = frames.reliability_frame(run.predictions)
    drawn = figures.panels(
        [partial(prediction_plots.reliability, frame), partial(prediction_plots.confidences, frame)],
        (5.2, 4.8),
        sharex=True,
        height_ratios=(3, 1),
    )
    block = Block(figures=[("reliability", "Accuracy against confidence", drawn)])
    block.numbers["reliability"] = records(frame)
    return block


def uncertainty(run: RunData) -> Block:
    """Distributions of the uncertainties by set, and how well they tell sets apart."""
    block = Block()
    if run.predictions is not None:
        frame = frames.uncertainty_frame(run.predictions)
        draws = [partial(prediction_plots.uncertainty, frame, measure=m) for m in frames.MEASURES]
        drawn = figures.panels(draws, (5.2, 7.2))
        block.figures.append(("uncertainty", "Uncertainty of the curve by set", drawn))
        block.numbers["items"] = frame.groupby("set", sort=False)["items"].first().to_dict()
    measures = {"entropy": "entropy", "expected_entropy": "expected", "mutual_information": "MI"}
    sets_of_curve = run.metrics["methods"]["curve"]["sets"]
    rows = [[n, *(number(v[k]) for k in measures), number(v.get("disagreement"), 3)] for n, v in sets_of_curve.items()]
    block.sheets.append(Sheet("Means of the curve by set, nats", ["set", *measures.values(), "disagreement"], rows))
    detection = [
        [
            f"{method}: {name}",
            number(found["auroc_entropy"], 3),
            number(found["auroc_mi"] if values["passes"] > 1 else None, 3),
        ]
        for method, values in run.metrics["methods"].items()
        for name, found in values["detection"].items()
    ]
    if detection:
        caption = "AUROC of telling a set from the test split (.5 is chance)"
        block.sheets.append(Sheet(caption, ["method: set", "by entropy", "by MI"], detection))
    else:
        block.notes.append("No set out of distribution was evaluated (evaluation.ood).")
    return block


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
        rows.append([name, *(number(a, 3) for a in at)])
    heads = ["ranked by", *(f"{c:.0%}" for c in COVERAGES)]
    drawn = figures.figure_of(prediction_plots.selective_prediction, frame)
    block = Block(figures=[("selective_prediction", "Accuracy among the examples answered", drawn)])
    block.sheets.append(Sheet("Accuracy at coverage", heads, rows))
    block.numbers["selective_accuracy"] = kept
    return block


def examples(run: RunData, count: int = 6) -> Block:
    """Where ambiguity and disagreement of the points rank examples most differently, in the more uncertain half."""
    if run.predictions is None:
        return Block(notes=[_NO_PREDICTIONS])
    table = run.predictions[run.predictions["method"] == "curve"].reset_index(drop=True)
    texts = texts_of(run)
    # The data's ambiguity, not the total: MI is part of the total and would hide in it. Ranks of rows of which every
    # point is certain say nothing.
    uncertain = table[table["entropy"] >= table["entropy"].median()]
    gap = uncertain["mutual_information"].rank(pct=True) - uncertain["expected_entropy"].rank(pct=True)
    block = Block(notes=[] if texts else ["The data set cannot be opened here, so ids stand for texts."])
    kept = block.numbers["examples"] = {}
    for caption, order in (
        ("The points disagree more than the text is ambiguous (high MI, low expected entropy)", gap.nlargest(count)),
        ("The text is ambiguous and the points agree on it (low MI, high expected entropy)", gap.nsmallest(count)),
    ):
        rows, kept[caption] = [], []
        for i in order.index:
            row = table.loc[i]
            text = texts.get((row["set"], row["id"]), f"id {row['id']}")
            best = int(np.argmax(row["probs"]))
            named = run.classes[best] if best < len(run.classes) else str(best)
            measures = {k: float(row[k]) for k in frames.MEASURES}
            found = {"id": str(row["id"]), "set": str(row["set"]), "prediction": named}
            kept[caption].append(found | {"probability": float(row["probs"][best])} | measures)
            shown = text if len(text) <= 160 else text[:157] + "..."
            predicted = f"{named} {row['probs'][best]:.2f}"
            rows.append([shown, str(row["set"]), predicted, *(number(v, 3) for v in measures.values())])
        heads = ["text", "set", "prediction", "entropy", "expected", "MI"]
        block.sheets.append(Sheet(caption, heads, rows, texts=2))
    return block


def settings(run: RunData) -> Block:
    """Configuration, environment and times."""
    environment = {k: v for k, v in run.environment.items() if k != "packages"}
    rows = [[k, str(v)] for k, v in {**environment, **run.environment.get("packages", {})}.items()]
    rows += [[f"seconds, {k}", f"{v:.0f}"] for k, v in run.metrics.get("seconds", {}).items()]
    task = run.metrics.get("task", {"sizes": {}})
    rows += [[f"rows, {k}", f"{v:,}"] for k, v in task["sizes"].items()]
    configured = [[k, v] for k, v in _flat(run.config)]
    if run.scan is not None:
        rows.append(["seconds, scan", f"{run.scan['seconds']:.0f}"])
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
    Section(
        "Summary",
        "A 10-point curve costs 10 forward passes and must be compared at equal passes. MI counts only where NLL and "
        "ACC are not worse. Small test sets leave a point of accuracy as noise: look at the intervals.",
        summary,
        evaluation=True,
    ),
    Section(
        "Loss along the paths",
        "A barrier on the straight line in (A, B) that the line in ΔW and the aligned lines (balanced, Procrustes, "
        "both alignments) do not have comes from the adapters' rescaling freedom (gauge), not from the loss.",
        loss_paths,
    ),
    Section("Reliability", "On the diagonal, confidence is right on average.", reliability, evaluation=True),
    Section(
        "Uncertainty by set",
        "Total uncertainty is what the data leave open (expected entropy) plus what the points disagree on (MI).",
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
        "Where the two kinds of uncertainty rank an example most differently, among the more uncertain half.",
        examples,
        evaluation=True,
    ),
    Section("Settings and environment", "", settings),
)
