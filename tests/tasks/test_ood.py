"""Rows of another kind in the task's own prompt."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.texts import PASSAGES, QUESTIONS, classes, folder, questions, shown
from helpers.tokenizers_made import qwen_style

from loracurve.system.errors import UserError
from loracurve.tasks.config import TaskConfig
from loracurve.tasks.dataset import Row
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
