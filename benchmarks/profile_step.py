"""Where time goes: the CUDA kernels of a captured step, and of predictions, longest first, by kind and by name.

`points` is one prompt at eight points, `whole_set` 128 texts of real lengths at ten, packed, `step` a training step.
`--run RUN` profiles training steps of a finished run instead, on its own rows. Without a GPU PyTorch's operations stand
in place of kernels.
"""

from __future__ import annotations

import itertools
import re
import time
from collections import Counter
from typing import Any

import torch
from common import DEVICE, arguments, build, curve_model, note, report, synthetic
from torch.profiler import ProfilerActivity, profile
from training_step import ours, r_and_sizes
from whole_set import encode, texts

from loracurve.curve.anchored import slot_times
from loracurve.curve.spec import CurveSpec
from loracurve.inference.prediction import predict_splits
from loracurve.runs.run import open_run
from loracurve.tasks.batching import collate
from loracurve.training.curves import CurveObjective
from loracurve.training.loop import TrainedPoints

# First match wins.
KINDS = {
    "matrix products": r"gemm|nvjet|cutlass|xmma|cublas|splitk|aten::(add|badd)?b?mm\b",
    "attention": r"flash|fmha|attention|softmax",
    "optimiser": r"adam|multi_tensor|lpnorm",
    "between the products": r"^_(mix|turn|gate|fold)",
    "copies and casts": r"copy|memcpy|memset|cat",
    "element by element": r"elementwise|reduce|aten::(add|mul|div|sub|neg|silu|pow|rsqrt|mean|sum|where|exp)_?\b",
}

SEGMENTS = {"points": 1, "whole_set": 1, "step": 1, "step_s4": 4}  # of the curve in each part


def kernels(function: Any, repeats: int) -> list[tuple[str, float, float]]:
    """Name, milliseconds and launches of each kernel for one call."""
    for _ in range(4):
        function()
    activities = [ProfilerActivity.CUDA if DEVICE.type == "cuda" else ProfilerActivity.CPU]
    with profile(activities=activities) as found:
        for _ in range(repeats):
            function()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
    rows = []
    for event in found.key_averages():
        micro = event.self_device_time_total if DEVICE.type == "cuda" else event.self_cpu_time_total
        rows.append((event.key, micro / 1e3 / repeats, event.count / repeats))
    return sorted(rows, key=lambda row: -row[1])


def steps_of(run: str) -> Any:
    """Training steps of a finished run, from its curve on, without weight noise."""
    opened = open_run(run)
    model, task, config = opened.model.to(DEVICE), opened.task, opened.config.curve_training
    program = CurveObjective(model, task.encode("train"), task.encode("validation"), config)
    trained = TrainedPoints(model, program, config, DEVICE)
    model.train()
    steps = itertools.count()
    return lambda: trained.step(next(steps), 1.0)


def kind(name: str) -> str:
    return next((k for k, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), "others")


def profiled(name: str, function: Any, options: Any, begin: float) -> dict[str, Any]:
    """What a call consists of, printed too."""
    found = kernels(function, min(options.repeats, 5))
    by_kind: Counter[str] = Counter()
    for key, ms, _ in found:
        by_kind[kind(key)] += ms
    total, launches = sum(ms for _, ms, _ in found), sum(count for *_, count in found)
    note(begin, f"{name}: {total:.1f} ms in {launches:.0f} launches")
    print("   " + ", ".join(f"{k} {ms:.1f} ms" for k, ms in by_kind.most_common()))
    for k, ms, count in found[: options.top]:
        print(f"   {ms:8.2f} ms {count:6.0f} x {k[:100]}")
    return {
        "total_ms": total,
        "launches": launches,
        "by_kind_ms": dict(by_kind.most_common()),
        "kernels": [{"name": k[:120], "ms": ms, "launches": count} for k, ms, count in found[: options.top]],
    }


def main() -> None:
    options = arguments(
        __doc__,
        top={"type": int, "default": 25},
        only={"nargs": "+", "choices": [*SEGMENTS], "default": [*SEGMENTS]},
        run={"help": "folder of a finished run whose steps are profiled"},
    )
    begin = time.perf_counter()
    figures: dict[str, Any] = {}
    if options.run:
        with torch.enable_grad():
            figures["run"] = profiled("a step of the run", steps_of(options.run), options, begin)
        options.shape = "run"
        report("profile_step", options, figures, "python benchmarks/profile_step.py --run RUN")
        return
    r, sizes = r_and_sizes(options.shape)
    rows, tokens = sizes[0]
    base = build(options.shape)
    encoded = synthetic(rows, tokens, base.config.vocab_size)
    prompt = collate(encoded, [0], 1)
    read = encode(texts(None, 128), base.config.vocab_size)
    model = curve_model(base, r, CurveSpec(1, 2))
    for name in options.only:
        spec = CurveSpec(SEGMENTS[name], 2)
        model.set_curve(spec, model.fresh_points(spec))

        def points() -> torch.Tensor:
            return model.point_log_probs(prompt, slot_times(8))

        def whole_set() -> Any:
            return predict_splits(model, {"test": read}, slot_times(10), way="points")

        trains = name.startswith("step")
        function = {"points": points, "whole_set": whole_set}.get(name) or ours(model, encoded, rows, True)[0]
        model.train(trains)
        with torch.set_grad_enabled(trains):
            figures[name] = profiled(name, function, options, begin)
        report("profile_step", options, figures)


if __name__ == "__main__":
    main()
