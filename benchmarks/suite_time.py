"""P11: what the evidence of one task and seed takes: ten anchors, a free curve of five units, predictions of all sets.

A suite of `loracurve bench` on a model with random weights and a task of SST-2's sizes and lengths (`--data`: a folder
that holds it). With `--workers` as many seeds run by one worker and by so many of a Ray cluster: predictions must be
the same to the last bit, and the times are compared.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import arguments, build, report, show
from predicting import tokenizer_of
from whole_set import texts

SIZES = {"train": 6920, "validation": 872, "test": 1821}
LABELS = ["negative", "positive"]


def rows_of(split: str, data: Path | None, count: int) -> list[dict[str, Any]]:
    if data is not None:
        return [json.loads(line) for line in (data / f"{split}.jsonl").read_text().splitlines()][:count]
    found = texts(None, count)
    return [{"id": f"{split}-{i}", "text": f"{split} {text}", "label": i % 2} for i, text in enumerate(found)]


def prepare(folder: Path, options: Any) -> Path:
    """Model, task and suite on disk; returns the suite's file."""
    data = folder / "data" / "made"
    data.mkdir(parents=True)
    words = []
    for split, size in SIZES.items():
        rows = rows_of(split, options.data, min(size, options.rows or size))
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        words += [row["text"] for row in rows]
    (data / "meta.json").write_text(json.dumps({"name": "made", "task": "classification", "labels": LABELS}))
    base = build(options.shape)
    base.save_pretrained(folder / "model")
    tokenizer_of(["Text: Class: A B 0 1", *LABELS, *words], base.config.vocab_size).save_pretrained(folder / "model")
    curve = {
        "method": "curve",
        "curve": {"kind": "free", "segments": 4},
        "units": 5,
        "training": {"evaluation_points": 5, "evaluate_every": 100, "points": 1, "share_points": False},
    }
    suite = {
        "model": {"name": str(folder / "model"), "dtype": "float32" if options.shape == "small" else "bfloat16"},
        "data_folder": str(folder / "data"),
        "seeds": list(range(1, 1 + max(options.workers, 1))),
        "anchors": 10,
        "train_rows": 0,
        "references": ["ensemble 10"],
        "training": {"steps": options.steps, "batch_size": 32, "learning_rate": 1e-3, "evaluate_every": 50},
        "tasks": {"made": {"scoring": "label", "limit_validation": 600, "limit_test": 1200}},
        "methods": {"ensemble 10": {"method": "ensemble", "members": 10}, "curve": curve},
    }
    file = folder / "suite.yaml"
    file.write_text(json.dumps(suite))  # which is YAML
    return file


def run(suite: Path, out: Path, *more: str) -> float:
    """Seconds of the command, from an empty store to its tables."""
    command = [sys.executable, "-W", "ignore", "-m", "loracurve.cli", "bench", str(suite), "--out", str(out), *more]
    begin = time.perf_counter()
    subprocess.run(command, check=True, stdout=sys.stderr)
    return time.perf_counter() - begin


def seconds_of(out: Path) -> dict[str, dict[str, float]]:
    """What each cell's record says, by seed and method."""
    found = {}
    for path in sorted(out.glob("cells/*/*/*/cell.json")):
        record = json.loads(path.read_text())
        kept = {name: record[name] for name in ("fit_seconds", "predict_seconds", "predicted_rows")}
        found[f"{record['seed']} {record['method']}"] = kept
    for path in sorted(out.glob("anchors/*/*/anchors.json")):
        found[f"{path.parent.name} anchors"] = {"fit_seconds": json.loads(path.read_text())["seconds"]}
    return found


def main() -> None:
    options = arguments(
        __doc__,
        data={"type": Path},
        rows={"type": int, "help": "of each split at most"},
        steps={"type": int, "default": 300},
        workers={"type": int, "default": 0},
    )
    command = f"python benchmarks/suite_time.py --shape {options.shape} --steps {options.steps}"
    command += f" --data DATA/{options.data.name}" if options.data else ""
    command += f" --workers {options.workers}" if options.workers else ""
    figures: dict[str, Any] = {"steps": options.steps, "data": options.data.name if options.data else "synthetic"}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        suite = prepare(folder, options)
        one = folder / "one"
        figures["s"] = run(suite, one, "--jobs", "1")
        figures["cells"] = seconds_of(one)
        report("suite_time", options, figures, command)
        if options.workers:
            several = folder / "several"
            os.environ["RAY_DEDUP_LOGS"] = "0"
            seconds = run(suite, several, "--jobs", str(options.workers), "--executor", "ray")
            same = {
                str(path.parent.relative_to(one)): path.read_bytes() == (several / path.relative_to(one)).read_bytes()
                for path in one.glob("cells/*/*/*/predictions.parquet")
            }
            figures["ray"] = {"workers": options.workers, "s": seconds, "speedup": figures["s"] / seconds, "same": same}
            report("suite_time", options, figures, command)
    show("suite_time", figures)


if __name__ == "__main__":
    main()
