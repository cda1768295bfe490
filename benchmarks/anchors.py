"""P5: M anchors in one pass against M PEFT fine-tunes one after the other, by the time of a step."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import (
    ANSWERS,
    DEVICE,
    arguments,
    build,
    check,
    curve_model,
    lora,
    note,
    peft_model,
    random_adapters,
    report,
    show,
    synthetic,
    timed,
)
from torch.nn.functional import cross_entropy
from training_step import STEP

from loracurve.loop import LoopConfig
from loracurve.spec import CurveSpec
from loracurve.stepping import Stepper
from loracurve.training import _Anchors


def main() -> None:
    options = arguments(__doc__)
    begin = time.perf_counter()
    if options.shape == "7b":
        options.shape = "smollm2"
    r, rows, tokens = 8, 32, 48
    base = build(options.shape)
    twin = copy.deepcopy(base, {id(p): p for p in base.parameters()})
    encoded = synthetic(256, tokens, base.config.vocab_size)
    model = curve_model(base, r, CurveSpec.slots(3))
    figures: dict[str, Any] = {"relative_errors": check(), "rows": rows, "tokens": tokens}
    adapter = random_adapters(model, 1)
    other = peft_model(twin, lora(r), adapter, cast=True).to(DEVICE).train()
    params = [p for p in other.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-4, fused=True)
    answers = torch.tensor(ANSWERS, device=DEVICE)
    ids = torch.tensor([e.prompt for e in encoded.examples[:rows]], device=DEVICE)
    labels = torch.tensor([e.label for e in encoded.examples[:rows]], device=DEVICE)

    def peft_step() -> None:
        logits = other(input_ids=ids, logits_to_keep=1, use_cache=False).logits[:, -1].index_select(-1, answers)
        cross_entropy(logits.float(), labels).backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    figures["peft_step_ms"] = timed(peft_step, options.repeats)
    note(begin, f"PEFT step {figures['peft_step_ms']:.1f} ms")
    for anchors in (3, 10):
        model.set_curve(CurveSpec.slots(anchors), _stack(model, anchors))
        for capture in (False, True):
            config = LoopConfig(batch_size=rows, capture=capture)
            program = _Anchors(model, encoded, encoded, config, anchors)
            model.train()
            stepper = Stepper(program, model.factors, model.spec.mask, STEP, capture)
            parts = program.parts(0)
            key = f"{anchors}_anchors_{'captured' if capture else 'eager'}"
            figures[f"{key}_ms"] = timed(lambda: stepper(parts, 1.0), options.repeats)  # noqa: B023
            figures["batches_ms"] = host_time(lambda: program.parts(0), options.repeats)  # noqa: B023
            figures[f"{key}_with_batches_ms"] = timed(lambda: stepper(program.parts(0), 1.0), options.repeats)  # noqa: B023
        figures[f"{anchors}_fine_tunes_over_ours"] = (
            anchors * figures["peft_step_ms"] / figures[f"{key}_with_batches_ms"]
        )
        note(begin, f"{anchors} anchors {figures[f'{key}_with_batches_ms']:.1f} ms")
        report("anchors", options, figures)
    show("anchors", figures)


def host_time(function: Callable[[], Any], repeats: int) -> float:
    """Median milliseconds of work on the host: laying out batches should not be slower than the step."""
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        found.append(1e3 * (time.perf_counter() - start))
    return statistics.median(found)


def _stack(model: Any, count: int) -> dict[str, torch.Tensor]:
    adapters = random_adapters(model, count)
    return {n: torch.stack([a[n] for a in adapters]) for n in adapters[0]}


if __name__ == "__main__":
    main()
