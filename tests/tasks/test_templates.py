"""Prompt templates: identity, and faults of custom ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.texts import classes, shown
from helpers.tokenizers_made import qwen_style

from loracurve.system.errors import UserError
from loracurve.tasks.dataset import Row
from loracurve.tasks.task import load_task
from loracurve.tasks.templates import TEMPLATES


def test_custom_prompt_errors(tmp_path: Path) -> None:
    for prompt, said in (
        ("{txt} is", "did you mean 'text'"),
        ("{text.__class__} is", "expected fields"),
        ("{text!r} is", "expected fields"),
        ("{} is", "expected fields"),
        ("{text is", "literal braces"),
        ("is it", "expected the field {text}"),
        ("{text} {text2} is", "expected rows with 'text2'"),
    ):
        with pytest.raises(UserError, match=said):
            load_task(classes(tmp_path, prompt=prompt, answers=["positive", "negative"]), qwen_style())
    task = load_task(classes(tmp_path, prompt="{{x}} {text} is", answers=["positive", "negative"]), qwen_style())
    assert shown(qwen_style(), task.encode("train").examples[0].prompt) == "{x} a good film 0 is"
    odd = task.encode_rows([Row("b", text="braces {text} {0}")])
    assert "braces {text} {0} is" in shown(qwen_style(), odd.examples[0].prompt)


def test_template_identity(tmp_path: Path) -> None:
    ids = {template.id for template in TEMPLATES.values()}
    assert len(ids) == len(TEMPLATES)
    one = load_task(classes(tmp_path, prompt="{text} is", answers=["positive", "negative"]), qwen_style())
    two = load_task(classes(tmp_path, prompt="{text} is", answers=["negative", "positive"]), qwen_style())
    assert one.template.id != two.template.id
    assert len(one.template.id.split(":")[1]) == 12
    with pytest.raises(UserError, match="did you mean 'class_letter'"):
        load_task(classes(tmp_path, scoring="letter", template="clas_letter"), qwen_style())
    with pytest.raises(UserError, match="it is for"):
        load_task(classes(tmp_path, scoring="letter", template="choice_letter"), qwen_style())
