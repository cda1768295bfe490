"""Likelihood and diversity of predictions at several points of a curve.

Log-probabilities carry the points first: ``[n, E, C]`` for n points, E examples and C classes. A class that an example
does not have is a log-probability of -inf; it contributes nothing to any value or gradient. All quantities are in nats.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from loracurve.inference.information import (
    jensen_shannon,
    negative_log_likelihood,
    pairwise_jensen_shannon,
)
from loracurve.tasks.encoding import UNLABELLED
from loracurve.training.config import ObjectiveConfig

__all__ = ["objective"]


def objective(
    log_probs: Tensor,
    labels: Tensor,
    config: ObjectiveConfig,
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
        jsd_log_probs: ``[n, E', C]`` at the same points on other inputs (corrupted, or without labels), on which
            the divergence is taken; None: the examples themselves.
        tau: target of the hinge in nats (`resolve_tau`); None: `config.tau`.
        whole: where these examples are one process's share of a batch: from their divergence to the batch's, by which
            the hinge decides. The shares' losses then add up to the batch's.

    Returns:
        The scalar loss in nats, and detached scalars ``nll`` (mean over points) and ``jsd``, the divergence that the
        term is made of: of the n points, for the hinge of their pairs (the same for n = 2).

    Raises:
        ValueError: a hinge without a target.
    """
    tau = config.tau if tau is None else tau
    if config.jsd == "hinge" and isinstance(tau, (int, float)) and not tau > 0:
        raise ValueError(f"expected a hinge target tau > 0 from resolve_tau, found {tau}")
    known = labels != UNLABELLED
    nll = negative_log_likelihood(log_probs, labels.masked_fill(~known, 0)).masked_fill(~known, 0)

    def mean(values: Tensor) -> Tensor:
        return values.masked_fill(~known, 0).sum() / known.expand_as(values).sum().clamp_min(1)

    def divergence(of: Tensor) -> Tensor:
        return pairwise_jensen_shannon(of) if config.jsd == "hinge" else jensen_shannon(of)

    mean_nll = mean(nll)
    with torch.set_grad_enabled(torch.is_grad_enabled() and config.jsd != "none"):
        jsd = mean(divergence(log_probs)) if jsd_log_probs is None else divergence(jsd_log_probs).mean()
    loss = mean_nll
    if config.jsd == "bonus":
        loss = mean_nll - config.weight * jsd
    elif config.jsd == "hinge":
        short = tau - jsd
        loss = mean_nll + config.weight * (short.clamp_min(0) if whole is None else short * (whole(jsd.detach()) < tau))
    return loss, {"nll": mean_nll.detach(), "jsd": jsd.detach()}
