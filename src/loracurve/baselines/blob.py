"""BLoB, Bayesian low-rank adaptation by backpropagation (Wang et al. 2024, arXiv 2406.11675).

A is Gaussian, entry by entry A_ij ~ N(M_ij, G_ij^4) (standard deviation G^2), B is a number; with the prior
A_ij ~ N(0, sigma^2) the divergence between posterior and prior of the whole update B A is that of A, which has a closed
form. As published, each step is one of AdamW on the likelihood at a sampled A, and one of plain gradient
descent on the weighted divergence.

Unlike the published code, whose flipout signs differ from token to token, every forward pass here is one weight sample
for all tokens and examples, so that a sample is a model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from loracurve.baselines.method import Fitted, Setting, fit_notes, from_adapters
from loracurve.baselines.single_adapter_loop import AdamW, NllAt, OneAdapter, fresh_adapter, train
from loracurve.system.errors import UserError
from loracurve.system.randomness import generator
from loracurve.system.ranges import Positive, check_ranges
from loracurve.training.config import LoopConfig

__all__ = ["BLoB", "divergence_weight", "gaussian_divergence"]


def gaussian_divergence(mean: Tensor, std: Tensor, prior_std: float) -> Tensor:
    """KL(N(mean, std^2) || N(0, prior_std^2)) in nats, summed over the entries."""
    return (math.log(prior_std) - std.log() + (std.square() + mean.square()) / (2 * prior_std**2) - 0.5).sum()


def divergence_weight(step: int, batches: int, reweighted: bool) -> float:
    """Weight of the divergence at a step (0-based) for `batches` steps an epoch; the weights of an epoch sum to 1.

    Equal weights, or 2^i for the i-th batch of an epoch, so that the prior acts at its end.
    """
    if not reweighted:
        return 1 / batches
    i = step % batches + 1
    # 2^i / (2^(batches + 1) - 2), without large powers
    return 2.0 ** (i - batches - 1) / (1 - 2.0**-batches)


@dataclass(frozen=True)
class BLoB:
    """A Gaussian over the entries of A, trained by backpropagation through its samples."""

    prior_std: Positive = 0.2
    """Standard deviation of the prior of each entry of A."""
    initial: Positive = 0.05
    """G starts uniformly between `initial` / sqrt(2) and `initial`; the standard deviation is its square."""
    divergence_rate: Positive = 0.02
    """Peak rate of gradient descent on the divergence; follows the schedule of the learning rate."""
    reweighted: bool = True
    """Weigh the divergence by 2^i for the i-th batch of an epoch instead of equally."""
    predict: Literal["samples", "mean"] = "samples"
    """Average over samples of A, or take its mean (one forward pass)."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.predict not in ("samples", "mean"):
            raise UserError(f"predict: expected samples or mean, found {self.predict!r}")

    def fit(self, setting: Setting) -> Fitted:
        """Train one adapter from scratch."""
        config = setting.training
        one = OneAdapter(setting.model, fresh_adapter(setting), config.capture)
        batches = max(round(len(setting.task.encode("train")) / config.batch_size), 1)
        learner = GaussianAdapter(one, self, config, batches, config.seed)
        result = train(setting, one, learner, config, "BLoB")
        if self.predict == "mean":
            drawn = [learner.adapter()]
        else:
            drawn = [learner.sample(generator(setting.seed, "blob test", s)) for s in range(setting.samples)]
        return from_adapters(
            setting, one.stack(drawn), result.steps * config.batch_size / setting.unit, notes=fit_notes(result)
        )


class GaussianAdapter:
    """The learner: means of A beside B and dense heads, and G for each A.

    Args:
        one: the model's adapter, where it starts.
        method: prior, start and rates.
        config: of AdamW.
        batches: steps of an epoch.
        seed: of all draws.
    """

    def __init__(self, one: OneAdapter, method: BLoB, config: LoopConfig, batches: int, seed: int) -> None:
        self.method, self.batches, self.seed = method, batches, seed
        self.values = [v.requires_grad_() for v in one.values()]
        """M for the factors A, the other factors as they are"""
        draw = generator(seed, "blob start")
        self.roots: dict[int, Tensor] = {}
        """G by the place of its A in `values`"""
        for i, name in enumerate(one.names):
            if name.endswith("lora_A.weight"):
                u = torch.rand(self.values[i].shape, generator=draw).to(self.values[i])
                low = method.initial / math.sqrt(2)
                self.roots[i] = (low + (method.initial - low) * u).requires_grad_()
        # B has no prior and A has its own: no decay beside them.
        self.optimizer = AdamW([*self.values, *self.roots.values()], config, weight_decay=0.0)

    def sample(self, draw: torch.Generator) -> list[Tensor]:
        """One weight sample, differentiable in means and G."""
        out = list(self.values)
        for i, root in self.roots.items():
            noise = torch.randn(root.shape, generator=draw).to(root)
            out[i] = self.values[i] + root.square() * noise
        return out

    def divergence(self) -> Tensor:
        """KL to the prior in nats, summed over all maps."""
        parts = [gaussian_divergence(self.values[i], g.square(), self.method.prior_std) for i, g in self.roots.items()]
        return torch.stack(parts).sum()

    def step(self, nll_at: NllAt, step: int, factor: float) -> float:
        sample = self.sample(generator(self.seed, "blob", step))
        nll, gradients = nll_at([v.detach() for v in sample])
        torch.autograd.backward(sample, gradients)
        self.optimizer.step(factor)
        rate = self.method.divergence_rate * factor * divergence_weight(step, self.batches, self.method.reweighted)
        moved = [*(self.values[i] for i in self.roots), *self.roots.values()]
        with torch.enable_grad():
            slopes = torch.autograd.grad(self.divergence(), moved)
        with torch.no_grad():
            for value, slope in zip(moved, slopes, strict=True):
                value -= rate * slope
        return nll

    def adapter(self) -> Sequence[Tensor]:
        return self.values

    def state(self) -> Sequence[Tensor]:
        return [*self.values, *self.roots.values()]
