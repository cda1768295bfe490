"""Base models known again by a few numbers: in other dtypes, quantised, with a curve in them; others told apart."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers.tiny import tiny
from helpers.tokenizers_made import bert_style, llama_style, qwen_style
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from loracurve.model.base_model import DRAWN_ANEW
from loracurve.model.curve_model import CurveModel
from loracurve.model.fingerprint import (
    base_fingerprint,
    compare_fingerprint,
    compare_tokenizers,
    tokenizer_fingerprint,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("checkpoint", DTYPES[:3])
def test_a_checkpoint_is_known_again_in_every_dtype(
    checkpoint: torch.dtype, stored: torch.dtype, tmp_path: Path
) -> None:
    tiny("qwen2").to(checkpoint).save_pretrained(tmp_path)
    found = base_fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=stored))
    found = json.loads(json.dumps(found, allow_nan=False))
    for dtype in DTYPES:
        assert compare_fingerprint(found, AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)) is None


def test_a_curve_in_the_model_changes_nothing() -> None:
    base = tiny("qwen2")
    plain = base_fingerprint(base)
    model = CurveModel.from_config(base, peft.LoraConfig(r=2, target_modules="all-linear"))
    assert base_fingerprint(model.model) == plain
    assert compare_fingerprint(plain, model.model) is None


def test_other_weights_shapes_and_configs_are_named() -> None:
    base = tiny("qwen2")
    stored = base_fingerprint(base)
    assert compare_fingerprint(stored, tiny("qwen2")) is None, "the same seed"
    other = copy.deepcopy(base)
    name = "model.layers.1.self_attn.v_proj.weight"
    with torch.no_grad():  # as folding an adapter in changes it
        other.get_parameter(name).add_(torch.full_like(other.get_parameter(name), 1e-4))
    assert compare_fingerprint(stored, other) == f"{name} has other numbers"
    other = copy.deepcopy(base)
    other.config.rope_parameters["rope_theta"] = 5.0
    assert str(compare_fingerprint(stored, other)).startswith("rope_parameters.rope_theta is 5.0 in its config")
    other = copy.deepcopy(base)
    other.resize_token_embeddings(base.config.vocab_size + 1)
    assert str(compare_fingerprint(stored, other)).startswith("vocab_size is")
    other.config.vocab_size = base.config.vocab_size
    assert "has shape" in str(compare_fingerprint(stored, other))
    assert compare_fingerprint(stored, tiny("llama")) is not None


def test_names_versions_and_drawn_weights_are_passed_over() -> None:
    base = tiny("encoder")
    setattr(base, DRAWN_ANEW, ("classifier.weight", "classifier.bias"))
    stored = base_fingerprint(base)
    assert not {"classifier.weight", "classifier.bias"} & stored["weights"].keys()
    other = copy.deepcopy(base)
    other.config.update({"id2label": {0: "a", 1: "b"}, "transformers_version": "9", "_name_or_path": "elsewhere"})
    with torch.no_grad():
        other.get_parameter("classifier.weight").zero_()
    assert compare_fingerprint(stored, other) is None


@pytest.mark.parametrize("make", [qwen_style, llama_style, bert_style])
def test_a_tokenizer_is_known_again(make: Any, tmp_path: Path) -> None:
    stored = tokenizer_fingerprint(make())
    make().save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert compare_tokenizers(json.loads(json.dumps(stored)), loaded) is None
    loaded("a padded and cut text", padding="max_length", max_length=4, truncation=True)
    loaded.chat_template, loaded.pad_token = "{{ messages }}", loaded.pad_token or loaded.unk_token
    assert compare_tokenizers(stored, loaded) is None, "state and chat templates are no part of it"
    others = [other for other in (qwen_style, llama_style, bert_style) if other is not make]
    assert all(compare_tokenizers(stored, other()) for other in others)


def test_swapped_tokens_and_other_rules_are_told_apart() -> None:
    stored = tokenizer_fingerprint(qwen_style())

    def changed(change: Callable[[dict[str, Any]], object]) -> str | None:
        values = json.loads(qwen_style().backend_tokenizer.to_str())
        change(values)
        fast = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(json.dumps(values)), pad_token="<|endoftext|>", eos_token="<|im_end|>"
        )
        return compare_tokenizers(stored, fast)

    def swap(values: dict[str, Any]) -> None:
        vocabulary = values["model"]["vocab"]
        first, second = list(vocabulary)[-2:]
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]

    assert changed(lambda values: None) is None
    assert changed(swap) == "its vocabulary differs"
    assert changed(lambda values: values["model"]["merges"].reverse()) == "its merges or scores differ"
    assert changed(lambda values: values.update(normalizer={"type": "Lowercase"})) == "it splits texts in another way"
