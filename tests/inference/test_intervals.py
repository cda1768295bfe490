"""Intervals by resampling: known coverage, and resamples computed one by one."""

from __future__ import annotations

import math

import pytest
import torch

from loracurve.inference import intervals, metrics
from loracurve.inference.intervals import interval_of, resample_counts, resampled_aurc, resampled_auroc, resampled_ece


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_bootstrap_is_reproducible_and_matches_the_normal_interval():
    values = normal(400) * 2 + 1
    first, again = intervals.bootstrap_interval(values, 7), intervals.bootstrap_interval(values, 7)
    assert first == again != intervals.bootstrap_interval(values, 8)
    half = 1.96 * (values.std() / 20).item()
    assert first.estimate == pytest.approx(values.mean().item())
    assert first.low == pytest.approx(first.estimate - half, abs=0.15 * half)
    assert first.high == pytest.approx(first.estimate + half, abs=0.15 * half)
    with pytest.raises(ValueError, match="level"):
        intervals.bootstrap_interval(values, 0, level=95)


def test_bootstrap_covers():
    data = normal(300, 60, seed=5)
    covered = sum(not intervals.bootstrap_interval(row, i, resamples=400).distinguishable for i, row in enumerate(data))
    assert 0.90 <= covered / 300 <= 0.98


def test_paired_bootstrap_uses_the_pairing():
    hard = normal(300) * 10
    better = hard - 0.1 + 0.1 * normal(300, seed=1)
    difference = intervals.paired_bootstrap(better, hard, 0)
    assert difference.distinguishable and difference.estimate == pytest.approx(-0.1, abs=0.02)
    assert not intervals.paired_bootstrap(
        better[torch.randperm(300, generator=torch.Generator())], hard, 0
    ).distinguishable
    with pytest.raises(ValueError, match="same examples"):
        intervals.paired_bootstrap(hard, hard[:-1], 0)
