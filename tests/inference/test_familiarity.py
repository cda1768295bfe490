"""Distances from training states, against scikit-learn, and p-values that keep their promise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.covariance import LedoitWolf, shrunk_covariance
from torch import Tensor

from loracurve.inference.familiarity import cosine_distance, fit_familiarity, p_values
from loracurve.inference.hidden_states import SplitStates
from loracurve.inference.metrics import auroc
from loracurve.model.states import States
from loracurve.system.errors import UserError


def made(rows: int = 80, points: int = 2, size: int = 6, classes: int = 3) -> SplitStates:
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(rows) % classes
    means = 3 * torch.randn(points, classes, size, generator=draw)
    states = means[:, labels] + torch.randn(points, rows, size, generator=draw)
    return SplitStates(torch.zeros(points, rows, classes).log_softmax(-1), States(states), labels)


def mahalanobis(h: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    d = (h - mean).double()
    return (d * torch.linalg.solve(covariance, d.mT).mT).sum(1)


def test_distances_are_relative_mahalanobis() -> None:
    train, weights = made(), torch.tensor([0.25, 0.75])
    found = fit_familiarity(train, weights, 3)
    h = torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(1)) * 4
    expected = torch.zeros(9, dtype=torch.float64)
    for i, state in enumerate(train.states.read):
        means = torch.stack([state[train.labels == c].mean(0) for c in range(3)])
        fitted = LedoitWolf().fit(state.double())
        own = np.cov((state - means[train.labels]).double().numpy(), rowvar=False, bias=True)
        within, whole = (torch.from_numpy(c) for c in (shrunk_covariance(own, fitted.shrinkage_), fitted.covariance_))
        of_classes = torch.stack([mahalanobis(h[i], mean, within) for mean in means])
        expected += weights[i] * (of_classes.amin(0) - 0.98 * mahalanobis(h[i], state.mean(0), whole))
    torch.testing.assert_close(found.distance(States(h)), expected, rtol=1e-4, atol=1e-4)
    read = found.read(train.log_probs, States(h), None)  # type: ignore[arg-type]
    assert read.open_entropy is None and read.distance is not None and torch.equal(read.log_probs, train.log_probs)


def test_without_classes_it_is_the_distance_from_all() -> None:
    train = made()
    for found in (fit_familiarity(train), fit_familiarity(replace(train, labels=torch.full((80,), -100)), classes=3)):
        state = train.states.read[0]
        whole = torch.from_numpy(LedoitWolf().fit(state).covariance_).double()
        expected = mahalanobis(state, state.mean(0), whole)
        one = found._at(0, state.double())
        torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-4)


def test_a_false_alarm_is_as_rare_as_promised() -> None:
    draw = torch.Generator().manual_seed(0)
    rates = []
    for _ in range(400):
        known, new = torch.randn(50, generator=draw).sort().values, torch.randn(20, generator=draw)
        rates.append((p_values(new, known) <= 0.1).double().mean())
    rate = float(torch.stack(rates).mean())
    # 5 of 51 places are at most .1.
    assert rate == pytest.approx(5 / 51, abs=0.012)


def test_p_values_count_ties_as_far() -> None:
    known = torch.tensor([1.0, 2.0, 2.0, 3.0], dtype=torch.float64)
    found = p_values(torch.tensor([0.0, 2.0, 2.5, 9.0]), known)
    assert found.tolist() == [1.0, 0.8, 0.4, 0.2]
    with pytest.raises(ValueError, match="found none"):
        p_values(found, known[:0])


def test_cosine_to_the_nearest() -> None:
    train = torch.eye(3)
    found = cosine_distance(torch.tensor([[2.0, 0, 0], [1.0, 1.0, 0]]), train, neighbours=2)
    assert found.tolist() == pytest.approx([0.5, 1 - 2**-0.5])


def test_fewer_rows_than_dimensions_and_rows_all_alike() -> None:
    few = made(rows=24, size=40)
    assert fit_familiarity(few, classes=3).distance(few.states).isfinite().all()
    alike = replace(few, states=States(torch.ones(2, 24, 40)))
    assert fit_familiarity(alike, classes=3).distance(few.states).isfinite().all()


def test_what_cannot_be() -> None:
    train = made()
    with pytest.raises(UserError, match="at least 20 training rows, found 19"):
        fit_familiarity(train.index(torch.arange(19)))
    with pytest.raises(UserError, match="finite hidden states"):
        fit_familiarity(replace(train, states=States(train.states.read * torch.inf)))
    with pytest.raises(ValueError, match="states at 2 points, found 1"):
        fit_familiarity(train).distance(States(train.states.read[:1]))


def test_what_is_far_from_all_is_unfamiliar_in_many_dimensions() -> None:
    draw = torch.Generator().manual_seed(0)
    # As in networks: classes far apart in one direction, all else small. With an intensity each the sign was wrong.
    scale = torch.logspace(1, -2, 60)
    known = torch.randn(1, 600, 60, generator=draw) * scale
    known[..., 0] += 60 * (torch.arange(600) % 2) - 30
    train = SplitStates(torch.zeros(1, 300, 2).log_softmax(-1), States(known[:, :300]), torch.arange(300) % 2)
    foreign = known[:, 300:] + 3 * torch.randn(1, 300, 60, generator=draw) * scale
    found = fit_familiarity(train, classes=2)
    scores = torch.cat([found.distance(States(known[:, 300:])), found.distance(States(foreign))])
    value = auroc(scores, torch.arange(600) >= 300).value
    assert value is not None and value > 0.95


def test_what_is_far_where_no_class_is_is_far() -> None:
    train = made(rows=400)
    found = fit_familiarity(train, classes=3)
    known = found.distance(train.states).sort().values
    # In a direction that means of classes do not differ in, the relative distance of 98 % is all there is.
    state = train.states.read.double()
    means = torch.stack([torch.stack([s[train.labels == c].mean(0) for c in range(3)]) for s in state])
    away = torch.linalg.svd(means - means.mean(1, keepdim=True)).Vh[:, -1]
    foreign = States((state.mean(1) + 60 * away)[:, None].float())
    assert p_values(found.distance(foreign), known) < 0.01
