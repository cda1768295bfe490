from __future__ import annotations

import json
import math
from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from loracurve.inference.calibration import (
    SelectiveThreshold,
    apply_temperature,
    conformal_quantile,
    fit_temperature,
    possible_errors,
    prediction_sets,
    selective_threshold,
)
from loracurve.inference.information import negative_log_likelihood
from loracurve.inference.predictive import Predictive
from loracurve.system.errors import UserError


def sample(examples, classes=4, seed=0, scale=2.0):
    """Calibrated log-probabilities and labels drawn from them."""
    generator = torch.Generator().manual_seed(seed)
    log_probs = (scale * torch.randn(examples, classes, generator=generator, dtype=torch.float64)).log_softmax(-1)
    return log_probs, torch.multinomial(log_probs.exp(), 1, generator=generator).squeeze(1)


@pytest.mark.parametrize("planted", [0.4, 1.0, 2.5])
def test_planted_temperature_is_recovered(planted):
    log_probs, labels = sample(20000)
    sharpened = apply_temperature(log_probs, 1 / planted)  # needs T = planted to be calibrated again
    found = fit_temperature(sharpened, labels)
    assert found == pytest.approx(planted, rel=0.05)

    def nll(temperature):
        return negative_log_likelihood(apply_temperature(sharpened, temperature), labels).mean()

    assert nll(found) <= min(nll(found * 1.01), nll(found / 1.01))


def test_temperature_with_absent_classes_and_on_a_predictive():
    log_probs, labels = sample(2000)
    wide = torch.nn.functional.pad(log_probs, (0, 1), value=-math.inf)
    assert fit_temperature(wide, labels) == pytest.approx(fit_temperature(log_probs, labels), rel=1e-5)
    predictive = Predictive.from_log_probs(torch.stack([log_probs, log_probs]))
    assert fit_temperature(predictive.log_probs, labels) == pytest.approx(fit_temperature(log_probs, labels), rel=1e-4)
    assert (apply_temperature(wide, 2.0)[:, -1] == -math.inf).all()


def test_temperature_edges():
    certain = torch.tensor([[0.8, 0.2]]).log()
    # Separable: as sharp as needed for a likelihood of 1, or the sharpest allowed.
    assert 0.01 <= fit_temperature(certain, torch.tensor([0])) < 0.05
    assert fit_temperature(certain, torch.tensor([1])) == pytest.approx(100, rel=1e-3)
    with pytest.raises(ValueError, match="finite"):
        fit_temperature(torch.tensor([[0.0, -math.inf]]), torch.tensor([1]))
    with pytest.raises(UserError, match="validation"):
        fit_temperature(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long))


def binomial_cdf(k, n, p):
    """P(X <= k) of n trials, by its definition."""
    return sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k + 1))


def errors_at(uncertainty, generator):
    return torch.rand(len(uncertainty), generator=generator, dtype=torch.float64) < 0.3 * uncertainty


def test_selective_threshold_reports_its_own_sample():
    generator = torch.Generator().manual_seed(0)
    uncertainty = torch.rand(2000, generator=generator, dtype=torch.float64)
    errors = errors_at(uncertainty, generator)
    result = selective_threshold(uncertainty, errors, risk=0.1, delta=0.1)
    answered = result.answered(uncertainty)
    assert result.coverage == answered.double().mean().item() and result.reason is None
    assert result.selective_risk == pytest.approx(errors[answered].double().mean().item())
    assert result.selective_risk < result.risk_bound <= 0.1 + 1e-9
    # P(error | u < s) = 0.15 s, so 2/3 of the examples could be answered; certainty costs some.
    assert 0.4 < result.coverage < 0.66
    assert binomial_cdf(
        round(result.selective_risk * answered.sum().item()), int(answered.sum()), result.risk_bound
    ) == (pytest.approx(0.1 / 20, rel=1e-6))
    json.dumps(asdict(result), allow_nan=False)


@pytest.mark.parametrize("ties", [False, True])
def test_selective_guarantee_holds_in_simulation(ties):
    delta, risk, violations, certified, repeats = 0.2, 0.1, 0, 0, 300
    generator = torch.Generator().manual_seed(1)
    levels = torch.arange(1, 11, dtype=torch.float64) / 10
    for _ in range(repeats):
        uncertainty = torch.rand(1000, generator=generator, dtype=torch.float64)
        if ties:
            uncertainty = (uncertainty * 10).ceil() / 10
        result = selective_threshold(uncertainty, errors_at(uncertainty, generator), risk, delta)
        if result.threshold is not None:
            certified += 1
            true_risk = 0.3 * (levels[levels < result.threshold].mean().item() if ties else result.threshold / 2)
            violations += true_risk > risk
    assert certified > repeats / 2
    assert violations / repeats <= delta


@st.composite
def tied(draw, most=200):
    """Uncertainties of which many are tied, errors, a tolerance, and other values within it for the same examples."""
    count = draw(st.integers(20, most))
    seed, values = draw(st.integers(0, 10**6)), draw(st.integers(1, 30))
    tolerance = draw(st.sampled_from([1e-6, 1e-3, 0.02]))
    generator = torch.Generator().manual_seed(seed)
    uncertainty = torch.randint(values, (count,), generator=generator).double() / values
    errors = torch.rand(count, generator=generator) < draw(st.floats(0, 0.5)) * uncertainty
    noise = 2 * torch.rand(count, generator=generator, dtype=torch.float64) - 1
    if draw(st.booleans()):
        noise = torch.where(errors, -1.0, 1.0).double()  # errors are answered and correct examples are not
    return uncertainty, errors, tolerance, uncertainty + 0.999 * tolerance * noise


@settings(max_examples=200, deadline=None)
@given(tied(), st.sampled_from([0.1, 0.3, 0.5]))
def test_other_batches_answer_as_promised(case, risk):
    uncertainty, errors, tolerance, elsewhere = case
    result = selective_threshold(uncertainty, errors, risk, 0.2, tolerance)
    for values in (uncertainty, elsewhere):
        answered = result.answered(values)
        assert answered.double().mean() >= result.coverage
        if result.threshold is not None:
            assert errors[answered].double().mean() <= result.selective_risk + 1e-12
            assert result.selective_risk <= result.risk_bound <= risk + 1e-9


@settings(max_examples=100, deadline=None)
@given(tied(), st.sampled_from([0.1, 0.3, 0.5]))
def test_without_a_tolerance_the_threshold_is_the_order_statistic(case, risk):
    uncertainty, errors = case[:2]
    result = selective_threshold(uncertainty, errors, risk, 0.2)
    for level in range(20, 0, -1):  # the rule in its plain form
        threshold = uncertainty.sort().values[math.ceil(len(errors) * level / 20) - 1]
        answered = uncertainty < threshold
        if answered.any() and binom.cdf(int(errors[answered].sum()), int(answered.sum()), risk) <= 0.2 / 20:
            assert result.threshold == threshold.item() and result.coverage == answered.double().mean().item()
            assert result.selective_risk == errors[answered].double().mean().item()
            return
    assert result.threshold is None


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 12))
def test_values_far_apart_are_answered_or_not_in_any_batch(seed, values):
    generator = torch.Generator().manual_seed(seed)
    tolerance = 0.24 / values  # less than a quarter of what lies between two values
    uncertainty = torch.randint(values, (300,), generator=generator).double() / values
    errors = torch.rand(300, generator=generator) < 0.1 * uncertainty
    result = selective_threshold(uncertainty, errors, 0.3, 0.2, tolerance)
    assert torch.equal(result.answered(uncertainty - tolerance), result.answered(uncertainty + tolerance))
    exact = selective_threshold(uncertainty, errors, 0.3, 0.2)
    assert (result.coverage, result.selective_risk) == (exact.coverage, exact.selective_risk), "gaps cost nothing"


@pytest.mark.parametrize("values,tolerance", [(10, 0.01), (10, 0.03), (2000, 0.01)])
def test_selective_guarantee_holds_under_the_worst_noise(values, tolerance):
    """The true uncertainty is known; batches of the calibration and of later rows differ as badly as they may."""
    delta, risk, repeats = 0.2, 0.1, 300
    certified, violations = {0.0: 0, tolerance: 0}, {0.0: 0, tolerance: 0}
    generator = torch.Generator().manual_seed(2)
    levels = torch.arange(1, values + 1, dtype=torch.float64) / values
    for _ in range(repeats):
        own = (torch.rand(1000, generator=generator, dtype=torch.float64) * values).ceil() / values
        errors = errors_at(own, generator)
        # Errors look uncertain in the calibration, and certain later; correct examples the other way round.
        measured = own + torch.where(errors, 0.5, -0.5) * tolerance
        for allowed in (0.0, tolerance):
            threshold = selective_threshold(measured, errors, risk, delta, allowed).threshold
            if threshold is not None:
                certified[allowed] += 1
                wrong = 0.3 * levels[levels - 0.5 * tolerance < threshold].sum()
                right = (1 - 0.3 * levels[levels + 0.5 * tolerance < threshold]).sum()
                violations[allowed] += (wrong / (wrong + right)).item() > risk
    assert certified[tolerance] > repeats / 4
    assert violations[tolerance] / repeats <= delta
    if values == 10:
        assert violations[0.0] / repeats > delta, "the case is one that needs the tolerance"


def test_errors_that_rounding_could_make_count():
    probs = torch.tensor([[0.6, 0.4, 0.0], [0.52, 0.48, 0.0], [0.5, 0.5, 0.0], [0.3, 0.7, 0.0]], dtype=torch.float64)
    labels = torch.zeros(4, dtype=torch.long)
    assert possible_errors(probs, labels, 0.0).tolist() == [False, False, True, True]
    assert possible_errors(probs, labels, 0.03).tolist() == [False, True, True, True]
    assert possible_errors(torch.ones(2, 1), torch.zeros(2, dtype=torch.long), 0.5).tolist() == [False, False]


def test_nothing_certified_is_said():
    always_wrong = selective_threshold(torch.rand(50, generator=torch.Generator()), torch.ones(50).bool(), 0.05, 0.1)
    assert always_wrong.threshold is None and always_wrong.coverage == 0 and always_wrong.risk_bound is None
    assert "no threshold certified" in always_wrong.reason and "104 answered" in always_wrong.reason
    assert not always_wrong.answered(torch.tensor([-1.0, 0.0])).any()
    json.dumps(asdict(always_wrong), allow_nan=False)
    all_equal = selective_threshold(torch.zeros(500), torch.zeros(500).bool(), 0.05, 0.1)
    assert isinstance(all_equal, SelectiveThreshold) and all_equal.coverage == 0
    flawless = selective_threshold(torch.arange(500.0), torch.zeros(500).bool(), 0.05, 0.1)
    assert flawless.coverage == 499 / 500 and flawless.risk_bound == pytest.approx(1 - 0.005 ** (1 / 499), rel=1e-6)


def test_conformal_quantile_by_hand():
    probs = torch.tensor([[p, 1 - p] for p in (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)], dtype=torch.float64)
    labels = torch.zeros(9, dtype=torch.long)
    assert conformal_quantile(probs, labels, 0.2) == pytest.approx(0.8)  # the 8th of 9 scores
    assert conformal_quantile(probs, labels, 0.7) == pytest.approx(0.3)  # 10 * (1 - 0.7) is 3, not 4
    assert conformal_quantile(probs, labels, 0.05) == 1  # rank 10 of 9: every class
    sets = prediction_sets(torch.tensor([[0.5, 0.3, 0.2, 0.0]]), 0.75)
    assert sets.tolist() == [[True, True, False, False]]
    assert prediction_sets(torch.tensor([[0.5, 0.3, 0.2, 0.0]]), 1.0).tolist() == [[True, True, True, False]]


@pytest.mark.parametrize("alpha", [0.1, 0.3])
def test_conformal_coverage(alpha):
    rates = []
    for repeat in range(200):
        log_probs, labels = sample(400, seed=repeat)
        probs = apply_temperature(log_probs, 0.3).exp()  # overconfident: coverage does not need calibration
        quantile = conformal_quantile(probs[:100], labels[:100], alpha)
        rates.append(prediction_sets(probs[100:], quantile)[torch.arange(300), labels[100:]].double().mean())
    coverage = torch.stack(rates)
    standard_error = (coverage.std() / math.sqrt(len(rates))).item()
    assert 1 - alpha - 3 * standard_error <= coverage.mean().item() <= 1 - alpha + 1 / 101 + 3 * standard_error


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.sampled_from([0.05, 0.2, 0.5]), st.sampled_from([1e-6, 0.02]))
def test_calibration_rows_in_other_batches_stay_covered(seed, texts, alpha, tolerance):
    """Of n rows at least ceil((n + 1)(1 - alpha)) have their label in the set, however they are rounded."""
    generator = torch.Generator().manual_seed(seed)
    probs = torch.rand(texts, 3, generator=generator, dtype=torch.float64).add(0.1)
    probs = (probs / probs.sum(1, keepdim=True))[torch.randint(texts, (60,), generator=generator)]
    labels = torch.randint(3, (60,), generator=generator)
    quantile = conformal_quantile(probs, labels, alpha)
    worst = prediction_sets(probs - 0.999 * tolerance, quantile, tolerance)[torch.arange(60), labels]
    assert int(worst.sum()) >= min(60, math.ceil(61 * (1 - alpha)))
    exact = prediction_sets(probs, quantile)
    assert not (exact & ~prediction_sets(probs, quantile, tolerance)).any(), "a tolerance only enlarges sets"


@pytest.mark.parametrize("alpha", [0.15, 0.3])
def test_conformal_coverage_of_ties_under_the_worst_noise(alpha):
    generator = torch.Generator().manual_seed(3)
    tolerance, rates, unprotected = 1e-3, [], []
    own = torch.tensor([[0.9, 0.1], [0.7, 0.3], [0.4, 0.6], [0.2, 0.8]], dtype=torch.float64)
    for _ in range(300):
        text = torch.randint(4, (400,), generator=generator)
        labels = torch.multinomial(own[text], 1, generator=generator).squeeze(1)
        # Labels look likelier in the calibration than later.
        quantile = conformal_quantile(own[text[:100]] + tolerance / 2, labels[:100], alpha)
        later = own[text[100:]] - tolerance / 2
        for found, allowed in ((rates, tolerance), (unprotected, 0.0)):
            found.append(prediction_sets(later, quantile, allowed)[torch.arange(300), labels[100:]].double().mean())
    coverage = torch.stack(rates)
    assert coverage.mean() >= 1 - alpha - 3 * coverage.std() / math.sqrt(len(rates))
    assert torch.stack(unprotected).mean() < 1 - alpha - 0.03, "the case is one that needs the tolerance"


@pytest.mark.parametrize("risk,delta", [(0.0, 0.1), (1.0, 0.1), (0.1, 0.0), (0.1, math.nan)])
def test_bad_levels_are_refused(risk, delta):
    with pytest.raises(UserError, match=r"expected a number in \(0, 1\)"):
        selective_threshold(torch.zeros(3), torch.zeros(3).bool(), risk, delta)
    with pytest.raises(UserError, match="alpha"):
        conformal_quantile(torch.ones(1, 1), torch.zeros(1, dtype=torch.long), 1.5)
    with pytest.raises(UserError, match="validation split"):
        selective_threshold(torch.zeros(0), torch.zeros(0).bool(), 0.1, 0.1)


@pytest.mark.parametrize("tolerance", [-1.0, math.nan, math.inf])
def test_a_tolerance_that_is_none_is_refused(tolerance):
    with pytest.raises(ValueError, match="tolerance"):
        selective_threshold(torch.zeros(3), torch.zeros(3).bool(), 0.1, 0.1, tolerance)
