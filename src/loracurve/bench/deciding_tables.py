"""Tables of the deciding measures and of paired comparisons."""

from __future__ import annotations

import statistics
from pathlib import Path

import torch

from loracurve.bench.deciding import (
    deep_ensemble_equivalent,
    ensemble_scores,
    holm,
    novel_share,
    paired_p_value,
)
from loracurve.bench.results import CellResult, Results, references_of, seed_of, shared_seeds, stacked
from loracurve.bench.suite import full_ensemble
from loracurve.bench.tables import Table, Value
from loracurve.metrics import bootstrap_interval
from loracurve.storage import read_json, write_json

__all__ = ["comparisons", "deciding"]

_CURVE_ANCHORS = 3


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


def deciding(results: Results, out: Path) -> list[Table]:
    """Which data sets count, mean scores of ensembles of each size, and deep-ensemble equivalents."""
    whole = full_ensemble(results.suite)
    most = results.suite.anchors
    data = Table(
        "data_sets",
        "Which data sets count",
        ["task", "test rows", "majority share", "single adapter ACC", "counts"],
        notes="A data set counts where single adapters exceed the majority class by three standard errors.",
    )
    sizes = Table("ensembles", "Ensembles of each size, after temperature scaling", ["task", "M", "NLL ts", "Brier ts"])
    sizes.notes = "Mean over all, or 120 random, subsets of the members, and over seeds."
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
        scores = {m.cell.seed: _scores(m, out) for m in members}
        for size in range(most):
            values = [sum(s[k][size] for s in scores.values()) / len(scores) for k in ("nll", "brier")]
            sizes.rows.append([task, size + 1, *values])
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
    for method, pairs in found.items():
        medians = [statistics.median(float(p[k] or most + 1) for p in pairs) for k in (0, 1)]
        shown = [f"> {most}" if m > most else f"{m:g}" for m in medians]
        equivalents.rows.append(["median of those that count", "yes", method, *shown, None, None])
    return [data, sizes, equivalents]


def _scores(whole: CellResult, out: Path) -> dict[str, list[float]]:
    """Scores of ensembles of each size; kept beside the predictions, since hundreds of temperatures are fitted."""
    path = whole.cell.folder(out) / "ensemble_scores.json"
    if path.is_file():
        kept = read_json(path)
        if isinstance(kept, dict) and kept.get("options") == whole.record["options"]:
            scores: dict[str, list[float]] = kept["scores"]
            return scores
    labels = whole.predictions.labels
    scores = ensemble_scores(
        whole.points("validation"), labels["validation"], whole.points("test"), labels["test"], seed=whole.cell.seed
    )
    write_json(path, {"options": whole.record["options"], "scores": scores})
    return scores


def _size(equivalent: int | None, most: int) -> str:
    return f"> {most}" if equivalent is None else str(equivalent)
