"""Rows of another kind in the task's own prompt."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from helpers.texts import PASSAGES, QUESTIONS, classes, folder, questions, shown
from helpers.tokenizers_made import qwen_style

from loracurve.system.errors import UserError
from loracurve.tasks.config import TaskConfig
from loracurve.tasks.dataset import Dataset, Row
from loracurve.tasks.ood import adopted, check_foreign, without_classes
from loracurve.tasks.task import load_task


def test_rows_in_and_out_of_distribution_have_the_same_format(tmp_path: Path) -> None:
    tokenizer = qwen_style()
    forms = {"letter": "Text: {}\nA. negative\nB. positive\nAnswer:", "label": "Text: {}\nLabel:"}
    for scoring, form in forms.items():
        task = load_task(classes(tmp_path, scoring=scoring), tokenizer)
        inside = task.encode("test").examples[0]
        foreign = [
            Row("c", 3, text="rust", text2="damp"),
            Row("m", 1, question="which?", choices=("x", "y"), context="air"),
        ]
        outside = task.encode_rows(foreign, "ood", labelled=False)
        assert shown(tokenizer, inside.prompt) == form.format("a good film 0")
        assert shown(tokenizer, outside.examples[0].prompt) == form.format("rust")
        assert shown(tokenizer, outside.examples[1].prompt) == form.format("air which?")
        assert outside.answer_ids == task.encode("test").answer_ids
        assert [e.label for e in outside.examples] == [None, None] and [e.n_choices for e in outside.examples] == [2, 2]
    with pytest.raises(UserError, match="labelled=False"):
        task.encode_rows(foreign[:1])
    mine = load_task(questions(tmp_path / "q"), tokenizer)
    other = Row("o", 0, question="why?", choices=("p", "q"), context=None)
    text = shown(tokenizer, mine.encode_rows([other]).examples[0].prompt)
    assert text == "Question: why?\nA. p\nB. q\nAnswer:"
    with pytest.raises(UserError, match="without any"):
        mine.encode_rows([Row("t", text="no choices")])


def test_foreign_rows_borrow_what_they_lack(tmp_path: Path) -> None:
    tokenizer = qwen_style()
    rows = [Row("s", 1, text="rust", text2="damp"), Row("m", 2, question="why?", choices=("p", "q", "r"))]
    mine = load_task(questions(tmp_path / "q", scoring="text"), tokenizer)
    encoded = mine.encode_foreign(rows)
    assert [e.label for e in encoded.examples] == [None, None]
    prompts = [shown(tokenizer, e.prompt) for e in encoded.examples]
    assert prompts == ["Question: rust damp\nAnswer:", "Question: why?\nAnswer:"]
    choices = [[shown(tokenizer, c).strip() for c in e.choices] for e in encoded.examples]
    assert choices[0] in [q["choices"] for q in QUESTIONS] and choices[1] == ["p", "q", "r"]
    assert mine.encode_foreign(rows[:1]).examples == encoded.examples[:1], "which one depends on the id alone"
    # All rows have the same choices, and a passage each: so do the foreign ones.
    for scoring in ("text", "label", "letter"):
        passages = TaskConfig(folder(tmp_path / "p", PASSAGES, "multiple_choice", ("no", "yes")), scoring)  # type: ignore[arg-type]
        foreign = load_task(passages, tokenizer).encode_foreign(rows).examples
        assert [e.n_choices for e in foreign] == [2, 2]
        assert all(shown(tokenizer, e.prompt).startswith("Passage: it is red\nQuestion: ") for e in foreign)


def test_a_pair_task_gets_pairs_of_foreign_texts(tmp_path: Path) -> None:
    rows = [Row(f"f{i}", text=f"foreign {i}") for i in range(50)]
    own = Dataset(
        "pairs", "classification", ("no", "yes"), {"test": [Row("a", 0, text="one", text2="two")]}, notes="", source=""
    )
    found = adopted(rows, own)
    assert [row.text for row in found] == [row.text for row in rows]
    assert all(row.text2 != row.text and row.text2 in {r.text for r in rows} for row in found)
    assert len({row.text2 for row in found}) > 20
    assert adopted(rows, replace(own, splits={"test": [Row("a", 0, text="one")]})) == rows


def test_rows_of_the_task_itself_are_not_foreign() -> None:
    own = Dataset(
        "mine", "classification", ("no", "yes"), {"train": [Row(f"a{i}", 0, text=f"Row {i}!") for i in range(100)]},
        notes="", source="",
    )  # fmt: skip
    foreign = [Row(f"f{i}", text=f"other {i}") for i in range(99)]
    check_foreign([*foreign, Row("x", text="row  7")], own, "ood:x")
    with pytest.raises(UserError, match="ood:x: expected rows that mine does not have, found 2 of 101 in it"):
        check_foreign([*foreign, Row("x", text="row  7"), Row("y", text="ROW 8")], own, "ood:x")


def test_classes_that_are_held_out() -> None:
    labels = ("a", "b", "c")
    splits = {part: [Row(f"{part}{i}", i % 3, text=f"{part} {i}") for i in range(9)] for part in ("train", "test")}
    dataset = Dataset("d", "classification", labels, splits, notes="", source="")
    found = without_classes(dataset, ["b"])
    assert found.labels == ("a", "c")
    assert [row.label for row in found.splits["train"]] == [0, 1] * 3
    assert [(row.id, row.label) for row in found.splits["held_out"]] == [
        ("test1", None),
        ("test4", None),
        ("test7", None),
    ]
    assert without_classes(dataset, []) is dataset
    with pytest.raises(UserError, match="classes of d, found 'bb'; did you mean 'b'"):
        without_classes(dataset, ["bb"])
    with pytest.raises(UserError, match="at least two classes to be left, found 1"):
        without_classes(dataset, ["a", "b"])
