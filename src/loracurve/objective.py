"""Likelihood and diversity of predictions at several points of a curve.

Log-probabilities carry the points first: ``[n, E, C]`` for n points, E examples and C classes. A class that an example
does not have is a log-probability of -inf; it contributes nothing to any value or gradient. All quantities are in nats.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor

from loracurve.errors import UserError

__all__ = [
    "ObjectiveConfig",
    "entropy",
    "jensen_shannon",
    "mixture_log_probs",
    "negative_log_likelihood",
    "objective",
    "pairwise_jensen_shannon",
]


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is minimised besides the mean negative log-likelihood of the curve points."""

    jsd: Literal["none", "mixture", "bonus"] = "none"
    """Diversity term. mixture: (1 - weight) mean NLL + weight NLL of the averaged prediction. bonus: mean NLL - weight
    x Jensen-Shannon divergence of the points' predictions."""

    weight: float = 0.0
    """Weight of the diversity term: 0 to 1 for mixture, at least 0 for bonus. A bonus above 1 pays for diversity that
    the data do not license."""

    def __post_init__(self) -> None:
        if self.jsd not in ("none", "mixture", "bonus"):
            raise UserError(f"objective.jsd: expected none, mixture or bonus, found {self.jsd!r}; choose one of them")
        if self.jsd == "none" and self.weight != 0:
            raise UserError(
                f"objective.weight: expected 0 with jsd 'none', found {self.weight}; set jsd to mixture or bonus"
            )
        if self.jsd == "mixture" and not 0 <= self.weight <= 1:
            raise UserError(f"objective.weight: expected 0 to 1 with jsd 'mixture', found {self.weight}; lower it")
        if self.jsd == "bonus" and not 0 <= self.weight < math.inf:
            raise UserError(
                f"objective.weight: expected a number >= 0 with jsd 'bonus', found {self.weight}; change it"
            )
        if self.jsd == "bonus" and self.weight > 1:
            # To second order NLL - JSD is the averaged prediction's NLL, so 1 is all that the likelihood supports.
            warnings.warn(f"JSD bonus of weight {self.weight} > 1 rewards more diversity than the data", stacklevel=3)


def entropy(log_probs: Tensor) -> Tensor:
    """Shannon entropy -sum_c p_c log p_c in nats, ``[..., C] -> [...]``; 0 log 0 is 0."""
    # Masked before the product: 0 * -inf would be NaN forward and backward.
    return -(log_probs.exp() * log_probs.masked_fill(log_probs.isneginf(), 0)).sum(-1)


def mixture_log_probs(log_probs: Tensor, weights: Tensor | None = None) -> Tensor:
    """log sum_i w_i p_i: the average over points in probability space, never of logits.

    Args:
        log_probs: ``[n, ...]``.
        weights: ``[n]``, non-negative, summing to 1; equal weights if None.

    Returns:
        ``[...]``; -inf where every point gives probability 0.
    """
    if weights is None:
        terms = log_probs - math.log(len(log_probs))
    else:
        terms = log_probs + weights.to(log_probs).log().reshape(-1, *[1] * (log_probs.dim() - 1))
    absent = terms.isneginf().all(0)  # logsumexp of nothing but -inf has a NaN gradient
    return terms.masked_fill(absent, 0).logsumexp(0).masked_fill(absent, -math.inf)


def jensen_shannon(log_probs: Tensor, weights: Tensor | None = None) -> Tensor:
    """Generalised Jensen-Shannon divergence H[sum_i w_i p_i] - sum_i w_i H[p_i] in nats (Lin 1991, sec. V).

    The same number is the mutual information between the label and the point (Houlsby et al. 2011, eq. 2).

    Args:
        log_probs: ``[n, E, C]``.
        weights: ``[n]``, non-negative, summing to 1; equal weights if None.

    Returns:
        ``[E]``, between 0 and log min(n, C) up to rounding.
    """
    at_points = entropy(log_probs)
    mean = at_points.mean(0) if weights is None else weights.to(at_points) @ at_points
    return entropy(mixture_log_probs(log_probs, weights)) - mean


def pairwise_jensen_shannon(log_probs: Tensor) -> Tensor:
    """Mean over pairs i < j of points of their Jensen-Shannon divergence, ``[n, E, C]`` to ``[E]``; 0 if n = 1.

    The points of one posterior give the same expected value whatever their number; `jensen_shannon` grows with it.
    A measure, not a loss: its gradient is not finite where probabilities are 0.
    """
    probs = log_probs.exp()
    # Pair by pair in probability space, each point's own entropy once: a vocabulary times all pairs is what takes time.
    mixtures = [torch.special.entr((a + b) / 2).sum(-1) for a, b in combinations(probs, 2)]
    at_points = entropy(log_probs).mean(0)
    return torch.stack(mixtures).mean(0) - at_points if mixtures else torch.zeros_like(at_points)


def negative_log_likelihood(log_probs: Tensor, labels: Tensor) -> Tensor:
    """-log p(label) in nats, ``[..., E, C]`` and labels ``[E]`` to ``[..., E]``; inf if the label has probability 0."""
    index = labels.expand(log_probs.shape[:-1]).unsqueeze(-1)
    return -log_probs.gather(-1, index).squeeze(-1)


def objective(
    log_probs: Tensor, labels: Tensor, config: ObjectiveConfig, example_weights: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one batch at n curve points, a mean over points and examples.

    Args:
        log_probs: normalised log-probabilities ``[n, E, C]``.
        labels: class numbers ``[E]``.
        config: form and weight of the diversity term.
        example_weights: ``[E]``, or ``[n, E]`` where they change along the curve (bootstrap). They multiply and are
            not normalised in the batch, which would bias it: let them average 1 over the data set. The diversity
            term uses their mean over points.

    Returns:
        The scalar loss in nats, and detached scalars ``nll`` (mean over points) and ``jsd``.
    """
    nll = negative_log_likelihood(log_probs, labels)
    per_example = example_weights
    if example_weights is not None and example_weights.dim() == 2:
        per_example = example_weights.mean(0)

    def mean(values: Tensor, weights: Tensor | None) -> Tensor:
        return values.mean() if weights is None else (weights * values).mean()

    mean_nll = mean(nll, example_weights)
    jsd = mean(jensen_shannon(log_probs if config.jsd == "bonus" else log_probs.detach()), per_example)
    loss = mean_nll
    if config.jsd == "mixture":
        loss = (1 - config.weight) * mean_nll + config.weight * mean(-mixture_log_probs(-nll), per_example)
    elif config.jsd == "bonus":
        loss = mean_nll - config.weight * jsd
    return loss, {"nll": mean_nll.detach(), "jsd": jsd.detach()}
