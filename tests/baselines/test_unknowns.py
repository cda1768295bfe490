"""Gaussians and familiarity of other methods' points."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from loracurve.baselines.ensembles import Ensemble
from loracurve.baselines.laplace import Laplace
from loracurve.baselines.method import Setting
from loracurve.baselines.single import Single
from loracurve.baselines.sngp import SNGP
from loracurve.baselines.temperature import TemperatureScaled
from loracurve.baselines.unknowns import FamiliarityOf, LaplaceCurve
from loracurve.inference.hidden_states import states_of
from loracurve.inference.laplace import fit_gaussians, marginal_tau
from loracurve.system.errors import UserError


def test_gaussians_of_an_ensemble_are_those_of_its_members(setting: Setting) -> None:
    test, train = setting.task.encode("test"), setting.task.encode("train")
    plain = Ensemble(3).fit(setting)
    found = LaplaceCurve(of=Ensemble(3), rule="marginal").fit(setting)
    predicted = found.predict(test)
    assert plain.along is not None
    plain.along.put_into(setting.model)
    states = states_of(setting.model, train, plain.along.t)
    rows = setting.model.runner.last_rows(plain.along.t, train.answer_ids, states.states.read.shape[-1])
    gaussians = fit_gaussians(states, rows)
    gaussians = replace(gaussians, tau=marginal_tau(gaussians))
    assert found.notes["tau"] == pytest.approx(gaussians.tau, rel=1e-3)
    known = states_of(setting.model, test, plain.along.t)
    expected = gaussians.averaged(known.log_probs, known.states)
    assert predicted.point_log_probs is not None
    torch.testing.assert_close(predicted.point_log_probs, expected.log_probs, rtol=1e-3, atol=1e-4)
    assert predicted.distance is not None and predicted.distance.isfinite().all()
    assert predicted.within_points.mean() > 0
    # Predicting is one pass more, the base's; building them, a third of so many with gradients.
    forward = 4 * (len(train) + len(setting.task.encode("validation"))) / 3 / setting.unit
    assert (found.passes, found.cost) == (4, pytest.approx(3 + forward))


def test_familiarity_leaves_probabilities_alone(setting: Setting) -> None:
    test = setting.task.encode("test")
    plain = Ensemble(2).fit(setting).predict(test)
    for options in ({}, {"measure": "cosine", "familiarity": "curve"}, {"familiarity": "base"}):
        found = FamiliarityOf(of=Ensemble(2), **options).fit(setting)  # type: ignore[arg-type]
        predicted = found.predict(test)
        torch.testing.assert_close(predicted.log_probs, plain.log_probs, rtol=1e-4, atol=1e-5)
        assert predicted.distance is not None and len(predicted.distance.unique()) > 1
        assert found.passes == 2 + (options.get("familiarity") != "curve")


def test_the_untouched_base_has_one_state_whatever_the_adapters(setting: Setting) -> None:
    test = setting.task.encode("test")
    one, other = (
        FamiliarityOf(of=Single(), familiarity="base").fit(replace(setting, anchors=anchors)).predict(test).distance
        for anchors in (setting.anchors, {n: -p for n, p in setting.anchors.items()})
    )
    assert one is not None and other is not None
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_what_was_fitted_before_is_not_fitted_again(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Ensemble] = []
    fit = Ensemble.fit
    monkeypatch.setattr(Ensemble, "fit", lambda self, s: calls.append(self) or fit(self, s))
    for method in (
        Ensemble(2),
        LaplaceCurve(of=Ensemble(2)),
        TemperatureScaled(Ensemble(2)),
        FamiliarityOf(of=Ensemble(3)),
    ):
        setting.shelf.fit(method, setting)
    assert calls == [Ensemble(2), Ensemble(3)] and setting.shelf.saved > 0


def test_what_cannot_be(setting: Setting) -> None:
    with pytest.raises(UserError, match="expected an average of points or adapters, found TemperatureScaled"):
        LaplaceCurve(of=TemperatureScaled(Single())).fit(setting)
    with pytest.raises(UserError, match="take the method familiarity"):
        LaplaceCurve(of=Single(), gaussians="none").fit(setting)
    with pytest.raises(UserError, match="expected curve or base, found none"):
        FamiliarityOf(of=Single(), familiarity="none").fit(setting)


def test_last_layer_laplace_of_one_adapter_is_near_that_of_laplace_torch(setting: Setting) -> None:
    pytest.importorskip("laplace")
    test = setting.task.encode("test")
    ours = LaplaceCurve(of=Single(), tau=3.0).fit(setting).predict(test)
    theirs = Laplace(weights="last_layer", prior_precision=3.0).fit(replace(setting, samples=400)).predict(test)
    # Theirs is a Kronecker approximation with draws; with two classes the two are close.
    torch.testing.assert_close(ours.probs, theirs.probs, atol=0.05, rtol=0)


def test_sngp_head(setting: Setting) -> None:
    test = setting.task.encode("test")
    fitted = SNGP(features=256).fit(setting)
    predicted = fitted.predict(test)
    train = fitted.predict(setting.task.encode("train"))
    assert fitted.notes["width"] in (0.25, 0.5, 1, 2, 4) and fitted.passes == 1
    # It is trained: on its training rows it is better than chance.
    assert train.negative_log_likelihood(setting.task.encode("train").labels).mean() < 0.69
    assert len(predicted) == len(test) and predicted.point_log_probs is not None
    wide = SNGP(features=256, width=4.0, ridge=1e6).fit(setting).predict(test)
    torch.testing.assert_close(wide.probs, torch.full_like(wide.probs, 0.5), atol=0.01, rtol=0)
