"""BLoB: one weight sample a pass, its divergence by formula."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.settings import LOOP, posterior_setting
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from loracurve.baselines.blob import BLoB, GaussianAdapter, divergence_weight, gaussian_divergence
from loracurve.baselines.method import Fitted, Setting, from_adapters
from loracurve.baselines.single_adapter_loop import OneAdapter, fresh_adapter
from loracurve.system.errors import UserError
from loracurve.training.config import LoopConfig


def mean_nll(fitted: Fitted, of: Setting, split: str = "train") -> float:
    encoded = of.task.encode(split)
    return float(fitted.predict(encoded).negative_log_likelihood(encoded.labels).mean())


def test_blob_learns(tmp_path: Path) -> None:
    of = posterior_setting(tmp_path, loop=LoopConfig(steps=40, batch_size=8, learning_rate=1e-2))
    before = mean_nll(from_adapters(of, fresh_adapter(of), 0.0), of)
    # Five steps an epoch: the published rate, for epochs of hundreds, would keep A at the prior.
    assert mean_nll(BLoB(divergence_rate=1e-3).fit(of), of) < 0.75 * before


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
    of = posterior_setting(tmp_path)
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
    of = posterior_setting(tmp_path)
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
    fitted = BLoB(predict="mean").fit(posterior_setting(tmp_path))
    assert fitted.passes == 1
    with pytest.raises(UserError, match="prior_std"):
        BLoB(prior_std=0)
