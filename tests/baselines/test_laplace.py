"""Laplace against laplace-torch used directly on PEFT's own model, and the PEFT view of a curve model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import matrix
from helpers.made import made_task, vocabulary
from helpers.matrix import SCORING
from helpers.tiny import lora_config, peft_twin, random_points, tiny
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from loracurve.baselines.laplace import Laplace
from loracurve.baselines.method import Setting
from loracurve.baselines.peft_model import ClassLogits, peft_model
from loracurve.curve.anchored import slot_times
from loracurve.curve.spec import CurveSpec
from loracurve.inference.prediction import predict_split
from loracurve.model.curve_model import CurveModel
from loracurve.system.errors import UserError
from loracurve.tasks.dataset import Row
from loracurve.tasks.encoding import Encoded
from loracurve.training.config import LoopConfig


def make(tmp_path: Path, architecture: str, **lora: object) -> tuple[Setting, nn.Module]:
    task = made_task(tmp_path, architecture, SCORING[architecture], {"train": 9, "validation": 4, "test": 5})
    base = tiny(architecture, vocabulary=vocabulary(task), labels=2)
    untouched = tiny(architecture, vocabulary=vocabulary(task), labels=2)
    model = CurveModel(base, lora_config(architecture, **lora), CurveSpec.slots(2))
    anchors = random_points(model, scale=0.1)
    return Setting(model, task, anchors, LoopConfig(steps=10, batch_size=4), samples=5, seed=1), untouched


def anchor(of: Setting, m: int) -> dict[str, Tensor]:
    return {name: p[m] for name, p in of.anchors.items()}


class Reference(nn.Module):
    """Class logits of PEFT's own model, the whole head computed."""

    def __init__(self, twin: nn.Module, answers: list[int] | None) -> None:
        super().__init__()
        self.twin, self.answers = twin, answers

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        if "token_type_ids" in x:
            return self.twin(x["input_ids"], token_type_ids=x["token_type_ids"]).logits
        if "texts" in x:  # each choice behind the prompt, one after the other
            return torch.stack([self.text(x["input_ids"], t) for t in x["texts"]], dim=-1)
        return self.twin(x["input_ids"], use_cache=False).logits[:, -1, self.answers][:, : int(x["choices"])]

    def text(self, prompt: Tensor, choice: Tensor) -> Tensor:
        logits = self.twin(torch.cat([prompt, choice], dim=1), use_cache=False).logits
        chosen = logits[:, prompt.shape[1] - 1 : -1].log_softmax(-1)
        return chosen.gather(-1, choice[..., None]).sum((1, 2))


class Loader:
    def __init__(self, encoded: Encoded) -> None:
        self.dataset = encoded.examples

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for e in self.dataset:
            x = {"input_ids": torch.tensor([e.prompt]), "labels": torch.tensor([e.label])}
            if e.token_types is not None:
                x["token_type_ids"] = torch.tensor([e.token_types])
            if e.choices:
                x["texts"] = [torch.tensor([c]) for c in e.choices]
            yield {**x, "choices": torch.tensor(e.n_choices)}


def reference(of: Setting, untouched: nn.Module, m: int) -> Reference:
    ids = of.task.encode("train").answer_ids
    twin = peft_twin(untouched, of.model.config, [anchor(of, m)])
    for name, p in twin.named_parameters():
        p.requires_grad_("lora_" in name or ".modules_to_save." in name)
    return Reference(twin, None if ids is None else list(ids))


@matrix.architectures
def test_the_peft_view_predicts_like_the_curve_model_and_shares_its_weights(architecture: str, tmp_path: Path) -> None:
    targets = {"target_modules": ["q_proj", "down_proj", "lm_head"]} if architecture == "qwen2" else {}
    of, _ = make(tmp_path, architecture, **targets)
    encoded = of.task.encode("test")
    of.model.set_curve(CurveSpec.slots(2), of.anchors)
    expected = predict_split(of.model, encoded, slot_times(2))  # leaves the route at two replicas
    logits = ClassLogits(of.model, anchor(of, 1), encoded)
    for i, example in enumerate(encoded.examples):
        x = logits.inputs(encoded, i)
        found = logits(x)
        assert found.shape == (1, example.n_choices)
        torch.testing.assert_close(
            found.log_softmax(-1)[0], expected.point_log_probs[1, i, : example.n_choices], rtol=1e-4, atol=1e-4
        )
        if encoded.scoring != "text":
            torch.testing.assert_close(logits.last_linear()(logits.features(x))[:, : example.n_choices], found)
    ours = {p.data_ptr() for p in of.model.model.parameters()}
    frozen = [p for n, p in peft_model(of.model, anchor(of, 0)).named_parameters() if not p.requires_grad]
    assert len(frozen) > 20 and all(p.data_ptr() in ours for p in frozen)
    again = predict_split(of.model, encoded, slot_times(2))
    assert torch.equal(again.point_log_probs, expected.point_log_probs), "the curve model is as it was"


def test_rows_with_more_choices_than_any_in_training(tmp_path: Path) -> None:
    of, _ = make(tmp_path, "qwen2", target_modules=["q_proj", "lm_head"])
    row = Row("more", question="the film is", choices=("good", "bad", "dull", "fine", "awful"), label=4)
    encoded = of.task.encode_rows([row], "more")
    of.model.set_curve(CurveSpec.slots(2), of.anchors)
    expected = predict_split(of.model, encoded, slot_times(2)).point_log_probs[0]
    train = of.task.encode("train")
    assert len(encoded.answer_ids) == 5 > len(train.answer_ids)
    logits = ClassLogits(of.model, anchor(of, 0), train)
    torch.testing.assert_close(logits(logits.inputs(encoded, 0)).log_softmax(-1), expected, rtol=1e-4, atol=1e-4)
    pytest.importorskip("laplace")
    for weights in ("all", "last_layer"):
        fitted = Laplace(weights=weights, predict="probit", prior_precision=1e9).fit(of)
        torch.testing.assert_close(fitted.predict(encoded).probs.float(), expected.exp(), rtol=1e-3, atol=1e-4)


@matrix.decoder_and_encoder
def test_all_lora_equals_the_library_on_pefts_own_model(architecture: str, tmp_path: Path) -> None:
    library = pytest.importorskip("laplace")
    of, untouched = make(tmp_path, architecture)
    model = reference(of, untouched, 1)
    direct = library.Laplace(model, "classification", "all", "kron", prior_precision=3.0)
    direct.fit(Loader(of.task.encode("train")))
    encoded = of.task.encode("test")
    fitted = Laplace(anchor=1, predict="probit", prior_precision=3.0).fit(of)
    found = fitted.predict(encoded)
    assert found.point_log_probs.shape == (1, len(encoded), len(encoded.answer_ids or encoded.classes))
    plain = Laplace(anchor=1, predict="probit", prior_precision=1e9).fit(of).predict(encoded)
    moved = 0.0
    for i, x in enumerate(Loader(encoded)):
        with sdpa_kernel(SDPBackend.MATH):
            probit = direct(x, "glm", link_approx="probit")[0]
        torch.testing.assert_close(found.probs[i, : len(probit)].float(), probit, rtol=1e-3, atol=1e-4)
        moved = max(moved, float((plain.probs[i] - found.probs[i]).abs().max()))
        torch.testing.assert_close(plain.probs[i, : len(probit)].float(), model(x)[0].softmax(-1), rtol=1e-3, atol=1e-4)
    assert moved > 0.01, "the posterior's width matters here"


def test_the_last_layer_equals_the_library_with_all_rows_in_one_batch(tmp_path: Path) -> None:
    library = pytest.importorskip("laplace")
    of, _ = make(tmp_path, "encoder")
    train, test = of.task.encode("train"), of.task.encode("test")
    logits = ClassLogits(of.model, anchor(of, 0), train)

    class Features(nn.Module):
        """Features in, as the rows of one batch; the last layer found by name."""

        def __init__(self) -> None:
            super().__init__()
            self.start, self.end = nn.Identity(), logits.last_linear()

        def forward(self, x: Tensor) -> Tensor:
            return self.end(self.start(x))

    def features(encoded: Encoded) -> Tensor:
        return torch.cat([logits.features(logits.inputs(encoded, i)) for i in range(len(encoded))])

    direct = library.Laplace(Features(), "classification", "last_layer", "kron", last_layer_name="end")
    data = torch.utils.data.TensorDataset(features(train), train.labels)
    direct.fit(torch.utils.data.DataLoader(data, batch_size=len(data)))
    with pytest.warns(UserWarning, match="By default `link_approx`"):
        direct.optimize_prior_precision("glm", prior_structure="scalar")
    expected = direct(features(test), "glm", link_approx="bridge")
    fitted = Laplace(weights="last_layer", predict="bridge").fit(of)
    assert fitted.passes == 1
    torch.testing.assert_close(fitted.predict(test).probs.float(), expected, rtol=1e-3, atol=1e-4)


def test_samples_are_gaussian_logits_though_their_covariance_be_singular(tmp_path: Path) -> None:
    of, _ = make(tmp_path, "qwen2")
    mean = torch.tensor([[0.5, -1.0, 0.2]])
    root = torch.tensor([[1.0, 0.5], [1.0, 0.5], [-0.3, 2.0]])
    moments = SimpleNamespace(_glm_predictive_distribution=lambda x: (mean, (root @ root.T)[None]))

    def sample(index: int) -> Tensor:
        x = {"batch": SimpleNamespace(index=torch.tensor([index]))}
        return Laplace()._log_probs(moments, x, 4, replace(of, samples=20_000))[:, 0]

    drawn = sample(0)
    assert drawn[:, 3].isneginf().all(), "a class that the row does not have"
    torch.testing.assert_close(
        drawn[:, 0] - drawn[:, 1], torch.full((20_000,), 1.5, dtype=torch.float64), atol=1e-6, rtol=0
    )
    difference = drawn[:, 2] - drawn[:, 0]
    assert difference.mean() == pytest.approx(-0.3, abs=0.05)
    assert difference.var() == pytest.approx(1.3**2 + 1.5**2, rel=0.05)
    assert torch.equal(drawn, sample(0)) and not torch.equal(drawn, sample(1))


@pytest.mark.parametrize("weights", ["all", "last_layer"])
def test_samples_have_the_spread_of_the_linearised_logits(weights: Any, tmp_path: Path) -> None:
    pytest.importorskip("laplace")
    of, _ = make(tmp_path, "qwen2")
    test = of.task.encode("test")
    many = Laplace(weights=weights, prior_precision=2.0).fit(replace(of, samples=60)).predict(test)
    probit = Laplace(weights=weights, prior_precision=2.0, predict="probit").fit(of).predict(test)
    assert probit.mutual_information.max() < 1e-9
    assert (many.probs - probit.probs).abs().max() < 0.15
    few = Laplace(weights=weights, prior_precision=2.0).fit(of).predict(test)
    assert few.point_log_probs.shape[0] == 5 and few.mutual_information.min() > 0
    choices = [e.n_choices for e in test.examples]
    assert set(choices) == {2, 3}, "rows with fewer choices are there"
    for i, n in enumerate(choices):
        assert many.probs[i, :n].sum() == pytest.approx(1) and not many.probs[i, n:].any()


def test_texts_of_choices_have_the_exact_posterior_of_a_generalised_gauss_newton_jacobian(tmp_path: Path) -> None:
    """The logits' covariance is J P^-1 J^T with the Jacobian of PEFT's own model, choice by choice."""
    pytest.importorskip("laplace")
    of, untouched = make(tmp_path, "llama")
    model = reference(of, untouched, 0)
    test = of.task.encode("test")
    # A very strong prior leaves P = precision * I, so that probit needs nothing but the Jacobian.
    found = Laplace(predict="probit", prior_precision=1e5).fit(of).predict(test)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for i, x in enumerate(Loader(test)):
        scores = model(x)[0]
        rows = [torch.autograd.grad(s, parameters, retain_graph=True) for s in scores]
        variance = torch.stack([sum(g.square().sum() for g in row) for row in rows]) / 1e5
        expected = (scores / (1 + torch.pi / 8 * variance).sqrt()).softmax(-1)
        torch.testing.assert_close(found.probs[i, : len(scores)].float(), expected, rtol=2e-2, atol=2e-3)


def test_what_does_not_serve_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of, _ = make(tmp_path, "qwen2")
    with pytest.raises(UserError, match="predict: expected one of mc, probit, bridge, found 'nn'"):
        Laplace(predict="nn")  # type: ignore[arg-type]
    lm = made_task(tmp_path / "lm", "qwen2", "lm").encode("test")
    with pytest.raises(UserError, match="expected a task with classes, found language modelling"):
        ClassLogits(of.model, anchor(of, 0), lm)
    text, _ = make(tmp_path / "text", "llama", target_modules=["q_proj", "lm_head"])
    with pytest.raises(UserError, match="expected no adapter on lm_head with scoring text"):
        ClassLogits(text.model, anchor(text, 0), text.task.encode("test"))
    monkeypatch.setitem(sys.modules, "laplace", None)
    with pytest.raises(UserError, match="Laplace needs laplace-torch.*pip install --no-deps laplace-torch") as error:
        Laplace().fit(of)
    assert "\n" not in str(error.value)
