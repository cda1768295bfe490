"""Classes by name: other data in the class order of a task; a task from its record, without its data."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.texts import PASSAGES, TEXTS, classes, folder, questions
from helpers.tokenizers_made import qwen_style
from hypothesis import given
from hypothesis import strategies as st

from loracurve.system.errors import UserError
from loracurve.tasks.classes import RecordedTask, TaskIdentity, in_terms_of, rows_hash, rows_in_class_order
from loracurve.tasks.config import TaskConfig
from loracurve.tasks.dataset import Dataset, Row
from loracurve.tasks.task import load_task, settled_dataset

THREE = TaskIdentity("classification", "head", ("a", "b", "c"), ("a", "b", "c"), None, "sum", False, 64)
YES_NO = TaskIdentity("multiple_choice", "label", ("no", "yes"), ("no", "yes"), None, "sum", False, 64)


def dataset(labels: tuple[str, ...], found: list[int | None]) -> Dataset:
    rows = [Row(str(i), label, text=f"text {i}") for i, label in enumerate(found)]
    return Dataset("other", "classification", labels, {"test": rows})


def test_labels_are_mapped_by_name() -> None:
    mapped = in_terms_of(dataset(("c", "a", "b"), [0, 1, 2, None]), THREE)
    assert mapped.labels == THREE.labels
    assert [row.label for row in mapped.rows("test")] == [2, 0, 1, None]
    assert [row.text for row in mapped.rows("test")] == [f"text {i}" for i in range(4)]
    some = in_terms_of(dataset(("c", "b"), [0, 1]), THREE)
    assert [row.label for row in some.rows("test")] == [2, 1], "data with some of the classes"


def test_choices_that_all_rows_share_are_mapped_by_name() -> None:
    rows = [
        Row("same", 1, question="q", choices=("no", "yes")),
        Row("turned", 1, question="q", choices=("yes", "no")),
        Row("unknown", None, question="q", choices=("yes", "no")),
    ]
    found = rows_in_class_order(rows, (), YES_NO)
    assert [row.label for row in found] == [1, 0, None]
    assert {row.choices for row in found} == {("no", "yes")}
    own = replace(YES_NO, scoring="letter")
    assert rows_in_class_order(rows, (), own) == rows, "each row has its own choices"


def test_what_a_task_does_not_have_is_refused() -> None:
    with pytest.raises(UserError, match="other, test: expected classes .*a, b, c.*found 'd'"):
        in_terms_of(dataset(("a", "d"), [0, 1]), THREE)
    with pytest.raises(UserError, match="row 'x': expected classes .*no, yes.*found 'maybe'"):
        rows_in_class_order([Row("x", 0, question="q", choices=("maybe", "no"))], (), YES_NO)
    with pytest.raises(UserError, match="expected classification data.*found multiple_choice"):
        in_terms_of(Dataset("other", "multiple_choice", (), {}), THREE)


@pytest.mark.parametrize("make", [classes, questions])
@pytest.mark.parametrize("scoring", ["letter", "text", "label", "head"])
def test_a_recorded_task_encodes_rows_as_the_task_without_its_data(make: Any, scoring: str, tmp_path: Path) -> None:
    if make is questions and scoring in ("label", "head"):
        config = TaskConfig(folder(tmp_path, PASSAGES, "multiple_choice", ("no", "yes")), scoring)  # type: ignore[arg-type]
    else:
        config = make(tmp_path, scoring=scoring)
    tokenizer = qwen_style()
    task = load_task(config, tokenizer, 200)
    encoded = task.encode("train")
    record = json.loads(json.dumps(TaskIdentity.of(task, encoded.answer_ids).record()))
    identity = TaskIdentity.read(record)
    assert identity == TaskIdentity.of(task, encoded.answer_ids)

    def gone() -> Dataset:
        raise UserError("the data are gone")

    recorded = RecordedTask(identity, config, tokenizer, 200, "made", gone)
    assert recorded.classes == task.classes
    assert recorded.encode_rows(task.dataset.rows("train")) == encoded
    with pytest.raises(UserError, match="the data are gone"):
        recorded.encode("test")


def test_the_record_counts_and_not_the_options(tmp_path: Path) -> None:
    config = classes(tmp_path, scoring="label")
    tokenizer = qwen_style()
    task = load_task(config, tokenizer, 200)
    ids = task.encode("train").answer_ids
    identity = TaskIdentity.of(task, ids)
    rows = task.dataset.rows("test")
    options = replace(config, scoring="letter", normalise="mean")
    recorded = RecordedTask(identity, options, tokenizer, 100, "made", lambda: settled_dataset(config)[0])
    assert recorded.encode("test") == task.encode_rows(rows) and recorded.window == 100
    assert ids is not None
    other = RecordedTask(replace(identity, answer_ids=ids[::-1]), config, tokenizer, 200, "made", lambda: task.dataset)
    with pytest.raises(UserError, match="as the tokens"):
        other.encode("test")


def test_the_hash_of_rows_knows_labels_by_name() -> None:
    one, turned = dataset(("a", "b"), [0, 1]), dataset(("b", "a"), [1, 0])
    assert rows_hash(one, "test") == rows_hash(turned, "test")
    assert rows_hash(one, "test") != rows_hash(dataset(("a", "b"), [1, 0]), "test")


def test_a_folder_with_the_name_of_a_built_in_data_set_has_its_own_classes(tmp_path: Path) -> None:
    """The built-in prompt of word_sentiment has its answers in its own class order."""
    for labels, name in ((("negative", "positive"), "word_sentiment"), (("positive", "negative"), "class_label")):
        data = folder(tmp_path / "word_sentiment", TEXTS, labels=labels)
        task = load_task(TaskConfig(data, "label"), qwen_style())
        assert task.template is not None and task.template.name == name
        ids = task.encode("train").answer_ids
        assert ids is not None
        assert [qwen_style().decode([i]).strip() for i in ids] == list(labels)


@given(st.permutations(["a", "b", "c"]), st.lists(st.integers(0, 2), min_size=1, max_size=5))
def test_any_order_of_the_names_gives_the_same_rows(order: list[str], labels: list[int]) -> None:
    turned = dataset(tuple(order), [order.index(THREE.labels[label]) for label in labels])
    assert in_terms_of(turned, THREE) == in_terms_of(dataset(THREE.labels, list(labels)), THREE)
