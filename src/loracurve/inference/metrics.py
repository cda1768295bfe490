"""How good predictions and their uncertainties are, with bootstrap intervals over examples.

A measure that the data leave undefined (an AUROC without errors) is a `Scalar` whose value is None and whose reason
says why, never 0.5 or NaN. Scores rank examples: only their order counts, and ties count half (AUROC) or in expectation
(AURC).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.classification import (
    binary_auroc,
    binary_calibration_error,
    multiclass_accuracy,
)

from loracurve.inference.information import negative_log_likelihood as per_example_nll
from loracurve.inference.model_average import effective_points
from loracurve.inference.predictive import Predictive

__all__ = [
    "Scalar",
    "accuracy",
    "aurc",
    "auroc",
    "average_precision",
    "brier",
    "brier_per_example",
    "classification_summary",
    "detection_summary",
    "expected_calibration_error",
    "fpr_at_95_tpr",
    "negative_log_likelihood",
    "risk_coverage_curve",
]


class Scalar(NamedTuple):
    """A measure, or the reason why the data leave it undefined."""

    value: float | None
    reason: str | None = None


def accuracy(probs: Tensor, labels: Tensor) -> float:
    """Share of examples whose most probable class is the label; probs ``[E, C]``, labels ``[E]``."""
    return multiclass_accuracy(probs.argmax(-1), labels, num_classes=max(probs.shape[-1], 2), average="micro").item()


def negative_log_likelihood(probs: Tensor, labels: Tensor) -> float:
    """Mean -log p(label) in nats; probs ``[E, C]``, labels ``[E]``. Inf if a label has probability 0."""
    return per_example_nll(probs.double().log(), labels).mean().item()


def brier_per_example(probs: Tensor, labels: Tensor) -> Tensor:
    """sum_c (p_c - [c = label])^2, between 0 and 2 (Brier 1950); probs ``[E, C]``, labels ``[E]``, result ``[E]``."""
    return (probs.double() - torch.nn.functional.one_hot(labels, probs.shape[-1])).square().sum(-1)


def brier(probs: Tensor, labels: Tensor) -> float:
    """Mean over examples of `brier_per_example`."""
    return brier_per_example(probs, labels).mean().item()


def expected_calibration_error(probs: Tensor, labels: Tensor) -> float:
    """Mean |accuracy - confidence| over 15 equal-width bins of the top probability (Guo et al. 2017, eq. 3)."""
    confidence, prediction = probs.max(-1)
    return _calibration_error(confidence, prediction == labels)


def auroc(scores: Tensor, is_positive: Tensor) -> Scalar:
    """P(score of a positive > score of a negative), ties counting half; scores ``[E]``, is_positive ``[E]`` bool."""
    reason = _undefined(is_positive, both=True)
    return Scalar(None, reason) if reason else Scalar(binary_auroc(_ranks(scores), is_positive.long()).item())


def average_precision(scores: Tensor, is_positive: Tensor) -> Scalar:
    """Area under the precision-recall curve as average precision, as if there were as many positives as negatives: its
    chance level is 1/2, and sets of different sizes can be compared."""
    reason = _undefined(is_positive, both=True)
    if reason:
        return Scalar(None, reason)
    # Imported here: it takes a second, and few need it.
    from sklearn.metrics import average_precision_score

    positive = is_positive.bool().cpu().numpy()
    weights = np.where(positive, 1 / positive.mean(), 1 / (1 - positive.mean()))
    return Scalar(float(average_precision_score(positive, _groups(scores).cpu().numpy(), sample_weight=weights)))


def fpr_at_95_tpr(scores: Tensor, is_positive: Tensor) -> Scalar:
    """Share of negatives at or above the highest threshold that at least 95 % of the positives reach."""
    reason = _undefined(is_positive, both=True)
    if reason:
        return Scalar(None, reason)
    is_positive = is_positive.bool()
    ranks = _ranks(scores)
    positives = ranks[is_positive].sort(descending=True).values
    threshold = positives[-(-95 * len(positives) // 100) - 1]  # integer ceiling: 0.95 is not exact in binary
    return Scalar((ranks[~is_positive] >= threshold).double().mean().item())


def risk_coverage_curve(uncertainty: Tensor, errors: Tensor) -> tuple[Tensor, Tensor]:
    """Error rate among the k most certain examples, for every k (El-Yaniv & Wiener 2010).

    Args:
        uncertainty: ``[E]``; examples of equal uncertainty enter in random order, of which this is the expectation.
        errors: ``[E]`` bool or a loss.

    Returns:
        Coverage k / E and risk, both ``[E]`` float64.
    """
    group = _groups(uncertainty)
    size = torch.bincount(group)
    group_risk = torch.bincount(group, weights=errors.double()) / size
    count = torch.arange(1, len(errors) + 1, dtype=torch.float64, device=errors.device)
    return count / len(errors), group_risk.repeat_interleave(size).cumsum(0) / count


def aurc(uncertainty: Tensor, errors: Tensor) -> float:
    """Area under the risk-coverage curve, the mean risk over coverages 1/E..1 (Geifman et al. 2019); 0 is best."""
    return risk_coverage_curve(uncertainty, errors)[1].mean().item()


def classification_summary(predictive: Predictive, labels: Tensor) -> dict[str, Any]:
    """Everything reported about predictions of labelled data.

    Returns:
        examples, acc, nll, brier, ece, the means of entropy, expected_entropy, mutual_information, its parts
        within_points and between_points, mutual_information_corrected (divided by 1 - sum w^2, i.e. n / (n - 1): the
        plug-in value grows with n), pairwise_jsd and disagreement; error_auroc_mi, error_auroc_entropy, aurc_mi,
        aurc_entropy. Undefined measures are None, and ``undefined`` maps their names to the reasons.
    """
    correct = predictive.correct(labels)
    full = predictive.point_log_probs is not None
    information = predictive.mutual_information.mean().item()
    effective = effective_points(predictive.weights)
    single = effective < 1 + 1e-9
    scores = {"mi": predictive.mutual_information, "entropy": predictive.entropy}
    return _report(
        {
            "examples": Scalar(len(predictive)),
            "acc": Scalar(correct.double().mean().item()),
            "nll": Scalar(predictive.negative_log_likelihood(labels).mean().item()),
            "brier": Scalar(brier(predictive.probs, labels)) if full else Scalar(None, "class probabilities not kept"),
            "ece": Scalar(_calibration_error(predictive.confidence, correct)),
            "entropy": Scalar(predictive.entropy.mean().item()),
            "expected_entropy": Scalar(predictive.expected_entropy.mean().item()),
            "mutual_information": Scalar(information),
            "within_points": Scalar(predictive.within_points.mean().item()),
            "between_points": Scalar(predictive.between_points.mean().item()),
            "mutual_information_corrected": Scalar(None, "one point")
            if single
            else Scalar(information / (1 - 1 / effective)),
            "pairwise_jsd": Scalar(predictive.pairwise_jsd.mean().item()),
            "disagreement": Scalar(predictive.disagreement.mean().item()),
            **{f"error_auroc_{name}": auroc(score, ~correct) for name, score in scores.items()},
            **{f"aurc_{name}": Scalar(aurc(score, ~correct)) for name, score in scores.items()},
        }
    )


def detection_summary(id_predictive: Predictive, ood_predictive: Predictive) -> dict[str, Any]:
    """Detection of out-of-distribution examples, the positives: by mutual information, by entropy, and where they are
    there by the information within the points and the distance from the training data.

    Returns:
        auroc, aupr and fpr95, each with _mi, _entropy, _within and _distance; ``undefined`` as in
        `classification_summary`.
    """
    is_ood = torch.cat([torch.zeros(len(id_predictive)), torch.ones(len(ood_predictive))]).bool()
    measures: dict[str, Scalar] = {}
    fields = {"mi": "mutual_information", "entropy": "entropy"}
    if bool(id_predictive.within_points.any()):
        fields["within"] = "within_points"
    if id_predictive.distance is not None and ood_predictive.distance is not None:
        fields["distance"] = "distance"
    for name, field in fields.items():
        scores = torch.cat([getattr(id_predictive, field), getattr(ood_predictive, field)]).cpu()
        measures[f"auroc_{name}"] = auroc(scores, is_ood)
        measures[f"aupr_{name}"] = average_precision(scores, is_ood)
        measures[f"fpr95_{name}"] = fpr_at_95_tpr(scores, is_ood)
    return _report(measures)


def _report(measures: dict[str, Scalar]) -> dict[str, Any]:
    values: dict[str, Any] = {name: scalar.value for name, scalar in measures.items()}
    return values | {"undefined": {name: scalar.reason for name, scalar in measures.items() if scalar.reason}}


def _undefined(is_positive: Tensor, both: bool) -> str | None:
    if not is_positive.any():
        return "no positives"
    return "no negatives" if both and is_positive.all() else None


def _calibration_error(confidence: Tensor, correct: Tensor) -> float:
    # torchmetrics gives a confidence of exactly 1 a sixteenth bin, and takes one of 1 + 1e-16 for a logit.
    confidence = confidence.double().clamp(max=math.nextafter(1, 0))
    return binary_calibration_error(confidence, correct.long(), n_bins=15).item()


def _groups(scores: Tensor) -> Tensor:
    """Number of each example's value among the distinct values in ascending order."""
    if scores.isnan().any():
        raise ValueError("expected scores that can be ranked, found NaN")
    return scores.unique(return_inverse=True)[1]


def _ranks(scores: Tensor) -> Tensor:
    """Scores mapped to [0, 1] keeping order and ties: torchmetrics squashes scores outside, which makes new ties."""
    groups = _groups(scores).double()
    return groups / groups.max().clamp_min(1)
