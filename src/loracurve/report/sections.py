"""The sections of a report: for each run figures, tables and sentences, made from what its files hold."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml

from loracurve.metrics import risk_coverage_curve
from loracurve.report import figures
from loracurve.report.blocks import Block, Section, Sheet, interval, number
from loracurve.report.landscape_sections import diversity, landscape, loss_paths
from loracurve.report.run_data import RunData, texts_of

__all__ = ["SECTIONS"]

COVERAGES = (0.5, 0.7, 0.8, 0.9, 0.95, 1.0)
_NO_PREDICTIONS = "No predictions were kept (language modelling)."


def summary(run: RunData) -> Block:
    """Every method on the test split, and the curve's paired differences."""
    keys = {"acc": 3, "nll": 4, "brier": 4, "ece": 3, "mutual_information": 4, "pairwise_jsd": 4, "aurc_entropy": 4}
    rows = []
    for name, method in run.metrics["methods"].items():
        test = method["sets"]["test"]
        alone = method["passes"] == 1  # one point has no information between points; zeros would read as findings
        values = [
            number(None if alone and k in ("mutual_information", "pairwise_jsd") else test.get(k), d)
            for k, d in keys.items()
        ]
        rows.append([name, str(method["passes"]), *values])
    examples = next(iter(run.metrics["methods"].values()))["sets"]["test"]["examples"]
    heads = ["method", "passes", "ACC", "NLL", "Brier", "ECE", "MI", "pair JSD", "AURC"]
    block = Block(sheets=[Sheet(f"Test split, {examples:,} examples", heads, rows)])
    compared = [
        [c["second"], *(interval(c[k]) if k in c else "–" for k in ("nll", "acc", "brier"))]
        for c in run.metrics.get("comparisons", [])
    ]
    if compared:
        caption = "Curve minus other on the same examples, 95 % bootstrap interval; * excludes 0"
        block.sheets.append(Sheet(caption, ["other", "NLL", "ACC", "Brier"], compared))
    else:
        block.notes.append("No baselines: a free curve has no anchors to compare with.")
    return block


def reliability(run: RunData) -> Block:
    """Reliability diagram of single adapter, ensemble and curve."""
    if run.predictions is None:
        return Block(notes=[_NO_PREDICTIONS])
    table = run.predictions[run.predictions["set"] == "test"]
    found = {n: _confidence(table[table["method"] == n]) for n in _compared(run)}
    return Block([("reliability", "Accuracy against confidence", figures.reliability(found))])


def uncertainty(run: RunData) -> Block:
    """Distributions of the uncertainties by set, and how well they tell sets apart."""
    block = Block()
    measures = {"entropy": "entropy", "expected_entropy": "expected", "mutual_information": "MI"}
    if run.predictions is not None:
        curve = run.predictions[run.predictions["method"] == "curve"]
        sets = {str(n): {k: part[k].to_numpy() for k in measures} for n, part in curve.groupby("set", sort=False)}
        block.figures.append(
            ("uncertainty", "Uncertainty of the curve by set", figures.uncertainty_by_set(_named(run, sets)))
        )
    sets_of_curve = run.metrics["methods"]["curve"]["sets"]
    rows = [[n, *(number(v[k]) for k in measures), number(v.get("disagreement"), 3)] for n, v in sets_of_curve.items()]
    block.sheets.append(Sheet("Means of the curve by set, nats", ["set", *measures.values(), "disagreement"], rows))
    detection = [
        [f"{method}: {name}", number(found["auroc_entropy"], 3), number(found["auroc_mi"], 3)]
        if values["passes"] > 1
        else [f"{method}: {name}", number(found["auroc_entropy"], 3), "–"]
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
    test = run.predictions[run.predictions["set"] == "test"]
    lines, rows, kept = {}, [], {}
    for method, measure in [(m, "entropy") for m in _compared(run)] + [("curve", "mutual_information")]:
        part = test[test["method"] == method]
        wrong = ~torch.tensor(_confidence(part)[1])
        coverage, risk = risk_coverage_curve(torch.tensor(part[measure].to_numpy()), wrong)
        name = f"{method}, {'MI' if measure == 'mutual_information' else measure}"
        lines[name] = (coverage.numpy(), 1 - risk.numpy())
        at = [float(1 - risk[max(math.ceil(c * len(risk)) - 1, 0)]) for c in COVERAGES]
        kept[name] = dict(zip(map(str, COVERAGES), at, strict=True))
        rows.append([name, *(number(a, 3) for a in at)])
    heads = ["ranked by", *(f"{c:.0%}" for c in COVERAGES)]
    drawn = figures.selective_prediction(lines)
    return Block(
        [("selective_prediction", "Accuracy among the examples answered", drawn)],
        [Sheet("Accuracy at coverage", heads, rows)],
        numbers={"selective_accuracy": kept},
    )


def examples(run: RunData, count: int = 6) -> Block:
    """Where total uncertainty and the disagreement of the points rank an example most differently."""
    if run.predictions is None:
        return Block(notes=[_NO_PREDICTIONS])
    table = run.predictions[run.predictions["method"] == "curve"].reset_index(drop=True)
    texts = texts_of(run)
    # The data's ambiguity, not the total: MI is part of the total and would hide in it.
    gap = table["mutual_information"].rank(pct=True) - table["expected_entropy"].rank(pct=True)
    sheets, kept = [], {}
    for caption, order in (
        ("The points disagree more than the text is ambiguous (high MI, low expected entropy)", gap.nlargest(count)),
        ("The text is ambiguous and the points agree on it (low MI, high expected entropy)", gap.nsmallest(count)),
    ):
        rows = []
        for i in order.index:
            row = table.loc[i]
            text = texts.get((row["set"], row["id"]), f"id {row['id']}")
            best = int(np.argmax(row["probs"]))
            named = run.classes[best] if best < len(run.classes) else str(best)
            rows.append(
                [
                    text if len(text) <= 160 else text[:157] + "...",
                    str(row["set"]),
                    f"{named} {row['probs'][best]:.2f}",
                    *(number(row[k], 3) for k in ("entropy", "expected_entropy", "mutual_information")),
                ]
            )
        heads = ["text", "set", "prediction", "entropy", "expected", "MI"]
        sheets.append(Sheet(caption, heads, rows, texts=2))
        kept[caption] = [table.loc[i, "id"] for i in order.index]
    notes = [] if texts else ["The data set cannot be opened here, so ids stand for texts."]
    return Block(sheets=sheets, notes=notes, numbers={"examples": kept})


def settings(run: RunData) -> Block:
    """Configuration, environment and times."""
    environment = {k: v for k, v in run.environment.items() if k != "packages"}
    rows = [[k, str(v)] for k, v in {**environment, **run.environment.get("packages", {})}.items()]
    rows += [[f"seconds, {k}", f"{v:.0f}"] for k, v in run.metrics.get("seconds", {}).items()]
    if run.scan is not None:
        rows.append(["seconds, scan", f"{run.scan['seconds']:.0f}"])
    task = run.metrics["task"]
    rows += [[f"rows, {k}", f"{v:,}"] for k, v in task["sizes"].items()]
    configured = [[k, v] for k, v in _flat(run.config)]
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


def _compared(run: RunData) -> list[str]:
    return [n for n in ("adapter 0", "ensemble", "curve") if n in run.metrics["methods"]]


def _named(run: RunData, sets: dict[str, Any]) -> dict[str, Any]:
    """In distribution first."""
    return {**({"test": sets["test"]} if "test" in sets else {}), **sets}


def _confidence(rows: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Probability of the predicted class of each row, and whether it is the label."""
    probs = [np.asarray(p) for p in rows["probs"]]
    right = [int(p.argmax()) == y for p, y in zip(probs, rows["label"], strict=True)]
    return np.array([p.max() for p in probs]), np.array(right)


SECTIONS = (
    Section(
        "Summary",
        "A 10-point curve costs 10 forward passes and must be compared at equal passes. MI counts only where NLL and "
        "ACC are not worse. Small test sets leave a point of accuracy as noise: look at the intervals.",
        summary,
    ),
    Section(
        "Loss along the paths",
        "Dotted lines are anchors. A barrier on the straight line in (A, B) that the aligned lines and the line in "
        "ΔW do not have is a matter of gauge, not of the loss.",
        loss_paths,
    ),
    Section("Reliability", "On the diagonal, confidence is right on average.", reliability),
    Section(
        "Uncertainty by set",
        "Total uncertainty is what the data leave open (expected entropy) plus what the points disagree on (MI).",
        uncertainty,
    ),
    Section("Selective prediction", "The most uncertain examples are left to someone else.", selective),
    Section(
        "Diversity along the curve",
        "Different predictions at low loss are what a curve is for. Diversity on train rows that is not there on test "
        "rows was bought, and does not generalise.",
        diversity,
    ),
    Section("Around the curve", "Train loss over a plane, slopes and their bound, sharpness.", landscape),
    Section("Examples", "Where the two kinds of uncertainty rank an example most differently.", examples),
    Section("Settings and environment", "", settings),
)
