"""P12: one adapter in place of a curve. What `loracurve distill` loses, and which texts teach it best.

`python benchmarks/distilling.py DATA MODEL --sets sst2 cr`, with the data folder and the model of a suite. For each set
its curve is fitted as the suite fits it, but by `loracurve fit`. Then one adapter is taught from it by training rows
alone, by these with words left out beside them, by texts that nobody labelled (every second test row, which is then no
test row), and by all. Curve and adapters are judged on the other test rows.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from loracurve.baselines.curve import Curve, with_changes
from loracurve.bench.config import SuiteConfig
from loracurve.bench.suite import load_suite, method_of
from loracurve.model.config import ModelConfig
from loracurve.runs.config import RunConfig
from loracurve.runs.distill import distill_run
from loracurve.runs.evaluate import MethodPredictions, summarise
from loracurve.runs.fit import fit_run
from loracurve.runs.run import open_run
from loracurve.system.environment import environment
from loracurve.system.files import read_json, write_json
from loracurve.tasks.config import TaskConfig
from loracurve.tasks.task import open_dataset
from loracurve.training.config import FitConfig

# Pairs whose other texts are foreign to the classes and have the form of the set's own.
FOREIGN = {
    "ag_news": ["sst2", "subj"],
    "cola": ["sst2", "ag_news"],
    "cr": ["ag_news"],
    "sst2": ["ag_news"],
    "subj": ["ag_news"],
}
FOREIGN_ROWS = 500
LEFT_OUT = 0.15
TEACHING = ("training rows", "words left out", "unlabelled", "all")
CLOSE = 0.003
"""nat above the curve's NLL, the goal"""


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def halved(data: Path, folder: Path) -> list[dict[str, Any]]:
    """Copy a data set with every other test row, and return the rest without labels."""
    folder.mkdir(parents=True)
    for name in ("meta.json", "train.jsonl", "validation.jsonl"):
        (folder / name).write_text((data / name).read_text())
    rows = lines_of(data / "test.jsonl")
    write_lines(folder / "test.jsonl", rows[::2])
    return [{k: v for k, v in row.items() if k != "label"} for row in rows[1::2]]


def thinned(rows: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """The rows without labels, of each text some words left out."""
    draw = random.Random(seed)

    def some(text: str) -> str:
        words = text.split()
        return " ".join(w for w in words if draw.random() >= LEFT_OUT) or text

    return [
        {k: some(v) if k.startswith("text") else f"{v}-thinned" for k, v in row.items() if k != "label"} for row in rows
    ]


def judged(folder: Path, data: Path, foreign: list[str]) -> dict[str, Any]:
    """Figures of a run's average on its test rows, and by which it tells foreign texts from them."""
    run = open_run(folder)
    average = run.average()
    sets = {name: run.task.encode(name) for name in ("validation", "test")}
    for name in foreign:
        rows = open_dataset(str(data / name), whole=True).rows("test")[:FOREIGN_ROWS]
        sets[f"foreign {name}"] = run.task.encode_foreign(rows, name)
    found = average.predict_all(run.model, sets)
    validation = found.pop("validation"), sets["validation"].labels
    method = MethodPredictions("average", len(average.weights), found, validation=validation)
    report = summarise([method], {"test": sets["test"].labels})["average"]
    return {
        "passes": report["passes"],
        **{name: report["sets"]["test"][name] for name in ("nll", "acc", "brier", "ece")},
        "after_temperature": report["tempered"]["sets"]["test"],
        "temperature": report["tempered"]["temperature"],
        "auroc": {
            other: {k: v for k, v in report["detection"][f"foreign {other}"].items() if k.startswith("auroc")}
            for other in foreign
        },
        "rows": {name: len(encoded) for name, encoded in sets.items()},
    }


def one_set(name: str, data: Path, model: ModelConfig, suite: SuiteConfig, seed: int, place: Path) -> dict[str, Any]:
    texts = halved(data / name, place / "data" / name)
    task, training = suite.tasks[name], suite.training_of(name, seed)
    curve = method_of(suite, "curve")
    assert isinstance(curve, Curve) and curve.units is not None
    options = with_changes(FitConfig(**vars(training)), curve.training, "curve")
    config = RunConfig(
        model,
        TaskConfig(str(place / "data" / name), task.scoring, limit_validation=task.limit_validation),
        curve=curve.curve,
        curve_training=replace(options, steps=round(curve.units * training.steps)),
    )
    begin = time.perf_counter()
    fit_run(config, place / name, progress=False)
    found: dict[str, Any] = {
        "fit_s": time.perf_counter() - begin,
        "curve": judged(place / name, data, FOREIGN.get(name, [])),
    }
    less = thinned(lines_of(data / name / "train.jsonl"), seed)
    for how, rows in zip(TEACHING, ([], less, texts, less + texts), strict=True):
        out, file = place / f"{name} {how}", None
        if rows:
            file = str(write_lines(place / f"{name} {how}.jsonl", rows))
        begin = time.perf_counter()
        distill_run(str(place / name), out, file)
        seconds = time.perf_counter() - begin
        record = read_json(out / "distilled.json")
        found[how] = {"s": seconds, "distilled": {k: record[k] for k in ("rows", "steps", "best_step", "validation")}}
        found[how] |= judged(out, data, FOREIGN.get(name, []))
        gap = found[how]["nll"] - found["curve"]["nll"]
        print(f"{name}, {how}: NLL {found[how]['nll']:.4f}, {gap:+.4f} against the curve's", flush=True)
    return found


def summary(folder: Path, device: str) -> dict[str, Any]:
    """Of all sets that are there: how far the adapters are above the curves, and below them by AUROC."""
    sets = [read_json(path) for path in sorted(folder.glob(f"*-{device}.json"))]
    gaps = {how: {s["set"]: s[how]["nll"] - s["curve"]["nll"] for s in sets} for how in TEACHING}
    lost = {
        how: {
            f"{s['set']}, {other}": {k: s[how]["auroc"][other][k] - v for k, v in own.items()}
            for s in sets
            for other, own in s["curve"]["auroc"].items()
        }
        for how in TEACHING
    }
    return {
        "sets": len(sets),
        "nll_above_curve": {how: gap | {"mean": fmean(gap.values())} for how, gap in gaps.items()},
        "within": {how: sum(v <= CLOSE for v in gap.values()) for how, gap in gaps.items()},
        "auroc_minus_curve": lost,
        "lowest_auroc_within_minus_curve": {
            how: min(each["auroc_within"] for each in pairs.values()) for how, pairs in lost.items()
        },
        "environment": sets[0]["environment"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("model")
    parser.add_argument("--sets", nargs="*", help="none: only the summary of those that are there; left out: all")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--suite", default="results/suites/tuned.yaml")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/distilling"))
    parser.add_argument("--device", help="of the figures to sum up; left out: this machine's")
    asked = parser.parse_args()
    suite = load_suite(asked.suite, [])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in list(suite.tasks) if asked.sets is None else asked.sets:
        with tempfile.TemporaryDirectory() as place:
            model = ModelConfig(asked.model, dtype=asked.dtype)
            found = one_set(name, asked.data, model, suite, asked.seed, Path(place))
        env = environment() | {"command": f"python benchmarks/distilling.py DATA MODEL --sets {name}"}
        asked.out.mkdir(parents=True, exist_ok=True)
        write_json(asked.out / f"{name}-{device}.json", {"set": name, "seed": asked.seed, **found, "environment": env})
    of = asked.device or device
    found = summary(asked.out, of)
    write_json(asked.out.parent / f"distilling-{of}.json", found)
    for how in TEACHING:
        mean, auroc = found["nll_above_curve"][how]["mean"], found["lowest_auroc_within_minus_curve"][how]
        print(
            f"{how}: NLL {mean:+.4f} against the curve's in the mean of {found['sets']} sets, within {CLOSE} on "
            f"{found['within'][how]}; AUROC by the part within points {auroc:+.3f} at worst"
        )


if __name__ == "__main__":
    main()
