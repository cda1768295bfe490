"""What the way of scoring does before any training: accuracy and NLL of a base model on validation rows.

    python benchmarks/scoring.py --model FOLDER --data DATA --rows 500

By letter, by the text of the choices (sum or mean over tokens) and, for sentences with a gap, by the choice after the
sentence or by what follows it. Differences here are differences of protocol: docs/evidence/protocols.md shows them.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from common import DEVICE, lora, note, report
from table import write_table

from loracurve.curve.spec import CurveSpec
from loracurve.inference.prediction import predict_split
from loracurve.model.base_model import load_base, model_window
from loracurve.model.curve_model import CurveModel
from loracurve.tasks.config import TaskConfig
from loracurve.tasks.task import load_task

MULTIPLE = ["arc_easy", "arc_challenge", "openbookqa", "boolq", "winogrande_m"]


def ways(name: str) -> dict[str, dict[str, Any]]:
    """Options of the task by the name of the way."""
    found: dict[str, dict[str, Any]] = {"letter": {"scoring": "letter"}}
    if name == "winogrande_m":
        found["text, the choice"] = {"scoring": "text", "template": "choice_text", "normalise": "mean"}
        return found | {"text, behind the gap": {"scoring": "text"}}
    if name == "boolq":
        return found | {"text": {"scoring": "text"}}
    return found | {"text, sum": {"scoring": "text"}, "text, mean": {"scoring": "text", "normalise": "mean"}}


def lines(found: dict[str, Any]) -> list[str]:
    """The table of docs/evidence/protocols.md."""
    env = found["environment"]
    out = [f"{found['model']}, {found['dtype']}, {env['device']}, torch {env['packages']['torch']}.", ""]
    out += ["| set | rows | majority | scored by | ACC | NLL |", "|---|---|---|---|---|---|"]
    for name, by_way in found["tasks"].items():
        for way, f in by_way.items():
            shown = f"{f['acc']:.3f} ± {f['se']:.3f} | {f['nll']:.3f}"
            out.append(f"| {name} | {f['rows']} | {f['majority']:.3f} | {way} | {shown} |")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or name of the base model")
    parser.add_argument("--data", type=Path, required=True, help="folder of data sets")
    parser.add_argument("--rows", type=int, default=500, help="validation rows of each set at most")
    parser.add_argument("--tasks", nargs="*", default=MULTIPLE)
    parser.add_argument("--dtype", default="bfloat16" if DEVICE.type == "cuda" else "float32")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--page", type=Path, default=Path("docs/evidence/protocols.md"), help="its table is made anew")
    options = parser.parse_args()
    options.shape = Path(options.model).name.split(".")[0].lower()
    name = Path(options.model).name
    command = f"python benchmarks/scoring.py --model {name} --data DATA --rows {options.rows}"
    started = time.perf_counter()
    base, tokenizer = load_base(options.model, False, options.dtype)
    window = model_window(base)
    model = CurveModel(base, lora(8), CurveSpec.slots(1)).to(DEVICE)  # fresh adapters: B is 0
    figures: dict[str, Any] = {"model": name, "rows": options.rows, "dtype": options.dtype, "tasks": {}}
    for data in options.tasks:
        found = figures["tasks"][data] = {}
        for way, settings in ways(data).items():
            config = TaskConfig(str(options.data / data), limit_validation=options.rows, max_length=512, **settings)
            task = load_task(config, tokenizer, window)
            encoded = task.encode("validation")
            labels = encoded.labels
            predictive = predict_split(model, encoded, torch.zeros(1, dtype=torch.float64))
            accuracy = float(predictive.correct(labels).double().mean())
            found[way] = {
                "rows": len(labels),
                "majority": float(torch.bincount(labels).max()) / len(labels),
                "acc": accuracy,
                "se": math.sqrt(accuracy * (1 - accuracy) / len(labels)),
                "nll": float(predictive.negative_log_likelihood(labels).mean()),
            }
            shown = {k: round(v, 4) for k, v in found[way].items()}
            note(started, f"{data}, {way}: {shown}")
            report("scoring", options, figures, command)
    found = json.loads((options.out / f"scoring-{options.shape}-{DEVICE.type}.json").read_text())
    write_table(options.page, lines(found))


if __name__ == "__main__":
    main()
