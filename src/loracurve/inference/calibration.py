"""Turning predictions into ones with guarantees: temperature, abstention and prediction sets, from held-out data."""

from __future__ import annotations

import math
from dataclasses import dataclass

from scipy.stats import beta, binom
from torch import Tensor

from loracurve.inference.information import negative_log_likelihood
from loracurve.inference.predictive import Predictive
from loracurve.system.errors import UserError

__all__ = [
    "SelectiveThreshold",
    "apply_temperature",
    "conformal_quantile",
    "fit_temperature",
    "prediction_sets",
    "selective_threshold",
    "tempered",
]


_LOG_TEMPERATURES = (math.log(1e-2), math.log(1e2))

_LEVELS = 20  # coverages at which a threshold is tested


def apply_temperature(log_probs: Tensor, temperature: float) -> Tensor:
    """log softmax(log_probs / T), ``[..., C]``; classes at -inf stay there (Guo et al. 2017, eq. 9)."""
    return (log_probs / temperature).log_softmax(-1)


def fit_temperature(log_probs: Tensor, labels: Tensor) -> float:
    """The T in [0.01, 100] that minimises the NLL of `apply_temperature` (Guo et al. 2017).

    Args:
        log_probs: ``[E, C]``. For a `Predictive` its `log_probs`: the average is tempered, not the points.
        labels: ``[E]``; rows without one (negative) do not count.

    Raises:
        UserError: no labelled examples.
        ValueError: a label of probability 0.
    """
    log_probs, labels = log_probs[labels >= 0], labels[labels >= 0]
    if not len(labels):
        raise UserError("temperature: expected labelled validation examples, found none; give a validation split")
    log_probs = log_probs.detach().double()
    if not negative_log_likelihood(log_probs, labels).isfinite().all():
        raise ValueError("expected every label to have a finite log-probability, found one without")

    def nll(log_temperature: float) -> float:
        found = apply_temperature(log_probs, math.exp(log_temperature))
        return negative_log_likelihood(found, labels).mean().item()

    # Convex in 1 / T, so there is one minimum: golden-section search finds it. By hand, because the NLL is flat to the
    # last bit over some 1e-8 of T: any other search stops elsewhere, and tables of stored predictions would change.
    shrink = (math.sqrt(5) - 1) / 2
    low, high = _LOG_TEMPERATURES
    left, right = high - shrink * (high - low), low + shrink * (high - low)
    at_left, at_right = nll(left), nll(right)
    while high - low > 1e-7:
        if at_left < at_right:
            high, right, at_right = right, left, at_left
            left = high - shrink * (high - low)
            at_left = nll(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + shrink * (high - low)
            at_right = nll(right)
    return math.exp((low + high) / 2)


def tempered(predictive: Predictive, temperature: float) -> Predictive:
    """The average of the points at a temperature: one distribution, so that it has no mutual information."""
    return Predictive.from_log_probs(apply_temperature(predictive.log_probs, temperature)[None])


@dataclass(frozen=True)
class SelectiveThreshold:
    """A rule for answering and what it guarantees: answer where uncertainty < threshold."""

    threshold: float | None
    """None where nothing was certified: abstain always."""
    coverage: float
    """Share of the calibration examples that would be answered."""
    selective_risk: float | None
    """Error rate among those."""
    risk_bound: float | None
    """Upper confidence bound on the error rate among answered examples (Clopper & Pearson 1934), at most `risk`."""
    risk: float
    """The error rate asked for."""
    delta: float
    """Probability, over the calibration sample, that the guarantee fails."""
    examples: int
    """Size of the calibration sample."""
    reason: str | None = None
    """Why nothing was certified."""

    def answered(self, uncertainty: Tensor) -> Tensor:
        """Where to answer, bool of the same shape."""
        return uncertainty < (-math.inf if self.threshold is None else self.threshold)


def selective_threshold(uncertainty: Tensor, errors: Tensor, risk: float, delta: float) -> SelectiveThreshold:
    """The threshold of largest coverage whose selective risk is certified to be at most `risk`.

    P(error | uncertainty < threshold) <= risk with probability >= 1 - delta over an i.i.d. calibration sample.
    Learn-then-Test (Angelopoulos et al. 2021) with Bonferroni over 20 coverages fixed beforehand, and the exact
    binomial tail of SGR (Geifman & El-Yaniv 2017, lemma 3.1) as p-value. Each candidate is an order statistic; given
    its value the examples strictly below are an i.i.d. sample of the answered ones, so ties and the data-dependent
    threshold cost nothing. (Fixed-sequence testing would save the Bonferroni factor, but its first hypotheses have
    too few examples to be rejected.)

    Args:
        uncertainty: ``[E]``, of examples that neither training nor any choice has seen.
        errors: ``[E]`` bool.
        risk: error rate to guarantee, in (0, 1).
        delta: allowed failure probability, in (0, 1).

    Raises:
        UserError: risk or delta outside (0, 1), or no examples.
        ValueError: NaN among the uncertainties.
    """
    for name, number in (("risk", risk), ("delta", delta)):
        if not 0 < number < 1:
            raise UserError(f"{name}: expected a number between 0 and 1, found {number}; choose e.g. 0.05")
    examples = len(errors)
    if not examples:
        raise UserError("selective threshold: expected calibration examples, found none; give a validation split")
    if uncertainty.isnan().any():
        raise ValueError("expected uncertainties that can be ranked, found NaN")
    ordered, order = uncertainty.double().sort()
    cumulative = errors.bool()[order].cumsum(0)
    for level in range(_LEVELS, 0, -1):
        threshold = ordered[math.ceil(examples * level / _LEVELS) - 1]
        answered = int((ordered < threshold).sum())
        if answered == 0:
            continue
        wrong = int(cumulative[answered - 1])
        if binom.cdf(wrong, answered, risk) <= delta / _LEVELS:
            return SelectiveThreshold(
                threshold=threshold.item(),
                coverage=answered / examples,
                selective_risk=wrong / answered,
                risk_bound=float(beta.isf(delta / _LEVELS, wrong + 1, answered - wrong)),
                risk=risk,
                delta=delta,
                examples=examples,
            )
    needed = math.ceil(math.log(delta / _LEVELS) / math.log1p(-risk))
    return SelectiveThreshold(
        threshold=None,
        coverage=0.0,
        selective_risk=None,
        risk_bound=None,
        risk=risk,
        delta=delta,
        examples=examples,
        reason=f"no threshold certified for risk {risk} at delta {delta}: that takes at least {needed} answered "
        f"examples without an error, of {examples} in the calibration sample; allow more risk or give more examples",
    )


def conformal_quantile(probs: Tensor, labels: Tensor, alpha: float) -> float:
    """Split-conformal quantile of the scores 1 - p(label) (LAC; Sadinle, Lei & Wasserman 2019).

    The k-th smallest of n scores with k = ceil((n + 1)(1 - alpha)); 1 if k > n, the largest possible score.

    Args:
        probs: ``[n, C]``.
        labels: ``[n]``.
        alpha: allowed share of sets without the label, in (0, 1).

    Raises:
        UserError: alpha outside (0, 1), or no examples.
    """
    if not 0 < alpha < 1:
        raise UserError(f"alpha: expected a number between 0 and 1, found {alpha}; choose e.g. 0.1")
    if not len(labels):
        raise UserError("conformal sets: expected calibration examples, found none; give a validation split")
    scores = 1 - probs.double().gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    rank = math.ceil(round((len(scores) + 1) * (1 - alpha), 9))  # 10 * (1 - 0.7) is above 3 in floating point
    return scores.sort().values[rank - 1].item() if rank <= len(scores) else 1.0


def prediction_sets(probs: Tensor, quantile: float) -> Tensor:
    """Classes with 1 - p <= quantile, ``[E, C]`` bool; contains the label with probability >= 1 - alpha.

    The probability is over calibration sample and test example together. Classes of probability 0 (absent ones) are
    never in the set.

    Args:
        probs: ``[E, C]``.
        quantile: from `conformal_quantile`, of probabilities made in the same way.
    """
    probs = probs.double()
    return (1 - probs <= quantile) & (probs > 0)
