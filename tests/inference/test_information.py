"""Entropy, mixture and Jensen-Shannon divergence by hand."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from helpers.log_probs import one_hot, random_log_probs

from loracurve.inference.information import (
    entropy,
    jensen_shannon,
    mixture_log_probs,
    negative_log_likelihood,
    pairwise_jensen_shannon,
)


def test_mixtures_take_weights_for_each_example() -> None:
    from loracurve.inference.information import mixture_log_probs

    log_probs = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    weights = torch.tensor([[0.2, 0.6], [0.3, 0.4], [0.5, 0.0]])
    found = mixture_log_probs(log_probs, weights).exp()
    for e, c in product(range(2), range(5)):
        expected = sum(float(weights[i, e] * log_probs[i, e, c].exp()) for i in range(3))
        assert float(found[e, c]) == pytest.approx(expected)


def test_entropy_known_values():
    log_probs = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.25, 0.25, 0.5]]).log()
    torch.testing.assert_close(entropy(log_probs), torch.tensor([math.log(2), 0.0, 1.5 * math.log(2)]))


def test_jensen_shannon_known_values():
    disjoint = torch.stack([one_hot(0), one_hot(1)])
    assert jensen_shannon(disjoint).item() == pytest.approx(math.log(2))
    assert jensen_shannon(disjoint, torch.tensor([0.25, 0.75])).item() == pytest.approx(
        -0.25 * math.log(0.25) - 0.75 * math.log(0.75)
    )
    three = torch.stack([one_hot(0), one_hot(1), one_hot(2)])
    assert jensen_shannon(three).item() == pytest.approx(math.log(3))
    assert pairwise_jensen_shannon(three).item() == pytest.approx(math.log(2))
    same = random_log_probs(1, 5, 4).expand(3, 5, 4)
    torch.testing.assert_close(jensen_shannon(same), torch.zeros(5, dtype=torch.float64), atol=1e-12, rtol=0)
    assert torch.equal(pairwise_jensen_shannon(same[:1]), torch.zeros(5, dtype=torch.float64))


def test_jensen_shannon_is_the_mean_kl_to_the_mixture():
    log_probs, w = random_log_probs(4, 6, 5), torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    mixture = (w[:, None, None] * log_probs.exp()).sum(0).log()
    kl = (log_probs.exp() * (log_probs - mixture)).sum(-1)
    torch.testing.assert_close(jensen_shannon(log_probs, w), w @ kl)


def test_pairwise_is_the_loop_over_pairs():
    log_probs = random_log_probs(4, 6, 5)
    loop = [jensen_shannon(log_probs[[i, j]]) for i in range(4) for j in range(i + 1, 4)]
    torch.testing.assert_close(pairwise_jensen_shannon(log_probs), torch.stack(loop).mean(0))


def test_mixture_averages_probabilities_not_logits():
    log_probs = torch.tensor([[[0.99, 0.01]], [[0.5, 0.5]]], dtype=torch.float64).log()
    expected = torch.tensor([[0.745, 0.255]], dtype=torch.float64)
    torch.testing.assert_close(mixture_log_probs(log_probs).exp(), expected)
    assert not torch.allclose(log_probs.mean(0).softmax(-1), expected, atol=0.05)
    assert torch.equal(mixture_log_probs(torch.stack([one_hot(0), one_hot(1)]))[0, 2], torch.tensor(-math.inf).double())


def test_zero_weight_removes_a_point():
    log_probs = torch.stack([one_hot(0), random_log_probs(1, 3)])
    torch.testing.assert_close(mixture_log_probs(log_probs, torch.tensor([0.0, 1.0])), log_probs[1])
    assert jensen_shannon(log_probs, torch.tensor([0.0, 1.0])).item() == pytest.approx(0, abs=1e-12)


def test_negative_log_likelihood_gathers_labels_at_each_point():
    log_probs, labels = random_log_probs(2, 3, 4), torch.tensor([3, 0, 1])
    expected = torch.tensor([[-log_probs[i, e, y] for e, y in enumerate(labels)] for i in range(2)])
    torch.testing.assert_close(negative_log_likelihood(log_probs, labels), expected.double())
    torch.testing.assert_close(negative_log_likelihood(log_probs[0], labels), expected[0].double())
    assert negative_log_likelihood(one_hot(0, 1), torch.tensor([0, 0])).tolist() == [0, math.inf]


def test_pairwise_gradients_are_finite_where_probabilities_are_zero():
    logits = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(4))
    logits[:, 0, 3] = -math.inf
    logits[0, 1, 0] = 200.0  # the other probabilities underflow
    logits.requires_grad_()
    pairwise_jensen_shannon(logits.log_softmax(-1)).sum().backward()
    assert logits.grad.isfinite().all() and logits.grad.abs().sum() > 0
