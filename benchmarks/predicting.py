"""P12: texts a second of a curve's points against transformers' text-classification pipeline with one merged adapter.

Both take the same texts, tokenised in the measured time; the pipeline gets them sorted by length or as they come, in
batches of the rows that fit into our budget of tokens. The floor is what a prediction multiplies over what the pipeline
does: every point runs the layers that are adapted, the frozen ones below run once.
"""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

from common import ANSWERS, DEVICE, arguments, build, check, lora, random_adapters, report, show, stacked, timed
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast, pipeline
from whole_set import texts

from loracurve.curve.spec import CurveSpec
from loracurve.inference.prediction import CPU_TOKENS, GPU_TOKENS, predict_split
from loracurve.inference.predictive import Predictive
from loracurve.model.curve_model import CurveModel
from loracurve.tasks.encoding import Encoded, Example


def tokenizer_of(found: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    words = dict.fromkeys(["[PAD]", "[UNK]", *(w for text in found for w in text.split())])
    numbers = {word: i for i, word in enumerate(list(words)[:vocabulary])}
    inner = Tokenizer(models.WordLevel(numbers, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]")


def ours(model: CurveModel, tokenizer: PreTrainedTokenizerFast, found: list[str], points: int) -> Predictive:
    examples = [Example(str(i), tuple(p), (), None, 4) for i, p in enumerate(tokenizer(found).input_ids)]
    return predict_split(model, Encoded(examples, "answer", ANSWERS, tuple("abcd"), "sum", 0), points=points)


def main() -> None:
    options = arguments(__doc__, data={"type": Path}, rows={"type": int})
    figures: dict[str, Any] = {"relative_errors": check()}
    if options.shape == "7b":
        raise SystemExit("expected --shape smollm2 or small: the pipeline has a Llama's head")
    found = texts(options.data, options.rows or {"smollm2": 4096, "small": 64}[options.shape])
    rows = len(found)
    base = build(options.shape)
    tokenizer = tokenizer_of(found, base.config.vocab_size)
    layers = base.config.num_hidden_layers
    plain = LlamaForSequenceClassification(copy.deepcopy(base.config)).to(DEVICE, base.dtype).eval()
    plain.model.load_state_dict(base.model.state_dict())
    plain.config.pad_token_id = tokenizer.pad_token_id
    longest = max(map(len, tokenizer(found).input_ids))
    budget = GPU_TOKENS if DEVICE.type == "cuda" else CPU_TOKENS
    batch = max(budget // longest, 1)
    pipe = pipeline("text-classification", model=plain, tokenizer=tokenizer, device=DEVICE, batch_size=batch)
    by_length = sorted(found, key=lambda text: len(text.split()))
    # Milliseconds; the first call captures what there is to.
    theirs = {
        "as they come": timed(lambda: pipe(found), options.repeats, 1),
        "sorted": timed(lambda: pipe(by_length), options.repeats, 1),
    }
    best = min(theirs.values())
    figures |= {
        "texts": rows,
        "batch": batch,
        "pipeline_texts_a_second": {k: 1e3 * rows / ms for k, ms in theirs.items()},
    }
    for name, first in (("all layers", 0), ("upper third", layers - layers // 3)):
        config = lora(8)
        if first:
            config.layers_to_transform = list(range(first, layers))
        model = CurveModel(copy.deepcopy(base), config, CurveSpec(4, 2)).to(DEVICE).eval()
        model.set_curve(model.spec, stacked(random_adapters(model, model.spec.size)))

        figures[name] = {}
        for points in (3, 5, 10):
            ms = timed(partial(ours, model, tokenizer, found, points), options.repeats, 1)
            floor = (first + points * (layers - first)) / layers
            figures[name][points] = {
                "texts_a_second": 1e3 * rows / ms,
                "pipeline_time_over_ours": best / ms,
                "floor": floor,
                "over_floor": ms / best / floor,
            }
        data = f" --data DATA/{options.data.name}" if options.data else ""
        command = f"python benchmarks/predicting.py --shape {options.shape} --rows {options.rows or rows}"
        report("predicting", options, figures, f"{command} --repeats {options.repeats}{data}")
    show("predicting", figures)


if __name__ == "__main__":
    main()
