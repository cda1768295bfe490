"""P3: several points of a curve for one prompt, against PEFT's adapters one after the other and in a mixed batch."""

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
    peft_model,
    random_adapters,
    report,
    stacked,
    synthetic,
    timed,
)

from loracurve.batching import collate
from loracurve.spec import CurveSpec
from loracurve.training import slot_times


def main() -> None:
    options = arguments(__doc__)
    r, n = (16 if options.shape == "7b" else 8), 8
    base = build(options.shape)
    dtype = next(base.parameters()).dtype
    twin = copy.deepcopy(base, {id(p): p for p in base.parameters()})
    rate, flop = matrix_rate(dtype), 2 * layer_weights(base)
    model = curve_model(base, r, CurveSpec.slots(n)).eval()
    adapters = random_adapters(model, n)
    model.set_curve(CurveSpec.slots(n), stacked(adapters))
    other = peft_model(twin, lora(r), adapters, cast=False).to(DEVICE).eval()
    answers = torch.tensor(ANSWERS, device=DEVICE)
    figures: dict[str, Any] = {"matrix_rate_tflops": rate, "points": n}
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

        def curve() -> torch.Tensor:
            return model.point_log_probs(batch, t, tokens_per_pass=10**9)  # noqa: B023

        def eager() -> torch.Tensor:
            moved = batch.to(DEVICE)  # noqa: B023
            return model.scores(moved, model.coefficients(t)).log_softmax(-1)  # noqa: B023

        with torch.inference_mode():
            expected = loop().float().log_softmax(-1)
            found: dict[str, Any] = {
                "relative_error": float((curve() - expected).norm() / expected.norm()),
                "relative_error_of_peft_mixed": float(
                    (mixed().float().log_softmax(-1) - expected).norm() / expected.norm()
                ),
                "floor_ms": flop * n * rows * tokens / rate / 1e9,
            }
            for name, function in (
                ("peft_loop", loop),
                ("peft_mixed", mixed),
                ("curve_eager", eager),
                ("curve", curve),
            ):
                found[f"{name}_ms"] = timed(function, options.repeats)
        found["mixed_over_curve"] = found["peft_mixed_ms"] / found["curve_ms"]
        found["loop_over_curve"] = found["peft_loop_ms"] / found["curve_ms"]
        found["curve_over_floor"] = found["curve_ms"] / found["floor_ms"]
        figures[f"{rows}x{tokens}"] = found
        report("points", options, figures)


if __name__ == "__main__":
    main()
