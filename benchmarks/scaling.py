"""P10: a training step and the evaluation of a whole data set by two processes, against one.

The batch of a step is the same; each process has a GPU of its own (NCCL), or one thread of the CPU (gloo). Both are
first compared in float32 on a small model: losses, control points, predictions. This script starts torchrun by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import (
    DEVICE,
    arguments,
    build,
    curve_model,
    note,
    peak_memory,
    random_adapters,
    report,
    reset_memory,
    show,
    stacked,
    synthetic,
)
from whole_set import encode, texts

from loracurve.curve.spec import CurveSpec
from loracurve.inference.prediction import predict_splits
from loracurve.model.fsdp import shard_base
from loracurve.system.distributed import backend, is_main, join, leave, sum_over_processes
from loracurve.training.config import FitConfig, ObjectiveConfig
from loracurve.training.curves import CurveObjective
from loracurve.training.step import StepConfig, Stepper

STEP = StepConfig(1e-3, (0.9, 0.999), 1e-3, 0.0, 1.0)
WARM_UP = 4
LIMIT_S = 240


def stepper_of(model: Any, encoded: Any, config: FitConfig) -> Callable[[], torch.Tensor]:
    program = CurveObjective(model, encoded, encoded, config)
    model.train()
    stepper = Stepper(program, model.factors, model.spec.mask, STEP, config.capture and not model.runner.sharded)
    count = iter(range(10**9))
    return lambda: stepper(program.parts(next(count)), 1.0)


def check_small(folder: Path) -> None:
    """Losses and control points of three steps, and predictions, for the comparison with the other run."""
    base = build("small", torch.float32)
    model = curve_model(base, 4, CurveSpec(2, 2))
    model.set_curve(model.spec, stacked(random_adapters(model, 5)))
    encoded = synthetic(33, 24, base.config.vocab_size)
    config = FitConfig(batch_size=7, points=2, share_points=True, objective=ObjectiveConfig("bonus", 0.5))
    step = stepper_of(model, encoded, config)
    losses = torch.stack([step() for _ in range(6)])
    t = torch.linspace(0, 1, 5, dtype=torch.float64)
    predicted = predict_splits(model, {"test": encoded}, t)["test"]
    if is_main():
        points = torch.cat([p.flatten() for p in model.control_points().values()])
        values = {"losses": losses.cpu(), "control_points": points, "predictions": predicted.point_log_probs}
        torch.save(values, folder / "small.pt")


def clocked(work: Callable[[], object], repeats: int, warm_up: int = WARM_UP) -> float:
    """Seconds of a call, from all processes' start to all processes' end."""

    def meet() -> None:
        sum_over_processes(torch.zeros(1, device=DEVICE))
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(warm_up):
        work()
    meet()
    begin = time.perf_counter()
    for _ in range(repeats):
        work()
    meet()
    return (time.perf_counter() - begin) / repeats


def worker(options: argparse.Namespace, folder: Path) -> None:
    """One of the processes; the main one writes what was measured as often as there is something new."""
    begin = time.perf_counter()
    if DEVICE.type == "cpu":
        torch.set_num_threads(1)
    join()
    found: dict[str, Any] = {"backend": backend(DEVICE)}

    def done(name: str, **figures: float) -> None:
        found[name] = figures
        if is_main():
            (folder / "found.json").write_text(json.dumps(found))
            note(begin, f"{name}: {json.dumps(figures)}")

    check_small(folder)
    rows, tokens, texts_read, r = sizes(options.shape)
    base = build(options.shape)
    model = curve_model(base, r, CurveSpec(1, 2))
    model.set_curve(model.spec, stacked(random_adapters(model, 3)))
    encoded = synthetic(4 * rows, tokens, base.config.vocab_size)
    config = FitConfig(batch_size=rows, points=1, share_points=False)
    reset_memory()
    done("training", s=clocked(stepper_of(model, encoded, config), options.repeats), peak_gib=peak_memory())
    split = encode(texts(None, texts_read), base.config.vocab_size)
    t = torch.linspace(0, 1, 10, dtype=torch.float64)
    reset_memory()
    # On a GPU the fourth run is the first in which no shape is captured any more.
    warm_up = 3 if DEVICE.type == "cuda" else 1
    seconds = clocked(lambda: predict_splits(model, {"test": split}, t), 1, warm_up)
    done("evaluation", s=seconds, peak_gib=peak_memory())
    if options.shard and backend(DEVICE):
        shard_base(model)
        reset_memory()
        seconds = clocked(stepper_of(model, encoded, config), options.repeats)
        done("training_sharded", s=seconds, peak_gib=peak_memory())
    leave()


def sizes(shape: str) -> tuple[int, int, int, int]:
    """Rows and tokens of a step, rows of the data set, rank."""
    return {"7b": (16, 256, 512, 16), "smollm2": (128, 128, 2000, 8), "small": (32, 64, 384, 8)}[shape]


def launch(processes: int, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run the worker in so many processes; what it measured."""
    folder.mkdir()
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), __file__, "--worker", str(folder)]
    command += ["--shape", options.shape, "--repeats", str(options.repeats)] + ["--shard"] * options.shard
    print(f"== {processes} process{'es' * (processes > 1)}", flush=True)
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    try:
        code = subprocess.run(command, timeout=LIMIT_S, env=environment).returncode
    except subprocess.TimeoutExpired:
        code = -1
    if code and not (folder / "found.json").exists():
        raise SystemExit(f"{processes} processes ended with {code} before anything was measured")
    return dict(json.loads((folder / "found.json").read_text()))


def compare(one: Path, two: Path) -> dict[str, float]:
    """Relative differences of the small model's results; a wrong one ends the benchmark."""
    first, second = (torch.load(folder / "small.pt", weights_only=True) for folder in (one, two))
    errors = {name: float((second[name] - x).norm() / x.norm()) for name, x in first.items()}
    if max(errors.values()) > 1e-4:
        raise SystemExit(f"two processes differ from one: {errors}")
    return errors


def main() -> None:
    options = arguments(__doc__, worker={"type": Path}, shard={"action": "store_true", "help": "FSDP2 too"})
    if options.worker is not None:
        worker(options, options.worker)
        return
    if DEVICE.type == "cuda" and torch.cuda.device_count() < 2:
        raise SystemExit("expected two GPUs, found one")
    with tempfile.TemporaryDirectory() as place:
        folders = [Path(place) / str(n) for n in (1, 2)]
        one, two = (launch(n, options, folder) for n, folder in zip((1, 2), folders, strict=True))
        rows, tokens, texts_read, r = sizes(options.shape)
        figures: dict[str, Any] = {
            "relative_errors": compare(*folders),
            "backend": two["backend"],
            "rows": rows,
            "tokens": tokens,
            "texts": texts_read,
            "r": r,
        }
    for name in ("training", "evaluation", "training_sharded"):
        single = one.get(name.removesuffix("_sharded"))
        if single and name in two:
            figures[name] = {"one": single, "two": two[name], "speedup": single["s"] / two[name]["s"]}
    report("scaling", options, figures)
    show("scaling", figures)


if __name__ == "__main__":
    main()
