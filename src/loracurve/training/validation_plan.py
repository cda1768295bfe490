"""How often a training is validated, and on which rows: looking takes a small part of what learning takes.

That part is counted and not timed, so that the same options give the same run on any machine. What is counted is
products: a token takes one with each weight where it is predicted, at each point of the curve, and three where it is
trained on, forward and about twice that backward.

Rows are given up first, down to `FEWEST_ROWS`, then validations: states are compared on the same rows, and of fewer
rows the best of several states is the luckiest one. Fewer validations find the best state less exactly.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from loracurve.tasks.dataset import by_hash, subset
from loracurve.tasks.encoding import Encoded
from loracurve.training.config import LoopConfig

__all__ = ["FEWEST_ROWS", "ValidationPlan", "plan_validation", "validation_interval"]


FEWEST_ROWS = 100
"""that are validated on at least, where there are as many"""

_OF_A_TRAINED_TOKEN = 3  # products with each weight


@dataclass(frozen=True)
class ValidationPlan:
    """The validations of a training that is not stopped early."""

    rows: Encoded
    of: int
    """rows that there are"""
    every: int
    """steps from one validation to the next; the last step is followed by one too"""
    times: int
    points: int
    """at which each row is predicted; of adapters side by side each has one"""
    share: float
    """of the training's products"""

    @property
    def record(self) -> dict[str, Any]:
        """For JSON; `rows` are counted."""
        return {"rows": len(self.rows)} | {name: getattr(self, name) for name in ("of", "times", "points", "share")}

    def __str__(self) -> str:
        """``212 of 2,000 rows, 10 times, 5 points: 20 % of the training's products``"""
        rows = f"{len(self.rows):,} of {self.of:,} rows"
        times = "once" if self.times == 1 else f"{self.times:,} times"
        points = f", {self.points} points" if self.points > 1 else ""
        return f"{rows}, {times}{points}: {100 * self.share:.0f} % of the training's products"


def validation_interval(config: LoopConfig) -> int:
    """Steps from one validation to the next, where no `validation_share` makes them more."""
    return config.evaluate_every or max(config.steps // 10, 1)


def plan_validation(
    config: LoopConfig, train: Encoded, validation: Encoded, points: int = 1, passes: int = 1
) -> ValidationPlan:
    """When and on which rows a training is validated.

    Args:
        config: of the training; its `validation_share` bounds the plan where `evaluate_every` is 0. At least one
            validation on `FEWEST_ROWS` rows is left.
        train: what is trained on.
        validation: the rows that there are, of which some are drawn by the hash of their ids.
        points: at which each row is predicted.
        passes: forward and backward passes of each training example (`passes_of`).
    """
    every, rows = validation_interval(config), len(validation)
    times = math.ceil(config.steps / every)
    trained = _OF_A_TRAINED_TOKEN * passes * config.steps * config.batch_size * train.total_size / len(train)
    in_order = replace(validation, examples=by_hash(validation.examples))
    taken = [points * tokens for tokens in accumulate(in_order.sizes)]  # by a validation on the first rows
    if config.validation_share is not None and not config.evaluate_every:
        most, fewest = config.validation_share * trained, min(FEWEST_ROWS, rows)
        if times * taken[fewest - 1] > most:
            every = math.ceil(config.steps / max(int(most / taken[fewest - 1]), 1))
            times = math.ceil(config.steps / every)
        rows = max(bisect_right(taken, most / times), fewest)
    drawn = validation if rows == len(validation) else replace(validation, examples=subset(validation.examples, rows))
    return ValidationPlan(drawn, len(validation), every, times, points, times * taken[rows - 1] / trained)
