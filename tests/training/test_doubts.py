"""A fit that failed, or was cut off, says so."""

from __future__ import annotations

import math

import pytest

from loracurve.tasks.encoding import Encoded, Example
from loracurve.training.doubts import constant_nll, doubts
from loracurve.training.loop import FitResult


def rows(labels: list[int], scoring: str = "answer", choices: int = 2) -> Encoded:
    examples = [Example(str(i), (1,), ((1,),) * choices, label, choices) for i, label in enumerate(labels)]
    return Encoded(examples, scoring, None, ("a", "b"), "sum", 0)


def result(*validated: list[float]) -> FitResult:
    history = [{"step": 10 * (i + 1), "nll": 1.0, "validation_nll": nll} for i, nll in enumerate(validated)]
    columns = list(zip(*validated, strict=True))
    best = [min(range(len(c)), key=c.__getitem__) for c in columns]
    return FitResult(10 * len(validated), 1.0, [10 * (b + 1) for b in best], [min(c) for c in columns], history=history)


def test_the_best_constant_prediction_is_the_classes_frequencies() -> None:
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert constant_nll(rows([0, 0, 1, 0])) == pytest.approx(expected)
    assert constant_nll(rows([0, 0, 0])) == pytest.approx(0)
    assert constant_nll(rows([0, 1], "text", choices=4)) == pytest.approx(math.log(4))
    assert constant_nll(rows([0, 1], "lm")) is None


def test_a_fit_that_learnt_nothing_is_told_with_both_figures() -> None:
    (words,) = doubts(result([0.71], [0.70]), rows([0, 1]), "curve", 2e-3)
    assert words.startswith("curve: learnt nothing: validation NLL 0.700, ")
    assert "is 0.693; lower learning_rate (now 0.002)" in words
    # One of two adapters is enough.
    (words,) = doubts(result([0.3, 0.75], [0.2, 0.70]), rows([0, 1]), "anchors", 1e-3)
    assert words.startswith("anchors: learnt nothing: validation NLL, the worst of 2 adapters: 0.700, that of guessing")


def test_a_fit_that_was_cut_off_is_told_and_one_that_had_settled_is_not() -> None:
    (words,) = doubts(result([0.5], [0.4]), rows([0, 1]), "curve", 1e-3)
    assert words == (
        "curve: still getting better at the last of 20 steps (validation NLL 0.500, then 0.400); more steps would help"
    )
    (words,) = doubts(result([0.5, 0.3], [0.4, 0.2]), rows([0, 1]), "anchors", 1e-3)
    assert "(validation NLL, the mean of 2 adapters: 0.400, then 0.300)" in words
    for settled in (result([0.5], [0.495]), result([0.4], [0.5]), result([0.5, 0.4], [0.4, 0.5]), result([0.4])):
        assert doubts(settled, rows([0, 1]), "curve", 1e-3) == []
