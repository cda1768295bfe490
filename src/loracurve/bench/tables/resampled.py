"""Measures of cells that are no means, over resamples of rows that all methods and seeds share, and over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from loracurve.bench.results import CellResult, seed_of
from loracurve.inference import metrics
from loracurve.inference.intervals import Interval, interval_of, resample_counts, resampled_aurc, resampled_auroc
from loracurve.inference.predictive import Predictive

__all__ = [
    "FIGURES",
    "SCORES",
    "Resampled",
    "counts_of",
    "mean_over_seeds",
    "means_over_rows",
    "over_groups",
    "over_seeds",
    "resampled",
    "scores_of",
]


SCORES = {"MI": "mutual_information", "entropy": "entropy", "W": "within_points", "distance": "distance"}
"""Scores by the names that tables give them. W is the mutual information within points (`Predictive`)."""

FIGURES = {"MI": "mi", "entropy": "entropy", "W": "within", "distance": "distance"}
"""How the figures of a cell call them, as in auroc_mi."""

Resampled = tuple[float | None, Tensor]
"""A measure, None where the data leave it undefined, and its values ``[R]`` over resamples."""


def scores_of(predictive: Predictive) -> list[str]:
    """The scores that there are: of one point MI is W, or nothing, and not every method measures a distance."""
    there = {
        "MI": len(predictive.weights) > 1 or bool((predictive.between_points.abs() > 1e-9).any()),
        "entropy": True,
        "W": bool(predictive.within_points.any()),
        "distance": predictive.distance is not None,
    }
    return [name for name, known in there.items() if known]


def resampled(result: CellResult, where: str, score: str, measure: str) -> Resampled:
    """AUROC or AURC ("auroc", "aurc") of a score for errors (``where`` is "errors") or for the rows of another set."""
    key = (where, score, measure)
    if key not in result.resampled:
        result.resampled[key] = _resample(result, *key)
    return result.resampled[key]


def _resample(result: CellResult, where: str, score: str, measure: str) -> Resampled:
    test, task = result.test, result.cell.task
    scores, counts = getattr(test, SCORES[score]), counts_of(task, "test", len(test))
    if where == "errors":
        positive = ~test.correct(result.predictions.labels["test"])
    else:
        other = result.predictions.sets[where]
        scores = torch.cat([scores, getattr(other, SCORES[score])])
        positive = torch.cat([torch.zeros(len(test)), torch.ones(len(other))]).bool()
        counts = torch.cat([counts, counts_of(task, where, len(other))], dim=1)
    if measure == "aurc":
        return metrics.aurc(scores, positive), resampled_aurc(scores, positive, counts)
    return metrics.auroc(scores, positive).value, resampled_auroc(scores, positive, counts)


@lru_cache(maxsize=8)
def counts_of(task: str, where: str, examples: int) -> Tensor:
    """``[R, E]``: how often each row of a task's set is in each resample."""
    return resample_counts(examples, seed_of(task, where))


def mean_over_seeds(found: Sequence[Resampled], minus: Sequence[Resampled] | None = None) -> Interval | None:
    """Mean over seeds, or mean difference, with its interval over rows; None where a seed leaves it undefined."""
    estimates = [e for e, _ in found]
    values = torch.stack([v for _, v in found]).mean(0)
    if minus is not None:
        others = [e for e, _ in minus]
        estimates = [None if a is None or b is None else a - b for a, b in zip(estimates, others, strict=True)]
        values = values - torch.stack([v for _, v in minus]).mean(0)
    known = [e for e in estimates if e is not None]
    return interval_of(sum(known) / len(known), values) if len(known) == len(estimates) else None


def means_over_rows(values: Tensor, task: str) -> Tensor:
    """``[S, R]``: means of values ``[S, E]`` of a task's test rows over resamples of these rows."""
    counts = resample_counts(values.shape[1], seed_of(task, "averages"))
    return values @ counts.mT / values.shape[1]


def over_seeds(values: Tensor) -> Tensor:
    """``[R]``: means of ``[S, R]`` over S seeds that are drawn with replacement for each resample of rows, the same
    draws for all that is compared."""
    return values.gather(0, _drawn(len(values), values.shape[1], "seeds")).mean(0)


def over_groups(values: Tensor, groups: Sequence[str]) -> Tensor:
    """``[R]``: means of ``[P, R]`` over pairs whose groups (tasks) are drawn with replacement for each resample."""
    names = list(dict.fromkeys(groups))
    member = torch.tensor([[g == name for g in groups] for name in names], dtype=values.dtype)
    times = torch.nn.functional.one_hot(_drawn(len(names), values.shape[1], "tasks"), len(names)).sum(0).to(values)
    weights = times @ member  # [R, P]
    return (weights * values.mT).sum(1) / weights.sum(1)


@lru_cache(maxsize=8)
def _drawn(count: int, resamples: int, what: str) -> Tensor:
    draw = torch.Generator().manual_seed(seed_of("", what))
    return torch.randint(count, (count, resamples), generator=draw)
