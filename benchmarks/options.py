"""What each option of the method costs: time of a training step relative to the plain objective at two points.

On the CPU it is the least processor time of several steps, which other programs on the machine disturb least; the plain
step is timed again beside each option.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from common import (
    DEVICE,
    arguments,
    build,
    curve_model,
    peak_memory,
    random_adapters,
    report,
    reset_memory,
    show,
    stacked,
    synthetic,
    timed,
)

from loracurve.curve.spec import CurveSpec
from loracurve.training.config import CorruptionConfig, FitConfig, ObjectiveConfig, PerturbationConfig
from loracurve.training.curves import CurveObjective
from loracurve.training.perturbation import Perturbation
from loracurve.training.step import StepConfig, Stepper

STEP = StepConfig(1e-4, (0.9, 0.999), 1e-8, 0.01, 1.0)
PLAIN, BONUS = CurveSpec(2, 2), ObjectiveConfig("bonus", 0.5)

# Name, shape of the curve, options beside batch size and points.
OPTIONS: list[tuple[str, CurveSpec, dict[str, Any]]] = [
    ("plain", PLAIN, {}),
    ("points 1", PLAIN, {"points": 1}),
    ("points 4", PLAIN, {"points": 4}),
    ("own points for each row", PLAIN, {"share_points": False}),
    ("layerwise", PLAIN, {"layerwise": True}),
    ("sampling arc-length", PLAIN, {"sampling": "arc-length"}),
    ("jsd bonus", PLAIN, {"objective": BONUS}),
    ("jsd hinge", PLAIN, {"objective": ObjectiveConfig("hinge", 5.0, 0.02)}),
    ("jsd bonus on corrupted tokens", PLAIN, {"objective": BONUS, "corruption": CorruptionConfig("tokens")}),
    ("jsd bonus with dropped attention", PLAIN, {"objective": BONUS, "corruption": CorruptionConfig("attention")}),
    ("flat_lora", PLAIN, {"perturbation": PerturbationConfig("flat_lora")}),
    ("lora_space", PLAIN, {"perturbation": PerturbationConfig("lora_space")}),
    ("sam, points 1", PLAIN, {"points": 1, "perturbation": PerturbationConfig("sam")}),
    ("closed", CurveSpec(2, 2, closed=True), {}),
    ("curve on A only", CurveSpec(2, 2, factors="A"), {}),
    ("4 segments", CurveSpec(4, 2), {}),
]


def clocked(function: Callable[[], Any], repeats: int) -> float:
    """Milliseconds of a call: the median by device events on a GPU, the least processor time elsewhere."""
    if DEVICE.type == "cuda":
        return timed(function, repeats)
    function()
    found = []
    for _ in range(repeats):
        begin = time.process_time()
        function()
        found.append(1e3 * (time.process_time() - begin))
    return min(found)


def step_of(model: Any, encoded: Any, rows: int, values: dict[str, Any], vocabulary: int) -> Any:
    config = FitConfig(**{"batch_size": rows, "steps": 1000, "points": 2, "share_points": True} | values)
    program = CurveObjective(model, encoded, encoded, config, torch.arange(20, vocabulary))
    noise = Perturbation(config.perturbation, model.layers, config.steps, config.seed)
    kind = config.perturbation.kind
    spec = model.spec
    stepper = Stepper(
        program, model.factors, spec.mask, STEP, True, noise if kind != "none" else None, model.dependences
    )
    count = iter(range(10**9))

    def step() -> torch.Tensor:
        number = next(count)
        noise.start(number)
        return stepper(program.parts(number), 1.0)

    return step, noise, stepper


def main() -> None:
    options = arguments(__doc__ or "")
    rows, tokens, r = {"7b": (8, 256, 16), "smollm2": (16, 128, 8), "small": (16, 64, 8)}[options.shape]
    base = build(options.shape)
    vocabulary = base.config.vocab_size
    encoded = synthetic(64, tokens, vocabulary)
    model = curve_model(base, r, PLAIN)
    adapter = random_adapters(model, 1)[0]
    figures: dict[str, Any] = {"rows": rows, "tokens": tokens, "r": r, "options": {}}

    def measure(spec: CurveSpec, values: dict[str, Any]) -> dict[str, Any]:
        model.set_curve(spec, stacked([adapter] * spec.size))
        model.train()
        reset_memory()
        step, noise, stepper = step_of(model, encoded, rows, values, vocabulary)
        with noise.attached():
            found: dict[str, Any] = {"step_ms": clocked(step, options.repeats), "peak_gib": peak_memory()}
        if DEVICE.type == "cuda":
            found["captured"] = bool(stepper.captured.graphs)
        return found

    before = measure(PLAIN, {})
    for name, spec, values in OPTIONS:
        found, after = measure(spec, values), measure(PLAIN, {})
        plain = min(before["step_ms"], after["step_ms"]) if DEVICE.type == "cpu" else before["step_ms"]
        figures["options"][name] = found | {"plain_ms": plain, "relative": found["step_ms"] / plain}
        before = after
        print(f"{name:34}{found['step_ms']:9.1f} ms{found['step_ms'] / plain:7.2f}", flush=True)
    report("options", options, figures)
    show("options", figures)


if __name__ == "__main__":
    main()
