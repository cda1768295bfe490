"""Bootstrap over examples of measures that are no means: AUROC and AURC, for all resamples at once.

A resample is how often each example is in it, a row of `counts` ``[R, E]``; methods that are compared share it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = [
    "Interval",
    "bootstrap_interval",
    "interval_of",
    "paired_bootstrap",
    "resample_counts",
    "resampled_aurc",
    "resampled_auroc",
    "resampled_ece",
]


class Interval(NamedTuple):
    """An estimate and its bootstrap interval."""

    estimate: float
    low: float
    high: float

    @property
    def distinguishable(self) -> bool:
        """Whether the interval excludes 0: for a paired difference, whether the data tell the two apart."""
        return not self.low <= 0 <= self.high


def bootstrap_interval(values: Tensor, seed: int, resamples: int = 2000, level: float = 0.95) -> Interval:
    """Mean of per-example values ``[E]`` with its percentile bootstrap interval (Efron & Tibshirani 1993, ch. 13).

    Raises:
        ValueError: no values, or a level outside (0, 1).
    """
    if not len(values) or not 0 < level < 1:
        raise ValueError(f"expected values and a level in (0, 1), found {len(values)} values and level {level}")
    values = values.detach().double().cpu()
    generator = torch.Generator().manual_seed(seed)
    chunk = max(1, 2_000_000 // len(values))
    means = torch.cat(
        [
            values[torch.randint(len(values), (min(chunk, resamples - first), len(values)), generator=generator)].mean(
                1
            )
            for first in range(0, resamples, chunk)
        ]
    )
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = means.quantile(tails).tolist()
    return Interval(values.mean().item(), low, high)


def paired_bootstrap(
    values_a: Tensor, values_b: Tensor, seed: int, resamples: int = 2000, level: float = 0.95
) -> Interval:
    """Mean difference a - b over the same examples ``[E]`` with its interval; see `Interval.distinguishable`.

    Raises:
        ValueError: shapes that differ.
    """
    if values_a.shape != values_b.shape:
        raise ValueError(f"expected values of the same examples, found {values_a.shape} and {values_b.shape}")
    return bootstrap_interval(values_a.double() - values_b.double(), seed, resamples, level)


def resample_counts(examples: int, seed: int, resamples: int = 1000) -> Tensor:
    """``[R, E]`` float64: how often each example is drawn in E draws with replacement."""
    draw = torch.Generator().manual_seed(seed)
    drawn = torch.randint(examples, (resamples, examples), generator=draw)
    ones = torch.ones_like(drawn, dtype=torch.float64)
    return torch.zeros(resamples, examples, dtype=torch.float64).scatter_add_(1, drawn, ones)


def resampled_auroc(scores: Tensor, is_positive: Tensor, counts: Tensor) -> Tensor:
    """`metrics.auroc` of each resample, ``[R]``; NaN where one has no positive or no negative."""
    counts = counts.double()
    positive = counts[:, is_positive]
    known, order = scores[~is_positive].sort()
    below = pad(counts[:, ~is_positive][:, order].cumsum(1), (1, 0))  # negatives up to each place
    first, last = (torch.searchsorted(known, scores[is_positive], right=right) for right in (False, True))
    return (positive * (below[:, first] + below[:, last])).sum(1) / (2 * positive.sum(1) * below[:, -1])


def resampled_aurc(uncertainty: Tensor, errors: Tensor, counts: Tensor) -> Tensor:
    """`metrics.aurc` of each resample, ``[R]``.

    Within a group of equal uncertainty the risk at k examples is (errors before + (k - n before) * the group's rate)
    / k, whose sum over the group needs harmonic numbers only.
    """
    size, wrong = _by_value(uncertainty, counts), _by_value(uncertainty, counts * errors.double())
    total = counts.sum(1)
    n_after, wrong_after = size.cumsum(1), wrong.cumsum(1)
    n_before, wrong_before = n_after - size, wrong_after - wrong
    harmonic = torch.zeros(int(total.max()) + 1, dtype=torch.float64)
    harmonic[1:] = (1 / torch.arange(1, len(harmonic), dtype=torch.float64)).cumsum(0)
    inverse = harmonic[n_after.long()] - harmonic[n_before.long()]
    rate = wrong / size.clamp_min(1)
    return (wrong_before * inverse + rate * (size - n_before * inverse)).sum(1) / total


def resampled_ece(confidence: Tensor, correct: Tensor, counts: Tensor, bins: int = 15) -> Tensor:
    """`metrics.expected_calibration_error` of each resample, ``[R]``."""
    place = (confidence.double() * bins).floor().long().clamp(max=bins - 1)
    gaps = torch.zeros(len(counts), bins, dtype=torch.float64)
    gaps.index_add_(1, place, counts * (correct.double() - confidence.double()))
    return gaps.abs().sum(1) / counts.sum(1)


def interval_of(estimate: float, values: Tensor, level: float = 0.95) -> Interval:
    """Percentile interval of resampled values ``[R]``, NaN left out (Efron & Tibshirani 1993, ch. 13)."""
    known = values[~values.isnan()]
    if not len(known):
        return Interval(estimate, float("nan"), float("nan"))
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = known.quantile(tails).tolist()
    return Interval(estimate, low, high)


def _by_value(scores: Tensor, weights: Tensor) -> Tensor:
    """``[R, G]``: weights ``[R, E]`` summed over examples of equal score, ascending."""
    group = scores.unique(return_inverse=True)[1]
    sums = torch.zeros(len(weights), int(group.max()) + 1, dtype=torch.float64)
    return sums.index_add_(1, group, weights)
