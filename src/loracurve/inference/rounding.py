"""How far rounding moves predictions: the same rows again in other batches, and a tolerance that covers what was seen.

A row's prediction depends on its neighbours in the last bits: sums are taken in another order, by another kernel. Where
scores are tied (few distinct texts) an exact comparison is then decided by the batch. Rounding the scores would only
move the place where they jump.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loracurve.inference.model_average import Average
from loracurve.inference.prediction import Way, folding_tokens, keeps_precision, room_for_merged
from loracurve.inference.predictive import Predictive
from loracurve.model.curve_model import CurveModel
from loracurve.system.distributed import gathered
from loracurve.system.randomness import generator
from loracurve.tasks.encoding import Encoded, Example

__all__ = ["FLOOR", "SAFETY", "PredictedAgain", "first_of_each", "predict_again"]


SAFETY = 4.0
"""The tolerance in units of the largest difference seen: rows that were not tried may differ more."""

FLOOR = 1e-6
"""The least tolerance, some units in the last place of float32."""

EXAMPLES = 64
GROUPS = (1, 3, 8, EXAMPLES)  # few rows and many run through different kernels


@dataclass(frozen=True)
class PredictedAgain:
    """All rows of a split as predicted together, followed by a sample of them predicted in other batches."""

    predictive: Predictive
    """of M predictions"""
    rows: Tensor
    """``[M]``, equal where predictions are of the same row"""
    examples: int
    """distinct rows in the sample"""
    batches: tuple[str, ...]
    """what the sample was predicted in"""

    def largest_difference(self, values: Tensor) -> float:
        """Of two predictions of one row, in a quantity ``[M]`` or ``[M, C]``."""
        order = self.rows.argsort()
        each = values.double()[order].split(self.rows.unique(return_counts=True)[1].tolist())
        return max(float((same.amax(0) - same.amin(0)).max()) for same in each)

    def tolerance(self, values: Tensor) -> float:
        """By how much two predictions of one row may differ in a quantity: with a margin, and never 0."""
        return max(SAFETY * self.largest_difference(values), FLOOR)


def first_of_each(encoded: Encoded) -> Tensor:
    """``[E]``, for each example the number of the first one with the same tokens."""
    first: dict[Example, int] = {}
    keys = [replace(example, id="", label=None) for example in encoded.examples]
    return torch.tensor([first.setdefault(key, i) for i, key in enumerate(keys)], dtype=torch.long)


def predict_again(
    model: CurveModel, encoded: Encoded, predictive: Predictive, average: Average, seed: int
) -> PredictedAgain:
    """Predict a sample of at most 64 distinct rows again: alone, in groups of 3, 8 and 64 drawn by the seed, merged.

    The sample spreads over the rows' lengths. Fewer distinct rows are repeated, so that copies are neighbours too. The
    merged way is tried where `predict_split` may choose it. It costs at most 320 more rows to predict.

    Args:
        model: with a curve.
        encoded: E rows, at least one.
        predictive: of these rows, by the average.
        average: what they are predicted by.
        seed: of the sample and of the groups.
    """
    first = first_of_each(encoded)
    distinct = first.unique()
    shuffled = distinct[torch.randperm(len(distinct), generator=generator(seed, "rounding"))].tolist()
    by_length = sorted(shuffled, key=lambda i: encoded.sizes[i])
    count = min(EXAMPLES, len(by_length))
    sample = torch.tensor(by_length)[torch.linspace(0, len(by_length) - 1, count).round().long()]
    copies = sample.repeat(math.ceil(EXAMPLES / count))[:EXAMPLES]

    parts, rows = [predictive], [first]

    def predict(group: Tensor, way: Way) -> None:
        some = replace(encoded, examples=[encoded.examples[i] for i in group.tolist()])
        parts.append(average.predict(model, some, way))
        rows.append(group)

    for size in GROUPS:
        drawn = copies[torch.randperm(EXAMPLES, generator=generator(seed, "rounding", size))]
        for group in (sample if size == 1 else drawn).split(size):
            predict(group, "points")
    merged = all(
        gathered(lambda: keeps_precision(model) and math.isfinite(folding_tokens(model)) and room_for_merged(model))
    )
    if merged:
        predict(copies, "merged")
    batches = ("all rows together", *(f"{size} together" for size in GROUPS), *(["merged"] if merged else []))
    return PredictedAgain(Predictive.cat(parts), torch.cat(rows), count, batches)
