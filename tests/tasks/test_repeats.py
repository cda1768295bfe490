"""Rows that stand in a data set twice."""

from __future__ import annotations

from loracurve.tasks.dataset import Dataset, Row
from loracurve.tasks.repeats import in_training, shared_rows


def test_texts_are_the_same_but_for_case_punctuation_and_spacing() -> None:
    train = [Row("a", text="It works, well."), Row("b", text="One", text2="two"), Row("c", question="Which?")]
    test = [Row("d", text="it works well"), Row("e", text="One two"), Row("f", text="it works"), Row("g", text="WHICH")]
    assert [shared_rows([row], train) for row in test] == [1, 1, 0, 1]
    assert shared_rows([], train) == 0


def test_a_question_with_other_choices_is_another_row() -> None:
    train = [Row("a", question="Which one?", choices=("The first.", "the second"))]
    same, other = (Row("b", question="which one", choices=c) for c in (("The second", "the first"), ("No", "yes")))
    assert shared_rows([same, other], train) == 2 and shared_rows([same, other], train, choices=True) == 1


def test_splits_with_training_rows_are_named() -> None:
    rows = [Row(str(i), text=f"text number {i}", label=i % 2) for i in range(6)]
    splits = {"train": rows[:3], "validation": rows[3:5], "test": [rows[5], Row("x", text="Text, number 0!", label=0)]}
    dataset = Dataset("made", "classification", ("a", "b"), splits)
    (found,) = in_training(dataset)
    assert found.startswith("1 of 2 test rows stand among the training rows too")
    assert in_training(dataset, ["validation"]) == []
