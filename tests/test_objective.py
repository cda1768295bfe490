import math
import warnings

import pytest
import torch

from loracurve.inference.information import (
    entropy,
    jensen_shannon,
    mixture_log_probs,
    negative_log_likelihood,
    pairwise_jensen_shannon,
)
from loracurve.system.errors import UserError
from loracurve.training.config import ObjectiveConfig, resolve_tau
from loracurve.training.objective import objective


def random_log_probs(*shape, seed=0, absent=False):
    logits = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if absent:
        logits[..., 0, -1] = -math.inf
    return logits.log_softmax(-1)


def one_hot(*classes, size=3):
    return torch.nn.functional.one_hot(torch.tensor(classes), size).double().log()


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


CONFIGS = [
    ObjectiveConfig(),
    ObjectiveConfig("mixture", 0.5),
    ObjectiveConfig("mixture", 1),
    ObjectiveConfig("bonus", 1),
    ObjectiveConfig("hinge", 5, tau=0.6),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("weights", [None, "example", "point"])
def test_finite_values_and_gradients_with_absent_classes(config, weights):
    logits = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    logits[:, 0, 3:] = -math.inf
    logits[0, 1, 4] = -math.inf
    logits.requires_grad_()
    example_weights = {None: None, "example": torch.ones(4), "point": torch.ones(3, 4)}[weights]
    loss, report = objective(logits.log_softmax(-1), torch.tensor([0, 1, 2, 3]), config, example_weights)
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all() and logits.grad.abs().sum() > 0
    assert set(report) == {"nll", "jsd"} and not any(value.requires_grad for value in report.values())
    unweighted, _ = objective(logits.log_softmax(-1), torch.tensor([0, 1, 2, 3]), config)
    torch.testing.assert_close(loss, unweighted)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_gradcheck(config):
    logits = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([1, 3])
    assert torch.autograd.gradcheck(lambda x: objective(x.log_softmax(-1), labels, config)[0], logits)


def test_forms_by_hand():
    probs = torch.tensor([[[0.9, 0.1]], [[0.3, 0.7]]], dtype=torch.float64)
    labels = torch.tensor([0])
    nll = -(math.log(0.9) + math.log(0.3)) / 2
    mixture_nll = -math.log(0.6)

    def h(p):
        return -p * math.log(p) - (1 - p) * math.log(1 - p)

    jsd = h(0.6) - (h(0.9) + h(0.3)) / 2
    for config, expected in (
        (ObjectiveConfig(), nll),
        (ObjectiveConfig("mixture", 0.25), 0.75 * nll + 0.25 * mixture_nll),
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
        losses = []
        for config in (ObjectiveConfig("bonus", 1), ObjectiveConfig("mixture", 1)):
            per_label = [objective(probs.log(), torch.tensor([y]), config)[0] for y in range(2)]
            losses.append(base @ torch.stack(per_label))
        gaps.append(abs(losses[0] - losses[1]).item())
    assert gaps[0] < 1e-5 and gaps[1] < gaps[0] / 7


def test_example_weights_multiply():
    log_probs, labels = random_log_probs(2, 3, 4), torch.tensor([3, 0, 1])
    w = torch.tensor([[0, 2, 1], [1, 0, 2]], dtype=torch.float64)
    loss, _ = objective(log_probs, labels, ObjectiveConfig(), w)
    torch.testing.assert_close(loss, (w * negative_log_likelihood(log_probs, labels)).mean())
    loss, report = objective(log_probs, labels, ObjectiveConfig("bonus", 1), w[0])
    torch.testing.assert_close(loss, report["nll"] - (w[0] * jensen_shannon(log_probs)).mean())


@pytest.mark.parametrize(
    "jsd,weight",
    [("mixture", 1.1), ("mixture", -0.1), ("mixture", math.nan), ("bonus", -1), ("bonus", math.inf), ("none", 1)]
    + [("hinge", -1), ("hinge", math.nan)],
)
def test_bad_weights_are_refused(jsd, weight):
    with pytest.raises(UserError, match=r"objective\.weight: expected"):
        ObjectiveConfig(jsd, weight)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"jsd": "hinge", "weight": 5, "tau": -0.1}, r"objective\.tau: expected a number of nats"),
        ({"jsd": "hinge", "weight": 5, "tau": math.nan}, r"objective\.tau: expected a number of nats"),
        ({"jsd": "hinge", "weight": 5, "tau_relative": 0}, r"objective\.tau_relative: expected"),
        ({"jsd": "hinge", "weight": 5, "tau": 0.1, "tau_relative": 2}, "leave one out"),
        ({"jsd": "bonus", "weight": 1, "tau": 0.1}, "set jsd to hinge"),
        ({"tau_relative": 2}, "set jsd to hinge"),
    ],
)
def test_bad_targets_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        ObjectiveConfig(**options)


def test_bad_form_is_refused_and_risky_settings_warn():
    with pytest.raises(UserError, match="one of none, mixture, bonus, hinge"):
        ObjectiveConfig("hing")
    with pytest.warns(UserWarning, match="more diversity"):
        ObjectiveConfig("bonus", 2)
    with pytest.warns(UserWarning, match="no pair of points reaches"):
        ObjectiveConfig("hinge", 5, tau=0.7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ObjectiveConfig("bonus", 1)
        ObjectiveConfig("hinge", 5, tau=0.1)


def test_resolve_tau():
    assert resolve_tau(ObjectiveConfig("hinge", 5, tau=0.1), None) == 0.1
    assert resolve_tau(ObjectiveConfig("hinge", 5, tau=0.1), 0.5) == 0.1
    assert resolve_tau(ObjectiveConfig("hinge", 5), 0.03) == 0.03
    assert resolve_tau(ObjectiveConfig("hinge", 5, tau_relative=3), 0.02) == pytest.approx(0.06)
    assert resolve_tau(ObjectiveConfig("bonus", 1), None) == 0
    with pytest.raises(UserError, match="free curve"):
        resolve_tau(ObjectiveConfig("hinge", 5), None)
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(UserError, match="whose predictions differ"):
            resolve_tau(ObjectiveConfig("hinge", 5), bad)


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
    w = torch.tensor([0.0, 3.0, 0.0], dtype=torch.float64)
    loss, report = objective(log_probs, labels, ObjectiveConfig("bonus", 0.5), w, jsd_log_probs=others)
    assert report["jsd"].item() == pytest.approx(jensen_shannon(others).mean().item())
    assert loss.item() == pytest.approx(((w * nll).mean() - 0.5 * jensen_shannon(others).mean()).item())
    with pytest.raises(ValueError, match="mixture"):
        objective(log_probs, labels, ObjectiveConfig("mixture", 0.5), jsd_log_probs=others)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_examples_without_label_enter_nothing(config, weighted):
    logits = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    logits[:, 1, 0] = -math.inf  # class 0 has probability 0 where the label is missing
    logits.requires_grad_()
    labels = torch.tensor([2, -100, 0, -100])
    w = torch.rand(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) if weighted else None
    loss, report = objective(logits.log_softmax(-1), labels, config, w)
    kept = [0, 2]
    alone, alone_report = objective(
        logits[:, kept].log_softmax(-1), labels[kept], config, None if w is None else w[:, kept]
    )
    torch.testing.assert_close(loss, alone)
    torch.testing.assert_close(report, alone_report)
    loss.backward()
    assert logits.grad.isfinite().all() and (logits.grad[:, [1, 3]] == 0).all() and logits.grad.abs().sum() > 0
    none, _ = objective(logits.detach().log_softmax(-1), torch.full((4,), -100), config)
    assert none.isfinite()


def test_pairwise_gradients_are_finite_where_probabilities_are_zero():
    logits = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(4))
    logits[:, 0, 3] = -math.inf
    logits[0, 1, 0] = 200.0  # the other probabilities underflow
    logits.requires_grad_()
    pairwise_jensen_shannon(logits.log_softmax(-1)).sum().backward()
    assert logits.grad.isfinite().all() and logits.grad.abs().sum() > 0
