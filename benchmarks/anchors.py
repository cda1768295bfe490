"""P5: M anchors in one pass against M PEFT fine-tunes one after the other, on prompts of real lengths.

Both take the same rows in the same steps. PEFT pads each batch to its longest prompt, as its users do; we share common
beginnings on a CPU and pad to few lengths on a GPU. Our seconds hold everything from the first step on (capture, the
laying out of batches) on a GPU; PEFT has warmed up.
"""

from __future__ import annotations

import copy
import statistics
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
    lora,
    note,
    peft_model,
    random_adapters,
    report,
    reset_memory,
    show,
    stacked,
)
from torch.nn.functional import cross_entropy
from training_step import STEP
from whole_set import encode, texts

from loracurve.curve.spec import CurveSpec
from loracurve.training.anchors import AnchorsObjective, slot_seeds
from loracurve.training.config import LoopConfig
from loracurve.training.loop import batch_numbers
from loracurve.training.step import Stepper


def main() -> None:
    options = arguments(__doc__, steps={"type": int, "default": 100 if DEVICE.type == "cuda" else 3})
    begin = time.perf_counter()
    if options.shape == "7b":
        options.shape = "smollm2"
    r, rows = 8, 32
    base = build(options.shape)
    twin = copy.deepcopy(base, {id(p): p for p in base.parameters()})
    encoded = encode(texts(None, 1000), base.config.vocab_size)
    lengths = [len(e.prompt) for e in encoded.examples]
    model = curve_model(base, r, CurveSpec.slots(3))
    figures: dict[str, Any] = {"relative_errors": check(), "rows": rows, "steps": options.steps}
    figures["mean_tokens"] = statistics.mean(lengths)
    other = peft_model(twin, lora(r), random_adapters(model, 1), cast=True).to(DEVICE).train()
    params = [p for p in other.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-4, fused=True)
    answers = torch.tensor(ANSWERS, device=DEVICE)
    seed = slot_seeds(0, 1)[0]

    def peft_step(step: int) -> None:
        prompts = [encoded.examples[i] for i in batch_numbers(seed, step, len(encoded), rows)]
        size = max(len(e.prompt) for e in prompts)
        ids = torch.tensor([[0] * (size - len(e.prompt)) + list(e.prompt) for e in prompts], device=DEVICE)
        mask = torch.tensor([[0] * (size - len(e.prompt)) + [1] * len(e.prompt) for e in prompts], device=DEVICE)
        labels = torch.tensor([e.label for e in prompts], device=DEVICE)
        out = other(input_ids=ids, attention_mask=mask, logits_to_keep=1, use_cache=False)
        cross_entropy(out.logits[:, -1].index_select(-1, answers).float(), labels).backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    for step in range(2):
        peft_step(step)
    for anchors in (3, 10) if DEVICE.type == "cuda" else (3,):
        reset_memory()
        model.set_curve(CurveSpec.slots(anchors), stacked(random_adapters(model, anchors)))
        program = AnchorsObjective(model, encoded, encoded, LoopConfig(batch_size=rows, seed=0), anchors)
        model.train()
        stepper = Stepper(program, model.factors, model.spec.mask, STEP)

        def our_step(step: int, program: Any = program, stepper: Any = stepper) -> None:
            stepper(program.parts(step), 1.0)

        ours, theirs = together(our_step, peft_step, options.steps)
        figures |= {"peft_s": theirs, f"{anchors}_anchors_s": ours}
        figures[f"{anchors}_anchors_tokens"] = sum(p.batch.tokens for p in program.parts(0))
        figures[f"{anchors}_anchors_batches_s"] = seconds(lambda: [program.parts(s) for s in range(options.steps)])  # noqa: B023
        figures[f"{anchors}_fine_tunes_over_ours"] = anchors * theirs / ours
        note(begin, f"{anchors} anchors {ours:.2f} s, one PEFT fine-tune {theirs:.2f} s")
        report("anchors", options, figures)
    show("anchors", figures)


def together(ours: Any, theirs: Any, steps: int) -> tuple[float, float]:
    """Seconds of so many steps of each. On a GPU one after the other; a CPU, which others may use too, takes them in
    turns, and the medians count."""
    if DEVICE.type == "cuda":
        return tuple(seconds(lambda f=f: [f(step) for step in range(steps)]) for f in (ours, theirs))  # type: ignore[return-value]
    pairs = [(seconds(lambda s=s: ours(s)), seconds(lambda s=s: theirs(s))) for s in range(steps)]  # type: ignore[misc]
    mine, other = (steps * statistics.median(column) for column in zip(*pairs, strict=True))
    return mine, other


def seconds(function: Any) -> float:
    start = time.perf_counter()
    function()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
