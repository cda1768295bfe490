"""P10: a training step and the evaluation of a whole data set by several processes, against one.

The batch of a step is the same; each process has a GPU of its own (NCCL), or one thread of the CPU (gloo). All are
first compared in float32 on a small model: losses, control points, predictions; with `--shard` also with the base
spread over the processes (FSDP2). This script starts torchrun by itself.
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
    allocated,
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


def check_small(folder: Path, shard: bool) -> None:
    """Losses and control points of six steps, and predictions, for the comparison with the other runs."""
    base = build("small", torch.float32)
    model = curve_model(base, 4, CurveSpec(2, 2))
    model.set_curve(model.spec, stacked(random_adapters(model, 5)))
    if shard:
        shard_base(model)
    encoded = synthetic(33, 24, base.config.vocab_size)
    config = FitConfig(batch_size=7, points=2, share_points=True, objective=ObjectiveConfig("bonus", 0.5))
    step = stepper_of(model, encoded, config)
    losses = torch.stack([step() for _ in range(6)])
    t = torch.linspace(0, 1, 5, dtype=torch.float64)
    predicted = predict_splits(model, {"test": encoded}, t)["test"]
    if is_main():
        points = torch.cat([p.flatten() for p in model.control_points().values()])
        values = {"losses": losses.cpu(), "control_points": points, "predictions": predicted.point_log_probs}
        torch.save(values, folder / ("sharded.pt" if shard else "whole.pt"))


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

    shards = options.shard and bool(backend(DEVICE))
    for shard in (False, True)[: 1 + shards]:
        check_small(folder, shard)
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
    if shards:
        whole = allocated()
        shard_base(model)
        reset_memory()
        spread = allocated()
        seconds = clocked(stepper_of(model, encoded, config), options.repeats)
        done("training_sharded", s=seconds, peak_gib=peak_memory(), before_gib=whole, spread_gib=spread)
    leave()


def sizes(shape: str) -> tuple[int, int, int, int]:
    """Rows and tokens of a step, rows of the data set, rank."""
    return {"7b": (16, 256, 1024, 16), "smollm2": (128, 128, 2000, 8), "small": (32, 64, 384, 8)}[shape]


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


def compare(one: Path, several: Path) -> dict[str, dict[str, float]]:
    """Relative differences of the small model's results; a wrong one ends the benchmark."""
    first = torch.load(one / "whole.pt", weights_only=True)
    errors = {}
    for file in sorted(several.glob("*.pt")):
        found = torch.load(file, weights_only=True)
        errors[file.stem] = {name: float((found[name] - x).norm() / x.norm()) for name, x in first.items()}
        if max(errors[file.stem].values()) > 1e-4:
            raise SystemExit(f"several processes differ from one: {errors}")
    return errors


def main() -> None:
    options = arguments(
        __doc__,
        worker={"type": Path},
        shard={"action": "store_true", "help": "the base spread over the processes, too"},
        processes={"type": int, "nargs": "+", "default": [2], "help": "how many; each is compared with one"},
    )
    if options.worker is not None:
        worker(options, options.worker)
        return
    found = torch.cuda.device_count()
    if DEVICE.type == "cuda" and found < max(options.processes):
        raise SystemExit(f"expected a GPU for each process, found {found} for {max(options.processes)}")
    rows, tokens, texts_read, r = sizes(options.shape)
    figures: dict[str, Any] = {"rows": rows, "tokens": tokens, "texts": texts_read, "r": r}
    processes = " ".join(map(str, options.processes))
    command = f"python benchmarks/scaling.py --shape {options.shape} --repeats {options.repeats}"
    command += f" --processes {processes}" + " --shard" * options.shard
    with tempfile.TemporaryDirectory() as place:
        alone = Path(place, "1")
        figures["1"] = one = launch(1, options, alone)
        for count in options.processes:
            folder = Path(place, str(count))
            figures[str(count)] = several = launch(count, options, folder)
            several["relative_errors"] = compare(alone, folder)
            for name in ("training", "evaluation", "training_sharded"):
                if name in several:
                    several[name]["speedup"] = one[name.removesuffix("_sharded")]["s"] / several[name]["s"]
            report("scaling", options, figures, command)
    show("scaling", figures)


if __name__ == "__main__":
    main()
