"""Sentences with a gap: what is scored is what follows it, as a plain loop over whole sentences would."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.places import PREPARED
from helpers.texts import folder
from helpers.tiny import lora_config, random_points, tiny
from helpers.tokenizers_made import llama_style, qwen_style, smollm_style

from loracurve.curve.spec import CurveSpec
from loracurve.inference.prediction import predict
from loracurve.model.curve_model import CurveModel
from loracurve.tasks.batching import collate
from loracurve.tasks.cloze import fillings, has_gap, split_gap
from loracurve.tasks.config import TaskConfig
from loracurve.tasks.dataset import Dataset, Row, read_dataset
from loracurve.tasks.task import Task, load_task
from loracurve.tasks.templates import TEMPLATES

ROWS = [
    Row("middle", 0, question="the sun was bigger than fire so _ was a star.", choices=("the sun", "fire")),
    Row("first", 1, question="_ rust in damp air and they grow", choices=("plants", "metals")),
    Row("inside", 0, question="he was un___ed by a very plain story", choices=("sort", "water")),
    Row("last", 1, question="plants need _", choices=("dust", "light")),
    Row("none", 1, question="which option is right", choices=("one", "two")),
]


def gap_task(tokenizer: Any) -> Task:
    dataset = Dataset("gaps", "multiple_choice", (), {"train": ROWS, "test": ROWS})
    return Task(TaskConfig("unused", "text"), dataset, tokenizer, TEMPLATES["choice_gap"], 512)


def test_gaps_are_filled_and_what_follows_is_scored() -> None:
    assert split_gap("so _ was") == ("so", " was")
    assert split_gap("a ____ b") == ("a", " b")
    assert split_gap("two _ gaps _ here ") == ("two _ gaps _ here", "")
    assert fillings("so _ was", ["he", "she"]) == [(" he", " was"), (" she", " was")]
    assert fillings("_ was", ["he"]) == [("he", " was")]
    assert fillings("(_) was", ["he"]) == [("he", ") was")]
    assert fillings("need _ ", ["he"]) == fillings("need", ["he"]) == [("", " he")]


@pytest.mark.parametrize(
    "text",
    [
        "What does get_value return?", "What is __init__?", "What is __all__", "call _private now", "x_1 is 2", "a__b",
        "1_000", "Which _word_ is meant?", "over_ and out", "H_2O", "x_{1}", "(a + b)_{n}", "(H_{2}O)", "$_$", "^_^",
        "_(text)", "caf\u00e9_x", "\u03a6_f", "lim_n\u2192\u221e", "two _ gaps _ here", "none", "",
    ],
)  # fmt: skip
def test_names_and_formulas_have_no_gap(text: str) -> None:
    assert not has_gap(text) and split_gap(text) == (text, "")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("get_value gives _ .", ("get_value gives", " .")),
        ("the _'s tail", ("the", "'s tail")),
        ("it is \u201c_\u201d, he said", ("it is \u201c", "\u201d, he said")),
        ("a _-based plan", ("a", "-based plan")),
        ("some ____s rust", ("some", "s rust")),
        ("a __ b", ("a", " b")),
        ("\u56e0\u4e3a_\u592a\u5927", ("\u56e0\u4e3a", "\u592a\u5927")),
    ],
)
def test_gaps_stand_for_words(text: str, parts: tuple[str, str]) -> None:
    assert has_gap(text) and split_gap(text) == parts


def test_questions_about_names_are_no_cloze_sentences(tmp_path: Path) -> None:
    questions = [f"What does {name} return?" for name in ("get_value", "set_value", "_private", "__init__")]
    rows = [{"id": q, "question": q, "choices": ["one", "two"], "label": 0} for q in questions]
    asked = load_task(TaskConfig(folder(tmp_path, rows, "multiple_choice", ()), "text"), qwen_style())
    assert asked.template == TEMPLATES["choice_text"]
    example = asked.encode("train").examples[0]
    assert qwen_style().decode(example.prompt) == "Question: What does get_value return?\nAnswer:"


@pytest.mark.parametrize("name", ["winogrande_s", "winogrande_m"])
def test_every_real_sentence_has_its_gap(name: str) -> None:
    if not PREPARED.is_dir():
        pytest.skip("the project's shared data are not here")
    rows = [row for split in read_dataset(PREPARED / name).splits.values() for row in split]
    assert len(rows) > 2000 and all(has_gap(row.question) for row in rows)
    for row in rows:
        before, _, behind = (row.question or "").partition("_")
        assert split_gap(row.question or "") == (before.rstrip(), behind.rstrip())


@pytest.mark.parametrize("make", [qwen_style, smollm_style, llama_style])
def test_every_choice_is_read_and_the_same_words_are_scored(make: Any) -> None:
    tokenizer = make()
    examples = gap_task(tokenizer).encode("train").examples
    for row, example in zip(ROWS[:3], examples, strict=False):
        before, behind = split_gap(row.question or "")
        for choice, tokens, given in zip(row.choices, example.choices, example.given, strict=True):
            assert tokenizer.decode(tokens[given:]).strip() == behind.strip()
            whole = tokenizer.decode([*example.prompt, *tokens], skip_special_tokens=True)
            assert whole == re.sub("_+", choice, row.question or "")
            assert given > 0 and whole.startswith(before)
    for row, example in zip(ROWS[3:], examples[3:], strict=True):
        assert example.given == (0, 0)
        assert [tokenizer.decode(c).strip() for c in example.choices] == list(row.choices)


@pytest.mark.parametrize("make", [qwen_style, llama_style])
def test_scores_equal_a_loop_over_whole_sentences(make: Any) -> None:
    tokenizer = make()
    encoded = gap_task(tokenizer).encode("train")
    model = CurveModel(tiny("llama", torch.float64, len(tokenizer)), lora_config("llama"), CurveSpec(1, 1))
    model.set_curve(model.spec, random_points(model))
    t = torch.tensor([0.3], dtype=torch.float64)
    expected = torch.zeros(len(ROWS), 2, dtype=torch.float64)
    for e, example in enumerate(encoded.examples):
        for c, (tokens, given) in enumerate(zip(example.choices, example.given, strict=True)):
            ids = torch.tensor([[*example.prompt, *tokens]])
            with torch.inference_mode(), model.merger.points() as fold:
                fold(t[0])
                log_probs = model.model(input_ids=ids).logits[0].log_softmax(-1)
            for place in range(len(example.prompt) + given, ids.shape[1]):
                expected[e, c] += log_probs[place - 1, ids[0, place]]
    everything = list(range(len(encoded)))
    batches = {
        "alone": [collate(encoded, [i], packing=False) for i in everything],
        "packed": [collate(encoded, everything, 10_000)],
        "padded": [collate(encoded, everything, 40, pad_to=32)],
    }
    assert all(batch.ends is None for batch in batches["alone"]), "plain causal rows"
    for laid_out in batches.values():
        found = predict(model, laid_out, t).point_log_probs
        torch.testing.assert_close(found[0].double(), expected.log_softmax(-1), rtol=1e-5, atol=1e-5)
