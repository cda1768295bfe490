"""P3: several points of a curve for one prompt, against PEFT's adapters one after the other and in a mixed batch."""

from __future__ import annotations

import copy
import time
from typing import Any

import torch
from common import (
    ANSWERS,
    DEVICE,
    arguments,
    build,
    check,
    curve_model,
    layer_weights,
    lora,
    matrix_rate,
    note,
    peft_model,
    random_adapters,
    report,
    show,
    stacked,
    synthetic,
    timed,
)

from loracurve.curve.anchored import slot_times
from loracurve.curve.spec import CurveSpec
from loracurve.tasks.batching import collate


def main() -> None:
    options = arguments(__doc__)
    begin = time.perf_counter()
    figures: dict[str, Any] = {"relative_errors": check()}
    r, n = (16 if options.shape == "7b" else 8), 8
    base = build(options.shape)
    dtype = next(base.parameters()).dtype
    twin = copy.deepcopy(base, {id(p): p for p in base.parameters()})
    rate, flop = matrix_rate(dtype), 2 * layer_weights(base)
    # Eight independent adapters: as many control points as points.
    spec = CurveSpec.slots(n)
    model = curve_model(base, r, spec).eval()
    adapters = random_adapters(model, n)
    model.set_curve(spec, stacked(adapters))
    other = peft_model(twin, lora(r), adapters, cast=False).to(DEVICE).eval()
    answers = torch.tensor(ANSWERS, device=DEVICE)
    figures |= {"matrix_rate_tflops": rate, "points": n}
    for rows, tokens in [(1, 128), (16, 256)] if options.shape == "7b" else [(1, 64), (8, 64)]:
        encoded = synthetic(rows, tokens, base.config.vocab_size)
        batch = collate(encoded, range(rows), 1)
        ids = batch.input_ids.to(DEVICE)
        names = [name for name in (f"p{i}" for i in range(n)) for _ in range(rows)]
        t = slot_times(n)

        def loop() -> torch.Tensor:
            found = []
            for i in range(n):
                other.set_adapter(f"p{i}")
                logits = other(input_ids=ids, logits_to_keep=1, use_cache=False).logits  # noqa: B023
                found.append(logits[:, -1].index_select(-1, answers))
            return torch.stack(found)

        def mixed() -> torch.Tensor:
            out = other(input_ids=ids.repeat(n, 1), adapter_names=names, logits_to_keep=1, use_cache=False)  # noqa: B023
            return out.logits[:, -1].index_select(-1, answers).view(n, rows, -1)  # noqa: B023

        def eager() -> torch.Tensor:
            moved = batch.to(DEVICE)  # noqa: B023
            return model.runner.scores(moved, model.coefficients(t)).log_softmax(-1)  # noqa: B023

        def captured() -> torch.Tensor:
            return model.point_log_probs(batch, t, tokens_per_pass=10**9)  # noqa: B023

        # Ours first: what a time limit leaves out are rivals.
        runs = {"curve": captured, "curve_eager": eager, "peft_mixed": mixed, "peft_loop": loop}
        found: dict[str, Any] = {"floor_ms": flop * n * rows * tokens / rate / 1e9}
        figures[f"{rows}x{tokens}"] = found
        with torch.inference_mode():
            expected = loop().float().log_softmax(-1)
            for name, function in runs.items():
                error = (function().float().log_softmax(-1) - expected).norm() / expected.norm()
                found[f"relative_error_of_{name}"] = float(error)
                found[f"{name}_ms"] = timed(function, options.repeats)
                note(begin, f"{rows}x{tokens} {name}: {found[f'{name}_ms']:.1f} ms, error {float(error):.3g}")
                report("points", options, figures)
        best = found["curve_ms"]
        found["mixed_over_curve"], found["loop_over_curve"] = (found[f"peft_{x}_ms"] / best for x in ("mixed", "loop"))
        found["curve_over_floor"] = best / found["floor_ms"]
        report("points", options, figures)
    show("points", figures)


if __name__ == "__main__":
    main()
