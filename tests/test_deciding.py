"""The measures that decide, their intervals and their tables, against values worked out by hand or by plain loops."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from loracurve.bench.results import Results
from loracurve.bench.statistics import (
    counts_above_chance,
    deep_ensemble_equivalent,
    ensemble_auroc,
    ensemble_scores,
    holm,
    novel_share,
    paired_p_value,
    subsets_of,
)
from loracurve.bench.tables.detection import verdicts
from loracurve.bench.tables.table import Table
from loracurve.inference import metrics
from loracurve.inference.calibration import apply_temperature, fit_temperature
from loracurve.inference.intervals import (
    Interval,
    interval_of,
    resample_counts,
    resampled_aurc,
    resampled_auroc,
    resampled_ece,
)
from loracurve.inference.predictive import Predictive


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- deep-ensemble equivalents


def test_equivalent_is_the_smallest_ensemble_no_worse() -> None:
    means = [0.5, 0.4, 0.35, 0.33, 0.32]
    assert deep_ensemble_equivalent(0.6, means) == 1
    assert deep_ensemble_equivalent(0.4, means) == 2  # no worse: equal counts
    assert deep_ensemble_equivalent(0.34, means) == 4
    assert deep_ensemble_equivalent(0.31, means) is None


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


# ---- which data sets count, novel functions


def test_a_data_set_counts_beyond_three_standard_errors() -> None:
    labels = torch.tensor([0] * 60 + [1] * 40)  # majority .6; at accuracy .73: 3 sqrt(.73 .27 / 100) = .1332
    assert not counts_above_chance(0.73, labels)
    assert counts_above_chance(0.74, labels)  # .14 > 3 sqrt(.74 .26 / 100) = .1316


def test_novel_rows_have_a_class_that_no_anchor_gives() -> None:
    anchors = torch.tensor([[0, 0, 1, 2], [0, 1, 1, 2]])
    points = torch.tensor([[0, 1, 0, 2], [0, 0, 1, 2], [1, 0, 1, 2]])
    as_scores = [torch.nn.functional.one_hot(x, 3).double() for x in (points, anchors)]
    assert novel_share(*as_scores) == 0.5  # rows 0 (class 1) and 2 (class 0)


# ---- tests


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


# ---- resampling


def test_resampled_measures_equal_those_of_the_resamples() -> None:
    scores = (drawn(50) * 3).round()  # with ties
    positive = drawn(50, seed=1) > 0.3
    counts = resample_counts(50, seed=3, resamples=20)
    assert (counts.sum(1) == 50).all() and len(counts.unique(dim=0)) == 20
    auroc, aurc = resampled_auroc(scores, positive, counts), resampled_aurc(scores, positive, counts)
    for r, row in enumerate(counts.long()):
        chosen = torch.arange(50).repeat_interleave(row)
        assert auroc[r].item() == pytest.approx(metrics.auroc(scores[chosen], positive[chosen]).value, abs=1e-6)
        assert aurc[r].item() == pytest.approx(metrics.aurc(scores[chosen], positive[chosen]), abs=1e-9)


def test_resampled_calibration_errors_equal_those_of_the_resamples() -> None:
    probs, labels = (2 * drawn(60, 3)).softmax(-1), torch.arange(60) % 3
    counts = resample_counts(60, seed=3, resamples=10)
    found = resampled_ece(probs.max(-1).values, probs.argmax(-1) == labels, counts)
    for r, row in enumerate(counts.long()):
        chosen = torch.arange(60).repeat_interleave(row)
        assert found[r].item() == pytest.approx(
            metrics.expected_calibration_error(probs[chosen], labels[chosen]), abs=1e-6
        )


def test_a_resample_without_positives_is_left_out() -> None:
    counts = torch.tensor([[1.0, 1.0], [2.0, 0.0]])
    values = resampled_auroc(torch.tensor([0.0, 1.0]), torch.tensor([False, True]), counts)
    assert values[0] == 1 and values[1].isnan()
    assert interval_of(1.0, values) == (1, 1, 1)
    assert math.isnan(interval_of(1.0, values[1:]).low)


def test_intervals_of_an_auroc_cover_its_true_value() -> None:
    # N(0, 1) against N(1, 1): AUROC = Phi(1 / sqrt 2)
    truth = 0.5 * (1 + math.erf(0.5))
    positive = torch.arange(200) >= 100
    hits = 0
    for seed in range(100):
        scores = drawn(200, seed=seed) + positive
        values = resampled_auroc(scores, positive, resample_counts(200, seed, 300))
        interval = interval_of(0.0, values)
        hits += interval.low <= truth <= interval.high
    assert 88 <= hits <= 99


# ---- tables


def test_verdicts_count_intervals_on_the_sets_that_count() -> None:
    class Judged(Results):
        def singles(self, task: str) -> tuple[float, bool]:
            return 0.9, task == "a"

    up, down, none, unknown = Interval(1, 0.5, 2), Interval(-1, -2, -0.5), Interval(1, -1, 2), Interval(1, math.nan, 1)
    differences = Table("d", "", [])
    differences.rows = [
        ["ref", "a", "curve", "errors", "MI", up, down],
        ["ref", "a", "curve", "errors", "entropy", down, none],
        ["ref", "a", "curve", "ood:x", "MI", unknown, None],
        ["ref", "b", "curve", "errors", "MI", up, up],
    ]
    judged = Judged(SimpleNamespace(tasks={"a": 0, "b": 0}), {}, {}, [])  # type: ignore[arg-type]
    found = verdicts(judged, differences)
    assert found.rows == [["ref", "curve", "AUROC", 1, 1, 1], ["ref", "curve", "AURC", 1, 0, 1]]


def test_a_table_in_three_forms() -> None:
    table = Table("x", "Title", ["method", "NLL", "n", "p"], notes="Note.")
    table.rows = [["a_b", Interval(0.25, 0.2, 0.3), 3, None], ["c", None, 10, 0.5]]
    assert table.markdown() == (
        "## Title\n\nNote.\n\n| method | NLL | n | p |\n|---|---:|---:|---:|\n"
        "| a_b | 0.2500 [0.2000, 0.3000] | 3 | - |\n| c | - | 10 | 0.5000 |\n"
    )
    assert table.csv() == "method,NLL,NLL low,NLL high,n,p\na_b,0.25,0.2,0.3,3,\nc,,,,10,0.5\n"
    assert r"a\_b & 0.2500 [0.2000, 0.3000] & 3 & - \\" in table.latex()
    assert r"\begin{tabular}{lrrr}" in table.latex()
