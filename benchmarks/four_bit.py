"""P9: a curve training step on a 4-bit base against a PEFT QLoRA step on the same."""

from __future__ import annotations

import copy
import importlib.util
import time
from typing import Any

import torch
from common import DEVICE, arguments, build, check, curve_model, note, random_adapters, report, show, synthetic
from torch import nn
from training_step import measure_ours, measure_peft, r_and_sizes, shared

from loracurve.curve.spec import CurveSpec


def quantise(base: nn.Module) -> nn.Module:
    """NF4 weights with bfloat16 arithmetic in place of the decoder layers' linear maps."""
    import bitsandbytes as bnb

    layers: Any = base.get_decoder().layers  # type: ignore[operator]
    for name, module in list(layers.named_modules()):
        if type(module) is not nn.Linear:
            continue
        bias = module.bias is not None
        new = bnb.nn.Linear4bit(module.in_features, module.out_features, bias, torch.bfloat16, quant_type="nf4")
        new.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
        if bias:
            new.bias = nn.Parameter(module.bias.data, requires_grad=False)
        parent, _, child = name.rpartition(".")
        setattr(layers.get_submodule(parent), child, new.to(DEVICE))
    base.is_loaded_in_4bit = True  # type: ignore[assignment]
    return base


def main() -> None:
    options = arguments(__doc__)
    begin = time.perf_counter()
    if importlib.util.find_spec("bitsandbytes") is None:
        figures: dict[str, Any] = {"not_measured": "bitsandbytes is not installed"}
        report("four_bit", options, figures)
        show("four_bit", figures)
        return
    figures = {"relative_errors": check()}
    r, sizes = r_and_sizes(options.shape)
    rows, tokens = sizes[0]
    base = build(options.shape, torch.bfloat16)
    note(begin, "built")
    base = quantise(base)
    note(begin, "quantised")
    twin = copy.deepcopy(base, shared(base))
    encoded = synthetic(rows, tokens, base.config.vocab_size)
    ids = torch.tensor([e.prompt for e in encoded.examples], device=DEVICE)
    labels = torch.tensor([e.label for e in encoded.examples], device=DEVICE)
    model = curve_model(base, r, CurveSpec(1, 2))
    adapter = random_adapters(model, 1)[0]
    losses = figures["losses"] = {}
    figures["peft"], losses["peft"] = measure_peft(twin, r, adapter, True, ids, labels, options.repeats)
    note(begin, f"PEFT {figures['peft']['ms']:.1f} ms")
    figures["captured"], losses["captured"] = measure_ours(model, encoded, rows, 1, True, options.repeats)
    figures["captured_over_peft"] = figures["captured"]["ms"] / figures["peft"]["ms"]
    note(begin, f"captured {figures['captured']['ms']:.1f} ms")
    report("four_bit", options, figures)
    show("four_bit", figures)


if __name__ == "__main__":
    main()
