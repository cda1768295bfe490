"""AUROC of foreign rows by the distance of the curve's states, of the base's, and of both together, from stored cells.

python results/distances.py unknowns_choosing
python results/distances.py unknowns --tables    (AUROC and the stream by both, with the intervals of the tables)

Both: each divided by its standard deviation among validation rows, added (`loracurve.inference.familiarity.balanced`);
largest: the larger of the two, each by mean and deviation; p: the smaller p-value. Means over seeds. The distances of
the base are from `base_states/TASK.parquet` where it is: cells of tasks with a head have wrong ones (NOTES.md).
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from loracurve.bench.results import read_results
from loracurve.bench.store import Predictions, read_predictions
from loracurve.bench.suite import Cell, full_ensemble, load_suite
from loracurve.bench.tables.foreign import foreign as foreign_table
from loracurve.bench.tables.foreign import stream
from loracurve.inference.familiarity import p_values
from loracurve.inference.metrics import auroc

NAMES = ("curve", "base", "both", "largest", "p")


def distances(cell: Predictions, again: pd.DataFrame | None) -> dict[str, Tensor]:
    """[E] of every set."""
    if again is None:
        return {name: p.distance for name, p in cell.sets.items() if p.distance is not None}
    values = again.set_index(["set", "id"]).distance
    return {
        s: torch.tensor([values[s, i] for i in ids], dtype=torch.float64) for s, ids in cell.ids.items() if s in values
    }


def scores(curve: dict[str, Tensor], base: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """[E] of a set by the name of the score; higher is farther."""
    found, known = ([of[n] for of in (curve, base)] for n in (name, "validation"))
    scaled = [(x - k.mean()) / k.std(correction=0) for x, k in zip(found, known, strict=True)]
    p = [p_values(x, k.sort().values) for x, k in zip(found, known, strict=True)]
    values = (*found, scaled[0] + scaled[1], torch.maximum(*scaled), -torch.minimum(*p))
    return dict(zip(NAMES, values, strict=True))


def main(store: Path) -> None:
    found: dict[str, list[list[float | None]]] = {}
    for path in sorted(store.glob("cells/*/*/curve_base_s_states/predictions.parquet")):
        beside = path.parent.parent / "curve_Gaussians" / path.name
        if not beside.is_file():
            continue
        file = store.parent / "base_states" / f"{path.parts[-4]}.parquet"
        again = pd.read_parquet(file) if file.is_file() else None
        curve, base = distances(read_predictions(beside), None), distances(read_predictions(path), again)
        test = scores(curve, base, "test")
        for name in (n for n in curve if n.startswith("ood:")):
            other = scores(curve, base, name)
            values = [auroc(torch.cat([test[s], other[s]]), foreign(test[s], other[s])).value for s in NAMES]
            assert None not in values
            found.setdefault(f"{path.parts[-4]} -> {name[4:]}", []).append(values)
    means = {pair: torch.tensor(v, dtype=torch.float64).mean(0) for pair, v in found.items()}
    means["mean"] = torch.stack([*means.values()]).mean(0)
    print("| pair |", " | ".join(NAMES), "|\n|" + "---|" * (len(NAMES) + 1))
    for pair, value in means.items():
        print(f"| {pair} |", " | ".join(f"{v:.4f}" for v in value.tolist()), "|")


def by_tables(store: Path) -> None:
    """The lines of `foreign` and `stream` of the curve with Gaussians, as if its cells had measured both distances."""
    suite = load_suite(store / "suite.yaml")
    results = read_results(suite, store)
    kept = (full_ensemble(suite), "curve, Gaussians", "curve, base's states")
    for cell in [c for c in results.done if c.method not in kept]:
        del results.done[cell]
    for cell, found in results.done.items():
        if cell.method == kept[1]:
            base = results.done[Cell(cell.task, cell.seed, kept[2])].predictions
            both = {n: scores(distances(found.predictions, None), distances(base, None), n)["both"] for n in base.sets}
            sets = found.predictions.sets
            sets |= {name: replace(sets[name], distance=distance) for name, distance in both.items()}
    for table in (foreign_table(results), stream(results)):
        table.rows = [row for row in table.rows if row[0] == kept[1]]
        print(table.markdown())


def foreign(test: Tensor, other: Tensor) -> Tensor:
    return torch.cat([torch.zeros(len(test)), torch.ones(len(other))]).bool()


if __name__ == "__main__":
    (by_tables if "--tables" in sys.argv else main)(Path(__file__).resolve().parent / sys.argv[1])
