"""The objective by hand: its forms, gradients, shares of a batch, missing labels."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.log_probs import random_log_probs

from loracurve.inference.information import jensen_shannon, mixture_log_probs, negative_log_likelihood
from loracurve.training.config import ObjectiveConfig
from loracurve.training.objective import objective

CONFIGS = [
    ObjectiveConfig(),
    ObjectiveConfig("bonus", 1),
    ObjectiveConfig("hinge", 5, tau=0.6),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_finite_values_and_gradients_with_absent_classes(config):
    logits = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    logits[:, 0, 3:] = -math.inf
    logits[0, 1, 4] = -math.inf
    logits.requires_grad_()
    loss, report = objective(logits.log_softmax(-1), torch.tensor([0, 1, 2, 3]), config)
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all() and logits.grad.abs().sum() > 0
    assert set(report) == {"nll", "jsd"} and not any(value.requires_grad for value in report.values())


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_gradcheck(config):
    logits = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([1, 3])
    assert torch.autograd.gradcheck(lambda x: objective(x.log_softmax(-1), labels, config)[0], logits)


def test_forms_by_hand():
    probs = torch.tensor([[[0.9, 0.1]], [[0.3, 0.7]]], dtype=torch.float64)
    labels = torch.tensor([0])
    nll = -(math.log(0.9) + math.log(0.3)) / 2

    def h(p):
        return -p * math.log(p) - (1 - p) * math.log(1 - p)

    jsd = h(0.6) - (h(0.9) + h(0.3)) / 2
    for config, expected in (
        (ObjectiveConfig(), nll),
        (ObjectiveConfig("bonus", 0.5), nll - 0.5 * jsd),
    ):
        loss, report = objective(probs.log(), labels, config)
        assert loss.item() == pytest.approx(expected)
        assert report["nll"].item() == pytest.approx(nll) and report["jsd"].item() == pytest.approx(jsd)


def test_bonus_is_the_mixture_to_second_order():
    # A small spread around the data's own distribution: mean NLL - JSD = NLL of the mixture + O(spread^3).
    base = torch.tensor([0.3, 0.7], dtype=torch.float64)
    gaps = []
    for spread in (0.02, 0.01):
        probs = torch.stack([base + spread * torch.tensor([1, -1]), base - spread * torch.tensor([1, -1])]).unsqueeze(1)
        bonus = [objective(probs.log(), torch.tensor([y]), ObjectiveConfig("bonus", 1))[0] for y in range(2)]
        mixture = negative_log_likelihood(mixture_log_probs(probs.log()).expand(2, -1), torch.arange(2))
        gaps.append(abs(base @ (torch.stack(bonus) - mixture)).item())
    assert gaps[0] < 1e-5 and gaps[1] < gaps[0] / 7


def test_hinge_by_hand():
    log_probs, labels = random_log_probs(2, 6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    nll, jsd = negative_log_likelihood(log_probs, labels).mean(), jensen_shannon(log_probs).mean()
    for tau, term in ((jsd.item() + 0.02, 0.02), (jsd.item() - 0.01, 0.0)):
        loss, report = objective(log_probs, labels, ObjectiveConfig("hinge", 5), tau=tau)
        assert loss.item() == pytest.approx(nll.item() + 5 * term)
        assert report["jsd"].item() == pytest.approx(jsd.item())
    by_tensor, _ = objective(log_probs, labels, ObjectiveConfig("hinge", 5), tau=jsd + 0.02)
    assert by_tensor.item() == pytest.approx(nll.item() + 0.1)
    by_config, _ = objective(log_probs, labels, ObjectiveConfig("hinge", 5, tau=0.5))
    assert by_config.item() == pytest.approx(nll.item() + 5 * (0.5 - jsd.item()))
    with pytest.raises(ValueError, match="resolve_tau"):
        objective(log_probs, labels, ObjectiveConfig("hinge", 5))


def test_hinge_target_means_the_same_for_any_number_of_points():
    # Copies of a pair: the pairs' divergence is that of the distinct pairs; their number is known.
    pair, labels = random_log_probs(2, 5, 3), torch.zeros(5, dtype=torch.long)
    _, report = objective(torch.cat([pair, pair]), labels, ObjectiveConfig("hinge", 1, tau=0.1))
    assert report["jsd"].item() == pytest.approx(jensen_shannon(pair).mean().item() * 4 / 6)


def test_hinge_has_no_gradient_above_its_target():
    logits = random_log_probs(2, 4, 3).requires_grad_()
    labels = torch.tensor([0, 1, 2, 0])
    gradients = []
    for config in (ObjectiveConfig(), ObjectiveConfig("hinge", 5, tau=1e-6), ObjectiveConfig("hinge", 5, tau=0.6)):
        loss, _ = objective(logits.log_softmax(-1), labels, config)
        gradients.append(torch.autograd.grad(loss, logits)[0])
    torch.testing.assert_close(gradients[0], gradients[1])
    assert not torch.allclose(gradients[0], gradients[2])


def test_shares_of_a_batch_add_up_to_its_hinge():
    # One share lies above the target and the other below: each decides by the whole batch.
    logits = random_log_probs(2, 5, 3) * torch.tensor([3.0, 3.0, 0.2, 0.2, 0.2], dtype=torch.float64)[:, None]
    logits.requires_grad_()
    labels, shares = torch.tensor([0, 1, 2, 0, 1]), (slice(0, 2), slice(2, 5))
    jsd = jensen_shannon(logits.detach().log_softmax(-1))
    for tau in (jsd.mean().item() + 0.01, jsd.mean().item() - 0.01):
        assert jsd[shares[0]].mean() > tau > jsd[shares[1]].mean()
        config = ObjectiveConfig("hinge", 5, tau=tau)
        whole, _ = objective(logits.log_softmax(-1), labels, config)

        def of(s, config=config):
            log_probs = logits[:, s].log_softmax(-1)
            return objective(log_probs, labels[s], config, whole=lambda _: jsd.mean())[0] * len(labels[s]) / 5

        parts = [of(s) for s in shares]
        (expected,), (found,) = (torch.autograd.grad(loss, logits) for loss in (whole, sum(parts)))
        assert sum(parts).item() == pytest.approx(whole.item())
        torch.testing.assert_close(found, expected)


def test_divergence_on_other_inputs():
    log_probs, others, labels = random_log_probs(2, 3, 4), random_log_probs(2, 7, 5, seed=1), torch.tensor([3, 0, 1])
    nll = negative_log_likelihood(log_probs, labels)
    loss, report = objective(log_probs, labels, ObjectiveConfig("bonus", 0.5), jsd_log_probs=others)
    assert report["jsd"].item() == pytest.approx(jensen_shannon(others).mean().item())
    assert loss.item() == pytest.approx((nll.mean() - 0.5 * jensen_shannon(others).mean()).item())


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_examples_without_label_enter_nothing(config):
    logits = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    logits[:, 1, 0] = -math.inf  # class 0 has probability 0 where the label is missing
    logits.requires_grad_()
    labels = torch.tensor([2, -100, 0, -100])
    loss, report = objective(logits.log_softmax(-1), labels, config)
    kept = [0, 2]
    alone, alone_report = objective(logits[:, kept].log_softmax(-1), labels[kept], config)
    torch.testing.assert_close(loss, alone)
    torch.testing.assert_close(report, alone_report)
    loss.backward()
    assert logits.grad.isfinite().all() and (logits.grad[:, [1, 3]] == 0).all() and logits.grad.abs().sum() > 0
    none, _ = objective(logits.detach().log_softmax(-1), torch.full((4,), -100), config)
    assert none.isfinite()
