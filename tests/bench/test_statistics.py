"""Statistics of the benchmarks: known answers and plain loops."""

from __future__ import annotations

import math

import pytest
import torch

from loracurve.bench.statistics import (
    counts_above_chance,
    deep_ensemble_equivalent,
    ensemble_auroc,
    ensemble_scores,
    holm,
    novel_share,
    paired_p_value,
    subsets_of,
    two_sided,
)
from loracurve.inference import metrics
from loracurve.inference.calibration import apply_temperature, fit_temperature
from loracurve.inference.predictive import Predictive


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_equivalent_is_the_smallest_ensemble_no_worse() -> None:
    means = [0.5, 0.4, 0.35, 0.33, 0.32]
    assert deep_ensemble_equivalent(0.6, means) == 1
    assert deep_ensemble_equivalent(0.4, means) == 2  # no worse: equal counts
    assert deep_ensemble_equivalent(0.34, means) == 4
    assert deep_ensemble_equivalent(0.31, means) is None
    assert deep_ensemble_equivalent(0.32 - 1e-15, means) == 5  # the whole ensemble against itself, up to rounding


def test_p_values_of_resamples_are_shares_on_the_rarer_side() -> None:
    assert two_sided(torch.tensor([-1.0, -1, -1, -1, -1, -1, -1, -1, -1, 1])) == pytest.approx(2 * 2 / 11)
    assert two_sided(torch.full((999,), 1.0)) == pytest.approx(2 / 1000)
    assert two_sided(torch.zeros(10)) == 1 and two_sided(torch.tensor([1.0, math.nan])) == 1


def test_subsets_are_all_or_as_many_different_ones_as_asked() -> None:
    assert subsets_of(4, 2, 120, 0) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    some = subsets_of(10, 5, 120, 0)
    assert len(set(some)) == 120 and all(len(set(s)) == 5 and list(s) == sorted(s) for s in some)
    assert some == subsets_of(10, 5, 120, 0) and some != subsets_of(10, 5, 120, 1)


def test_ensemble_scores_equal_a_plain_loop() -> None:
    validation, test = (3 * drawn(3, e, 2, seed=s).log_softmax(-1) for e, s in ((40, 1), (60, 2)))
    validation, test = validation.log_softmax(-1), test.log_softmax(-1)
    labels, test_labels = (drawn(e, seed=s) > 0 for e, s in ((40, 3), (60, 4)))
    labels, test_labels = labels.long(), test_labels.long()
    scores = ensemble_scores(validation, labels, test, test_labels)
    nll, brier = [], []
    for pair in ((0, 1), (0, 2), (1, 2)):
        mean = [torch.stack([part[m].exp() for m in pair]).mean(0).log() for part in (validation, test)]
        tempered = apply_temperature(mean[1], fit_temperature(mean[0], labels))
        nll.append(-tempered[torch.arange(60), test_labels].mean().item())
        brier.append(metrics.brier(tempered.exp(), test_labels))
    assert scores["nll"][1] == pytest.approx(sum(nll) / 3, abs=1e-12)
    assert scores["brier"][1] == pytest.approx(sum(brier) / 3, abs=1e-12)
    assert len(scores["nll"]) == 3


def test_ensembles_detect_errors_as_their_averages_do() -> None:
    test, labels = (2 * drawn(3, 50, 3)).log_softmax(-1), torch.arange(50) % 3
    found = ensemble_auroc(test, labels)
    pairs = [Predictive.from_log_probs(test[[a, b]]) for a, b in ((0, 1), (0, 2), (1, 2))]
    for by, name in (("MI", "mutual_information"), ("entropy", "entropy")):
        by_hand = [metrics.auroc(getattr(p, name), ~p.correct(labels)).value for p in pairs]
        assert found[by][1] == pytest.approx(sum(v for v in by_hand if v is not None) / 3, abs=1e-6)  # type: ignore[index]
    assert found["MI"][0] is None and len(found["entropy"]) == 3
    assert ensemble_auroc(test[:1], test[0].argmax(-1))["entropy"] == [None]  # no errors


def test_members_with_independent_errors_make_larger_ensembles_better() -> None:
    labels = torch.arange(800) % 2
    truth = torch.nn.functional.one_hot(labels, 2).double()
    members = [(1.5 * truth + drawn(800, 2, seed=m)).log_softmax(-1) for m in range(6)]
    stack = torch.stack(members)
    scores = ensemble_scores(stack[:, :400], labels[:400], stack[:, 400:], labels[400:])["nll"]
    assert all(a > b for a, b in zip(scores, scores[1:], strict=False))
    assert deep_ensemble_equivalent((scores[2] + scores[3]) / 2, scores) == 4


def test_a_data_set_counts_beyond_three_standard_errors() -> None:
    labels = torch.tensor([0] * 60 + [1] * 40)  # majority .6; at accuracy .73: 3 sqrt(.73 .27 / 100) = .1332
    assert not counts_above_chance(0.73, labels)
    assert counts_above_chance(0.74, labels)  # .14 > 3 sqrt(.74 .26 / 100) = .1316


def test_novel_rows_have_a_class_that_no_anchor_gives() -> None:
    anchors = torch.tensor([[0, 0, 1, 2], [0, 1, 1, 2]])
    points = torch.tensor([[0, 1, 0, 2], [0, 0, 1, 2], [1, 0, 1, 2]])
    as_scores = [torch.nn.functional.one_hot(x, 3).double() for x in (points, anchors)]
    assert novel_share(*as_scores) == 0.5  # rows 0 (class 1) and 2 (class 0)


def test_holm_by_hand() -> None:
    # ascending .005 x 4, .01 x 3, .03 x 2, .04 x 1, then made monotone
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_p_values_of_paired_differences() -> None:
    values = torch.tensor([1.0, -1.0] * 50) + 0.1
    z = values.mean() / (values.std() / 10)
    assert paired_p_value(values) == pytest.approx(math.erfc(z / math.sqrt(2)))
    assert paired_p_value(torch.zeros(5)) == 1 and paired_p_value(torch.ones(5)) == 0
    found = torch.tensor([paired_p_value(drawn(200, seed=s)) for s in range(400)])
    assert 0.03 < (found < 0.05).double().mean() < 0.08  # of true null hypotheses about one in twenty is refused
