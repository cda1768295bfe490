"""P1, P2, P6, P7: a curve training step (one point for each row) against a PEFT LoRA step on the same prompts."""

from __future__ import annotations

import copy
from typing import Any

import torch
from common import (
    ANSWERS,
    DEVICE,
    arguments,
    build,
    curve_model,
    layer_weights,
    lora,
    matrix_rate,
    peak_memory,
    peft_model,
    random_adapters,
    report,
    reset_memory,
    stacked,
    synthetic,
    timed,
)
from torch.nn.functional import cross_entropy

from loracurve.spec import CurveSpec
from loracurve.stepping import StepConfig, Stepper
from loracurve.training import FitConfig, _Curve

STEP = StepConfig(1e-4, (0.9, 0.999), 1e-8, 0.0, 1.0)


def ours(model: Any, encoded: Any, rows: int, capture: bool) -> tuple[Any, Stepper]:
    config = FitConfig(batch_size=rows, points=1, share_points=False, capture=capture)
    program = _Curve(model, encoded, encoded, config)
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


def main() -> None:
    options = arguments(__doc__)
    r = 16 if options.shape == "7b" else 8
    sizes = [(8, 256), (16, 256)] if options.shape == "7b" else [(32, 64)]
    base = build(options.shape)
    vocabulary = base.config.vocab_size
    flop = 4 * layer_weights(base)
    rate = matrix_rate(next(base.parameters()).dtype)
    figures: dict[str, Any] = {"matrix_rate_tflops": rate, "r": r}
    # The curve's base is wrapped in place; PEFT gets the same weights in modules of its own.
    memo = {id(p): p for p in base.parameters()}
    twin = copy.deepcopy(base, memo)
    model = curve_model(base, r, CurveSpec(1, 2))
    adapter = random_adapters(model, 1)[0]
    for rows, tokens in sizes:
        name = f"{rows}x{tokens}"
        encoded = synthetic(rows, tokens, vocabulary)
        ids = torch.tensor([e.prompt for e in encoded.examples], device=DEVICE)
        labels = torch.tensor([e.label for e in encoded.examples], device=DEVICE)
        found: dict[str, Any] = {}
        losses = {}
        for segments in (1, 4):
            spec = CurveSpec(segments, 2)
            model.set_curve(spec, stacked([adapter] * spec.size))
            for capture in (False, True):
                reset_memory()
                step, stepper = ours(model, encoded, rows, capture)
                if segments == 1 and not capture:
                    losses["curve"] = float(step()[0])
                before = torch.cuda.memory_allocated() / 2**30 if DEVICE.type == "cuda" else 0.0
                key = f"curve_s{segments}_{'captured' if capture else 'eager'}"
                found[f"{key}_ms"] = timed(step, options.repeats)
                found[f"{key}_peak_gib"] = peak_memory()
                found[f"{key}_allocated_before_gib"] = before
                if capture:
                    found[f"{key}_works"] = bool(stepper.captured.enabled)
                del step, stepper
        found["control_points_gib"] = sum(p.numel() for p in model.factors) * 4 / 2**30
        model.set_curve(CurveSpec(1, 2), stacked([adapter] * 3))
        found["share_of_matrix_rate"] = flop * rows * tokens / found["curve_s1_captured_ms"] / 1e9 / rate
        for cast in (True, False):
            reset_memory()
            other = peft_model(copy.deepcopy(twin, {id(p): p for p in twin.parameters()}), lora(r), [adapter], cast)
            other.to(DEVICE)
            step = peft_step(other, ids, labels)
            losses[f"peft_cast_{cast}"] = float(step())
            key = "peft" if cast else "peft_adapters_bf16"
            found[f"{key}_ms"] = timed(step, options.repeats)
            found[f"{key}_peak_gib"] = peak_memory()
            del other, step
        found["losses"] = losses
        found["ratio_to_peft"] = found["curve_s1_captured_ms"] / found["peft_ms"]
        found["ratio_to_peft_adapters_bf16"] = found["curve_s1_captured_ms"] / found["peft_adapters_bf16_ms"]
        found["s4_over_s1"] = found["curve_s4_captured_ms"] / found["curve_s1_captured_ms"]
        figures[name] = found
        report("training_step", options, figures)


if __name__ == "__main__":
    main()
