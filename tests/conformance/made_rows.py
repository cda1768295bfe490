"""A small tokenizer and rows made of its words, shorter and longer than the windows of the tiny models."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from conformance.families import POSITIONS

__all__ = ["VOCABULARY", "made_tokenizer", "words_of", "write_task"]

_WORDS = """a the it they we you this that water fire sun star plant light air metal stone river film story music word
plain fine dull great good bad old new long short warm cold red green blue one two three four five is was has had grows
shines burns falls turns sings reads says and or but so very quite rather never always here there now then why how"""
_CUES = ". : ? , A B C D E Question Answer Text Label Passage 1 2 negative positive"
_GROWN = ["newone", "newtwo"]
"""the last two tokens, which bases with a grown vocabulary had not"""
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
_TOKENS = [*SPECIAL, *_CUES.split(), *_WORDS.split(), *_GROWN]
VOCABULARY = len(_TOKENS)


@cache
def made_tokenizer(style: str, side: str, pad: int = 0) -> PreTrainedTokenizerFast:
    """Words as tokens. Styles: bare; bos; encoder (<s> A </s> B </s>, token types); xlnet (A </s> <s>).

    `pad`: number of the padding token; where it is 1, BOS is 0, as RoBERTa has them.
    """
    tokens = [*_TOKENS]
    tokens[0], tokens[pad] = tokens[pad], tokens[0]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    forms = {
        "bos": ("<s> $A", "<s> $A $B"),
        "encoder": ("<s> $A </s>", "<s> $A </s> $B:1 </s>:1"),
        "xlnet": ("$A </s> <s>:2", "$A </s> $B:1 </s>:1 <s>:2"),
    }
    if style in forms:
        single, pair = forms[style]
        special = [("<s>", vocabulary["<s>"]), ("</s>", vocabulary["</s>"])]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=special)
    names = ["input_ids", "attention_mask"]
    if style in ("encoder", "xlnet"):
        names.insert(1, "token_type_ids")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        cls_token="<s>",
        sep_token="</s>",
        mask_token="<mask>",
        padding_side=side,
        model_input_names=names,
    )


def words_of(length: str, seed: int) -> list[str]:
    """Six texts: shorter than every window, or most of them longer than the attention windows or the positions.

    Neighbours begin alike, so that packed rows share more than the template.
    """
    draw = random.Random(seed)
    sizes = {
        "short": [1, 2, 1, 3, 2, 1],
        "long": [30, 44, 25, 3, 38, 50],
        "over": [POSITIONS + 14, 40, POSITIONS + 30, POSITIONS - 3, 5, POSITIONS + 14],
    }[length]
    texts: list[list[str]] = []
    for number, size in enumerate(sizes):
        begin = texts[-1][: size // 2] if number % 2 else []
        rest = [draw.choice(_WORDS.split()) for _ in range(size - len(begin) - 1)]
        texts.append([*begin, *rest, _GROWN[number % 2]])
    return [" ".join(text) for text in texts]


def write_task(folder: Path, scoring: str, length: str, pairs: bool, seed: int) -> Path:
    """A data folder with the same six rows in every split; `pairs`: most rows have a second text."""
    draw = random.Random(seed)
    rows = []
    for number, text in enumerate(words_of(length, seed)):
        row: dict[str, Any] = {"id": str(number)}
        some = lambda n: " ".join(draw.choice(_WORDS.split()) for _ in range(n))  # noqa: E731
        if scoring in ("letter", "text"):
            options = [some(1 if scoring == "letter" else 1 + (number + c) % 3) for c in range(2 + number % 2)]
            row |= {"question": text, "choices": options, "label": 0}
        elif scoring == "lm":
            row |= {"prompt": text, "completion": " " + some(1 + number % 4)}
        else:
            row |= {"text": text, "label": number % 2}
            if pairs and number != 2:
                row["text2"] = some(1 + number % 2)
        rows.append(json.dumps(row) + "\n")
    kinds = {"letter": "multiple_choice", "text": "multiple_choice", "lm": "language_modelling"}
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation", "test"):
        (folder / f"{split}.jsonl").write_text("".join(rows))
    classes = scoring in ("head", "label")
    meta = {"task": kinds.get(scoring, "classification"), "labels": ["negative", "positive"] if classes else []}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder
