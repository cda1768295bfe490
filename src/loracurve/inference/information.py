"""Entropy, mixtures and divergences of predictions at several points, in nats.

Log-probabilities carry the points first: ``[n, E, C]`` for n points, E examples and C classes. A class that an example
does not have is a log-probability of -inf; it contributes nothing to any value or gradient.
"""

from __future__ import annotations

import math
from itertools import combinations

import torch
from torch import Tensor

__all__ = ["entropy", "jensen_shannon", "mixture_log_probs", "negative_log_likelihood", "pairwise_jensen_shannon"]


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
