"""Where a fine-tune first has a value that is not finite.

python results/not_finite.py MODEL DATA SET STEPS RATE [DTYPE]

Trains three adapters of the second model (`suites/minilm_tuning.yaml`, seed 0) without CUDA graphs until a loss or a
gradient is not finite. That step leaves the control points as they are, so its batch is gone through once more with a
look at every module: what goes in, what comes out, and the gradients on the way back. `not_finite.txt` is what it
printed for SST-2, 1,000 steps at 4e-3 in bfloat16, on an H200 (torch 2.11, commit bf6840f with cuDNN's attention).
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from loracurve.bench.shared import open_shared
from loracurve.bench.suite import load_suite
from loracurve.curve.spec import CurveSpec
from loracurve.model.cuda_graphs import map_tensors
from loracurve.training.fit import fit_anchors
from loracurve.training.step import Stepper

SUITE = Path(__file__).parent / "suites" / "minilm_tuning.yaml"


def main(model: str, data: str, name: str, steps: str, rate: str, dtype: str = "bfloat16") -> None:
    changes = [f"--model.name={model}", f"--data_folder={data}", "--commit=none", f"--model.dtype={dtype}"]
    suite = load_suite(SUITE, changes)
    shared = open_shared(suite, name, 0)
    spec = CurveSpec.slots(3)
    shared.model.set_curve(spec, shared.model.fresh_points(spec))
    step, taken = Stepper.__call__, 0

    def looked_at(self: Stepper, parts: list[Any], factor: float) -> Tensor:
        nonlocal taken
        found = step(self, parts, factor)
        taken += 1
        if not found[:2].isfinite().all():
            print("step", taken, "values", found.tolist())
            inspect(self, parts, shared.model.model)
            sys.exit()
        return found

    Stepper.__call__ = looked_at  # type: ignore[method-assign]
    options = {"steps": int(steps), "learning_rate": float(rate), "evaluate_every": 10**6, "capture": False}
    fit_anchors(shared.model, shared.task, dataclasses.replace(suite.training_of(name, 0), **options))
    print("no value that is not finite")


def inspect(stepper: Stepper, parts: list[Any], base: nn.Module) -> None:
    """Print what is in the modules when the batch is gone through once more, forwards and back."""
    print("largest entries of control points", max(p.abs().max().item() for p in stepper.factors))
    lines: list[str] = []

    def look(name: str, module: nn.Module) -> None:
        def hook(_: nn.Module, given: tuple[Any, ...], out: Any) -> None:
            out = out[0] if isinstance(out, tuple) else out
            if not (isinstance(out, Tensor) and out.is_floating_point()):
                return
            line = f"{name} {type(module).__name__}: out {said(out)}"
            if given and isinstance(given[0], Tensor) and given[0].is_floating_point():
                line += f"; in {said(given[0])}"
                if isinstance(module, nn.LayerNorm):
                    line += f"; smallest std of a row {given[0].detach().float().std(-1).min().item():.3g}"
            lines.append(line)
            if out.requires_grad:
                out.register_hook(lambda g: lines.append(f"   grad of {name}: {said(g)}"))

        module.register_forward_hook(hook)

    for name, module in base.named_modules():
        if not list(module.children()) or name.endswith("attention"):
            look(name, module)
    stepper.forget_gradients()
    for part in map_tensors(list(parts), lambda t: t.to(stepper.rate.device)):
        loss, figures = stepper.program.loss(part)
        print("loss", loss.item(), "figures", figures.tolist())
        loss.backward()
    print(*lines, sep="\n")
    for number, p in enumerate(stepper.factors):
        if p.grad is not None and not p.grad.isfinite().all():
            print("grad of factor", number, tuple(p.shape), said(p.grad))


def said(value: Tensor) -> str:
    value = value.detach().float()
    finite = value[value.isfinite()]
    largest = finite.abs().max().item() if len(finite) else float("nan")
    return f"max {largest:.3g} bad {value.numel() - len(finite)} of {value.numel()}"


if __name__ == "__main__":
    main(*sys.argv[1:])
