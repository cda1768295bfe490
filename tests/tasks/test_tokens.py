"""Answers that are no single token."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.texts import classes
from helpers.tokenizers_made import bert_style, qwen_style

from loracurve.system.errors import UserError
from loracurve.tasks.task import load_task
from loracurve.tasks.tokens import answer_tokens


def test_answer_errors_name_answer_tokens_and_example(tmp_path: Path) -> None:
    def fails(said: str, prompt: str, answers: list[str]) -> None:
        with pytest.raises(UserError, match=said) as caught:
            load_task(classes(tmp_path, prompt=prompt, answers=answers), qwen_style()).encode("train")
        assert "\n" not in str(caught.value)

    fails(
        "' unfathomable': expected exactly one token after the prompt of example '0'",
        "{text} is",
        ["unfathomable", "A"],
    )
    # "(" + "a" is "a", but "is" + "a" is "is", "##a".
    with pytest.raises(UserError, match="expected the same token after every prompt, found '##a' in example 'second'"):
        answer_tokens(bert_style(), ["is (", "is"], ["a"], ["first", "second"])
    fails("expected different tokens", "{text} is", ["positive", " positive "])
    fails("in place of the prompt's own", "{text} is ", ["positive", "negative"])
    fails("expected 2 for the classes", "{text} is", ["positive"])
