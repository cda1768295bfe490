"""How many tokens one forward pass over points and rows should have: time per token and point by the size of passes.

    python benchmarks/pass_sizes.py --shape 7b --sizes 8192 16384 32768 65536

Texts of real lengths at ten points of a curve, packed and run together, as `predict_splits` does by default.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from common import DEVICE, arguments, build, curve_model, note, report, timed
from training_step import r_and_sizes
from whole_set import encode, texts

from loracurve.curve.anchored import slot_times
from loracurve.curve.spec import CurveSpec
from loracurve.inference.prediction import laid_out_for

POINTS = 10


def main() -> None:
    options = arguments(
        __doc__,
        rows={"type": int, "default": 256 if DEVICE.type == "cuda" else 8},
        sizes={"type": int, "nargs": "+", "default": [4096, 8192, 16_384, 32_768, 65_536, 131_072]},
    )
    begin, sizes = time.perf_counter(), " ".join(map(str, options.sizes))
    command = f"python benchmarks/pass_sizes.py --shape {options.shape} --rows {options.rows}"
    command += f" --repeats {options.repeats} --sizes {sizes}"
    base = build(options.shape)
    encoded = encode(texts(None, options.rows), base.config.vocab_size)
    model = curve_model(base, r_and_sizes(options.shape)[0], CurveSpec(1, 2)).eval()
    batches, t = laid_out_for(model, encoded), slot_times(POINTS)
    tokens = sum(b.tokens for b in batches) * POINTS
    figures: dict[str, Any] = {"batches": [b.tokens for b in batches], "points": POINTS, "sizes": {}}
    with torch.inference_mode():
        for size in options.sizes:

            def run(size: int = size) -> None:
                for batch in batches:
                    model.point_log_probs(batch, t, size)

            ms = timed(run, options.repeats)
            figures["sizes"][str(size)] = {"ms": ms, "us_per_token": 1e3 * ms / tokens}
            note(begin, f"passes of at most {size} tokens: {ms:.1f} ms, {1e3 * ms / tokens:.2f} us a token and point")
            report("pass_sizes", options, figures, command)


if __name__ == "__main__":
    main()
