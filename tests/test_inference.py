import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from loracurve.curve import bezier
from loracurve.curve.quadrature import quadrature
from loracurve.inference.model_average import arc_length_weights, effective_points, likelihood_weights
from loracurve.inference.prediction import predict
from loracurve.inference.predictive import Predictive
from loracurve.model.runner import evaluation_mode
from loracurve.system.errors import UserError


def random_log_probs(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).log_softmax(-1)


def from_probs(probs, weights=None):
    return Predictive.from_log_probs(torch.tensor(probs, dtype=torch.float64).log(), weights)


def test_uniform_quadrature():
    t, w = quadrature("uniform", 10, 2)
    torch.testing.assert_close(t, torch.arange(10, dtype=torch.float64) / 9)
    assert t[0] == 0 and t[-1] == 1 and torch.equal(w, torch.full((10,), 0.1, dtype=torch.float64))
    t, w = quadrature("uniform", 1, 2)
    assert t.tolist() == [0.5] and w.tolist() == [1]


@pytest.mark.parametrize("segments", [1, 2, 3])
def test_gauss_legendre_is_exact_for_piecewise_polynomials(segments):
    t, w = quadrature("gauss-legendre", 3 * segments, segments)
    assert t.dtype == w.dtype == torch.float64 and w.sum().item() == pytest.approx(1)
    c = bezier.coefficients(t, segments, 2)
    torch.testing.assert_close(c.T @ (w[:, None] * c), bezier.coefficient_gram(segments, 2))


def test_monte_carlo_needs_and_obeys_a_generator():
    first, w = quadrature("monte-carlo", 1000, 2, torch.Generator().manual_seed(3))
    again, _ = quadrature("monte-carlo", 1000, 2, torch.Generator().manual_seed(3))
    assert torch.equal(first, again) and abs(first.mean() - 0.5) < 0.05 and w.sum().item() == pytest.approx(1)
    with pytest.raises(ValueError, match="Generator"):
        quadrature("monte-carlo", 3, 1)


@pytest.mark.parametrize(
    "kind,points,message",
    [("gauss-legendre", 7, "ask for 6$"), ("gauss-legendre", 1, "ask for 3$"), ("uniform", 0, "at least 1")]
    + [("simpson", 3, "expected uniform")],
)
def test_bad_quadratures(kind, points, message):
    with pytest.raises(UserError, match=message):
        quadrature(kind, points, 3)


def test_arc_length_weights_follow_the_speed():
    gram = bezier.gram([torch.tensor([[0.0], [1.0], [4.0]], dtype=torch.float64)])  # second segment 3 times as long
    t, w = quadrature("gauss-legendre", 4, 2)
    weights = arc_length_weights(t, w, gram, 2, 1)
    torch.testing.assert_close(weights, torch.tensor([1, 1, 3, 3], dtype=torch.float64) / 8)
    assert torch.equal(arc_length_weights(t, w, torch.zeros(3, 3), 2, 1), w)


def test_likelihood_weights():
    prior = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64)
    weights = likelihood_weights(torch.tensor([9000.0, 9000 + math.log(2), 9e5]), prior, 1.0)
    torch.testing.assert_close(weights, torch.tensor([0.5, 0.5, 0], dtype=torch.float64), atol=1e-3, rtol=0)
    torch.testing.assert_close(likelihood_weights(torch.tensor([1.0, 2, 3]), prior, math.inf), prior)
    tempered = likelihood_weights(torch.tensor([0.0, 20.0]), torch.tensor([0.5, 0.5]), 10.0)
    assert tempered[0].item() == pytest.approx(1 / (1 + math.exp(-2)))
    assert likelihood_weights(torch.tensor([1.0, math.inf]), prior[:2], 1.0).tolist() == [1, 0]
    with pytest.raises(UserError, match="temperature"):
        likelihood_weights(torch.ones(3), prior, 0.0)
    with pytest.raises(ValueError, match="finite"):
        likelihood_weights(torch.full((3,), math.inf), prior, 1.0)


def test_effective_points():
    assert effective_points(torch.full((8,), 0.125)) == pytest.approx(8)
    assert effective_points(torch.tensor([1.0, 0])) == 1


def test_disjoint_one_hots_have_information_log_2():
    p = from_probs([[[1, 0, 0]], [[0, 1, 0]]])
    for value in (p.mutual_information, p.entropy, p.pairwise_jsd):
        assert value.item() == pytest.approx(math.log(2))
    assert p.expected_entropy.item() == 0 and p.disagreement.item() == 0.5 and p.confidence.item() == 0.5


def test_equal_points_have_no_information():
    p = Predictive.from_log_probs(random_log_probs(1, 6, 4).expand(5, 6, 4))
    zeros = torch.zeros(6, dtype=torch.float64)
    for value in (p.mutual_information, p.pairwise_jsd, p.disagreement):
        torch.testing.assert_close(value, zeros, atol=1e-12, rtol=0)


def test_uncertainty_decomposes():
    p = Predictive.from_log_probs(random_log_probs(5, 40, 4), torch.tensor([0.1, 0.2, 0.3, 0.25, 0.15]))
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
    logs = random_log_probs(3, 5, 4)
    wide = torch.nn.functional.pad(logs, (0, 1), value=-math.inf)
    a, b = Predictive.from_log_probs(logs), Predictive.from_log_probs(wide)
    for name in ("entropy", "expected_entropy", "mutual_information", "pairwise_jsd", "disagreement", "confidence"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name))
    assert (b.probs[:, 4] == 0).all()
    joined = Predictive.cat([a, b])
    assert joined.probs.shape == (10, 5) and torch.equal(joined.probs[:5], joined.probs[5:])


def test_cat_and_index_are_inverse():
    logs = random_log_probs(3, 7, 4)
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
    logs, labels = random_log_probs(3, 7, 4), torch.tensor([0, 1, 2, 3, 0, 1, 2])
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
    logs = random_log_probs(2, 3, 4)
    with pytest.raises(ValueError, match="normalised"):
        Predictive.from_log_probs(logs + 1)
    with pytest.raises(ValueError, match="NaN"):
        Predictive.from_log_probs(logs * math.nan)
    with pytest.raises(ValueError, match="weights"):
        Predictive.from_log_probs(logs, torch.tensor([0.5, 0.6]))
    with pytest.raises(ValueError, match=r"\[n, E, C\]"):
        Predictive.from_log_probs(logs[0])


class Stub(nn.Module):
    """log-probabilities depend on the example's number and on t alone."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.dropout = nn.Dropout(0.5)
        self.frozen = nn.Dropout(0.5).eval()

    def point_log_probs(self, batch, t):
        assert not self.training and not self.dropout.training
        classes = torch.arange(3)
        return (
            (self.scale * torch.sin(batch.index[:, None] * (classes + 1.0)) * t[:, None, None]).float().log_softmax(-1)
        )


def batches(*indices):
    return [SimpleNamespace(index=torch.tensor(i), labels=torch.tensor(i) % 3) for i in indices]


T = torch.tensor([0.2, 0.5, 1.0], dtype=torch.float64)


def test_predict_restores_order_and_drops_no_example():
    model = Stub()
    done = []
    shuffled = predict(model, batches([4, 0], [3], [6, 1, 2, 5]), T, progress=done.append, examples=7)
    ordered = predict(model, batches(list(range(7))), T)
    torch.testing.assert_close(shuffled.probs, ordered.probs)
    expected = model.eval().point_log_probs(batches(list(range(7)))[0], T)
    torch.testing.assert_close(shuffled.point_log_probs, expected.detach())
    assert len(shuffled) == 7 and done == [2, 3, 7]
    small = predict(model, batches([4, 0], [3], [6, 1, 2, 5]), T, summarise=True)
    torch.testing.assert_close(small.negative_log_likelihood(), ordered.negative_log_likelihood(torch.arange(7) % 3))
    weighted = predict(model, batches(list(range(7))), T, torch.tensor([0.0, 0.0, 1.0]))
    torch.testing.assert_close(weighted.probs.float(), expected[2].exp().detach())


@pytest.mark.parametrize("summarise", [False, True])
def test_predictions_can_take_part_in_gradients(summarise):
    p = predict(Stub(), batches([0, 1, 2]), T, summarise=summarise)
    scale = torch.ones((), requires_grad=True, dtype=torch.float64)
    (p.entropy * scale * p.weights.sum()).sum().backward()
    assert not p.weights.is_inference() and not p.entropy.is_inference() and scale.grad > 0


@pytest.mark.parametrize("indices", [([0, 1], [1, 2]), ([0, 1], [3]), ([1, 2],), ([0, 0, 2],), ()])
def test_missing_or_repeated_examples_are_an_error(indices):
    with pytest.raises(RuntimeError, match="expected each"):
        predict(Stub(), batches(*indices), T)


def test_a_dropped_last_batch_is_an_error_where_the_number_is_known():
    with pytest.raises(RuntimeError, match=r"0\.\.4 once, found 3, without \[3, 4\]"):
        predict(Stub(), batches([0, 1, 2]), T, examples=5)


def test_predict_checks_the_shape():
    model = Stub()
    model.point_log_probs = lambda batch, t: random_log_probs(len(t), 1, 3)
    with pytest.raises(RuntimeError, match=r"expected \[3, 2, C\]"):
        predict(model, batches([0, 1]), T)


def test_training_mode_is_restored():
    model = Stub()
    assert model.training
    predict(model, batches([0]), T)
    assert model.training and model.dropout.training and not model.frozen.training
    with pytest.raises(RuntimeError), evaluation_mode(model):
        assert not model.dropout.training
        raise RuntimeError
    assert model.training and model.dropout.training and not model.frozen.training
    model.eval()
    predict(model, batches([0]), T)
    assert not model.training
