"""Options of averages over points and of generated text. No torch here: options are read before it is imported."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from loracurve.curve.config import Rule
from loracurve.system.errors import UserError

__all__ = ["EvaluationConfig", "GenerateConfig", "TunnelConfig", "Measure"]


Measure = Literal["mutual_information", "expected_entropy", "entropy"]
"""What is shown of a generated token's uncertainty."""


@dataclass(frozen=True)
class TunnelConfig:
    """Posterior samples off the curve; drawing one costs two to six x thin predictions of `rows` rows."""

    sigma: float = 0.1
    """Standard deviation of the prior in each direction off the curve, as a part of the curve's length."""
    prior: Literal["uniform", "arc-length"] = "uniform"
    """Prior of the place along the curve: uniform in t or in length."""
    temperature: float = 0.0
    """T of the likelihood, which is raised to 1 / T; 0: the one that gives points on the curve the best average."""
    split: Literal["validation", "train"] = "validation"
    """Rows whose likelihood counts."""
    rows: int = 256
    """At most so many of them, drawn once; their log-likelihood is scaled to the whole split."""
    warm_up: int = 20
    """States of the chain that are dropped at first."""
    thin: int = 2
    """Of so many states one is kept."""

    def __post_init__(self) -> None:
        if not 0 < self.sigma < math.inf:
            raise UserError(f"tunnel.sigma: expected a part of the curve's length > 0, found {self.sigma}; try 0.1")
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"tunnel.temperature: expected a number >= 0, found {self.temperature}; 0 fits it")
        if self.rows < 1 or self.thin < 1 or self.warm_up < 0:
            raise UserError(
                f"tunnel: expected rows and thin >= 1 and warm_up >= 0, found {self.rows}, {self.thin} and "
                f"{self.warm_up}"
            )


@dataclass(frozen=True)
class EvaluationConfig:
    """How the curve is averaged and judged."""

    points: int = 10
    """Points of the curve in the model average, that is forward passes at test time."""
    quadrature: Rule = "uniform"
    """uniform: equally spaced with both ends; gauss-legendre: nodes by segment; monte-carlo: random."""
    weights: Literal["uniform", "arc-length", "likelihood"] = "uniform"
    """Weights of the points. likelihood: proportional to exp(-N L(t) / T) with L the validation NLL of N rows."""
    temperature: float = 0.0
    """T of the likelihood weights; 0: fitted to the validation NLL of the average."""
    inference: Literal["curve", "tunnel"] = "curve"
    """curve: average points of the curve. tunnel: as many posterior samples in a tube around it, judged beside them."""
    tunnel: TunnelConfig = field(default_factory=TunnelConfig)
    """The tube and its sampler."""
    ood: list[str] = field(default_factory=list)
    """Data sets put into the same prompt to measure out-of-distribution detection."""
    seed: int = 0
    """Seed of Monte Carlo points and bootstrap intervals."""

    def __post_init__(self) -> None:
        if self.points < 1:
            raise UserError(f"points: expected at least 1, found {self.points}; ask for 10")
        if not 0 <= self.temperature < math.inf:
            raise UserError(
                f"evaluation.temperature: expected a number >= 0, found {self.temperature}; 0 fits it to validation"
            )


@dataclass(frozen=True)
class GenerateConfig:
    """How text is decoded."""

    max_new_tokens: int = 64
    """Most tokens to generate for each prompt."""
    temperature: float = 0.0
    """0: the most probable token of the average. Above: draws from the average, sharper below 1, flatter above 1."""
    top_p: float = 1.0
    """Draw from the fewest tokens whose probability together reaches this."""
    weights: Literal["fixed", "sequence"] = "fixed"
    """fixed: the points have the same weights at each token. sequence: each weight is multiplied by the point's
    probability of the text generated so far, so that whole texts follow the mixture of the points."""
    batch_size: int = 8
    """Prompts decoded together, each at all points."""
    seed: int = 0
    """Seed of the draws; prompts have streams of their own, whatever the batch size."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: expected at least 1, found {getattr(self, name)}")
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature: expected a number >= 0, found {self.temperature}; 0 is greedy")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p: expected a number above 0 and at most 1, found {self.top_p}")
        if self.top_p < 1 and self.temperature == 0:
            raise UserError(f"top_p: expected 1 with temperature 0, which is greedy, found {self.top_p}; draw at 1.0")
