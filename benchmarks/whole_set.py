"""P4: ten points of a curve over a whole data set with its real lengths, against PEFT one adapter after the other.

P4a gives PEFT our length-sorted batches of a token budget, P4b unsorted batches of a fixed number of rows. PEFT pads on
the left and computes the last position's logits only. `--data` is a folder with JSONL files; its words become tokens
(two for a word of more than six letters), so that lengths and common beginnings are real without a tokenizer.
"""

from __future__ import annotations

import copy
import json
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
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
    stacked,
)

from loracurve.curve.spec import CurveSpec
from loracurve.inference.prediction import CPU_TOKENS, GPU_TOKENS, folding_tokens, predict_splits
from loracurve.tasks.encoding import Encoded, Example

ROWS = 16  # of P4b
TEMPLATE = "Read the text and choose the letter of the answer that fits best . Text :"


def words_to_tokens(text: str, vocabulary: int) -> list[int]:
    tokens = []
    for word in text.split():
        for part in (word[:6], word[6:]):
            if part:
                tokens.append(20 + zlib.crc32(part.encode()) % (vocabulary - 20))
    return tokens


def texts(folder: Path | None, rows: int) -> list[str]:
    """Rows of the folder's test split, or random words in the lengths of short reviews (log-normal, median 25)."""
    if folder is not None:
        lines = (folder / "test.jsonl").read_text().splitlines()[:rows]
        return [" ".join(str(v) for k, v in json.loads(x).items() if k not in ("id", "label")) for x in lines]
    draw = torch.Generator().manual_seed(3)
    sizes = torch.randn(rows, generator=draw).mul(0.6).add(3.2).exp().clamp(4, 200).long().tolist()
    return [" ".join(f"w{int(torch.randint(5000, (1,), generator=draw))}" for _ in range(size)) for size in sizes]


def encode(found: Sequence[str], vocabulary: int, template: str = TEMPLATE) -> Encoded:
    start, end = words_to_tokens(template, vocabulary), words_to_tokens("Answer :", vocabulary)
    prompts = [(*start, *words_to_tokens(text, vocabulary)[:1500], *end) for text in found]
    examples = [Example(str(i), p, (), i % 4, 4) for i, p in enumerate(prompts)]
    return Encoded(examples, "answer", ANSWERS, ("a", "b", "c", "d"), "sum", 0)


def sorted_batches(encoded: Encoded, budget: int) -> Iterator[list[int]]:
    """Numbers of the examples in batches of at most `budget` padded tokens, sorted by length."""
    order = sorted(range(len(encoded)), key=lambda i: len(encoded.examples[i].prompt))
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) + 1) * len(encoded.examples[i].prompt) > budget:
            yield batch
            batch = []
        batch.append(i)
    yield batch


def fixed_batches(encoded: Encoded) -> Iterator[list[int]]:
    yield from (list(range(i, min(i + ROWS, len(encoded)))) for i in range(0, len(encoded), ROWS))


def main() -> None:
    options = arguments(__doc__, data={"type": Path}, rows={"type": int}, points={"type": int, "default": 10})
    begin = time.perf_counter()
    figures: dict[str, Any] = {"relative_errors": check()}
    rows = options.rows or {"7b": 256, "smollm2": 640, "small": 24}[options.shape]
    budget = GPU_TOKENS if DEVICE.type == "cuda" else CPU_TOKENS
    base = build(options.shape)
    encoded = encode(texts(options.data, rows), base.config.vocab_size)
    lengths = [len(e.prompt) for e in encoded.examples]
    twin = copy.deepcopy(base, {id(p): p for p in base.parameters()})
    r, spec = (16 if options.shape == "7b" else 8), CurveSpec(2, 2)
    model = curve_model(base, r, spec).eval()
    model.set_curve(spec, stacked(random_adapters(model, spec.size)))
    t = torch.linspace(0, 1, options.points, dtype=torch.float64)
    other = peft_model(twin, lora(r), [model.adapter(float(x)) for x in t], cast=False).to(DEVICE).eval()
    answers = torch.tensor(ANSWERS, device=DEVICE)
    figures |= {
        "data": options.data.name if options.data else "synthetic",
        "rows": len(lengths),
        "tokens": sum(lengths),
        "longest": max(lengths),
        "points": options.points,
        "folding_pays_from_tokens": folding_tokens(model),
    }

    def peft(numbers: Callable[[], Iterator[list[int]]], merge: bool) -> torch.Tensor:
        found = torch.zeros(len(t), len(encoded), len(ANSWERS), device=DEVICE)
        for i in range(len(t)):
            other.set_adapter(f"p{i}")
            if merge:
                other.merge_adapter([f"p{i}"])
            for batch in numbers():
                prompts = [encoded.examples[k].prompt for k in batch]
                size = max(len(p) for p in prompts)
                ids = torch.tensor([[0] * (size - len(p)) + list(p) for p in prompts]).to(DEVICE)
                mask = torch.tensor([[0] * (size - len(p)) + [1] * len(p) for p in prompts]).to(DEVICE)
                logits = other(input_ids=ids, attention_mask=mask, logits_to_keep=1, use_cache=False).logits
                found[i, torch.tensor(batch, device=DEVICE)] = logits[:, -1].index_select(-1, answers).float()
            if merge:
                other.unmerge_adapter()
        return found.log_softmax(-1).cpu()

    def ours(which: Any, way: Any) -> torch.Tensor:
        log_probs = predict_splits(which, {"test": encoded}, t, way=way)["test"].point_log_probs
        assert log_probs is not None
        return log_probs

    def by_length() -> Iterator[list[int]]:
        return sorted_batches(encoded, budget)

    def by_count() -> Iterator[list[int]]:
        return fixed_batches(encoded)

    runs: dict[str, Callable[[], torch.Tensor]] = {
        "points": lambda: ours(model, "points"),
        "merged": lambda: ours(model, "merged"),
        "chosen": lambda: ours(model, "auto"),
    }
    runs |= {
        "peft_set_adapter_sorted": lambda: peft(by_length, False),
        "peft_merge_sorted": lambda: peft(by_length, True),
        "peft_merge_fixed_rows": lambda: peft(by_count, True),
        "peft_set_adapter_fixed_rows": lambda: peft(by_count, False),
    }
    expected: torch.Tensor | None = None
    with torch.inference_mode():
        for name, run in runs.items():
            seconds = []
            # The first run fills caches, and of ours captures and compiles: both are written down. Many small batches
            # take PEFT so long that a first run is all there is.
            for _ in range(1 if name.endswith("fixed_rows") else 2):
                start = time.perf_counter()
                found = run()
                seconds.append(time.perf_counter() - start)
            expected = found if expected is None else expected
            error = float((found - expected).norm() / expected.norm())
            figures[name] = {"s": seconds[-1], "first_s": seconds[0], "difference_from_points": error}
            note(begin, f"{name}: {seconds[-1]:.2f} s (first {seconds[0]:.2f} s), difference {error:.3g}")
            _ratios(figures)
            report("whole_set", options, figures)
    show("whole_set", figures)


def _ratios(figures: dict[str, Any]) -> None:
    """PEFT's faster way over ours, as far as there are times; the first runs too."""
    for kind in ("sorted", "fixed_rows"):
        for which, suffix in (("s", ""), ("first_s", "_first")):
            there = [figures[k][which] for how in ("set_adapter", "merge") if (k := f"peft_{how}_{kind}") in figures]
            if there and "chosen" in figures:
                figures[f"{kind}_over_ours{suffix}"] = min(there) / figures["chosen"][which]


if __name__ == "__main__":
    main()
