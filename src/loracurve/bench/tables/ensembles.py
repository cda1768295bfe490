"""Tables of ensembles of each size and deep-ensemble equivalents, and of paired comparisons."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from loracurve.bench.registry import ONE_MODE, method_name
from loracurve.bench.results import CellResult, Results, references_of, seed_of, shared_seeds, stacked
from loracurve.bench.statistics import (
    MOST_SUBSETS,
    deep_ensemble_equivalent,
    ensemble_auroc,
    ensemble_scores,
    holm,
    mean_or_none,
    novel_share,
    paired_p_value,
)
from loracurve.bench.store import WIDE
from loracurve.bench.suite import full_ensemble
from loracurve.bench.tables.table import Table, Value
from loracurve.inference.intervals import Interval, bootstrap_interval
from loracurve.system.files import read_json, write_json
from loracurve.system.paths import is_file

__all__ = ["comparisons", "ensembles"]


_CURVE_ANCHORS = 3

_SCORES = {"NLL": "nll", "Brier": "brier"}


def comparisons(results: Results) -> Table:
    """Paired differences of every method to the references."""
    table = Table(
        "comparisons",
        "Paired differences: method minus reference, on test rows, averaged over seeds",
        ["reference", "measure", "task", "method", "difference", "p", "p Holm"],
        notes="Negative NLL and Brier, positive ACC: the method is better. p: normal approximation over test rows; "
        "Holm's correction over all rows of one reference and measure.",
    )
    for reference in references_of(results.suite):
        for measure in ("nll", "acc", "brier", "nll_ts", "brier_ts"):
            rows, p_values = [], []
            for task, method, done in results.each():
                mine, other = shared_seeds(done, results.seeds(task, reference))
                if method == reference or not mine:
                    continue
                differences = stacked(mine, measure) - stacked(other, measure)
                interval = bootstrap_interval(differences, seed_of(task, "comparison"))
                rows.append([reference, measure, task, method, interval])
                p_values.append(paired_p_value(differences))
            for row, p, corrected in zip(rows, p_values, holm(p_values), strict=True):
                table.rows.append([*row, p, corrected])
    return table


def ensembles(results: Results, out: Path) -> list[Table]:
    """Which data sets count, ensembles of each size beside methods of one mode, and deep-ensemble equivalents."""
    whole = full_ensemble(results.suite)
    most = results.suite.anchors
    data = Table(
        "data_sets",
        "Which data sets count",
        ["task", "test rows", "majority share", "single adapter ACC", "counts"],
        notes="A data set counts where single adapters exceed the majority class by three standard errors. Sets with "
        f"more than {WIDE} classes, of whose methods averages alone are stored, have no part in the next two tables.",
    )
    sizes = Table(
        "ensembles",
        "Ensembles of each size beside methods of one mode",
        ["task", "method", *(f"{n} ts" for n in _SCORES), *(f"error AUROC, {by}" for by in ("MI", "entropy"))],
        notes=f"ts: after temperature scaling. Ensembles of M anchors: means over all, or {MOST_SUBSETS} random, "
        "subsets, and over seeds. The other methods spend the training of one adapter.",
    )
    equivalents = Table(
        "deep_ensemble_equivalents",
        "Deep-ensemble equivalents and diversity",
        ["task", "counts", "method", "DEE NLL", "DEE Brier", "pairwise JSD", "novel"],
        notes="DEE: the smallest M whose ensembles' mean score is no worse, after temperature scaling, means over "
        "seeds. novel: share of test rows to which a point gives a class that none of the first "
        f"{_CURVE_ANCHORS} anchors gives.",
    )
    found: dict[str, list[tuple[int | None, int | None]]] = {}
    for task in results.suite.tasks:
        members, judged = results.seeds(task, whole), results.singles(task)
        if judged is None:
            continue
        accuracy, counts = judged
        labels = members[0].predictions.labels["test"]
        majority = torch.bincount(labels).max().item() / len(labels)
        data.rows.append([task, len(labels), majority, accuracy, "yes" if counts else "no"])
        if not members[0].keeps_points:  # no smaller ensembles can be made of the average
            continue
        kept = {m.cell.seed: _scores(m, out) for m in members}
        scores = {seed: k["scores"] for seed, k in kept.items()}
        sizes.rows += [[task, *row] for row in _sizes_and_modes(results, task, list(kept.values()))]
        for _, method, done in (e for e in results.each() if e[0] == task):
            mine, whole_too = shared_seeds(done, members)
            if not mine:
                continue
            pair = []
            for key in ("nll", "brier"):
                score = float(stacked(mine, f"{key}_ts").mean())
                curve = [sum(scores[m.cell.seed][key][k] for m in mine) / len(mine) for k in range(most)]
                pair.append(deep_ensemble_equivalent(score, curve))
            if counts:
                found.setdefault(method, []).append((pair[0], pair[1]))
            novel = [
                novel_share(r.points("test"), w.points("test")[:_CURVE_ANCHORS])
                for r, w in zip(mine, whole_too, strict=True)
            ]
            jsd = results.figure(task, method, "test", "pairwise_jsd")
            row: list[Value] = [task, "yes" if counts else "no", method, *(_size(d, most) for d in pair)]
            equivalents.rows.append([*row, jsd, sum(novel) / len(novel)])
    sizes.rows += _means(sizes.rows, [task for task, *_, counts in data.rows if counts == "yes"])
    for method, pairs in found.items():
        medians = [statistics.median(float(p[k] or most + 1) for p in pairs) for k in (0, 1)]
        shown = [f"> {most}" if m > most else f"{m:g}" for m in medians]
        equivalents.rows.append(["median of those that count", "yes", method, *shown, None, None])
    return [data, sizes, equivalents]


def _sizes_and_modes(results: Results, task: str, kept: list[dict[str, Any]]) -> list[list[Value]]:
    """Scores of ensembles of 1, 2, ... members, then of each method that trains one adapter."""
    rows: list[list[Value]] = []
    for size in range(results.suite.anchors):
        values: list[Value] = [mean_or_none([k["scores"][name][size] for k in kept]) for name in _SCORES.values()]
        values += [mean_or_none([k["auroc"][by][size] for k in kept]) for by in ("MI", "entropy")]
        rows.append([f"ensemble of {size + 1}", *values])
    for name, method in results.suite.methods.items():
        done = results.seeds(task, name)
        if done and method_name(method) in ONE_MODE:
            scores = [bootstrap_interval(stacked(done, f"{k}_ts"), seed_of(task, "summary")) for k in _SCORES.values()]
            found = [results.figure(task, name, "test", f"error_auroc_{by}") for by in ("mi", "entropy")]
            rows.append([name, *scores, *found])
    return rows


def _means(rows: list[Sequence[Value]], tasks: list[Value]) -> list[Sequence[Value]]:
    """Means over the data sets that count, of methods that are there on all of them."""
    found: list[Sequence[Value]] = []
    for method in dict.fromkeys(row[1] for row in rows):
        mine = [row[2:] for row in rows if row[1] == method and row[0] in tasks]
        if len(mine) == len(tasks) > 1:
            columns = [[v.estimate if isinstance(v, Interval) else v for v in c] for c in zip(*mine, strict=True)]
            found.append(["mean of those that count", method, *(mean_or_none(c) for c in columns)])
    return found


def _scores(whole: CellResult, out: Path) -> dict[str, Any]:
    """Scores of ensembles of each size; kept beside the predictions, since hundreds of temperatures are fitted."""
    path = whole.cell.folder(out) / "ensemble_scores.json"
    if is_file(path):
        kept = read_json(path)
        if (
            isinstance(kept, dict)
            and kept.get("options") == whole.record["options"]
            and kept.get("subsets") == MOST_SUBSETS
        ):
            return kept
    labels, seed = whole.predictions.labels, whole.cell.seed
    parts = whole.points("validation"), labels["validation"], whole.points("test"), labels["test"]
    scores = ensemble_scores(*parts, seed=seed)
    auroc = ensemble_auroc(*parts[2:], seed=seed)
    made = {"options": whole.record["options"], "subsets": MOST_SUBSETS, "scores": scores, "auroc": auroc}
    write_json(path, made)
    return made


def _size(equivalent: int | None, most: int) -> str:
    return f"> {most}" if equivalent is None else str(equivalent)
