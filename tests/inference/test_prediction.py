"""Prediction at points of a curve: order, missing examples, and every way to name a point."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import matrix
from helpers.log_probs import drawn_log_probs
from helpers.made import made_task, vocabulary
from helpers.matrix import build
from helpers.tiny import lora_config, random_points, tiny
from torch import nn

from loracurve.curve.spec import CurveSpec
from loracurve.inference.prediction import Way, predict, predict_split
from loracurve.model.curve_model import CurveModel
from loracurve.model.runner import evaluation_mode
from loracurve.system.errors import UserError
from loracurve.tasks.batching import evaluation_batches

SHAPES = [
    CurveSpec(2, 2),
    CurveSpec(2, 3),
    CurveSpec.anchored(3, closed=True),
    CurveSpec(2, 2, factors="A"),
]


@pytest.mark.parametrize("spec", SHAPES)
@matrix.decoder_and_encoder
def test_points_rows_merged_and_coefficients_agree(architecture: str, spec: CurveSpec, tmp_path: Path) -> None:
    model, _, task = build(architecture, tmp_path, spec)
    model.set_curve(spec, spec.tie(random_points(model)))
    model.eval()
    test, t = task.encode("test"), torch.tensor([0.0, 0.3, 0.9], dtype=torch.float64)
    expected = predict_split(model, test, t).point_log_probs
    assert expected is not None
    found = predict_split(model, test, model.coefficients(t)).point_log_probs
    torch.testing.assert_close(found, expected)
    (batch,) = evaluation_batches(test, packing=model.runner.takes_trees(test))
    for i, at in enumerate(t.tolist()):
        with model.merged(at), torch.no_grad():
            merged = model.runner.scores(batch, None).log_softmax(-1)[0]
        torch.testing.assert_close(merged, expected[i, batch.index], rtol=1e-3, atol=1e-4)


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
    model.point_log_probs = lambda batch, t: drawn_log_probs(len(t), 1, 3)
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


@pytest.mark.parametrize("way", ["points", "merged"])
@pytest.mark.parametrize("scoring", ["letter", "text"])
def test_outputs_that_are_no_numbers_are_told_by_the_row(way: Way, scoring: str, tmp_path: Path) -> None:
    task = made_task(tmp_path / "data", "qwen2", scoring)
    base = tiny("qwen2", torch.float32, vocabulary(task))
    encoded = task.encode("test")
    odd = encoded.examples[3]
    taken = {token for e in encoded.examples for part in (e.prompt, *e.choices) for token in part}
    own = next(i for i in range(1, len(base.model.embed_tokens.weight)) if i not in taken)  # rows are filled with 0
    examples = [replace(e, prompt=(own, *e.prompt)) if e is odd else e for e in encoded.examples]
    model = CurveModel.from_config(base, lora_config("qwen2"))
    spoil = lambda _, ids, output: output.masked_fill((ids[0] == own)[..., None], torch.nan)  # noqa: E731
    base.model.embed_tokens.register_forward_hook(spoil)
    with pytest.raises(UserError, match=f"row {odd.id!r}: the model's outputs are no numbers"):
        predict_split(model, replace(encoded, examples=examples), torch.tensor([0.2, 0.7]), way=way)
