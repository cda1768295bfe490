"""Options of averages over points and of generated text. No torch here: options are read before it is imported."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from loracurve.curve.config import Rule
from loracurve.system.errors import UserError
from loracurve.system.ranges import (
    Amount,
    Count,
    NonNegative,
    Points,
    Positive,
    PositiveShare,
    Range,
    Rows,
    Seed,
    check_ranges,
)

__all__ = ["MOST_ALTERNATIVES", "EvaluationConfig", "GenerateConfig", "Measure", "TunnelConfig", "UnknownsConfig"]


MOST_ALTERNATIVES = 20

Measure = Literal["mutual_information", "expected_entropy", "entropy"]
"""What is shown of a generated token's uncertainty."""


@dataclass(frozen=True)
class TunnelConfig:
    """Posterior samples off the curve; drawing one costs two to six x thin predictions of `rows` rows."""

    sigma: Positive = 0.1
    """Standard deviation of the prior in each direction off the curve, as a part of the curve's length."""
    prior: Literal["uniform", "arc-length"] = "uniform"
    """Prior of the place along the curve: uniform in t or in length."""
    temperature: NonNegative = 0.0
    """T of the likelihood, which is raised to 1 / T; 0: the one that gives points on the curve the best average."""
    split: Literal["validation", "train"] = "validation"
    """Rows whose likelihood counts."""
    rows: Count = 256
    """At most so many of them, drawn once; their log-likelihood is scaled to the whole split."""
    warm_up: Amount = 20
    """States of the chain that are dropped at first."""
    thin: Count = 2
    """Of so many states one is kept."""

    def __post_init__(self) -> None:
        check_ranges(self, "tunnel")


@dataclass(frozen=True)
class EvaluationConfig:
    """How the curve is averaged and judged."""

    points: Points = 10
    """Points of the curve in the model average, that is forward passes at test time."""
    quadrature: Rule = "uniform"
    """uniform: equally spaced with both ends; gauss-legendre: nodes by segment; monte-carlo: random."""
    weights: Literal["uniform", "arc-length", "likelihood"] = "uniform"
    """Weights of the points. likelihood: proportional to exp(-N L(t) / T) with L the validation NLL of N rows."""
    temperature: NonNegative = 0.0
    """T of the likelihood weights; 0: fitted to the validation NLL of the average."""
    inference: Literal["curve", "tunnel"] = "curve"
    """curve: average points of the curve. tunnel: as many posterior samples in a tube around it, judged beside them."""
    tunnel: TunnelConfig = field(default_factory=TunnelConfig)
    """The tube and its sampler."""
    ood: list[str] = field(default_factory=list)
    """Data sets put into the same prompt to measure out-of-distribution detection."""
    seed: Seed = 0
    """Seed of Monte Carlo points and bootstrap intervals."""

    def __post_init__(self) -> None:
        check_ranges(self, "evaluation")


@dataclass(frozen=True)
class UnknownsConfig:
    """What tells known from unknown inputs beside the spread of the points."""

    gaussians: Literal["auto", "last_layer", "none"] = "auto"
    """last_layer: a Gaussian over the answer rows at every point. auto: the same, left out where it cannot be had."""
    tau: NonNegative = 0.0
    """Precision of the Gaussians' prior, one for all points; 0: found by `rule`."""
    rule: Literal["marginal", "validation"] = "validation"
    """marginal: the tau of the highest marginal likelihood. validation: the smallest whose validation NLL, as it is and
    after temperature, is within .3 % or 1e-4 nats of the best. Scores of whole texts always take the second."""
    familiarity: Literal["both", "curve", "base", "none"] = "both"
    """Distance from the training data by hidden states. curve: of its points, which see what is unlike the classes.
    base: of the untouched base, which sees other topics and formats. both: their sum. The base is a forward pass more.
    """
    measure: Literal["mahalanobis", "cosine"] = "mahalanobis"
    """mahalanobis: relative to the classes and to all rows. cosine: to the nearest training rows."""
    rows: Count = 3000
    """Training rows at most, drawn by the hash of their ids; their number is made up for."""

    def __post_init__(self) -> None:
        check_ranges(self, "unknowns")
        if self.measure == "cosine" and self.familiarity == "both":
            raise UserError("unknowns.familiarity: expected curve or base with measure cosine, found both; choose one")


@dataclass(frozen=True)
class GenerateConfig:
    """How text is decoded."""

    max_new_tokens: Count = 64
    """Most tokens to generate for each prompt."""
    temperature: NonNegative = 0.0
    """0: the most probable token of the average. Above: draws from the average, sharper below 1, flatter above 1."""
    top_p: PositiveShare = 1.0
    """Draw from the fewest tokens whose probability together reaches this."""
    weights: Literal["fixed", "sequence"] = "fixed"
    """fixed: the points have the same weights at each token. sequence: each weight is multiplied by the point's
    probability of the text generated so far, so that whole texts follow the mixture of the points."""
    batch_size: Rows = 8
    """Prompts decoded together, each at all points."""
    seed: Seed = 0
    """Seed of the draws; prompts have streams of their own, whatever the batch size."""
    alternatives: Annotated[int, Range(0, MOST_ALTERNATIVES)] = 0
    """How many of the most probable tokens to name at each place, with their log-probabilities."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.top_p < 1 and self.temperature == 0:
            raise UserError(f"top_p: expected 1 with temperature 0, which is greedy, found {self.top_p}; draw at 1.0")
