"""Predictions at several points: averages and uncertainties by hand."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.log_probs import drawn_log_probs

from loracurve.inference.predictive import Predictive


def from_probs(probs, weights=None):
    return Predictive.from_log_probs(torch.tensor(probs, dtype=torch.float64).log(), weights)


def test_disjoint_one_hots_have_information_log_2():
    p = from_probs([[[1, 0, 0]], [[0, 1, 0]]])
    for value in (p.mutual_information, p.entropy, p.pairwise_jsd):
        assert value.item() == pytest.approx(math.log(2))
    assert p.expected_entropy.item() == 0 and p.disagreement.item() == 0.5 and p.confidence.item() == 0.5


def test_equal_points_have_no_information():
    p = Predictive.from_log_probs(drawn_log_probs(1, 6, 4).expand(5, 6, 4))
    zeros = torch.zeros(6, dtype=torch.float64)
    for value in (p.mutual_information, p.pairwise_jsd, p.disagreement):
        torch.testing.assert_close(value, zeros, atol=1e-12, rtol=0)


def test_uncertainty_decomposes():
    p = Predictive.from_log_probs(drawn_log_probs(5, 40, 4), torch.tensor([0.1, 0.2, 0.3, 0.25, 0.15]))
    torch.testing.assert_close(p.entropy, p.expected_entropy + p.mutual_information, atol=1e-9, rtol=0)
    assert (p.mutual_information > 0).all() and (p.expected_entropy <= math.log(4)).all()


def test_averages_probabilities_and_not_logits():
    p = from_probs([[[0.99, 0.01]], [[0.3, 0.7]]], torch.tensor([0.25, 0.75]))
    torch.testing.assert_close(p.probs, torch.tensor([[0.4725, 0.5275]], dtype=torch.float64))
    assert p.prediction.item() == 1  # the average of logits would say 0
    assert p.disagreement.item() == 0.25
    assert p.negative_log_likelihood(torch.tensor([1])).item() == pytest.approx(-math.log(0.5275))
    torch.testing.assert_close(p.point_probs[0], torch.tensor([[0.99, 0.01]]))


def test_information_is_between_models_for_each_example():
    # Every model gives the same average over examples, but they differ on each example: averaging over examples (or
    # shuffling examples within a model) before the entropies are taken would give another number.
    p = from_probs([[[1, 0], [0, 1]], [[0, 1], [1, 0]]])
    torch.testing.assert_close(p.mutual_information, torch.full((2,), math.log(2), dtype=torch.float64))
    same = from_probs([[[1, 0], [0, 1]], [[1, 0], [0, 1]]])
    assert same.mutual_information.tolist() == [0, 0]


def test_absent_classes_change_nothing():
    logs = drawn_log_probs(3, 5, 4)
    wide = torch.nn.functional.pad(logs, (0, 1), value=-math.inf)
    a, b = Predictive.from_log_probs(logs), Predictive.from_log_probs(wide)
    for name in ("entropy", "expected_entropy", "mutual_information", "pairwise_jsd", "disagreement", "confidence"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name))
    assert (b.probs[:, 4] == 0).all()
    joined = Predictive.cat([a, b])
    assert joined.probs.shape == (10, 5) and torch.equal(joined.probs[:5], joined.probs[5:])


def test_cat_and_index_are_inverse():
    logs = drawn_log_probs(3, 7, 4)
    whole = Predictive.from_log_probs(logs)
    joined = Predictive.cat([Predictive.from_log_probs(logs[:, :3]), Predictive.from_log_probs(logs[:, 3:])])
    assert torch.equal(joined.probs, whole.probs) and torch.equal(joined.entropy, whole.entropy) and len(joined) == 7
    part = whole.index(torch.tensor([5, 0]))
    assert torch.equal(part.point_log_probs, logs[:, [5, 0]]) and torch.equal(part.entropy, whole.entropy[[5, 0]])
    mask = torch.arange(7) > 4
    assert torch.equal(whole.index(mask).probs, whole.probs[mask])
    assert torch.equal(whole.to("cpu").probs, whole.probs)
    with pytest.raises(ValueError, match="same weights"):
        Predictive.cat([whole, Predictive.from_log_probs(logs, torch.tensor([0.2, 0.2, 0.6]))])
    with pytest.raises(ValueError, match="found both"):
        Predictive.cat([whole, whole.summarise(torch.zeros(7, dtype=torch.long))])
    with pytest.raises(ValueError, match="found none"):
        Predictive.cat([])


def test_summary_keeps_what_it_promises():
    logs, labels = drawn_log_probs(3, 7, 4), torch.tensor([0, 1, 2, 3, 0, 1, 2])
    full = Predictive.from_log_probs(logs, torch.tensor([0.5, 0.3, 0.2]))
    small = Predictive.cat(
        [full.index(torch.arange(3)).summarise(labels[:3]), full.index(torch.arange(3, 7)).summarise(labels[3:])]
    )
    assert small.point_log_probs is None and small.label_log_probs.shape == (3, 7)
    torch.testing.assert_close(small.negative_log_likelihood(), full.negative_log_likelihood(labels))
    assert torch.equal(small.correct(), full.correct(labels)) and torch.equal(small.entropy, full.entropy)
    assert torch.equal(small.correct(labels), small.correct())
    assert small.index(torch.tensor([6])).labels.tolist() == [2]
    for broken in (lambda: small.probs, lambda: small.point_probs, lambda: small.correct(labels.flip(0))):
        with pytest.raises(ValueError, match="expected"):
            broken()
    with pytest.raises(ValueError, match="expected labels"):
        full.correct()


def test_bad_inputs_are_refused():
    logs = drawn_log_probs(2, 3, 4)
    with pytest.raises(ValueError, match="normalised"):
        Predictive.from_log_probs(logs + 1)
    with pytest.raises(ValueError, match="NaN"):
        Predictive.from_log_probs(logs * math.nan)
    with pytest.raises(ValueError, match="weights"):
        Predictive.from_log_probs(logs, torch.tensor([0.5, 0.6]))
    with pytest.raises(ValueError, match=r"\[n, E, C\]"):
        Predictive.from_log_probs(logs[0])
