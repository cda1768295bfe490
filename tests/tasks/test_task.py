"""Tasks: labels, limits, language modelling, no example dropped."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.places import PREPARED
from helpers.texts import PASSAGES, classes, folder, questions, shown
from helpers.tokenizers_made import llama_style, qwen_style

from loracurve.system.errors import UserError
from loracurve.tasks.config import TaskConfig
from loracurve.tasks.dataset import Dataset, Row, read_dataset
from loracurve.tasks.task import Task, load_task


def test_boolq_true_is_answered_by_yes(tmp_path: Path) -> None:
    for make in (qwen_style, llama_style):
        tokenizer = make()
        config = TaskConfig(folder(tmp_path, PASSAGES, "multiple_choice", ("no", "yes")), "label")
        encoded = load_task(config, tokenizer).encode("test")
        assert encoded.answer_ids is not None
        words = {example.id: shown(tokenizer, [encoded.answer_ids[example.label or 0]]) for example in encoded.examples}
        assert {name: word.strip() for name, word in words.items()} == {"t": "yes", "f": "no"}
        assert "Passage: it is red\nQuestion: is it red\nAnswer:" in shown(tokenizer, encoded.examples[0].prompt)


def test_language_modelling(tokenizer: Any, tmp_path: Path) -> None:
    rows = [
        {"id": "p", "prompt": "Question: which?\nAnswer:", "completion": " red and blue"},
        {"id": "t", "text": "the sun is a star"},
    ]
    data = folder(tmp_path, rows, "language_modelling", ())
    encoded = load_task(TaskConfig(data, "lm"), tokenizer).encode("train")
    with_eos = load_task(TaskConfig(data, "lm", append_eos=True), tokenizer).encode("train")
    texts = ["Question: which?\nAnswer: red and blue", "the sun is a star"]
    for text, example, ended in zip(texts, encoded.examples, with_eos.examples, strict=True):
        (completion,) = example.choices
        full = [*example.prompt, *completion]
        assert full == list(tokenizer(text).input_ids[: len(full)]) and example.prompt and completion
        assert completion[-1] != tokenizer.eos_token_id and example.label is None
        assert ended.choices[0] == (*completion, tokenizer.eos_token_id)
    assert len(encoded.examples[1].prompt) == 1
    for window in (4, 6, 9):
        cut = load_task(TaskConfig(data, "lm", max_length=window), tokenizer).encode("train")
        assert len(cut) == 2 and all(e.prompt and len(e.prompt) + len(e.choices[0]) <= window for e in cut.examples)
    with pytest.raises(UserError, match="suits language_modelling"):
        load_task(TaskConfig(data, "letter"), tokenizer)


def test_language_modelling_rows_are_cut_on_the_side_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Prompts lose their left end, completions and texts that are longer than the window their right end."""
    tokenizer = qwen_style()
    rows = [
        {"id": "text", "text": "the sun is a star it is red and they grow"},
        {"id": "prompt", "prompt": "the sun is a star", "completion": " red and blue"},
        {"id": "both", "prompt": "the sun", "completion": " is a star it is red"},
        {"id": "short", "prompt": "the sun", "completion": " is"},
    ]
    data = folder(tmp_path, rows, "language_modelling", ())
    whole = {e.id: e for e in load_task(TaskConfig(data, "lm"), tokenizer).encode("train").examples}
    with caplog.at_level(logging.WARNING, "loracurve"):
        encoded = load_task(TaskConfig(data, "lm", max_length=5), tokenizer).encode("train")
    (said,) = [record.getMessage() for record in caplog.records]
    assert "train: 2 of 4 prompts were cut on the left and 2 of 4 completions lost tokens at their right end" in said
    assert said.endswith("to fit 5 tokens")
    assert (encoded.truncated, encoded.cut_prompts, encoded.cut_completions) == (3, 2, 2)
    found = {e.id: (e.prompt, e.choices[0]) for e in encoded.examples}
    for name, (prompt, completion) in found.items():
        full = whole[name]
        assert prompt == full.prompt[len(full.prompt) - len(prompt) :], "the left end went"
        assert completion == full.choices[0][: len(completion)], "the right end went"
        assert len(prompt) + len(completion) == min(5, len(full.prompt) + len(full.choices[0]))
    assert found["text"][0] == whole["text"].prompt, "a text has no prompt to lose"
    assert found["prompt"][1] == whole["prompt"].choices[0], "what is learnt stays whole where it fits"
    assert len(found["both"][0]) == 1
    assert found["short"] == (whole["short"].prompt, whole["short"].choices[0])
    caplog.clear()
    less = len(whole["text"].prompt) + len(whole["text"].choices[0]) - 1
    with caplog.at_level(logging.WARNING, "loracurve"):
        load_task(TaskConfig(data, "lm", max_length=less), tokenizer).encode("train")
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.endswith(f"train: 1 of 4 completions lost tokens at their right end to fit {less} tokens")


def test_limits_validation_and_description(tmp_path: Path) -> None:
    config = classes(tmp_path, limit_train=3, limit_test=2, limit_validation=1)
    (tmp_path / "validation.jsonl").unlink()
    task = load_task(config, qwen_style())
    assert {split: len(rows) for split, rows in task.dataset.splits.items()} == {"train": 3, "validation": 1, "test": 2}
    assert not {r.id for r in task.dataset.rows("train")} & {r.id for r in task.dataset.rows("validation")}
    task.encode("train")
    said = json.loads(json.dumps(task.describe()))
    assert said["validation"] == "1 rows (0.1) of train by hash of id, seed 0" and said["truncated"] == {"train": 0}
    assert said["template"]["hash"] in task.template.id
    labels = task.labels("train")
    assert labels.dtype == torch.int64 and labels.tolist() == [row.label for row in task.dataset.rows("train")]
    bare = Dataset("d", "classification", ("n", "y"), {"x": [Row("1", text="t")]})
    with pytest.raises(UserError, match="expected a label on every row"):
        Task(config, bare, qwen_style(), task.template, None).labels("x")


def test_label_scoring_needs_the_same_choices_in_every_row(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="use scoring letter or text"):
        load_task(questions(tmp_path, scoring="label"), qwen_style())


def test_word_sentiment_task() -> None:
    pytest.importorskip("periodictable")
    try:
        task = load_task(TaskConfig("word_sentiment", "label", limit_train=1200, limit_test=50), qwen_style())
    except UserError as error:
        pytest.skip(str(error))
    assert len(task.encode("train")) == 1200 and len(task.encode("test")) == 50
    for split in ("ambiguous", "elements"):
        encoded = task.encode(split)
        assert len(encoded) == len(task.dataset.splits[split]) and encoded.examples[0].label is None
        assert encoded.answer_ids == task.encode("train").answer_ids
    assert shown(qwen_style(), encoded.examples[0].prompt) == "The sentiment of the word actinium is"
    assert [shown(qwen_style(), [i]) for i in encoded.answer_ids or ()] == [" negative", " positive"]


@pytest.mark.parametrize(
    ("name", "scoring", "split"),
    [
        ("arc_challenge", "letter", "validation"),
        ("arc_challenge", "text", "validation"),
        ("boolq", "label", "test"),
        ("winogrande_s", "text", "train"),
        ("winogrande_m", "text", "test"),
        ("mmlu_anatomy", "letter", "validation"),
        ("sst2", "letter", "test"),
        ("mrpc", "letter", "test"),
        ("rte", "head", "test"),
        ("ag_news", "letter", "test"),
    ],
)
def test_no_example_is_dropped(name: str, scoring: Any, split: str) -> None:
    if not PREPARED.is_dir():
        pytest.skip("the project's shared data are not here")
    task = load_task(TaskConfig(str(PREPARED / name), scoring), qwen_style(), 512)
    encoded = task.encode(split)
    rows = task.dataset.splits[split]
    assert [example.id for example in encoded.examples] == [row.id for row in rows]
    if name != "mmlu_anatomy":
        assert rows == read_dataset(PREPARED / name).splits[split]
    assert task.labels(split).tolist() == [example.label for example in encoded.examples]
    assert all(0 <= example.label < example.n_choices for example in encoded.examples if example.label is not None)
    assert max(len(example.prompt) for example in encoded.examples) <= 512
    assert all(bool(example.given) == name.startswith("winogrande") for example in encoded.examples)
