"""Options of a task."""

from __future__ import annotations

import pytest
from helpers.tokenizers_made import qwen_style

from loracurve.system.errors import UserError
from loracurve.tasks.config import TaskConfig
from loracurve.tasks.task import load_task


def test_config_errors() -> None:
    for options, said in (
        ({"scoring": "leter"}, "did you mean 'letter'"),
        ({"scoring": "letter", "limit_train": 0}, "limit_train: expected a whole number >= 1, found 0"),
        ({"scoring": "letter", "validation_fraction": 1.5}, r"validation_fraction: expected a number in \(0, 1\)"),
        ({"scoring": "letter", "prompt": "{text}", "template": "x"}, "found both"),
        ({"scoring": "letter", "answers": ["A"]}, "give prompt too"),
        ({"scoring": "label", "prompt": "{text}", "answers": "no"}, "answers: expected a list with one text"),
        ({"scoring": "label", "prompt": "{text}\udce9"}, "prompt: expected text, found half of a surrogate pair"),
        ({"scoring": "label", "prompt": "{text}", "answers": ["a", "\ud800"]}, "answers: expected text, found half"),
    ):
        with pytest.raises(UserError, match=said):
            TaskConfig("d", **options)
    with pytest.raises(UserError, match="did you mean 'sst2'"):
        load_task(TaskConfig("sst-2", "label"), qwen_style())
