"""SWAG (Maddox et al. 2019, arXiv 1902.02476): a Gaussian fitted to the iterates of further training.

From an anchor on, training goes on at a constant learning rate. Of the iterates theta_1..theta_n collected on the way,
mean and variance of each weight and the last K deviations D from the running mean give (their eq. 1)

    theta = mean + diag(variance)^(1/2) z_1 / sqrt(2) + D z_2 / sqrt(2 (K - 1)),    z_1, z_2 standard normal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loracurve.baselines.method import Fitted, Setting, from_adapters
from loracurve.baselines.single_adapter_loop import AdamW, NllAt, OneAdapter, train
from loracurve.curve.lora_space import ControlPoints
from loracurve.system.errors import UserError
from loracurve.system.randomness import generator
from loracurve.system.ranges import Amount, Count, Positive, Rank, Slots, check_ranges
from loracurve.training.config import LoopConfig

__all__ = ["SWAG", "Iterates", "MultiSWAG"]


class Iterates:
    """Running moments of collected weights, each a list of tensors.

    Args:
        rank: K, deviations that are kept.
    """

    def __init__(self, rank: int) -> None:
        self.rank, self.count = rank, 0
        self.mean: list[Tensor] = []
        self.squares: list[Tensor] = []
        """sums of squared deviations from the mean, updated as Welford does: E[x^2] - E[x]^2 would cancel"""
        self.deviations: list[list[Tensor]] = []
        """the last K of theta_i - mean of theta_1..theta_i"""

    def add(self, values: Sequence[Tensor]) -> None:
        """Collect one iterate."""
        self.count += 1
        if not self.mean:
            self.mean = [torch.zeros_like(v) for v in values]
            self.squares = [torch.zeros_like(v) for v in values]
        latest = []
        for value, mean, squares in zip(values, self.mean, self.squares, strict=True):
            before = value - mean
            mean += before / self.count
            latest.append(value - mean)
            squares += before * latest[-1]
        self.deviations = [*self.deviations, latest][-self.rank :]

    def variance(self) -> list[Tensor]:
        """Variance of each weight over the iterates (divided by their number)."""
        return [s / self.count for s in self.squares]

    def sample(self, draw: torch.Generator, scale: float = 1.0) -> list[Tensor]:
        """Weights drawn from the Gaussian, with `scale` times its covariance."""
        columns = len(self.deviations)
        weights = torch.randn(columns, generator=draw) / math.sqrt(2 * (columns - 1))
        out = []
        for i, (mean, variance) in enumerate(zip(self.mean, self.variance(), strict=True)):
            noise = torch.randn(mean.shape, generator=draw).to(mean) * (variance / 2).sqrt()
            for w, deviation in zip(weights.tolist(), self.deviations, strict=True):
                noise += w * deviation[i]
            out.append(mean + math.sqrt(scale) * noise)
        return out


class _Collecting:
    """A fine-tune that goes on, and collects its iterates."""

    def __init__(self, start: list[Tensor], config: LoopConfig, method: SWAG) -> None:
        self.values = [v.requires_grad_() for v in start]
        self.optimizer = AdamW(self.values, config, config.weight_decay)
        self.iterates = Iterates(method.rank)
        self.due = {(i + 1) * config.steps // method.collect for i in range(method.collect)}

    def step(self, nll_at: NllAt, step: int, factor: float) -> float:
        nll, gradients = nll_at(self.values)
        for value, gradient in zip(self.values, gradients, strict=True):
            value.grad = gradient
        self.optimizer.step(factor)
        if step + 1 in self.due:
            self.iterates.add([v.detach() for v in self.values])
        return nll

    def adapter(self) -> Sequence[Tensor]:
        return self.values

    def state(self) -> Sequence[Tensor]:
        return self.values


@dataclass(frozen=True)
class SWAG:
    """Stochastic weight averaging with a diagonal plus low-rank Gaussian, around one anchor."""

    anchor: Amount = 0
    """Number of the anchor that training goes on from."""
    steps: Amount = 0
    """Steps of further training; 0: as many as a fine-tune has."""
    rate: Positive = 0.5
    """Constant learning rate, as a multiple of the fine-tune's peak."""
    collect: Count = 20
    """Iterates that are collected, evenly over the steps."""
    rank: Rank = 10
    """Deviations kept for the low-rank part."""
    scale: Positive = 1.0
    """Factor on the covariance."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.rank < 2 or self.collect < self.rank:
            raise UserError(
                f"rank, collect: expected 2 <= rank <= collect, found {self.rank} and {self.collect}; collect more"
            )

    def fit(self, setting: Setting) -> Fitted:
        """Go on training from an anchor; raises UserError for an anchor that is not there or too few steps."""
        adapters, cost = self._samples(setting, self.anchor, range(setting.samples))
        return from_adapters(setting, adapters, cost)

    def _samples(self, setting: Setting, anchor: int, numbers: range) -> tuple[ControlPoints, float]:
        """Samples [S, ...] around an anchor, a stream of draws for each number, and the cost of anchor and training."""
        start = {name: p[-1:] for name, p in setting.first(anchor + 1).items()}
        steps = self.steps or setting.training.steps
        if steps < self.collect:
            raise UserError(f"collect: expected at most one iterate a step, found {self.collect} in {steps} steps")
        config = replace(
            setting.training,
            steps=steps,
            learning_rate=self.rate * setting.training.learning_rate,
            schedule="constant",
            warmup=0.0,
            keep="last",
            evaluate_every=steps,
            patience=0,
        )
        one = OneAdapter(setting.model, start, config.capture)
        learner = _Collecting(one.values(), config, self)
        train(setting, one, learner, config, "SWAG", anchor)
        draws = (generator(setting.seed, "swag", s) for s in numbers)
        adapters = one.stack([learner.iterates.sample(draw, self.scale) for draw in draws])
        return adapters, 1 + steps * config.batch_size / setting.unit


@dataclass(frozen=True)
class MultiSWAG(SWAG):
    """SWAG around several anchors, which share the samples evenly (Wilson & Izmailov 2020, arXiv 2002.08791)."""

    modes: Slots = 3
    """Anchors with a Gaussian each, from `anchor` on."""

    def fit(self, setting: Setting) -> Fitted:
        """Go on training from each anchor; raises UserError as SWAG does, and for fewer samples than modes."""
        if self.modes > setting.samples:
            raise UserError(f"modes: expected at most one a sample, found {self.modes} for {setting.samples} samples")
        setting.first(self.anchor + self.modes)  # says which are missing before any is trained
        shares = [range(mode, setting.samples, self.modes) for mode in range(self.modes)]
        found = [self._samples(setting, self.anchor + mode, share) for mode, share in enumerate(shares)]
        adapters = {name: torch.cat([points[name] for points, _ in found]) for name in found[0][0]}
        weights = torch.tensor([1 / (self.modes * len(s)) for s in shares for _ in s], dtype=torch.float64)
        return from_adapters(setting, adapters, sum(cost for _, cost in found), weights)
