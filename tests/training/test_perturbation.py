"""Flat-minima perturbation in training: the noise has the distribution it claims and leaves nothing behind."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import matrix
from helpers.noise import DOUBLE, digest, epsilon, ids, layer, loss_at, noisy_model, randn, seeded
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

from loracurve.model import weight_noise
from loracurve.model.layers import CurveLinear
from loracurve.model.routes import Route
from loracurve.model.weight_noise import squared_row_norms
from loracurve.system.errors import UserError
from loracurve.training.config import PerturbationConfig
from loracurve.training.perturbation import FlatLora, LoraSpace, Perturbation
from loracurve.training.sam import sam_backward


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_row_norms_from_gram_terms_are_those_of_the_merged_weight(kind: type[nn.Module]) -> None:
    made = layer(kind)
    noise = FlatLora(made, seeded(), torch.tensor(1.0, dtype=DOUBLE))
    found = squared_row_norms(noise.weight, noise.base, made.A, made.B, made.scaling)
    base = made.base_layer.weight.mT if made.transposed else made.base_layer.weight
    merged = base + made.scaling * made.B.mT @ made.A
    torch.testing.assert_close(found, merged.square().sum(-1), rtol=1e-12, atol=0)


def test_variance_by_row_mean_and_normality() -> None:
    n_in, n_out, rho = 4000, 6, 0.3
    made = layer(n_in=n_in, n_out=n_out)
    noise = FlatLora(made, seeded(), torch.tensor(rho, dtype=DOUBLE))
    x = torch.eye(n_in, dtype=DOUBLE)
    with torch.no_grad():
        eps = noise.output(x.new_zeros(n_in, n_out), x, made.A[:1], made.B[:1]).mT
        merged = made.base_layer.weight + made.scaling * made.B[0].mT @ made.A[0]
    expected = rho**2 / n_in * merged.square().sum(1)
    ratio = eps.square().mean(1) / expected  # chi-square with n_in degrees of freedom, over n_in
    assert (ratio - 1).abs().max() < 5 * math.sqrt(2 / n_in)
    standard = eps / expected.sqrt()[:, None]
    assert standard.mean(1).abs().max() < 5 / math.sqrt(n_in)
    assert abs(float(standard.pow(4).mean()) - 3) < 5 * math.sqrt(96 / (n_in * n_out))
    correlation = standard @ standard.mT / n_in - torch.eye(n_out)
    assert correlation.abs().max() < 5 / math.sqrt(n_in) * 1.5


def test_nothing_of_the_size_of_a_weight_is_saved_or_made(monkeypatch: pytest.MonkeyPatch) -> None:
    n_in, n_out, block = 64, 48, 512
    monkeypatch.setattr(weight_noise, "NOISE_CHUNK", block)
    made = layer(n_in=n_in, n_out=n_out)
    noise = FlatLora(made, seeded(), torch.tensor(0.1, dtype=DOUBLE))
    saved: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    x = randn(2, n_in).requires_grad_()
    y = randn(2, n_out).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        noise.output(y, x, made.A[:1], made.B[:1])
    assert sum(t.numel() for t in saved) <= n_out, "only the rows' scale"
    blocks = [z for _, z in weight_noise._standard_normal(n_out, x.detach(), seeded())]
    assert len(blocks) == 6 and all(z.numel() <= block for z in blocks)
    monkeypatch.setattr(weight_noise, "NOISE_CHUNK", 700 * n_in)
    rows = [len(z) for _, z in weight_noise._standard_normal(1100, x.detach(), seeded())]
    assert rows == [512, 512, 76], "whole tiles of 256 rows"
    monkeypatch.setattr(weight_noise, "NOISE_CHUNK", block)
    large: set[int] = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            found = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
            large.update(t.data_ptr() for t in found if t.untyped_storage().nbytes() >= n_in * n_out * t.element_size())
            return result

    with Watch():
        noise.output(y, x, made.A[:1].detach(), made.B[:1].detach()).sum().backward()
    assert large <= {noise.weight.data_ptr()}, "views of the base weight"


def test_stop_gradient_on_the_norm_is_the_default() -> None:
    made = layer()
    x, y = randn(5, 24), randn(5, 10)
    for flows in (False, True):
        noise = FlatLora(made, seeded(), torch.tensor(0.3, dtype=DOUBLE), norm_gradient=flows)

        def run(a: Tensor, b: Tensor, noise: FlatLora = noise) -> Tensor:
            noise.draws.reseed(0, 0)
            return noise.output(y, x, a, b)

        a, b = made.A[:1].detach().requires_grad_(), made.B[:1].detach().requires_grad_()
        assert run(a, b).requires_grad is flows
        assert not flows or torch.autograd.gradcheck(run, (a, b))


def test_quantised_bases_are_refused_with_a_way_out() -> None:
    made = layer()
    made.base_layer.weight = nn.Parameter(torch.zeros(120, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(UserError, match="use kind lora_space"):
        FlatLora(made, seeded("q_proj"), torch.tensor(0.1))
    made.base_layer.weight = nn.Parameter(torch.zeros(120, 1, dtype=torch.bfloat16), requires_grad=False)
    with pytest.raises(UserError, match="q_proj quantised"):
        FlatLora(made, seeded("q_proj"), torch.tensor(0.1))
    config = PerturbationConfig("lora_space")
    assert isinstance(Perturbation(config, {"q_proj": made}, 10, 0).maps[0][1], LoraSpace)


@pytest.mark.parametrize("kind", ["flat_lora", "lora_space", "sam"])
@matrix.architectures
def test_noise_acts_in_training_only_and_leaves_weights_alone(architecture: str, kind: str) -> None:
    model = noisy_model(architecture)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    t = torch.tensor([0.3, 0.8])
    model.eval()
    clean, before = model(t, input_ids=ids()).logits.detach(), digest(model)
    config = PerturbationConfig(kind, 0.2)  # type: ignore[arg-type]
    with Perturbation(config, model.layers, 10, seed=0).attached() as perturbation:
        perturbation.start(0)
        assert torch.equal(model(t, input_ids=ids()).logits, clean), "off at evaluation"
        model.train()
        noisy = model(t, input_ids=ids()).logits
        assert torch.equal(noisy, clean) is (kind == "sam")
        if kind == "sam":
            c = model.coefficients(torch.tensor(0.3, dtype=DOUBLE))
            sam_backward(lambda: (model(0.3, input_ids=ids()).logits.square().mean(), None), model.factors, c, 0.1)
        else:
            noisy.square().mean().backward()
        perturbation.start(0)
        assert torch.equal(model(t, input_ids=ids()).logits, noisy), "a step's draw is a function of the step"
        perturbation.start(1)
        assert torch.equal(model(t, input_ids=ids()).logits, noisy) is (kind == "sam")
    assert torch.equal(model(t, input_ids=ids()).logits, clean), "gone after the fit"
    assert digest(model) == before
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.factors)


def test_flat_lora_in_a_model_equals_noise_on_merged_weights() -> None:
    model, t, rho = noisy_model(target_modules=["q_proj", "down_proj"]), 0.3, 0.2
    plain = noisy_model(target_modules=["q_proj", "down_proj"]).eval()
    c = model.coefficients(torch.tensor(t, dtype=DOUBLE))
    for name, made in plain.layers.items():
        assert isinstance(made, CurveLinear)
        made.merge(c)
        assert made._merged is not None
        merged = made.base_layer.weight + made.scaling * torch.tensordot(c, made.B, dims=1).mT @ torch.tensordot(
            c, made.A, dims=1
        )
        scale = (rho**2 / made.in_features * merged.square().sum(1)).sqrt()
        made._merged = merged.detach() + epsilon(scale.detach(), made.in_features, seeded(name, seed=4, step=6))
    plain.runner.set_route(Route("merged"))
    expected = plain.model(input_ids=ids()).logits
    config = PerturbationConfig("flat_lora", rho)
    with Perturbation(config, model.layers, 10, seed=4).attached() as perturbation, torch.no_grad():
        perturbation.start(6)
        # rho is held in float32
        torch.testing.assert_close(model.train()(t, input_ids=ids()).logits, expected, rtol=1e-5, atol=1e-6)


def test_gradients_in_a_model_match_finite_differences() -> None:
    model = noisy_model(target_modules=["q_proj", "v_proj", "lm_head"]).train()
    # With norms in the gradient the loss of a step is a function of the factors alone.
    config = PerturbationConfig("flat_lora", 0.2, norm_gradient=True)
    with Perturbation(config, model.layers, 10, 0).attached() as perturbation:
        loss = loss_at(model, torch.tensor([0.3, 0.8]))

        def value() -> Tensor:
            perturbation.start(3)
            return loss()[0]

        value().backward()
        for p in (*model.factors[:2], *model.factors[-2:]):
            direction, h = randn(*p.shape, seed=7), 1e-3
            assert p.grad is not None
            with torch.no_grad():
                p.add_(h * direction)
                up = value()
                p.sub_(2 * h * direction)
                down = value()
                p.add_(h * direction)
            # Llama's norms compute in float32
            torch.testing.assert_close((p.grad * direction).sum(), (up - down) / (2 * h), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["flat_lora", "lora_space"])
def test_the_head_at_chosen_places_is_the_whole_head_there(kind: str) -> None:
    made = layer(points=3)
    c = randn(2, 3, seed=8).softmax(-1)
    made.route = Route("points", c.repeat_interleave(2, dim=0), c, replicas=2, rows=2)
    rho = torch.tensor(0.3, dtype=DOUBLE)
    noise = FlatLora(made, seeded(), rho) if kind == "flat_lora" else LoraSpace(seeded(), rho)
    made.noise = noise
    x, rows, places = randn(4, 3, 24), torch.tensor([0, 3, 1, 2, 3]), torch.tensor([2, 0, 0, 1, 1])
    made.train()
    whole = made(x)
    noise.draws.reseed(0, 0)
    torch.testing.assert_close(made.select(x[rows, places], rows, None), whole[rows, places])
    chosen = torch.tensor([7, 2])
    noise.draws.reseed(0, 0)
    found = made.select(x[rows, places], rows, chosen)
    if kind == "lora_space":
        torch.testing.assert_close(found, whole[rows, places][:, chosen])
        return
    a, b = made._perturbed_factors(noise)
    merged = (made.base_layer.weight + made.scaling * b.mT @ a)[rows // 2][:, chosen]
    eps = (rho**2 / 24 * merged.square().sum(-1)).sqrt()[..., None] * epsilon(torch.ones(2, dtype=DOUBLE), 24, seeded())
    torch.testing.assert_close(
        found, ((merged + eps) @ x[rows, places][..., None])[..., 0] + made.base_layer.bias[chosen]
    )


def test_checkpointed_layers_see_the_same_noise() -> None:
    gradients = []
    for recompute in (False, True):
        model = noisy_model().train()
        if recompute:
            model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        config = PerturbationConfig("flat_lora", 0.2)
        with Perturbation(config, model.layers, 10, 0).attached() as perturbation:
            perturbation.start(0)
            loss_at(model, torch.tensor([0.3, 0.8]))()[0].backward()
            uses = max(len(noise.draws.generators) for _, noise in perturbation.maps)
        assert uses == (3 if recompute else 2)
        gradients.append([p.grad for p in model.factors])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again, rtol=1e-12, atol=1e-14)
