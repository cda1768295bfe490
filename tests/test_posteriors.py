"""Posteriors of one adapter: MC dropout, SWAG, IVON, BLoB; each against a formula or its library used directly."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from made import made_task, vocabulary
from tiny import lora_config, random_points, tiny
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.nn.functional import cross_entropy

from loracurve.baselines.blob import BLoB, GaussianAdapter, divergence_weight, gaussian_divergence
from loracurve.baselines.flat_lora import FlatLoRA
from loracurve.baselines.ivon import IVON
from loracurve.baselines.mc_dropout import MCDropout, masked_adapters
from loracurve.baselines.method import Fitted, Setting, from_adapters
from loracurve.baselines.single_adapter_loop import OneAdapter, fresh_adapter, train
from loracurve.baselines.swag import SWAG, Iterates
from loracurve.curve.anchored import slot_times
from loracurve.curve.spec import CurveSpec
from loracurve.inference.prediction import labels_of, predict_split
from loracurve.model.curve_model import CurveModel
from loracurve.system.errors import UserError
from loracurve.tasks.batching import collate
from loracurve.training.anchors import slot_seeds
from loracurve.training.config import LoopConfig, PerturbationConfig
from loracurve.training.fit import fit_anchors
from loracurve.training.loop import batch_numbers

LOOP = LoopConfig(steps=12, batch_size=4, learning_rate=1e-2)
ARCHITECTURES = {"qwen2": "letter", "encoder": "head"}


def setting(tmp_path: Path, architecture: str = "qwen2", loop: LoopConfig = LOOP, samples: int = 4) -> Setting:
    task = made_task(tmp_path / architecture, architecture, ARCHITECTURES[architecture])
    base = tiny(architecture, vocabulary=vocabulary(task), labels=2)
    model = CurveModel(base, lora_config(architecture), CurveSpec.slots(2))
    return Setting(model, task, random_points(model, scale=0.05), loop, samples)


def mean_nll(fitted: Fitted, of: Setting, split: str = "train") -> float:
    encoded = of.task.encode(split)
    return float(fitted.predict(encoded).negative_log_likelihood(labels_of(encoded)).mean())


METHODS = [FlatLoRA(), MCDropout(0.2), SWAG(collect=6, rank=3), IVON(effective_samples=1e5, hessian=1e-2), BLoB()]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_methods_learn_predict_and_repeat_themselves(method, architecture: str, tmp_path: Path) -> None:
    if isinstance(method, IVON):
        pytest.importorskip("ivon")
    of = setting(tmp_path, architecture)
    fitted = method.fit(of)
    encoded = of.task.encode("test")
    predictive = fitted.predict(encoded)
    assert predictive.point_log_probs.shape[0] == fitted.passes == (1 if isinstance(method, FlatLoRA) else 4)
    assert len(predictive) == len(encoded)
    assert predictive.mutual_information.max() > 0 or fitted.passes == 1
    again = method.fit(of).predict(encoded)
    assert torch.equal(again.point_log_probs, predictive.point_log_probs)
    if architecture == "encoder":
        other = method.fit(replace(of, training=replace(of.training, seed=4))).predict(encoded)
        assert not torch.equal(other.point_log_probs, predictive.point_log_probs)
    assert fitted.cost == (2 if isinstance(method, SWAG) else 1)


def test_blob_learns(tmp_path: Path) -> None:
    of = setting(tmp_path, loop=LoopConfig(steps=40, batch_size=8, learning_rate=1e-2))
    before = mean_nll(from_adapters(of, fresh_adapter(of), 0.0), of)
    # Five steps an epoch: the published rate, for epochs of hundreds, would keep A at the prior.
    assert mean_nll(BLoB(divergence_rate=1e-3).fit(of), of) < 0.75 * before


def test_flat_lora_without_noise_is_the_fine_tune_of_anchor_0(tmp_path: Path) -> None:
    of = setting(tmp_path)
    of.model.set_curve(CurveSpec.slots(2), of.anchors)
    fit_anchors(of.model, of.task, of.training, progress=False)
    anchors = of.model.control_points()
    FlatLoRA(PerturbationConfig("flat_lora", 0.0)).fit(of)
    found = of.model.control_points()
    for name, tensor in anchors.items():
        torch.testing.assert_close(found[name], tensor[:1], rtol=1e-3, atol=1e-5)
    FlatLoRA().fit(of)
    assert any(not torch.allclose(p, found[n], atol=1e-3) for n, p in of.model.control_points().items())
    with pytest.raises(UserError, match="perturbation.kind: expected flat_lora"):
        FlatLoRA(PerturbationConfig())


def test_the_shared_loop_takes_the_steps_of_a_fine_tune(tmp_path: Path) -> None:
    from loracurve.baselines.swag import _Collecting

    of = setting(tmp_path, loop=replace(LOOP, accumulation=2, weight_decay=0.0, evaluate_every=3))
    of.model.set_curve(CurveSpec.slots(1), fresh_adapter(of))
    expected = fit_anchors(of.model, of.task, of.training, progress=False)
    points = of.model.control_points()
    one = OneAdapter(of.model, fresh_adapter(of))
    learner = _Collecting(one.values(), of.training, SWAG())
    train(of, one, learner, of.training, "again")
    found = one.stack([learner.adapter()])
    assert expected.best_step[0] > 0
    for name, tensor in points.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)


def test_training_ends_after_validations_without_improvement(tmp_path: Path) -> None:
    class Standing:
        def __init__(self, values: list[Tensor]) -> None:
            self.values = values

        def step(self, nll_at, step: int, factor: float) -> float:
            return nll_at(self.values)[0]

        def adapter(self) -> list[Tensor]:
            return self.values

        state = adapter

    of = setting(tmp_path)
    one = OneAdapter(of.model, fresh_adapter(of))
    loop = replace(LOOP, evaluate_every=2, patience=2)
    assert train(of, one, Standing(one.values()), loop, "standing").steps == 6

    class Bad(Standing):
        def step(self, nll_at, step: int, factor: float) -> float:
            return math.nan

    with pytest.raises(UserError, match="bad: the loss is not finite at step 1"):
        train(of, one, Bad(one.values()), loop, "bad")


# ---- MC dropout


def test_a_pass_of_mc_dropout_is_the_layer_with_one_mask_for_all_tokens(tmp_path: Path) -> None:
    of = setting(tmp_path)
    model, encoded = of.model, of.task.encode("test")
    adapter = {n: p[:1] for n, p in of.anchors.items()}
    masked = masked_adapters(adapter, 0.3, 3, seed=5)
    model.set_curve(CurveSpec.slots(3), masked)
    batch = collate(encoded, range(6))
    found = model.point_log_probs(batch, slot_times(3))

    class Mask(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * self.keep

    model.set_curve(CurveSpec.slots(1), adapter)
    for s in range(3):
        for name, layer in model.layers.items():
            a = masked[f"base_model.model.{name}.lora_A.weight"][s]
            layer.dropout = Mask()
            layer.dropout.keep = (a != 0).any(0).float() / 0.7
        torch.testing.assert_close(model.point_log_probs(batch, slot_times(1))[0], found[s], rtol=1e-5, atol=1e-5)


def test_masks_drop_columns_at_the_asked_rate_and_keep_the_mean() -> None:
    adapter = {"x.lora_A.weight": torch.ones(1, 4, 500), "x.lora_B.weight": torch.ones(1, 3, 4)}
    masked = masked_adapters(adapter, 0.25, 20, seed=0)
    a = masked["x.lora_A.weight"]
    assert torch.equal(a, a[:, :1].expand_as(a)), "a feature is dropped for all rows of A at once"
    assert (a == 0).float().mean() == pytest.approx(0.25, abs=0.02)
    assert a.mean() == pytest.approx(1, abs=0.02)
    assert torch.equal(masked["x.lora_B.weight"], torch.ones(20, 3, 4))
    assert not torch.equal(a[0], a[1])


# ---- SWAG


def test_moments_of_iterates_and_covariance_of_samples() -> None:
    draw = torch.Generator().manual_seed(0)
    thetas = [3 + torch.randn(6, generator=draw, dtype=torch.float64) for _ in range(9)]
    iterates = Iterates(rank=4)
    for theta in thetas:
        iterates.add([theta[:2], theta[2:]])
    stacked = torch.stack(thetas)
    torch.testing.assert_close(torch.cat(iterates.mean), stacked.mean(0))
    torch.testing.assert_close(torch.cat(iterates.variance()), stacked.var(0, unbiased=False))
    deviations = torch.stack([theta - stacked[: i + 1].mean(0) for i, theta in enumerate(thetas)][-4:], dim=1)
    torch.testing.assert_close(torch.stack([torch.cat(d) for d in iterates.deviations], dim=1), deviations)
    expected = 0.5 * (stacked.var(0, unbiased=False).diag() + deviations @ deviations.T / 3)
    samples = torch.stack([torch.cat(iterates.sample(draw)) for _ in range(3000)])
    torch.testing.assert_close(samples.mean(0), stacked.mean(0), atol=0.08, rtol=0)
    torch.testing.assert_close(torch.cov(samples.T), expected, atol=0.08, rtol=0.08)
    wide = torch.stack([torch.cat(iterates.sample(draw, scale=4.0)) for _ in range(3000)])
    torch.testing.assert_close(torch.cov(wide.T), 4 * expected, atol=0.32, rtol=0.08)


def test_swag_collects_evenly_from_the_anchor_at_a_constant_rate(tmp_path: Path) -> None:
    from loracurve.baselines.swag import _Collecting

    of = setting(tmp_path)
    learner = _Collecting([torch.zeros(1)], replace(LOOP, steps=10), SWAG(collect=4, rank=2))
    assert learner.due == {2, 5, 7, 10}
    tiny_rate = SWAG(anchor=1, collect=6, rank=3, rate=1e-9).fit(of)
    encoded = of.task.encode("test")
    of.model.set_curve(CurveSpec.slots(1), {n: p[1:2] for n, p in of.anchors.items()})
    anchor = predict_split(of.model, encoded, slot_times(1))
    torch.testing.assert_close(tiny_rate.predict(encoded).probs, anchor.probs, rtol=0, atol=1e-4)
    with pytest.raises(UserError, match="expected 1 to 2 anchors"):
        SWAG(anchor=2).fit(of)
    with pytest.raises(UserError, match="collect: expected at most one iterate a step, found 20 in 12 steps"):
        SWAG().fit(of)
    with pytest.raises(UserError, match="2 <= rank <= collect"):
        SWAG(collect=3)


# ---- IVON


def test_ivon_equals_the_library_used_directly(tmp_path: Path) -> None:
    library = pytest.importorskip("ivon")
    of = setting(tmp_path, "encoder", replace(LOOP, steps=3, keep="last", schedule="constant", warmup=0.0), samples=2)
    method = IVON(learning_rate=0.1, effective_samples=500.0, hessian=0.5, weight_decay=1e-3, clip_radius=0.2, passes=2)
    found = method.fit(of).predict(of.task.encode("test"))

    from loracurve.system.randomness import stream_seed

    model, rows = of.model, of.task.encode("train")
    model.set_curve(CurveSpec.slots(1), fresh_adapter(of))
    model.train()
    optimizer = library.IVON(
        model.factors,
        lr=0.1,
        ess=500.0,
        hess_init=0.5,
        beta2=0.99999,
        weight_decay=1e-3,
        mc_samples=2,
        clip_radius=0.2,
        rescale_lr=False,
    )
    seed = slot_seeds(of.training.seed, 1)[0]
    here = model.coefficients(slot_times(1))
    for step in range(3):
        torch.manual_seed(stream_seed(seed, "forward", step))
        batch = collate(rows, batch_numbers(seed, step, len(rows), 4))
        for _ in range(2):
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                cross_entropy(model.scores(batch, here)[0], batch.labels).backward()
        optimizer.step()
    for s in range(2):
        torch.manual_seed(stream_seed(of.seed, "ivon test", s))
        with optimizer.sampled_params():
            point = predict_split(model, of.task.encode("test"), slot_times(1)).point_log_probs[0]
        torch.testing.assert_close(found.point_log_probs[s], point, rtol=1e-4, atol=1e-5)


def test_ivons_default_rate_follows_the_fine_tunes(tmp_path: Path) -> None:
    pytest.importorskip("ivon")
    of = setting(tmp_path, "encoder", replace(LOOP, steps=2, learning_rate=2e-3), samples=2)
    test = of.task.encode("test")
    default = IVON(clip_radius=1e-2).fit(of).predict(test)
    named = IVON(clip_radius=1e-2, learning_rate=0.3 * 2e-3 / 1e-2).fit(of).predict(test)
    torch.testing.assert_close(default.probs, named.probs)


def test_ivon_finds_the_posterior_of_a_gaussian_toy() -> None:
    pytest.importorskip("ivon")
    from loracurve.baselines.ivon import _Variational

    curvature = torch.tensor([[4.0, 1.0, 0.25]])
    method = IVON(
        learning_rate=0.3, effective_samples=100.0, hessian=1.0, betas=(0.9, 0.98), weight_decay=0.1, clip_radius=10.0,
        passes=4,
    )  # fmt: skip
    learner = _Variational([torch.ones(1, 3)], method)
    torch.manual_seed(0)
    for step in range(300):
        learner.step(lambda v: (float((curvature * v[0] ** 2).sum() / 2), [curvature * v[0]]), step, 1 - step / 300)
    samples = torch.cat([learner.sample(s)[0] for s in range(2000)])
    expected = 1 / (100 * (curvature[0] + 0.1))
    torch.testing.assert_close(samples.var(0), expected, rtol=0.15, atol=0)
    assert samples.mean(0).abs().max() < 0.05


def test_ivon_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ivon", None)
    with pytest.raises(UserError, match=r"ivon-opt.*pip install 'loracurve\[ivon\]'"):
        IVON().fit(setting(tmp_path))


# ---- BLoB


def test_the_divergence_is_that_of_torch_distributions() -> None:
    draw = torch.Generator().manual_seed(0)
    mean = torch.randn(3, 7, generator=draw, dtype=torch.float64)
    std = 0.01 + torch.rand(3, 7, generator=draw, dtype=torch.float64)
    expected = kl_divergence(Normal(mean, std), Normal(torch.zeros_like(mean), torch.full_like(std, 0.2))).sum()
    torch.testing.assert_close(gaussian_divergence(mean, std, 0.2), expected)
    assert gaussian_divergence(torch.zeros(5), torch.full((5,), 0.2), 0.2) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("reweighted", [True, False])
@pytest.mark.parametrize("batches", [1, 5, 3000])
def test_the_weights_of_an_epoch_sum_to_one(batches: int, reweighted: bool) -> None:
    weights = [divergence_weight(step, batches, reweighted) for step in range(2 * batches)]
    assert sum(weights[:batches]) == pytest.approx(1)
    assert weights[:batches] == weights[batches:]
    if batches == 5:
        assert weights[4] / weights[3] == (2 if reweighted else 1)


def test_a_forward_pass_of_blob_is_one_weight_sample(tmp_path: Path) -> None:
    """The gradients of a step are those at one adapter A = M + G^2 E, for means and G by the chain rule."""
    of = setting(tmp_path)
    one = OneAdapter(of.model, fresh_adapter(of))
    loop = replace(LOOP, max_grad_norm=0.0)
    learner = GaussianAdapter(one, BLoB(divergence_rate=1e-30), loop, 10, seed=1)
    for root in learner.roots.values():
        assert 0.05 / math.sqrt(2) <= float(root.detach().min()) <= float(root.detach().max()) <= 0.05
    seen: list[list[Tensor]] = []
    slopes = [torch.randn(v.shape) for v in learner.values]

    def nll_at(values: list[Tensor]) -> tuple[float, list[Tensor]]:
        seen.append([v.clone() for v in values])
        return 0.0, slopes

    gradients: dict[str, list[Tensor]] = {}
    means, roots = (
        [v.detach().clone() for v in learner.values],
        {i: g.detach().clone() for i, g in learner.roots.items()},
    )

    def keep(factor: float) -> None:
        gradients["values"] = [v.grad.clone() for v in learner.values]
        gradients["roots"] = [g.grad.clone() for g in learner.roots.values()]

    learner.optimizer.step = keep  # type: ignore[method-assign]
    learner.step(nll_at, 0, 1.0)
    assert len(seen) == 1
    for i, value in enumerate(seen[0]):
        torch.testing.assert_close(gradients["values"][i], slopes[i])
        if i not in roots:
            assert torch.equal(value, means[i]), "B is a number"
    for (i, root), gradient in zip(roots.items(), gradients["roots"], strict=True):
        noise = (seen[0][i] - means[i]) / root.square()
        assert 0.5 < float(noise.std()) < 1.5
        torch.testing.assert_close(gradient, slopes[i] * noise * 2 * root, rtol=1e-3, atol=1e-5)


def test_the_divergence_pulls_to_the_prior_where_nothing_is_learnt(tmp_path: Path) -> None:
    of = setting(tmp_path)
    one = OneAdapter(of.model, fresh_adapter(of))
    method = BLoB(divergence_rate=0.01, reweighted=False)
    learner = GaussianAdapter(one, method, replace(LOOP, learning_rate=1e-30), 1, seed=1)
    zero = [torch.zeros_like(v) for v in learner.values]
    start = float(learner.divergence().detach())
    for step in range(80):
        learner.step(lambda values: (0.0, zero), step, 1.0)
    assert float(learner.divergence().detach()) < 1e-3 * start
    for i, root in learner.roots.items():
        torch.testing.assert_close(root.detach().square(), torch.full_like(root, 0.2), rtol=1e-2, atol=0)
        assert float(learner.values[i].detach().abs().max()) < 1e-3


def test_blob_can_predict_by_its_mean(tmp_path: Path) -> None:
    fitted = BLoB(predict="mean").fit(setting(tmp_path))
    assert fitted.passes == 1
    with pytest.raises(UserError, match="prior_std"):
        BLoB(prior_std=0)
