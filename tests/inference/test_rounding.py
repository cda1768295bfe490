"""The same rows in other batches: how far their predictions differ, and a tolerance that covers it."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.tiny import curve_model

from loracurve.inference.model_average import equal
from loracurve.inference.prediction import predict_split
from loracurve.inference.predictive import Predictive
from loracurve.inference.rounding import FLOOR, SAFETY, PredictedAgain, first_of_each, predict_again
from loracurve.tasks.encoding import Encoded, Example

T = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)


def encoded(rows: int, texts: int, choices: bool = False) -> Encoded:
    """Rows of which many have the same tokens, under ids and labels of their own."""
    draw = torch.Generator().manual_seed(4)
    prompts = [tuple(torch.randint(3, 300, (4 + 5 * i % 23,), generator=draw).tolist()) for i in range(texts)]
    own = [(((5, 6), (7,), (8, 9, 10))[: 2 + i % 2] if choices else ()) for i in range(texts)]
    examples = [
        Example(f"row {i}", prompts[i % texts], own[i % texts], i % 2, len(own[i % texts]) or 3) for i in range(rows)
    ]
    if choices:
        return Encoded(examples, "text", None, ("a", "b", "c"), "sum", 0)
    return Encoded(examples, "answer", (11, 12, 13), ("a", "b", "c"), "sum", 0)


def test_equal_rows_are_found_by_their_tokens() -> None:
    assert first_of_each(encoded(7, 3)).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert first_of_each(encoded(2, 2)).tolist() == [0, 1]


def test_largest_difference_by_hand() -> None:
    predictive = Predictive.from_log_probs(torch.full((1, 5, 2), math.log(0.5)))
    again = PredictedAgain(predictive, torch.tensor([0, 3, 0, 3, 1]), 2, ())
    assert again.largest_difference(torch.tensor([1.0, 5.0, 1.25, 4.5, 9.0])) == 0.5
    assert again.tolerance(torch.tensor([1.0, 5.0, 1.25, 4.5, 9.0])) == SAFETY * 0.5
    assert again.largest_difference(torch.tensor([[1, 0], [2, 0], [1, 3], [2, 1], [7, 0]])) == 3
    assert again.tolerance(torch.zeros(5)) == FLOOR, "nothing seen is not nothing"


@pytest.mark.parametrize("rows,texts", [(1, 1), (30, 1), (30, 5), (90, 90)])
@pytest.mark.parametrize("choices", [False, True])
def test_the_sample_is_predicted_alone_in_groups_and_merged(rows: int, texts: int, choices: bool) -> None:
    model, _ = curve_model("qwen2", 1, torch.float32)
    split = encoded(rows, texts, choices)
    predictive = predict_split(model, split, T)
    again = predict_again(model, split, predictive, equal(T), seed=0)
    assert again.examples == min(64, texts)
    assert len(again.predictive) == len(again.rows) == rows + again.examples + 4 * 64
    assert torch.equal(again.rows[:rows], first_of_each(split))
    assert again.batches[-1] == "merged" and len(again.batches) == 6
    sizes = {split.sizes[i] for i in again.rows[rows : rows + again.examples].tolist()}
    assert {min(split.sizes), max(split.sizes)} <= sizes, "the sample spreads over the lengths"
    # The same rows: what is put together differs by rounding alone.
    assert again.largest_difference(again.predictive.probs) < 1e-4
    same = predict_again(model, split, predictive, equal(T), seed=0)
    assert torch.equal(same.rows, again.rows) and torch.equal(same.predictive.probs, again.predictive.probs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_the_tolerance_covers_rows_that_were_not_tried(architecture: str, dtype: torch.dtype) -> None:
    model, _ = curve_model(architecture, 1, dtype)
    split = encoded(120, 120)
    predictive = predict_split(model, split, T)
    again = predict_again(model, split, predictive, equal(T), seed=0)
    merged = dtype == torch.float32  # folding in half precision changes more than rounding a sum does
    assert ("merged" in again.batches) == merged
    draw = torch.Generator().manual_seed(9)
    others = []
    for size in (1, 5, 40):
        order = torch.randperm(120, generator=draw)
        parts = []
        for group in order.split(size):
            some = Encoded([split.examples[i] for i in group.tolist()], "answer", (11, 12, 13), split.classes, "sum", 0)
            parts.append(predict_split(model, some, T))
        others.append(Predictive.cat(parts).index(order.argsort()))
    for quantity in ("probs", "entropy", "mutual_information"):
        seen = torch.stack([getattr(p, quantity).double() for p in [predictive, *others]])
        assert (seen.amax(0) - seen.amin(0)).max() <= again.tolerance(getattr(again.predictive, quantity))
