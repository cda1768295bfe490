"""Metrics by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch

from loracurve.inference import metrics
from loracurve.inference.metrics import Scalar
from loracurve.inference.predictive import Predictive

PROBS = torch.tensor([[0.7, 0.2, 0.1], [0.4, 0.5, 0.1], [0.3, 0.3, 0.4], [0.9, 0.05, 0.05]], dtype=torch.float64)
LABELS = torch.tensor([0, 0, 2, 0])


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_accuracy_nll_brier_by_hand():
    assert metrics.accuracy(PROBS, LABELS) == pytest.approx(0.75)
    expected = -(math.log(0.7) + math.log(0.4) + math.log(0.4) + math.log(0.9)) / 4
    assert metrics.negative_log_likelihood(PROBS, LABELS) == pytest.approx(expected)
    each = [0.09 + 0.04 + 0.01, 0.36 + 0.25 + 0.01, 0.09 + 0.09 + 0.36, 0.01 + 0.0025 + 0.0025]
    assert metrics.brier_per_example(PROBS, LABELS).tolist() == pytest.approx(each)
    assert metrics.brier(PROBS, LABELS) == pytest.approx(sum(each) / 4)
    assert metrics.brier(torch.tensor([[1.0, 0]]), torch.tensor([1])) == 2


def test_calibration_error_by_hand():
    # Confidences .7 right, .5 wrong, .4 right, .9 right, each alone in its bin of width 1/15.
    assert metrics.expected_calibration_error(PROBS, LABELS) == pytest.approx((0.3 + 0.5 + 0.6 + 0.1) / 4)
    # .95 and exactly 1 share the last of 15 bins: mean confidence .975, accuracy .5.
    probs = torch.tensor([[0.95, 0.05], [1.0, 0.0]], dtype=torch.float64)
    assert metrics.expected_calibration_error(probs, torch.tensor([0, 1])) == pytest.approx(0.475)
    # A confidence rounded above 1 is not taken for a logit.
    assert metrics.expected_calibration_error(torch.tensor([[1 + 1e-6, 0.0]]), torch.tensor([0])) == pytest.approx(0)


def test_auroc_and_average_precision_by_hand():
    scores, positive = torch.tensor([0.1, 0.4, 0.35, 0.8]), torch.tensor([False, False, True, True])
    assert metrics.auroc(scores, positive) == Scalar(pytest.approx(0.75))
    assert metrics.average_precision(scores, positive).value == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert metrics.auroc(torch.ones(4), positive).value == pytest.approx(0.5)
    assert metrics.average_precision(torch.ones(4), positive).value == pytest.approx(0.5)
    # Of three times as many negatives each weighs a third.
    many = torch.cat([scores, scores[~positive], scores[~positive]])
    more = torch.cat([positive, torch.zeros(4).bool()])
    assert metrics.average_precision(many, more).value == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)


def test_only_the_order_of_scores_counts():
    scores, positive = normal(500), normal(500, seed=1) > 0
    for measure in (metrics.auroc, metrics.average_precision, metrics.fpr_at_95_tpr):
        # Through a sigmoid in float32 these would all be ties.
        assert measure(scores, positive) == measure(scores * 100 + 1000, positive)


def test_auroc_is_the_share_of_ordered_pairs():
    scores, positive = (normal(200) * 3).round(), normal(200, seed=1) > 0.5
    pairs = scores[positive][:, None] - scores[~positive]
    expected = ((pairs > 0).double() + 0.5 * (pairs == 0).double()).mean().item()
    assert metrics.auroc(scores, positive).value == pytest.approx(expected, abs=1e-6)


def test_fpr_at_95_tpr_by_hand():
    # 20 positives 1..20: 19 of them (95 %) are >= 2; 3 of 4 negatives are at or above 2.
    scores = torch.cat([torch.arange(1, 21), torch.tensor([0, 2, 5, 30])]).double()
    positive = torch.arange(24) < 20
    assert metrics.fpr_at_95_tpr(scores, positive).value == pytest.approx(0.75)
    assert metrics.fpr_at_95_tpr(torch.tensor([1.0, 2, 0]), torch.tensor([True, True, False])).value == 0


def test_undefined_measures_say_why():
    for positive, reason in ((torch.zeros(3).bool(), "no positives"), (torch.ones(3).bool(), "no negatives")):
        for measure in (metrics.auroc, metrics.average_precision, metrics.fpr_at_95_tpr):
            assert measure(torch.arange(3.0), positive) == Scalar(None, reason)
    with pytest.raises(ValueError, match="NaN"):
        metrics.auroc(torch.tensor([0, math.nan]), torch.tensor([True, False]))


def test_risk_coverage_by_hand():
    uncertainty, errors = torch.tensor([0.3, 0.1, 0.2, 0.9]), torch.tensor([True, False, False, True])
    coverage, risk = metrics.risk_coverage_curve(uncertainty, errors)
    assert coverage.tolist() == [0.25, 0.5, 0.75, 1]
    assert risk.tolist() == pytest.approx([0, 0, 1 / 3, 1 / 2])
    assert metrics.aurc(uncertainty, errors) == pytest.approx((1 / 3 + 1 / 2) / 4)
    assert metrics.aurc(uncertainty, torch.zeros(4).bool()) == 0


def test_ties_enter_the_risk_coverage_curve_in_expectation():
    uncertainty, errors = torch.tensor([0.0, 1, 1, 1, 2]), torch.tensor([0.0, 1, 0, 0, 1])
    orders = [[0, *middle, 4] for middle in ([1, 2, 3], [2, 1, 3], [2, 3, 1])]
    count = torch.arange(1, 6).double()
    expected = torch.stack([errors[order].double().cumsum(0) / count for order in orders]).mean(0)
    torch.testing.assert_close(metrics.risk_coverage_curve(uncertainty, errors)[1], expected)
    assert metrics.aurc(torch.zeros(5), errors) == pytest.approx(0.4)  # no information: the error rate


def test_classification_summary():
    points = torch.stack([PROBS, PROBS.roll(1, 0)]).log()
    predictive = Predictive.from_log_probs(points)
    summary = metrics.classification_summary(predictive, LABELS)
    probs = points.exp().mean(0)
    assert summary["examples"] == 4 and summary["acc"] == pytest.approx(metrics.accuracy(probs, LABELS))
    assert summary["nll"] == pytest.approx(metrics.negative_log_likelihood(probs, LABELS))
    assert summary["brier"] == pytest.approx(metrics.brier(probs, LABELS))
    assert summary["ece"] == pytest.approx(metrics.expected_calibration_error(probs, LABELS))
    assert summary["mutual_information"] == pytest.approx(summary["entropy"] - summary["expected_entropy"])
    # Two points are one pair: the correction n / (n - 1) doubles.
    assert summary["mutual_information_corrected"] == pytest.approx(2 * summary["mutual_information"])
    assert summary["pairwise_jsd"] == pytest.approx(summary["mutual_information"])
    errors = probs.argmax(-1) != LABELS
    assert summary["error_auroc_entropy"] == metrics.auroc(predictive.entropy, errors).value
    assert summary["aurc_mi"] == metrics.aurc(predictive.mutual_information, errors)
    json.dumps(summary, allow_nan=False)

    small = metrics.classification_summary(predictive.summarise(LABELS), LABELS)
    assert small.pop("brier") is None and small.pop("undefined") == {"brier": "class probabilities not kept"}
    assert small == pytest.approx({name: summary[name] for name in small}, rel=1e-6)


def test_summary_of_one_faultless_point():
    predictive = Predictive.from_log_probs(PROBS[[0, 2]].log().unsqueeze(0))
    summary = metrics.classification_summary(predictive, LABELS[[0, 2]])
    assert summary["acc"] == 1 and summary["mutual_information"] == 0 and summary["aurc_mi"] == 0
    assert summary["error_auroc_mi"] is None and summary["mutual_information_corrected"] is None
    assert summary["undefined"] == {
        "mutual_information_corrected": "one point",
        "error_auroc_mi": "no positives",
        "error_auroc_entropy": "no positives",
    }


def test_detection_summary():
    agree = Predictive.from_log_probs(torch.tensor([[0.9, 0.1], [0.9, 0.1]]).log().unsqueeze(1).expand(2, 5, 2))
    differ = Predictive.from_log_probs(torch.tensor([[0.9, 0.1], [0.1, 0.9]]).log().unsqueeze(1).expand(2, 3, 2))
    summary = metrics.detection_summary(agree, differ)
    assert summary == {
        **{f"{m}_{by}": v for by in ("mi", "entropy") for m, v in (("auroc", 1), ("aupr", 1), ("fpr95", 0))},
        "undefined": {},
    }
    assert metrics.detection_summary(differ, agree)["auroc_mi"] == 0
