"""Gaussians over answer rows: their covariances, their averages, and how wide they are."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import Tensor

from loracurve.inference import laplace
from loracurve.inference.calibration import apply_temperature, fit_temperature
from loracurve.inference.hidden_states import SplitStates
from loracurve.inference.information import mixture_log_probs, negative_log_likelihood
from loracurve.inference.laplace import Gaussians, contrasts, fit_gaussians, marginal_tau, validation_tau
from loracurve.inference.predictive import Predictive
from loracurve.model.states import States
from loracurve.system.errors import UserError

N, D = 60, 5


def centred(covariance: Tensor) -> Tensor:
    size = covariance.shape[-1]
    turn = torch.eye(size, dtype=torch.float64) - 1 / size
    return turn @ covariance @ turn


def made(classes: int, points: int = 2, bias: bool = False, rows: int = N, seed: int = 0) -> tuple[SplitStates, Tensor]:
    """States, log-probabilities that follow from them, and the rows that give them."""
    draw = torch.Generator().manual_seed(seed)
    weights = torch.randn(points, classes, D + 1, generator=draw, dtype=torch.float64)
    if not bias:
        weights[..., -1] = 0
    h = torch.randn(points, rows, D, generator=draw, dtype=torch.float64)
    logits = torch.einsum("ned,ncd->nec", h, weights[..., :-1]) + weights[:, None, :, -1]
    labels = torch.distributions.Categorical(logits=logits[0]).sample()
    return SplitStates(logits.log_softmax(-1), States(h), labels), weights


def texts(choices: int, rows: int = N, seed: int = 0) -> SplitStates:
    draw = torch.Generator().manual_seed(seed)
    u = torch.randn(1, rows, choices, D, generator=draw, dtype=torch.float64)
    scores = torch.randn(1, rows, choices, generator=draw, dtype=torch.float64)
    labels = torch.randint(choices, (rows,), generator=draw)
    return SplitStates(scores.log_softmax(-1), States(u.mean(2), u), labels)


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_contrasts_are_orthonormal_and_see_no_shift(classes: int) -> None:
    v = contrasts(classes)
    torch.testing.assert_close(v.mT @ v, torch.eye(classes - 1, dtype=torch.float64))
    assert v.sum(0).abs().max() < 1e-12


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("classes", [2, 4])
def test_covariances_are_those_of_the_hessian(classes: int, bias: bool) -> None:
    train, rows = made(classes, bias=bias)
    found = replace(fit_gaussians(train, rows, total=3 * N), tau=0.7)
    assert (found.form, found.bias) == ("exact", bias)
    for i in range(2):
        h = (
            torch.cat([train.states.read[i], torch.ones(N, 1, dtype=torch.float64)], 1)
            if bias
            else train.states.read[i]
        )
        v = contrasts(classes)

        def nll(w: Tensor, h: Tensor = h, v: Tensor = v) -> Tensor:
            logits = h @ (v @ w.view(classes - 1, -1)).mT
            return -3 * logits.log_softmax(-1)[torch.arange(N), train.labels].sum()

        at = v.mT @ (rows[i] if bias else rows[i, :, :-1])
        hessian = torch.autograd.functional.hessian(nll, at.flatten())
        precision = hessian + 0.7 * torch.eye(len(hessian), dtype=torch.float64)
        jacobian = torch.einsum("ck,ed->eckd", v, h).flatten(2)
        expected = jacobian @ torch.linalg.solve(precision, jacobian.mT)
        torch.testing.assert_close(
            found.covariance(i, train.states.read[i], train.log_probs[i]), expected, rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("classes", [2, 3])
def test_covariances_are_those_of_laplace_torch(classes: int) -> None:
    library = pytest.importorskip("laplace")
    train, rows = made(classes, points=1)
    linear = torch.nn.Linear(D, classes, bias=False, dtype=torch.float64)
    linear.weight.data.copy_(rows[0, :, :-1])
    data = torch.utils.data.TensorDataset(train.states.read[0], train.labels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = library.Laplace(linear, "classification", "all", "full", prior_precision=2.5)
        reference.fit(torch.utils.data.DataLoader(data, batch_size=N))
        _, expected = reference._glm_predictive_distribution(train.states.read[0])
    found = replace(fit_gaussians(train, rows), tau=2.5).covariance(0, train.states.read[0], train.log_probs[0])
    # Its prior is on all rows of the head; what it says of a shift of all logits changes no probability.
    torch.testing.assert_close(found, centred(expected.detach().double()), rtol=1e-5, atol=1e-8)


def test_many_dimensions_take_the_kronecker_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(laplace, "MOST_EXACT", 10)
    train, rows = made(4, bias=True)
    found = replace(fit_gaussians(train, rows, total=2 * N), tau=0.3)
    assert found.form == "kronecker" and found.values.shape == (2, D + 1) and found.class_values.shape == (2, 3)
    h = torch.cat([train.states.read[1], torch.ones(N, 1, dtype=torch.float64)], 1)
    p, v = train.log_probs[1].exp(), contrasts(4)
    g = torch.stack([v.mT @ (q.diag() - q[:, None] * q) @ v for q in p]).mean(0)
    precision = torch.kron(g, 2 * h.mT @ h) + 0.3 * torch.eye(3 * (D + 1), dtype=torch.float64)
    jacobian = torch.einsum("ck,ed->eckd", v, h).flatten(2)
    expected = jacobian @ torch.linalg.solve(precision, jacobian.mT)
    torch.testing.assert_close(
        found.covariance(1, train.states.read[1], train.log_probs[1]), expected, rtol=1e-4, atol=1e-6
    )


def test_texts_are_a_conditional_logit_on_top_of_their_scores() -> None:
    train = texts(3)
    assert train.states.choices is not None
    train.log_probs[0, ::4, 2] = -torch.inf  # some rows have two choices
    train = replace(train, log_probs=train.log_probs.log_softmax(-1), labels=train.labels.clamp_max(1))
    u = train.states.choices[0]

    def nll(beta: Tensor) -> Tensor:
        return -(train.log_probs[0] + u @ beta).log_softmax(-1)[torch.arange(N), train.labels].sum()

    hessian = torch.autograd.functional.hessian(nll, torch.zeros(D, dtype=torch.float64))
    precision = hessian + 1.5 * torch.eye(D, dtype=torch.float64)
    found = replace(fit_gaussians(train, torch.zeros(1, 3, D + 1)), tau=1.5)
    covariance = found.covariance(0, u, train.log_probs[0])
    expected = u @ torch.linalg.solve(precision, u.mT)
    torch.testing.assert_close(covariance[1], centred(expected[1]), rtol=1e-4, atol=1e-7)
    two = centred(expected[0][:2, :2])
    torch.testing.assert_close(covariance[0][:2, :2], two, rtol=1e-4, atol=1e-7)
    assert covariance[0][2].abs().max() == 0


@pytest.mark.parametrize("tau", [1e3, 1.0, 1e-3])
def test_two_classes_are_integrated(tau: float) -> None:
    train, rows = made(2, points=1)
    gaussians = replace(fit_gaussians(train, rows), tau=tau)
    far = States(torch.cat([train.states.read[:, :3], 30 * train.states.read[:, :3]], 1))
    logits = torch.einsum("ned,ncd->nec", far.read, rows[..., :-1]).log_softmax(-1)
    found = gaussians.averaged(logits, far)
    assert found.open_entropy is not None
    for e in range(6):
        variance = gaussians.covariance(0, far.read[0, e : e + 1], logits[0, e : e + 1])[0]
        spread = float((variance[0, 0] + variance[1, 1] - 2 * variance[0, 1]).sqrt())
        mean = float(logits[0, e, 0] - logits[0, e, 1])

        def inside(z: float, what: int, mean: float = mean, spread: float = spread) -> float:
            p = 1 / (1 + np.exp(-np.clip(mean + spread * z, -700, 700)))
            left = p if what == 0 else -(p * np.log(max(p, 1e-300)) + (1 - p) * np.log(max(1 - p, 1e-300)))
            return left * np.exp(-z * z / 2) / np.sqrt(2 * np.pi)

        step = -mean / spread
        expected = [
            quad(inside, -12, 12, (what,), points=[step] if abs(step) < 12 else None, limit=500)[0] for what in (0, 1)
        ]
        # The poles of a sigmoid lie pi / spread beside the line: what equal steps of 1/8 leave.
        error = 1e-6 + 4 * np.exp(-2 * np.pi**2 / (spread / 8))
        assert float(found.log_probs[0, e].exp()[0]) == pytest.approx(expected[0], abs=error)
        assert float(found.open_entropy[0, e]) == pytest.approx(expected[1], abs=10 * error)
        assert error < 0.05


def test_draws_of_many_classes_come_close_to_many_more(monkeypatch: pytest.MonkeyPatch) -> None:
    train, rows = made(4, points=1)
    gaussians = replace(fit_gaussians(train, rows), tau=0.5)
    few = gaussians.averaged(train.log_probs, train.states)
    monkeypatch.setattr(laplace, "DRAWS", 4096)
    laplace._nodes_on_cpu.cache_clear()
    many = gaussians.averaged(train.log_probs, train.states)
    laplace._nodes_on_cpu.cache_clear()
    assert few.open_entropy is not None and many.open_entropy is not None
    assert (few.log_probs.exp() - many.log_probs.exp()).abs().max() < 0.01
    assert (few.open_entropy - many.open_entropy).abs().max() < 0.02


def test_the_three_parts_add_up_and_the_middle_one_rises_off_the_data() -> None:
    train, rows = made(3)
    gaussians = replace(fit_gaussians(train, rows), tau=1.0)
    far = States(10 * train.states.read)
    logits = torch.einsum("ned,ncd->nec", far.read, rows[..., :-1])
    # As uncertain as before, so that only the covariance differs.
    known = gaussians.averaged(train.log_probs, train.states)
    foreign = gaussians.averaged(train.log_probs, far)
    for read in (known, foreign, gaussians.averaged(logits.log_softmax(-1), far)):
        p = Predictive.from_log_probs(read.log_probs, None, read.open_entropy)
        parts = p.expected_entropy + p.within_points + p.between_points
        torch.testing.assert_close(p.entropy, parts, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(p.mutual_information, p.within_points + p.between_points)
        assert p.within_points.min() > -1e-6
    within = [Predictive.from_log_probs(r.log_probs, None, r.open_entropy).within_points for r in (known, foreign)]
    assert (within[1] > within[0]).all()


def test_without_spread_nothing_changes() -> None:
    train, rows = made(3)
    read = replace(fit_gaussians(train, rows), tau=1e12).averaged(train.log_probs, train.states)
    torch.testing.assert_close(read.log_probs, train.log_probs, rtol=1e-5, atol=1e-5)


def test_classes_that_training_did_not_have_get_no_spread() -> None:
    train, rows = made(3)
    gaussians = fit_gaussians(train, rows)
    wider = torch.cat([train.log_probs, torch.full((2, N, 1), -2.0, dtype=torch.float64)], -1).log_softmax(-1)
    covariance = gaussians.covariance(0, train.states.read[0], wider[0])
    assert covariance.shape == (N, 4, 4) and covariance[:, 3].abs().max() == 0 and covariance[:, 0, 0].min() > 0
    fewer = train.log_probs.clone()
    fewer[:, :, 2] = -torch.inf
    read = gaussians.averaged(fewer.log_softmax(-1), train.states)
    assert (read.log_probs[:, :, 2] == -torch.inf).all()
    torch.testing.assert_close(read.log_probs.exp().sum(-1), torch.ones(2, N, dtype=torch.float64))


@pytest.mark.parametrize("most_exact", [4096, 1])
def test_the_marginal_likelihood_is_highest_at_its_tau(most_exact: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(laplace, "MOST_EXACT", most_exact)
    train, rows = made(3, bias=True)
    gaussians = fit_gaussians(train, rows)
    v, tau = contrasts(3), marginal_tau(gaussians)

    def evidence(tau: float) -> float:
        total = 0.0
        for i in range(2):
            values = gaussians.values[i]
            if gaussians.form == "kronecker":
                values = torch.outer(gaussians.class_values[i], values).flatten()
            w = v.mT @ rows[i]
            total += 0.5 * (
                len(values) * np.log(tau) - float((values + tau).log().sum()) - tau * float(w.square().sum())
            )
        return total

    assert evidence(tau) > max(evidence(tau * 1.01), evidence(tau / 1.01))


def nlls(gaussians: Gaussians, validation: SplitStates, tau: float) -> tuple[float, float]:
    """Of validation rows with this tau: as it is, and after temperature."""
    read = replace(gaussians, tau=tau).averaged(validation.log_probs, validation.states)
    average = mixture_log_probs(read.log_probs)
    tempered = apply_temperature(average, fit_temperature(average, validation.labels))
    plain, after = (float(negative_log_likelihood(p, validation.labels).mean()) for p in (average, tempered))
    return plain, after


def test_the_validation_rule_takes_the_widest_that_costs_nothing() -> None:
    train, rows = made(3, rows=12)
    validation, _ = made(3, rows=200, seed=0)
    gaussians = fit_gaussians(train, rows)
    tau = validation_tau(gaussians, validation)
    grid = laplace._TAUS.tolist()
    found = [nlls(gaussians, validation, t) for t in grid]
    most = [1.003 * min(column) for column in zip(*found, strict=True)]
    good = [all(a <= b for a, b in zip(pair, most, strict=True)) for pair in found]
    place = grid.index(tau)
    assert good[place] and not any(good[:place]) and place > 0
    with pytest.raises(UserError, match="labelled validation rows"):
        validation_tau(gaussians, replace(validation, labels=torch.full((200,), -100)))


def test_rounding_does_not_choose_tau_where_a_temperature_leaves_no_loss() -> None:
    train, rows = made(2, points=1, rows=12)
    validation, _ = made(2, points=1, rows=40)
    validation = replace(validation, labels=validation.log_probs[0].argmax(-1))
    far = validation.log_probs[0].diff(dim=-1).abs()[:, 0] > 0.25
    validation = validation.index(far.nonzero()[:, 0])
    gaussians = fit_gaussians(train, rows)
    grid = laplace._TAUS.tolist()
    plain, after = zip(*(nlls(gaussians, validation, t) for t in grid), strict=True)
    assert max(after) < 1e-4, "separable rows"
    widest = next(t for t, nll in zip(grid, plain, strict=True) if nll <= 1.003 * min(plain))
    assert grid[0] < widest == validation_tau(gaussians, validation)


def test_texts_have_no_marginal_tau() -> None:
    with pytest.raises(UserError, match="expected validation for scoring text"):
        marginal_tau(fit_gaussians(texts(3), torch.zeros(1, 3, D + 1)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.index(torch.zeros(0, dtype=torch.long)), "expected training rows, found none"),
        (lambda s: replace(s, log_probs=s.log_probs[..., :0]), "found language modelling"),
        (lambda s: replace(s, log_probs=s.log_probs[..., :1]), "at least two classes"),
        (lambda s: replace(s, states=States(s.states.read * torch.nan)), "finite hidden states"),
    ],
)
def test_what_cannot_be(change: Any, message: str) -> None:
    train, rows = made(3)
    with pytest.raises(UserError, match=message):
        fit_gaussians(change(train), rows)
    with pytest.raises(ValueError, match="Gaussians at 1 points"):
        fit_gaussians(train, rows).averaged(train.log_probs[:1], train.states)


def test_fewer_rows_than_dimensions_and_equal_texts_have_covariances() -> None:
    train, rows = made(3, rows=2)
    read = fit_gaussians(train, rows).averaged(train.log_probs, train.states)
    assert read.log_probs.isfinite().all()
    twins = texts(3)
    assert twins.states.choices is not None
    twins.states.choices[:, :, 1] = twins.states.choices[:, :, 0]
    read = fit_gaussians(twins, torch.zeros(1, 3, D + 1)).averaged(twins.log_probs, twins.states)
    assert read.log_probs.isfinite().all()
