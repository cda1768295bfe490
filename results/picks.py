"""What two tuning suites chose, put into the suite that follows.

python results/picks.py OUT/minilm_tuning [OUT/minilm_curve_tuning] SUITE.yaml > CHOSEN.yaml

For each set the shortest fine-tune whose validation NLL (average of three adapters, seed 0) is within .002 of the best.
For the curve the rate of the lowest validation NLL: of each set, or one of the lowest mean over sets where the suite's
curves name a rate already. A fit that failed is worse than all others. A set on which the best fine-tune's accuracy is
not three standard errors above the share of the largest class is left out. The tables that this was read from go to the
error stream.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from loracurve.bench.store import read_predictions
from loracurve.system.files import read_json

CLOSE = 0.002


def validation(out: Path) -> pd.DataFrame:
    """A line for each cell: set, method, its options, and what it reaches on validation rows."""
    lines = []
    for path in sorted(out.glob("cells/*/*/*/cell.json")):
        cell = read_json(path)
        if "units" not in cell["options"]["method"]:
            continue
        values = {"set": cell["task"], "method": cell["method"], "options": cell["options"]}
        if cell["status"] != "done":
            lines.append(values | {"nll": math.inf, "above": False, "accuracy": math.nan, "seconds": math.nan})
            continue
        found = read_predictions(path.parent / "predictions.parquet")
        average, labels = found.sets["validation"], found.labels["validation"]
        largest = float(labels.bincount().max()) / len(labels)
        accuracy = float((average.probs.argmax(-1) == labels).double().mean())
        enough = accuracy - largest > 3 * math.sqrt(largest * (1 - largest) / len(labels))
        nll = float(average.negative_log_likelihood(labels).mean())
        reached = {"nll": nll, "accuracy": accuracy, "above": enough, "seconds": cell["fit_seconds"]}
        lines.append(values | reached)
    return pd.DataFrame(lines)


def main(tuned: Path, curves: Path | None, suite: dict[str, Any]) -> None:
    found = validation(tuned)
    show(found)
    for name, of in found.groupby("set"):
        if not of.loc[of.nll.idxmin(), "above"]:
            suite["tasks"].pop(name, None)
            continue
        good = of[of.nll <= of.nll.min() + CLOSE]
        lengths = [o["training"]["steps"] * o["method"]["units"] / o["method"]["members"] for o in good.options]
        _, _, best = min(zip(lengths, good.nll, good.options, strict=True), key=lambda each: each[:2])
        if name in suite["tasks"]:
            steps = round(best["training"]["steps"] * best["method"]["units"] / best["method"]["members"])
            suite["tasks"][name] |= {"steps": steps, "learning_rate": best["method"]["learning_rate"]}
    if curves is not None:
        found = validation(curves)
        show(found)
        named = [t for m in suite["methods"].values() for t in _training_of(m) if "learning_rate" in t]
        if named:
            by_method = found.pivot(index="set", columns="method", values="nll").mean()
            for training in named:
                training["learning_rate"] = _rate(found[found.method == by_method.idxmin()].iloc[0])
        else:
            for name, of in found.groupby("set"):
                if name in suite["tasks"]:
                    suite["tasks"][name]["curve_learning_rate"] = _rate(of.loc[of.nll.idxmin()])
    yaml.safe_dump(suite, sys.stdout, sort_keys=False, default_flow_style=None, width=200)


def _training_of(method: dict[str, Any]) -> list[dict[str, Any]]:
    return [m["training"] for m in (method, method.get("of", {})) if m.get("method") == "curve"]


def _rate(of: pd.Series[Any]) -> float:
    rate: float = of.options["method"]["training"]["learning_rate"]
    return rate


def show(found: pd.DataFrame) -> None:
    for value in ("nll", "accuracy", "seconds"):
        print(
            value,
            found.pivot(index="set", columns="method", values=value).round(4).to_string(),
            sep="\n",
            file=sys.stderr,
        )


if __name__ == "__main__":
    *stores, target = sys.argv[1:]
    main(Path(stores[0]), Path(stores[1]) if stores[1:] else None, yaml.safe_load(Path(target).read_text()))
