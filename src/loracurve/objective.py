"""Likelihood and diversity of predictions at several points of a curve.

Log-probabilities carry the points first: ``[n, E, C]`` for n points, E examples and C classes. A class that an example
does not have is a log-probability of -inf; it contributes nothing to any value or gradient. All quantities are in nats.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
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
    "resolve_tau",
]

# Label of an example that has none; it is left out of every mean.
UNLABELLED = -100


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is minimised besides the mean negative log-likelihood of the curve points."""

    jsd: Literal["none", "mixture", "bonus", "hinge"] = "none"
    """Diversity term. mixture: (1 - weight) mean NLL + weight NLL of the averaged prediction. bonus: mean NLL - weight
    x Jensen-Shannon divergence of the points' predictions. hinge: mean NLL + weight x max(tau - mean pairwise
    divergence, 0)."""

    weight: float = 0.0
    """Weight of the diversity term: 0 to 1 for mixture, at least 0 for bonus and hinge. A bonus above 1 pays for
    diversity that the data do not license. The paper's authors use a hinge of weight 5."""

    tau: float = 0.0
    """hinge: the divergence that a pair of points shall have on the average of a batch, in nats (the paper's authors:
    0.1). 0: tau_relative decides."""

    tau_relative: float = 1.0
    """hinge: the same as a multiple of the anchors' mean pairwise divergence on validation data."""

    def __post_init__(self) -> None:
        forms = ("none", "mixture", "bonus", "hinge")
        if self.jsd not in forms:
            raise UserError(f"objective.jsd: expected one of {', '.join(forms)}, found {self.jsd!r}; choose one")
        if self.jsd == "none" and self.weight != 0:
            raise UserError(
                f"objective.weight: expected 0 with jsd 'none', found {self.weight}; set jsd to mixture, bonus or hinge"
            )
        if self.jsd == "mixture" and not 0 <= self.weight <= 1:
            raise UserError(f"objective.weight: expected 0 to 1 with jsd 'mixture', found {self.weight}; lower it")
        if not 0 <= self.weight < math.inf:
            raise UserError(
                f"objective.weight: expected a number >= 0 with jsd {self.jsd!r}, found {self.weight}; change it"
            )
        if not 0 <= self.tau < math.inf:
            raise UserError(f"objective.tau: expected a number of nats >= 0, found {self.tau}; change it")
        if not 0 < self.tau_relative < math.inf:
            raise UserError(f"objective.tau_relative: expected a number > 0, found {self.tau_relative}; change it")
        if self.jsd != "hinge" and (self.tau, self.tau_relative) != (0, 1):
            raise UserError(
                f"objective.tau: expected none with jsd {self.jsd!r}, found tau {self.tau} and tau_relative "
                f"{self.tau_relative}; set jsd to hinge"
            )
        if self.tau and self.tau_relative != 1:
            raise UserError(
                f"objective.tau: expected tau or tau_relative, found {self.tau} and {self.tau_relative}; leave one out"
            )
        if self.jsd == "bonus" and self.weight > 1:
            # To second order NLL - JSD is the averaged prediction's NLL, so 1 is all that the likelihood supports.
            warnings.warn(f"JSD bonus of weight {self.weight} > 1 rewards more diversity than the data", stacklevel=3)
        if self.tau >= math.log(2):
            warnings.warn(f"hinge target tau {self.tau} is beyond log 2, which no pair of points reaches", stacklevel=3)


def resolve_tau(config: ObjectiveConfig, anchor_jsd: float | None) -> float:
    """The target of the hinge in nats: `config.tau`, or `config.tau_relative` times what the anchors have.

    Args:
        config: form and target; other forms than the hinge have target 0.
        anchor_jsd: the anchors' mean pairwise Jensen-Shannon divergence on validation data (the mean over examples of
            `pairwise_jensen_shannon`), in nats; None for a free curve.

    Raises:
        UserError: a relative target without anchors, or with anchors that predict the same.
    """
    if config.jsd != "hinge":
        return 0.0
    if config.tau > 0:
        return config.tau
    if anchor_jsd is None:
        raise UserError(
            "objective.tau: expected a target in nats for a free curve, which has no anchors to measure it by, "
            "found 0; set tau, for instance to 0.02"
        )
    if not 0 < anchor_jsd < math.inf:
        raise UserError(
            f"objective.tau_relative: expected anchors whose predictions differ, found a divergence of {anchor_jsd} "
            "nats; set tau"
        )
    return config.tau_relative * anchor_jsd


def entropy(log_probs: Tensor) -> Tensor:
    """Shannon entropy -sum_c p_c log p_c in nats, ``[..., C] -> [...]``; 0 log 0 is 0."""
    # Masked before the product: 0 * -inf would be NaN forward and backward.
    return -(log_probs.exp() * log_probs.masked_fill(log_probs.isneginf(), 0)).sum(-1)


def mixture_log_probs(log_probs: Tensor, weights: Tensor | None = None) -> Tensor:
    """log sum_i w_i p_i: the average over points in probability space, never of logits.

    Args:
        log_probs: ``[n, ...]``.
        weights: ``[n]``, or ``[n, E]`` where each example has its own; non-negative, summing to 1 over the points.
            Equal weights if None.

    Returns:
        ``[...]``; -inf where every point gives probability 0.
    """
    if weights is None:
        terms = log_probs - math.log(len(log_probs))
    else:
        each = weights.to(log_probs).log()
        terms = log_probs + each.reshape(*each.shape, *[1] * (log_probs.dim() - each.dim()))
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
    """
    probs = log_probs.exp()
    # Pair by pair in probability space, each point's own entropy once: a vocabulary times all pairs is what takes time.
    # The slope of p log p is infinite at 0; below the clamp there is none.
    least = torch.finfo(probs.dtype).tiny
    mixtures = [torch.special.entr(((a + b) / 2).clamp_min(least)).sum(-1) for a, b in combinations(probs, 2)]
    at_points = entropy(log_probs).mean(0)
    return torch.stack(mixtures).mean(0) - at_points if mixtures else torch.zeros_like(at_points)


def negative_log_likelihood(log_probs: Tensor, labels: Tensor) -> Tensor:
    """-log p(label) in nats, ``[..., E, C]`` and labels ``[E]`` to ``[..., E]``; inf if the label has probability 0."""
    index = labels.expand(log_probs.shape[:-1]).unsqueeze(-1)
    return -log_probs.gather(-1, index).squeeze(-1)


def objective(
    log_probs: Tensor,
    labels: Tensor,
    config: ObjectiveConfig,
    example_weights: Tensor | None = None,
    jsd_log_probs: Tensor | None = None,
    tau: float | Tensor | None = None,
    whole: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one batch at n curve points, a mean over points and labelled examples.

    Examples with label -100 enter nothing. Nothing here looks at a value: it can be captured in a CUDA graph.

    Args:
        log_probs: normalised log-probabilities ``[n, E, C]``.
        labels: class numbers ``[E]``; -100: none.
        config: form and weight of the diversity term.
        example_weights: ``[E]``, or ``[n, E]`` where they change along the curve (bootstrap). They multiply and are
            not normalised in the batch, which would bias it: let them average 1 over the data set. The diversity
            term uses their mean over points.
        jsd_log_probs: ``[n, E', C]`` at the same points on other inputs (corrupted, or without labels), on which
            bonus and hinge take the divergence, every one with weight 1; None: the examples themselves. The mixture
            needs labels and does not take them.
        tau: target of the hinge in nats (`resolve_tau`); None: `config.tau`.
        whole: where these examples are one process's share of a batch: from their divergence to the batch's, by which
            the hinge decides. The shares' losses then add up to the batch's.

    Returns:
        The scalar loss in nats, and detached scalars ``nll`` (mean over points) and ``jsd``, the divergence that the
        term is made of: of the n points, for the hinge of their pairs (the same for n = 2).

    Raises:
        ValueError: a hinge without a target, a mixture with `jsd_log_probs`.
    """
    if config.jsd == "mixture" and jsd_log_probs is not None:
        raise ValueError("expected no other inputs for the mixture, which needs labels, found some")
    tau = config.tau if tau is None else tau
    if config.jsd == "hinge" and isinstance(tau, (int, float)) and not tau > 0:
        raise ValueError(f"expected a hinge target tau > 0 from resolve_tau, found {tau}")
    known = labels != UNLABELLED
    nll = negative_log_likelihood(log_probs, labels.masked_fill(~known, 0)).masked_fill(~known, 0)
    per_example = example_weights
    if example_weights is not None and example_weights.dim() == 2:
        per_example = example_weights.mean(0)

    def mean(values: Tensor, weights: Tensor | None) -> Tensor:
        values = values if weights is None else weights.to(values) * values
        return values.masked_fill(~known, 0).sum() / known.expand_as(values).sum().clamp_min(1)

    def divergence(of: Tensor) -> Tensor:
        return pairwise_jensen_shannon(of) if config.jsd == "hinge" else jensen_shannon(of)

    mean_nll = mean(nll, example_weights)
    with torch.set_grad_enabled(torch.is_grad_enabled() and config.jsd in ("bonus", "hinge")):
        jsd = mean(divergence(log_probs), per_example) if jsd_log_probs is None else divergence(jsd_log_probs).mean()
    loss = mean_nll
    if config.jsd == "mixture":
        loss = (1 - config.weight) * mean_nll + config.weight * mean(-mixture_log_probs(-nll), per_example)
    elif config.jsd == "bonus":
        loss = mean_nll - config.weight * jsd
    elif config.jsd == "hinge":
        short = tau - jsd
        loss = mean_nll + config.weight * (short.clamp_min(0) if whole is None else short * (whole(jsd.detach()) < tau))
    return loss, {"nll": mean_nll.detach(), "jsd": jsd.detach()}
