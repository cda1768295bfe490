"""Screening on one GPU: ten anchors in one pass, ensembles of them, and variants of the curve, by saved predictions.

    python experiments/screen.py --base MODEL --data FOLDER --out OUT --sets sst2 ag_news subj --seconds 500

Resumable: what is in OUT already is skipped. OUT/<set>.npz holds log-probabilities by method and split, OUT/log.jsonl
one line of figures for each method.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loracurve.bases import load_base
from loracurve.config import LoraOptions
from loracurve.evaluation import labels_of, predict_split
from loracurve.gauge import align
from loracurve.inference import quadrature
from loracurve.loop import LoopConfig
from loracurve.metrics import auroc, expected_calibration_error
from loracurve.model import CurveModel
from loracurve.objective import ObjectiveConfig
from loracurve.predictive import Predictive
from loracurve.run import environment
from loracurve.spec import CurveSpec
from loracurve.tasks import TaskConfig, load_task, open_dataset
from loracurve.training import FitConfig, fit, fit_anchors, slot_times

OOD = {"sst2": ["cr", "ag_news"], "ag_news": ["sst2", "subj"], "subj": ["sst2", "ag_news"], "cr": ["sst2", "ag_news"]}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
POINTS = 10
ANCHORS = LoopConfig(steps=300, batch_size=32, learning_rate=5e-4, evaluate_every=50)
CURVE = FitConfig(steps=300, batch_size=32, learning_rate=5e-4, points=2, evaluate_every=50)


def variants() -> dict[str, dict[str, Any]]:
    """Name -> how the curve differs from: through three aligned anchors, inner points on the line, 300 steps."""
    return {
        "anchored": {},
        "lr 2e-4": {"fit": {"learning_rate": 2e-4}},
        "lr 1e-3": {"fit": {"learning_rate": 1e-3}},
        "not aligned": {"alignment": "none"},
        "inner init": {"inner": "init"},
        "procrustes": {"alignment": "procrustes"},
        "4 points": {"fit": {"points": 4}},
        "own points": {"fit": {"points": 1, "share_points": False}},
        "own 2 points": {"fit": {"points": 2, "share_points": False}},
        "mixture .5": {"fit": {"objective": ObjectiveConfig("mixture", 0.5)}},
        "mixture 1": {"fit": {"objective": ObjectiveConfig("mixture", 1.0)}},
        "bonus 1": {"fit": {"objective": ObjectiveConfig("bonus", 1.0)}},
        "600 steps": {"fit": {"steps": 600, "evaluate_every": 100}},
        "degree 3": {"degree": 3},
        "free 1x2": {"free": (1, 2), "fit": {"steps": 600, "evaluate_every": 100}},
        "free 2x2": {"free": (2, 2), "fit": {"steps": 600, "evaluate_every": 100}},
        "5 anchors": {"anchors": 5, "fit": {"steps": 400}},
        "decay .1": {"fit": {"weight_decay": 0.1}},
    }


def figures(found: dict[str, Predictive], labels: dict[str, torch.Tensor]) -> dict[str, float]:
    out = {}
    for split in ("validation", "test"):
        p, y = found[split], labels[split]
        out[f"{split}_nll"] = float(p.negative_log_likelihood(y).mean())
        out[f"{split}_acc"] = float(p.correct(y).double().mean())
    p = found["test"]
    out["ece"] = expected_calibration_error(p.probs, labels["test"])
    out["mi"], out["pairwise_jsd"] = float(p.mutual_information.mean()), float(p.pairwise_jsd.mean())
    out["error_auroc_mi"] = auroc(p.mutual_information, ~p.correct(labels["test"])).value or 0.0
    out["error_auroc_entropy"] = auroc(p.entropy, ~p.correct(labels["test"])).value or 0.0
    for name, q in found.items():
        if name.startswith("ood:"):
            positive = torch.cat([torch.zeros(len(p)), torch.ones(len(q))]).bool()
            for key in ("mutual_information", "entropy"):
                scores = torch.cat([getattr(p, key), getattr(q, key)])
                out[f"{name} {key}"] = auroc(scores, positive).value or 0.0
    if p.point_log_probs is not None:
        at = torch.arange(len(labels["test"]))
        points = -p.point_log_probs[:, at, labels["test"]].double().mean(1)
        out["point_nll_min"], out["point_nll_max"] = float(points.min()), float(points.max())
    return out


class Screen:
    """One data set: its model, task, splits, store."""

    def __init__(self, args: argparse.Namespace, name: str, seed: int) -> None:
        self.name, self.seed, self.out = name, seed, args.out
        base, tokenizer = load_base(str(args.base), dtype="bfloat16")
        self.task = load_task(TaskConfig(data=str(args.data / name), scoring="letter"), tokenizer, 2048)
        self.sets = {s: self.task.encode(s) for s in ("validation", "test")}
        for other in OOD.get(name, []):
            rows = open_dataset(str(args.data / other)).rows("test")[:1000]
            self.sets[f"ood:{other}"] = self.task.encode_rows(rows, other, labelled=False)
        self.labels = {s: labels_of(e) for s, e in self.sets.items()}
        lora = LoraOptions(r=8, lora_alpha=16).to_peft(str(args.base), False)
        self.model = CurveModel(base, lora, CurveSpec.slots(10)).to(DEVICE)
        self.path = args.out / f"{name}-{seed}.npz"
        self.store = dict(np.load(self.path)) if self.path.exists() else {}

    def has(self, method: str) -> bool:
        return f"{method}|test" in self.store

    def predict(self, method: str, t: torch.Tensor, **extra: Any) -> dict[str, Predictive]:
        started = time.perf_counter()
        found = {s: predict_split(self.model, e, t) for s, e in self.sets.items()}
        for split, p in found.items():
            assert p.point_log_probs is not None
            self.store[f"{method}|{split}"] = p.point_log_probs.numpy().astype(np.float32)
        self.write(method, found, predict_s=round(time.perf_counter() - started, 1), **extra)
        return found

    def write(self, method: str, found: dict[str, Predictive], **extra: Any) -> None:
        line = {"set": self.name, "seed": self.seed, "method": method, **figures(found, self.labels), **extra}
        short = {k: round(v, 4) if isinstance(v, float) else v for k, v in line.items()}
        with (self.out / "log.jsonl").open("a") as file:
            file.write(json.dumps(short) + "\n")
        print(json.dumps(short), flush=True)
        np.savez_compressed(self.path, **{f"label|{s}": y.numpy() for s, y in self.labels.items()} | self.store)

    def anchors(self) -> dict[str, torch.Tensor]:
        started = time.perf_counter()
        result = fit_anchors(self.model, self.task, replace(ANCHORS, seed=self.seed), progress=False)
        seconds = time.perf_counter() - started
        anchors = self.model.control_points()
        found = self.predict("anchors", slot_times(10), fit_s=round(seconds, 1), best_step=result.best_step)
        for m in (1, 3, 5, 10):
            parts = {s: Predictive.from_log_probs(p.point_log_probs[:m]) for s, p in found.items()}  # type: ignore[index]
            self.write(f"ensemble {m}", parts)
        return anchors

    def variant(self, method: str, options: dict[str, Any], anchors: dict[str, torch.Tensor]) -> None:
        config = replace(CURVE, seed=self.seed, **options.get("fit", {}))
        if "free" in options:
            segments, degree = options["free"]
            fresh = self.model.fresh_points(CurveSpec(segments, degree), self.seed)
            self.model.set_curve(CurveSpec(segments, degree), fresh)
        else:
            m = options.get("anchors", 3)
            self.model.set_curve(CurveSpec.slots(m), {n: p[:m] for n, p in anchors.items()})
            self.model.anchor(
                options.get("degree", 2), options.get("alignment", "balanced+procrustes"),
                options.get("inner", "line"), self.seed,
            )  # fmt: skip
        started = time.perf_counter()
        result = fit(self.model, self.task, config, progress=False)
        seconds = time.perf_counter() - started
        t, _ = quadrature("uniform", POINTS, self.model.spec.segments)
        self.predict(method, t, fit_s=round(seconds, 1), best_step=result.best_step[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", default=["sst2", "ag_news", "subj"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=500)
    parser.add_argument("--only", nargs="*", default=[])
    args = parser.parse_args()
    end = time.perf_counter() + args.seconds
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "environment.json").write_text(json.dumps(environment(), indent=2) + "\n")
    for name in args.sets:
        screen = Screen(args, name, args.seed)
        anchors = screen.anchors()
        t, _ = quadrature("uniform", POINTS, 2)
        for method, points in (("straight line", anchors), ("aligned line", align(anchors))):
            screen.model.set_curve(CurveSpec.slots(3), {n: p[:3] for n, p in points.items()})
            screen.predict(method, t)
        for method, options in variants().items():
            if time.perf_counter() > end:
                return
            if not screen.has(method) and (not args.only or method in args.only):
                screen.variant(method, options, anchors)
        del screen
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
