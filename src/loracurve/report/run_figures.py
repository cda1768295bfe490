"""The figures of a run directory, drawn from metrics.json and predictions.parquet alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from loracurve.report import figures
from loracurve.storage import read_json

__all__ = ["write_figures"]

_PATHS = ("straight line", "aligned line", "curve")


def write_figures(folder: Path) -> list[Path]:
    """Draw loss along the paths, reliability and uncertainty by set into FOLDER/figures; returns the PNG paths."""
    report = read_json(folder / "metrics.json")
    methods = report["methods"]
    table = pq.read_table(folder / "predictions.parquet").to_pandas()
    out = folder / "figures"
    written = []
    paths = {n: (methods[n]["t"], methods[n]["point_nll"]) for n in _PATHS if n in methods}
    ends = [m for n, m in methods.items() if n.startswith("adapter ")]
    anchors = np.linspace(0, 1, len(ends)).tolist() if ends else []
    loss = figures.loss_along_path(paths, anchors, ylabel="test NLL (nats)")
    written.append(figures.save(loss, out, "loss_along_path")[0])
    test = table[table["set"] == "test"]
    compared = {n: _confidence(test[test["method"] == n]) for n in ("adapter 0", "ensemble", "curve") if n in methods}
    written.append(figures.save(figures.reliability(compared), out, "reliability")[0])
    curve = table[table["method"] == "curve"]
    kinds = {
        name: {k: part[k].to_numpy() for k in ("entropy", "expected_entropy", "mutual_information")}
        for name, part in curve.groupby("set", sort=False)
    }
    written.append(figures.save(figures.uncertainty_by_set(kinds), out, "uncertainty")[0])
    return written


def _confidence(rows: Any) -> tuple[np.ndarray, np.ndarray]:
    """Probability of the predicted class of each row, and whether it is the label."""
    probs = [np.asarray(p) for p in rows["probs"]]
    right = [int(p.argmax()) == y for p, y in zip(probs, rows["label"], strict=True)]
    return np.array([p.max() for p in probs]), np.array(right)
