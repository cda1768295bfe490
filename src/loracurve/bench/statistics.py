"""Numbers by which methods are compared: deep-ensemble equivalents, which data sets count, corrected tests, functions
not in the anchors' hull.

Deep-ensemble equivalent: Ashukha et al. 2020, "Pitfalls of in-domain uncertainty estimation and ensembling in deep
learning", section 5, here with a temperature for every method and NLL and Brier of the tempered average.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any, Literal

import torch
from torch import Tensor

from loracurve.inference.calibration import apply_temperature, fit_temperature
from loracurve.inference.information import entropy, jensen_shannon, mixture_log_probs, negative_log_likelihood
from loracurve.inference.intervals import resampled_auroc
from loracurve.inference.metrics import brier_per_example
from loracurve.system.randomness import generator

__all__ = [
    "MOST_SUBSETS",
    "counts_above_chance",
    "deep_ensemble_equivalent",
    "ensemble_auroc",
    "ensemble_scores",
    "holm",
    "mean_or_none",
    "novel_share",
    "paired_p_value",
    "subsets_of",
    "two_sided",
]


MOST_SUBSETS = 252
"""Subsets of one size that are taken at most: all of those of ten members."""


def subsets_of(members: int, size: int, most: int, seed: int) -> list[tuple[int, ...]]:
    """All subsets of `size` of the members, or `most` different random ones if there are more."""
    if math.comb(members, size) <= most:
        return list(combinations(range(members), size))
    draw = generator(seed, "subsets", size)
    found: dict[tuple[int, ...], None] = {}
    while len(found) < most:
        found[tuple(sorted(torch.randperm(members, generator=draw)[:size].tolist()))] = None
    return list(found)


def tempered_average(validation: Tensor, validation_labels: Tensor, test: Tensor) -> Tensor:
    """``[E, C]`` log-probabilities of the equal average of members on test rows, at the temperature of the validation
    rows. validation, test: ``[M, E, C]`` log-probabilities of the members."""
    weights = torch.full((len(test),), 1 / len(test), dtype=torch.float64)
    known, found = (mixture_log_probs(part.double(), weights) for part in (validation, test))
    return apply_temperature(found, fit_temperature(known, validation_labels))


def ensemble_scores(
    validation: Tensor,
    validation_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    most: int = MOST_SUBSETS,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Mean score of ensembles of 1, 2, ... M of M members, each tempered on validation data.

    Args:
        validation, test: ``[M, E, C]`` log-probabilities of the members.
        most: subsets taken of each size at most.

    Returns:
        ``nll`` (nats) and ``brier``, each a list of M means over subsets.
    """
    scores: dict[str, list[float]] = {"nll": [], "brier": []}
    for size in range(1, len(test) + 1):
        nll, brier = 0.0, 0.0
        subsets = subsets_of(len(test), size, most, seed)
        for subset in subsets:
            rows = list(subset)
            tempered = tempered_average(validation[rows], validation_labels, test[rows])
            nll += negative_log_likelihood(tempered, test_labels).mean().item() / len(subsets)
            brier += brier_per_example(tempered.exp(), test_labels).mean().item() / len(subsets)
        scores["nll"].append(nll)
        scores["brier"].append(brier)
    return scores


def ensemble_auroc(
    test: Tensor, labels: Tensor, most: int = MOST_SUBSETS, seed: int = 0
) -> dict[Literal["MI", "entropy"], list[float | None]]:
    """Mean AUROC of error detection by ensembles of 1, 2, ... M of M members, over the subsets of `ensemble_scores`.

    Args:
        test: ``[M, E, C]`` log-probabilities of the members.

    Returns:
        By mutual information (None for one member) and by entropy, each a list of M; None where no subset has both
        errors and right answers.
    """
    out: dict[Literal["MI", "entropy"], list[float | None]] = {"MI": [], "entropy": []}
    once = torch.ones(1, len(labels), dtype=torch.float64)
    for size in range(1, len(test) + 1):
        found = []
        weights = torch.full((size,), 1 / size, dtype=torch.float64)
        for subset in subsets_of(len(test), size, most, seed):
            points = test[list(subset)].double()
            average = mixture_log_probs(points, weights)
            wrong = average.argmax(-1) != labels
            by = (jensen_shannon(points, weights), entropy(average))
            found.append(torch.cat([resampled_auroc(scores, wrong, once) for scores in by]))
        information, total = torch.stack(found).nanmean(0).tolist()
        out["MI"].append(None if size == 1 or math.isnan(information) else information)
        out["entropy"].append(None if math.isnan(total) else total)
    return out


def deep_ensemble_equivalent(score: float, ensembles: Sequence[float]) -> int | None:
    """The smallest M whose ensembles' mean score is no worse (no higher) than `score`; None: more than there are."""
    slack = 1e-9 * abs(score)  # the same members averaged in another order are no worse
    return next((m for m, value in enumerate(ensembles, start=1) if value <= score + slack), None)


def counts_above_chance(accuracy: float, labels: Tensor) -> bool:
    """Whether a data set counts: single adapters exceed the majority class's share by three standard errors."""
    majority = torch.bincount(labels).max().item() / len(labels)
    return accuracy - majority > 3 * math.sqrt(accuracy * (1 - accuracy) / len(labels))


def novel_share(points: Tensor, anchors: Tensor) -> float:
    """Share of examples to which some point ``[n, E, C]`` gives a most probable class that no anchor ``[M, E, C]``
    gives."""
    chosen = torch.nn.functional.one_hot(anchors.argmax(-1), anchors.shape[-1]).any(0)
    known = chosen.expand(len(points), -1, -1).gather(-1, points.argmax(-1, keepdim=True))
    return (~known.bool()).any(0).double().mean().item()


def paired_p_value(differences: Tensor) -> float:
    """Two-sided p-value of mean difference 0 over examples ``[E]``, by the normal approximation; 1 if all are equal."""
    values = differences.double()
    error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else 0.0
    if not error > 0:
        return 1.0 if not values.mean().item() else 0.0
    return math.erfc(abs(values.mean().item()) / error / math.sqrt(2))


def two_sided(resampled: Tensor) -> float:
    """p-value of 0 from resampled differences ``[R]``: twice the share on the rarer side, counting one more there
    (Davison & Hinkley 1997, sec. 4.2)."""
    known = resampled[~resampled.isnan()]
    rarer = min(int((known <= 0).sum()), int((known >= 0).sum()))
    return min(1.0, 2 * (rarer + 1) / (len(known) + 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number, which control the family-wise error rate (Holm 1979), in the same order."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def mean_or_none(values: Sequence[Any]) -> float | None:
    """Mean of numbers; None where one of them is, or where there are none."""
    return None if None in values or not values else sum(values) / len(values)
