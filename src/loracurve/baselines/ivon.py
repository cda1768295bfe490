"""IVON (Shen et al. 2024, arXiv 2402.17641) by ivon-opt: an optimiser that learns a diagonal Gaussian over the adapter.

Defaults as for LoRA in Cong et al. 2024 (arXiv 2411.04421). Every forward pass sees one weight sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from loracurve.baselines.method import Fitted, Setting, fit_notes, from_adapters
from loracurve.baselines.single_adapter_loop import NllAt, OneAdapter, fresh_adapter, train
from loracurve.system.errors import UserError
from loracurve.system.randomness import stream_seed
from loracurve.system.ranges import Count, NonNegative, PartBelowOne, Positive, check_ranges

__all__ = ["IVON"]


RATE = 0.3  # At 1 a small model does not leave the majority class on some tasks (results/suites/ivon.yaml).


@dataclass(frozen=True)
class IVON:
    """A diagonal Gaussian over all weights of an adapter, trained by IVON."""

    learning_rate: NonNegative = 0.0
    """Peak learning rate; follows the schedule of the fine-tune. 0: `RATE` times the fine-tune's own divided by
    `clip_radius`, so that the longest steps are 0.3 times as long (they take 3e-5 beside AdamW's 5e-5)."""
    effective_samples: Positive = 1e7
    """Effective sample size: the posterior's precision is this times (Hessian + weight_decay). Far above the number of
    examples: a cold posterior. They take 1e6 to 1e8 by task."""
    hessian: Positive = 3e-4
    """Start of the diagonal Hessian; they take 3e-4 or 1e-3 by task."""
    betas: tuple[PartBelowOne, PartBelowOne] = (0.9, 0.99999)
    """Decay rates of gradient and Hessian averages."""
    weight_decay: NonNegative = 0.0
    """Precision of the prior, divided by the effective sample size."""
    clip_radius: Positive = 1e-3
    """A weight moves by at most the learning rate times this in a step."""
    passes: Count = 1
    """Weight samples, and so forward-backward passes, in a training step."""

    def __post_init__(self) -> None:
        check_ranges(self)

    def fit(self, setting: Setting) -> Fitted:
        """Train one adapter from scratch; raises UserError where ivon-opt is not installed."""
        config = setting.training
        one = OneAdapter(setting.model, fresh_adapter(setting), config.capture)
        rate = self.learning_rate or RATE * config.learning_rate / self.clip_radius
        learner = _Variational(one.values(), replace(self, learning_rate=rate))
        result = train(setting, one, learner, config, "IVON")
        drawn = [learner.sample(stream_seed(setting.seed, "ivon test", s)) for s in range(setting.samples)]
        cost = self.passes * result.steps * config.batch_size / setting.unit
        return from_adapters(setting, one.stack(drawn), cost, notes=fit_notes(result))


def _library() -> Any:
    try:
        import ivon
    except ImportError as error:
        raise UserError("IVON needs the package ivon-opt, found none; pip install 'loracurve[ivon]'") from error
    return ivon


class _Variational:
    """The learner: parameters and the library's optimiser, which holds the Hessian."""

    def __init__(self, start: list[Tensor], method: IVON) -> None:
        self.method = method
        self.parameters = [torch.nn.Parameter(v) for v in start]
        self.optimizer = _library().IVON(
            self.parameters,
            lr=method.learning_rate,
            ess=method.effective_samples,
            hess_init=method.hessian,
            beta1=method.betas[0],
            beta2=method.betas[1],
            weight_decay=method.weight_decay,
            mc_samples=method.passes,
            clip_radius=method.clip_radius,
            rescale_lr=False,
        )

    def step(self, nll_at: NllAt, step: int, factor: float) -> float:
        # The library draws from the global generator, which the loop seeds by the step.
        self.optimizer.param_groups[0]["lr"] = self.method.learning_rate * factor
        total = 0.0
        for _ in range(self.method.passes):
            with self.optimizer.sampled_params(train=True):
                nll, gradients = nll_at([p.detach() for p in self.parameters])
                total += nll / self.method.passes
                for p, gradient in zip(self.parameters, gradients, strict=True):
                    p.grad = gradient
        self.optimizer.step()
        return total

    def sample(self, seed: int) -> list[Tensor]:
        """An adapter drawn from the posterior."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            with self.optimizer.sampled_params():
                return [p.detach().clone() for p in self.parameters]

    def adapter(self) -> Sequence[Tensor]:
        return self.parameters

    def state(self) -> Sequence[Tensor]:
        return [*self.parameters, *(group["hess"] for group in self.optimizer.param_groups)]
