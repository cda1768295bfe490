"""Flat-minima perturbation: the noise has the distribution it claims, is the same wherever it is used, and leaves
nothing behind."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import pytest
import torch
from tiny import lora_config, random_points, tiny
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

from loracurve.curve.gauge import balanced
from loracurve.curve.spec import CurveSpec
from loracurve.model import weight_noise
from loracurve.model.curve_model import CurveModel
from loracurve.model.layers import CurveLinear
from loracurve.model.routes import Route
from loracurve.model.weight_noise import Draws, flat_lora, perturb_factors, squared_row_norms
from loracurve.system.errors import UserError
from loracurve.training.config import PerturbationConfig, needs_shared_points, needs_single_point, strength
from loracurve.training.perturbation import FlatLora, LoraSpace, Perturbation
from loracurve.training.sam import sam_ascent, sam_backward, shifted

CPU = torch.device("cpu")
DOUBLE = torch.float64


def seeded(stream: str = "map", seed: int = 0, step: int = 0) -> Draws:
    draws = Draws(stream, CPU)
    draws.reseed(seed, step)
    return draws


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def epsilon(scale: Tensor, n_in: int, draws: Draws) -> Tensor:
    """The noise of one point [n_out, n_in], read off with the identity as input."""
    x = torch.eye(n_in, dtype=scale.dtype)
    return flat_lora(x.new_zeros(n_in, len(scale)), x, scale[None], draws).mT


def layer(kind: type[nn.Module] = nn.Linear, n_in: int = 24, n_out: int = 10, points: int = 3) -> CurveLinear:
    base = (nn.Linear(n_in, n_out) if kind is nn.Linear else Conv1D(n_out, n_in)).double()
    nn.init.normal_(base.weight, generator=torch.Generator().manual_seed(3))
    made = CurveLinear(base, Route(), 4, 0.5, 0.0, n_in, n_out)
    made.set_factors(
        {"lora_A.weight": randn(points, 4, n_in, seed=1), "lora_B.weight": randn(points, n_out, 4, seed=2)}
    )
    return made


# ---- options


def test_schedules() -> None:
    assert [strength(PerturbationConfig("flat_lora", 0.05), s, 10) for s in (0, 9)] == [0.05, 0.05]
    ramp = [strength(PerturbationConfig("flat_lora", 0.05, "ramp"), s, 10) for s in range(10)]
    assert ramp == sorted(ramp) and ramp[0] == pytest.approx(0.005) and ramp[-1] == pytest.approx(0.05)
    cyclic = [strength(PerturbationConfig("flat_lora", 0.25, "cyclic"), s, 1000) for s in range(1000)]
    assert cyclic[0] == 0 and max(cyclic) == pytest.approx(0.5) and sum(cyclic) / 1000 == pytest.approx(0.25)
    assert cyclic[:20] == pytest.approx(cyclic[20:40]), "50 cycles of 20 steps"
    with pytest.raises(UserError, match="at least 100 steps, found 60; lower cycles to 10"):
        strength(PerturbationConfig("flat_lora", 0.25, "cyclic"), 0, 60)


@pytest.mark.parametrize("values", [{"kind": "flatlora"}, {"schedule": "cosine"}, {"rho": -1.0}, {"cycles": 0}])
def test_wrong_options_are_named(values: dict[str, object]) -> None:
    with pytest.raises(UserError, match=f"perturbation.{next(iter(values))}: expected"):
        PerturbationConfig(**values)  # type: ignore[arg-type]


def test_what_the_kinds_need() -> None:
    kinds = ["none", "flat_lora", "lora_space", "sam"]
    assert [needs_shared_points(PerturbationConfig(k)) for k in kinds] == [False, True, True, True]  # type: ignore[arg-type]
    assert [needs_single_point(PerturbationConfig(k)) for k in kinds] == [False, False, False, True]  # type: ignore[arg-type]


# ---- flat_lora


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


def test_steps_maps_and_seeds_are_independent_and_repeatable() -> None:
    scale = torch.ones(8, dtype=DOUBLE)
    draws = [seeded(), seeded(step=1), seeded("other"), seeded(seed=1)]
    noises = [epsilon(scale, 2000, d).flatten() for d in draws]
    limit = 5 / math.sqrt(len(noises[0]))
    for i, a in enumerate(noises):
        for b in noises[i + 1 :]:
            assert abs(float((a * b).mean())) < limit
    assert torch.equal(epsilon(scale, 2000, seeded()).flatten(), noises[0])
    again = draws[1]
    again.reseed(0, 0)
    assert torch.equal(epsilon(scale, 2000, again).flatten(), noises[0]), "a draw depends on its step alone"


def test_the_same_noise_for_all_tokens_points_and_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_noise, "NOISE_CHUNK", 50)  # several blocks, the last one smaller
    scale = randn(2, 7).abs()
    draws = seeded()
    x = randn(2, 3, 12, seed=5)
    out = flat_lora(torch.zeros(2, 3, 7, dtype=DOUBLE), x, scale, draws)
    z = epsilon(torch.ones(7, dtype=DOUBLE), 12, draws)
    for point in range(2):
        torch.testing.assert_close(out[point], x[point] @ (scale[point][:, None] * z).mT)


def test_backward_draws_the_noise_of_the_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_noise, "NOISE_CHUNK", 50)
    x, y, scale = (t.requires_grad_() for t in (randn(4, 3, 12), randn(4, 3, 7, seed=1), randn(2, 7, seed=2)))

    def run(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        return flat_lora(y, x, scale, seeded())

    # Against finite differences: right only if both passes see one noise.
    assert torch.autograd.gradcheck(run, (x, y, scale))
    grad = randn(4, 3, 7, seed=4)
    (found,) = torch.autograd.grad(run(x, y, scale), x, grad)
    z = epsilon(torch.ones(7, dtype=DOUBLE), 12, seeded())
    expected = torch.cat([grad[2 * g : 2 * g + 2] @ (scale[g][:, None] * z) for g in range(2)])
    torch.testing.assert_close(found, expected)


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


def test_bfloat16_sums_blocks_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    def gradient(dtype: torch.dtype) -> Tensor:
        x = randn(4, 16).to(dtype).requires_grad_()
        flat_lora(torch.zeros(4, 600, dtype=dtype), x, torch.ones(1, 600), seeded()).sum().backward()
        assert x.grad is not None
        return x.grad

    whole = gradient(torch.bfloat16)
    monkeypatch.setattr(weight_noise, "NOISE_CHUNK", 16 * 16 * 4)  # 16 at least: a CPU draws short tensors otherwise
    torch.testing.assert_close(gradient(torch.bfloat16), whole, rtol=0.02, atol=0.2)


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


# ---- lora_space


def product_moments(a: Tensor, b: Tensor, rho: float, count: int) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the noise of B A, entries flattened."""
    draw = torch.Generator().manual_seed(0)
    noises = []
    for _ in range(count):
        na, nb = perturb_factors(a, b, rho, draw)
        noises.append((nb.mT @ na - b.mT @ a).flatten())
    stacked = torch.stack(noises)
    return stacked.mean(0), stacked.mT.cov()


def test_the_noise_of_the_product_does_not_depend_on_the_gauge() -> None:
    a, b = randn(2, 4), randn(2, 3, seed=1)
    r = torch.tensor([[3.0, 2.0], [-1.0, 0.5]], dtype=DOUBLE)
    moved = r @ a, torch.linalg.inv(r).mT @ b
    rho, count = 0.3, 20000
    delta = b.mT @ a
    rows, columns = delta.square().sum(1) / 4, delta.square().sum(0) / 3
    variance = rho**2 * (rows[:, None] + columns) + rho**4 * delta.square().sum() / 12
    found = [product_moments(*factors, rho, count) for factors in ((a, b), moved)]
    size = variance.flatten().sqrt()
    for mean, covariance in found:
        assert (mean.abs() / size).max() < 5 / math.sqrt(count)
        torch.testing.assert_close(covariance.diagonal().view_as(variance), variance, rtol=0.08, atol=0)
    correlation = [c / size[:, None] / size for _, c in found]
    assert (correlation[0] - correlation[1]).abs().max() < 0.08
    # Without care for the gauge it would not be so: noise relative to rows as they are.
    naive = [(f[1].mT.square() @ (f[0].square().mean(1))) for f in ((a, b), moved)]
    assert (naive[0] / naive[1] - 1).abs().max() > 0.3


def test_the_noise_is_that_of_the_balanced_gauge() -> None:
    a, b = randn(3, 40), randn(3, 30, seed=1)
    balanced_a, balanced_b = balanced(a, b.mT)
    into = balanced_a @ torch.linalg.pinv(a)  # A_balanced = into A
    size_a = torch.diag(balanced_a.square().mean(1))  # of row i of A, and of column i of B
    size_b = torch.diag(balanced_b.square().mean(0))
    out = torch.linalg.inv(into)
    torch.testing.assert_close(out @ size_a @ out.mT, a @ a.mT / 40)
    torch.testing.assert_close(into.mT @ size_b @ into, b @ b.mT / 30)
    draw = torch.Generator().manual_seed(0)
    noises = torch.stack([perturb_factors(a, b, 0.1, draw)[0] - a for _ in range(300)], 1).flatten(1)
    torch.testing.assert_close(noises.cov(), 0.01 * a @ a.mT / 40, rtol=0.1, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_degenerate_factors_stay_finite(dtype: torch.dtype) -> None:
    a = randn(2, 4, 16, dtype=dtype)
    b = torch.zeros(2, 4, 12, dtype=dtype)  # the LoRA initialisation
    draw = torch.Generator().manual_seed(0)
    na, nb = perturb_factors(a, b, 0.1, draw)
    assert na.isfinite().all() and nb.abs().max() < 1e-20 and not torch.equal(na, a)
    b[:, :2] = randn(2, 2, 12, dtype=dtype)
    b[:, 1] = b[:, 0]
    na, nb = perturb_factors(a, b, 0.1, draw)
    assert nb.isfinite().all() and nb[:, 2:].abs().max() < 1e-20
    torch.testing.assert_close(nb[:, 1], nb[:, 0], rtol=0, atol=1e-4)


# ---- sam


def test_sam_on_a_quadratic_by_hand() -> None:
    p = randn(3, 2, 5).requires_grad_()
    c = torch.tensor([0.2, 0.5, 0.3], dtype=DOUBLE)
    target, curvature, rho = randn(2, 5, seed=1), randn(2, 5, seed=2).abs(), 0.4

    def loss() -> tuple[Tensor, str]:
        return (curvature * (torch.tensordot(c, p, dims=1) - target).square()).sum(), "more"

    before = p.detach().clone()
    value, extra = sam_backward(loss, [p], c, rho)
    theta = torch.tensordot(c, before, dims=1)
    g = 2 * curvature * (theta - target)
    second = 2 * curvature * (theta + rho * g / g.norm() - target)
    assert p.grad is not None and extra == "more"
    torch.testing.assert_close(p.grad, c[:, None, None] * second)
    torch.testing.assert_close(value, (curvature * (theta - target).square()).sum())
    assert torch.equal(p, before)
    assert all(not e.any() for e in sam_ascent([torch.zeros(3, 2)], c, rho)), "no gradient, no step"


def test_points_are_moved_and_brought_back_even_after_an_error() -> None:
    p = nn.Parameter(randn(3, 4, dtype=torch.float32))
    before, e = p.detach().clone(), randn(4, seed=1, dtype=torch.float32)
    with pytest.raises(ZeroDivisionError), shifted([p], [e]):
        assert torch.equal(p.detach(), before + e)
        raise ZeroDivisionError
    assert torch.equal(p, before)


# ---- in a model


def noisy_model(architecture: str = "llama", **options: object) -> CurveModel:
    model = CurveModel(tiny(architecture, DOUBLE), lora_config(architecture, **options), CurveSpec(2, 2))
    model.set_curve(model.spec, random_points(model))
    return model


def ids(rows: int = 3) -> Tensor:
    return torch.randint(3, 300, (rows, 7), generator=torch.Generator().manual_seed(2))


def loss_at(model: CurveModel, t: float | Tensor) -> Callable[[], tuple[Tensor, None]]:
    return lambda: (model(t, input_ids=ids()).logits.log_softmax(-1)[..., 5].mean().neg(), None)


def digest(model: CurveModel) -> str:
    state = sorted(model.model.state_dict().items())
    return hashlib.sha256(b"".join(v.contiguous().numpy().tobytes() for _, v in state)).hexdigest()


@pytest.mark.parametrize("kind", ["flat_lora", "lora_space", "sam"])
@pytest.mark.parametrize("architecture", ["qwen2", "llama", "encoder"])
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
    plain._set_route(Route("merged"))
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


def test_no_gradient_through_the_scale_of_lora_space() -> None:
    a, b, g = randn(2, 4, 9).requires_grad_(), randn(2, 4, 6, seed=1).requires_grad_(), randn(2, 4, 9, seed=2)
    noisy, _ = perturb_factors(a, b, 0.3, torch.Generator().manual_seed(0))
    (found,) = torch.autograd.grad((noisy * g).sum(), a)
    assert torch.equal(found, g)


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


def test_sam_in_a_model_equals_two_passes_by_hand() -> None:
    model, t, rho = noisy_model("encoder").eval(), 0.3, 0.3
    c = model.coefficients(torch.tensor(t, dtype=DOUBLE))
    head = lambda: (model(t, input_ids=ids()).logits.log_softmax(-1)[:, 1].mean().neg(), None)  # noqa: E731
    start = {n: p.clone() for n, p in model.control_points().items()}
    sam_backward(head, model.factors, c, rho)
    found = [p.grad.clone() for p in model.factors if p.grad is not None]
    assert all(torch.equal(p, start[n]) for n, p in model.control_points().items())
    # By hand: one adapter, theta(t), as a curve of equal control points, whose gradients sum to that at theta(t).
    theta = [torch.tensordot(c, p.detach(), dims=1) for p in model.factors]

    def gradient(point: list[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            for p, value in zip(model.factors, point, strict=True):
                p.copy_(value.expand_as(p))
        return [g.sum(0) for g in torch.autograd.grad(head()[0], model.factors)]

    first = gradient(theta)
    norm = torch.cat([g.flatten() for g in first]).norm()
    second = gradient([p + rho * g / norm for p, g in zip(theta, first, strict=True)])
    for f, g in zip(found, second, strict=True):
        torch.testing.assert_close(f, c.view(-1, *[1] * g.dim()) * g, rtol=1e-6, atol=1e-10)
