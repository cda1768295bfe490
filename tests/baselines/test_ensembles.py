"""Ensembles and mixtures of anchors: plain averages, planted answers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.settings import members, of

from loracurve.baselines.ensembles import ConvexMix, Ensemble, LongerEnsemble, mixture_weights
from loracurve.baselines.method import Setting
from loracurve.baselines.single import Single
from loracurve.system.errors import UserError


def test_an_ensemble_averages_probabilities(setting: Setting) -> None:
    fitted = Ensemble(3).fit(setting)
    found = fitted.predict(setting.task.encode("test"))
    torch.testing.assert_close(found.probs, members(setting)[:3].mean(0), atol=1e-5, rtol=1e-5)
    assert (fitted.passes, fitted.cost) == (3, 3)
    torch.testing.assert_close(of(setting, Single()).probs, members(setting)[0], atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="expected 1 to 4 anchors.*found 5"):
        Ensemble(5).fit(setting)


def test_longer_ensembles_share_their_budget(setting: Setting) -> None:
    fitted = LongerEnsemble(2, 5.0).fit(setting)
    assert fitted.cost == 5 and fitted.passes == 2 and fitted.notes["steps"] == 10
    faster = replace(setting, training=replace(setting.training, learning_rate=3e-2))
    there, here = of(faster, LongerEnsemble(2, 2.0)), of(setting, LongerEnsemble(2, 2.0, learning_rate=3e-2))
    assert torch.equal(there.probs, here.probs)
    with pytest.raises(UserError, match="at least one for each of 3"):
        LongerEnsemble(3, 2.0)


def test_mixture_weights_find_planted_ones() -> None:
    # Two classes; component 0 says .9 and component 1 says .2 for class 1, which has share .6 = .9 w + .2 (1 - w).
    labels = torch.tensor([1] * 60 + [0] * 40)
    class_one = torch.tensor([0.9, 0.2])
    probs = torch.where(labels == 1, class_one[:, None], 1 - class_one[:, None])
    assert mixture_weights(probs.log()).tolist() == pytest.approx([4 / 7, 3 / 7], abs=1e-6)
    assert mixture_weights(torch.tensor([[0.8, 0.7], [0.3, 0.2]]).log()).tolist() == pytest.approx([1, 0], abs=1e-6)


def test_the_best_mix_is_no_worse_than_any_other_on_validation_rows(setting: Setting) -> None:
    validation = setting.task.encode("validation")
    labels = validation.labels
    fitted = ConvexMix(4).fit(setting)
    best = fitted.predict(validation).negative_log_likelihood(labels).mean()
    assert sum(fitted.notes["weights"]) == pytest.approx(1)
    points = Ensemble(4).fit(setting).predict(validation).point_probs.double()
    for seed in range(50):
        weights = torch.rand(4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        other = torch.einsum("n,nec->ec", weights / weights.sum(), points)
        assert best <= -other[torch.arange(len(labels)), labels].log().mean() + 1e-6
