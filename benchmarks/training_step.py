"""P1, P2, P6, P7: a curve training step (one point for each row) against a PEFT LoRA step on the same prompts."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from common import (
    ANSWERS,
    DEVICE,
    allocated,
    arguments,
    build,
    check,
    curve_model,
    layer_weights,
    lora,
    matrix_rate,
    note,
    peak_memory,
    peft_model,
    random_adapters,
    report,
    reset_memory,
    rounded,
    show,
    stacked,
    synthetic,
    timed,
)
from torch.nn.functional import cross_entropy

from loracurve.curve.spec import CurveSpec
from loracurve.training.config import FitConfig
from loracurve.training.curves import CurveObjective
from loracurve.training.step import StepConfig, Stepper

STEP = StepConfig(1e-4, (0.9, 0.999), 1e-8, 0.0, 1.0)


def ours(model: Any, encoded: Any, rows: int, capture: bool) -> tuple[Any, Stepper]:
    config = FitConfig(batch_size=rows, points=1, share_points=False, capture=capture)
    program = CurveObjective(model, encoded, encoded, config)
    model.train()
    stepper = Stepper(program, model.factors, model.spec.mask, STEP, capture)
    count = iter(range(10**9))
    return (lambda: stepper(program.parts(next(count)), 1.0)), stepper


def peft_step(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> Any:
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-4, fused=True)
    answers = torch.tensor(ANSWERS, device=DEVICE)
    model.train()

    def step() -> torch.Tensor:
        logits = model(input_ids=ids, logits_to_keep=1, use_cache=False).logits[:, -1].index_select(-1, answers)
        loss = cross_entropy(logits.float(), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def r_and_sizes(shape: str) -> tuple[int, list[tuple[int, int]]]:
    """Rank, and rows x tokens of the steps."""
    return {"7b": (16, [(8, 256), (16, 256)]), "smollm2": (8, [(32, 64)]), "small": (8, [(4, 32)])}[shape]


def gib(tensors: Iterable[torch.Tensor]) -> float:
    return sum(p.numel() * p.element_size() for p in tensors) / 2**30


def measure_ours(
    model: Any, encoded: Any, rows: int, segments: int, capture: bool, repeats: int
) -> tuple[dict[str, Any], float]:
    """Time and memory of a step, and the first loss.

    `memory_gib` is the base model and what a step takes on top, without control points and their moments.
    """
    spec = CurveSpec(segments, 2)
    model.set_curve(spec, stacked(random_adapters(model, 1) * spec.size))
    reset_memory()
    before, begin = allocated(), time.perf_counter()
    step, stepper = ours(model, encoded, rows, capture)
    loss = float(step()[0])
    found = {"first_step_s": time.perf_counter() - begin, "ms": timed(step, repeats), "peak_gib": peak_memory()}
    found["captured"] = bool(stepper.captured.graphs)
    found["control_points_gib"] = points = gib(model.factors)
    found["memory_gib"] = gib(p for p in model.model.parameters() if not p.requires_grad) + (
        found["peak_gib"] - before - 2 * points
    )
    return found, loss


def measure_peft(twin: Any, r: int, adapter: Any, cast: bool, ids: Any, labels: Any, repeats: int) -> Any:
    """The same for PEFT; its memory holds everything."""
    other = peft_model(copy.deepcopy(twin, shared(twin)), lora(r), [adapter], cast).to(DEVICE)
    reset_memory()
    before = allocated()
    step = peft_step(other, ids, labels)
    loss = float(step().detach())
    found = {"ms": timed(step, repeats), "peak_gib": peak_memory()}
    found["memory_gib"] = gib(other.parameters()) + found["peak_gib"] - before
    return found, loss


def shared(base: Any) -> dict[int, Any]:
    """For deepcopy: modules of one's own around the same weights."""
    return {id(p): p for p in base.parameters()}


def summarise(found: dict[str, Any], flop: float, rate: float) -> None:
    """The ratios, as far as what they are made of is there."""
    ms = {name: value["ms"] for name, value in found.items() if isinstance(value, dict) and "ms" in value}
    best = "curve_s1_captured"
    if best not in ms:
        return
    found["share_of_matrix_rate"] = flop / ms[best] / 1e9 / rate
    for peft in ("peft", "peft_adapters_bf16"):
        if peft not in ms:
            continue
        found[f"time_over_{peft}"] = ms[best] / ms[peft]
        found[f"memory_over_{peft}"] = found[best]["memory_gib"] / found[peft]["memory_gib"]
    if "curve_s4_captured" in ms:
        found["s4_over_s1_captured"] = ms["curve_s4_captured"] / ms[best]


def main() -> None:
    options = arguments(__doc__)
    begin = time.perf_counter()
    figures: dict[str, Any] = {"relative_errors": check()}
    r, sizes = r_and_sizes(options.shape)
    base = build(options.shape)
    flop = 4 * layer_weights(base)
    rate = matrix_rate(next(base.parameters()).dtype)
    figures |= {"matrix_rate_tflops": rate, "r": r}
    # Curve models wrap their base in place; PEFT gets modules of its own around the same weights.
    twin = copy.deepcopy(base, shared(base))
    model = curve_model(base, r, CurveSpec(1, 2))
    adapter = random_adapters(model, 1)[0]
    figures |= {f"{rows}x{tokens}": {"losses": {}} for rows, tokens in sizes}

    def done(size: tuple[int, int], key: str, measure: Callable[..., tuple[dict[str, Any], float]], *more: Any) -> None:
        rows, tokens = size
        found = figures[f"{rows}x{tokens}"]
        try:
            found[key], found["losses"][key] = measure(*more, options.repeats)
        except RuntimeError as error:  # memory: the other figures are worth having
            found[key] = {"failed": str(error).splitlines()[0][:200]}
        summarise(found, flop * rows * tokens, rate)
        note(begin, f"{rows}x{tokens} {key}: {json.dumps(rounded(found[key]))}")
        report("training_step", options, figures)

    data = {size: synthetic(*size, base.config.vocab_size) for size in sizes}
    # PEFT first: graphs of ours would hold memory that it needs.
    for size, encoded in data.items():
        ids = torch.tensor([e.prompt for e in encoded.examples], device=DEVICE)
        labels = torch.tensor([e.label for e in encoded.examples], device=DEVICE)
        for key, cast in (("peft", True), ("peft_adapters_bf16", False)):
            done(size, key, measure_peft, twin, r, adapter, cast, ids, labels)
    first = sizes[0]

    def plain(size: tuple[int, int], segments: int, kind: str = "captured") -> None:
        done(size, f"curve_s{segments}_{kind}", measure_ours, model, data[size], size[0], segments, kind != "eager")

    plain(first, 1)
    plain(first, 4)
    for size in sizes[1:]:
        plain(size, 1)
    plain(first, 1, "eager")
    show("training_step", figures)


if __name__ == "__main__":
    main()
