"""Turning predictions into ones with guarantees: temperature, abstention and prediction sets, from held-out data."""

from __future__ import annotations

import math
from dataclasses import dataclass

from scipy.stats import beta, binom
from torch import Tensor

from loracurve.inference.information import negative_log_likelihood
from loracurve.inference.predictive import Predictive
from loracurve.system.errors import UserError
from loracurve.system.ranges import OpenShare, in_range

__all__ = [
    "TEMPERATURES",
    "SelectiveThreshold",
    "apply_temperature",
    "conformal_quantile",
    "fit_temperature",
    "possible_errors",
    "prediction_sets",
    "selective_threshold",
    "tempered",
]


TEMPERATURES = (1e-2, 1e2)
"""the lowest and the highest that is fitted"""

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
    low, high = map(math.log, TEMPERATURES)
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
    """Share of the calibration examples that are answered in whatever batch they stand; at least so many."""
    selective_risk: float | None
    """Error rate among the answered ones, in the batch that makes it largest."""
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
    tolerance: float = 0.0
    """By how much the uncertainty of an example may differ between batches without harm to the guarantee."""

    def answered(self, uncertainty: Tensor) -> Tensor:
        """Where to answer, bool of the same shape."""
        return uncertainty < (-math.inf if self.threshold is None else self.threshold)


def possible_errors(probs: Tensor, labels: Tensor, tolerance: float) -> Tensor:
    """Where another class than the label may be the most probable one, bool ``[E]``, if rounding decides against us.

    Args:
        probs: ``[E, C]``.
        labels: ``[E]``.
        tolerance: by how much a probability may differ between batches.
    """
    column = labels.unsqueeze(-1)
    others = probs.scatter(-1, column, -math.inf).amax(-1)
    return probs.gather(-1, column).squeeze(-1) - others <= 2 * tolerance


def selective_threshold(
    uncertainty: Tensor, errors: Tensor, risk: float, delta: float, tolerance: float = 0.0
) -> SelectiveThreshold:
    """The threshold of largest coverage whose selective risk is certified to be at most `risk`.

    P(error | uncertainty < threshold) <= risk with probability >= 1 - delta over an i.i.d. calibration sample.
    Learn-then-Test (Angelopoulos et al. 2021) with Bonferroni over 20 coverages fixed beforehand, and the exact
    binomial tail of SGR (Geifman & El-Yaniv 2017, lemma 3.1) as p-value. Each candidate is an order statistic; given
    its value the examples strictly below are an i.i.d. sample of the answered ones, so ties and the data-dependent
    threshold cost nothing. (Fixed-sequence testing would save the Bonferroni factor, but its first hypotheses have
    too few examples to be rejected.)

    With a tolerance d > 0 the guarantee holds whatever the batches do, as long as two values u of one example differ by
    at most d. Let s, within d / 2 of all of them, be the example's own value: those are i.i.d., and their order
    statistic v is within d / 2 of the measured one, q. For a threshold q - c, the answered set then lies between
    {s < v - c - d} and {s < v - c + d}. Its risk is largest for all of the inner set and only the errors between: a set
    that v determines and, for c = 2 d, examples strictly below v, so that the argument above applies to it. All errors
    with u < q and no correct examples but those with u < q - 4 d are counted: a larger p-value than its own. As the
    sets for larger c contain each other and so do the hypotheses, the counts also certify all thresholds as far as they
    stay the same: where nothing was measured in (q - 4 d, q) the threshold is put into the middle of the gap below q,
    and an example's being answered does not depend on its batch.

    Args:
        uncertainty: ``[E]``, of examples that neither training nor any choice has seen.
        errors: ``[E]`` bool; with a tolerance those of `possible_errors`.
        risk: error rate to guarantee, in (0, 1).
        delta: allowed failure probability, in (0, 1).
        tolerance: by how much the uncertainty of one example may differ between batches; 0: not at all, and the
            threshold is the order statistic.

    Raises:
        UserError: risk or delta outside (0, 1), or no examples.
        ValueError: NaN among the uncertainties, a tolerance below 0.
    """
    risk, delta = in_range("risk", risk, OpenShare), in_range("delta", delta, OpenShare)
    examples = len(errors)
    if not examples:
        raise UserError("selective threshold: expected calibration examples, found none; give a validation split")
    if uncertainty.isnan().any():
        raise ValueError("expected uncertainties that can be ranked, found NaN")
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"expected a tolerance of at least 0, found {tolerance}")
    ordered, order = uncertainty.double().sort()
    cumulative = [0, *errors.bool()[order].cumsum(0).tolist()]
    for level in range(_LEVELS, 0, -1):
        found = ordered[math.ceil(examples * level / _LEVELS) - 1].item()
        below, surely = (int((ordered < value).sum()) for value in (found, found - 4 * tolerance))
        wrong, right = cumulative[below], surely - cumulative[surely]
        if right == 0:
            continue
        answered = right + wrong
        if binom.cdf(wrong, answered, risk) <= delta / _LEVELS:
            highest = ordered[below - 1].item()
            middle = (min(highest, found - 4 * tolerance) + found) / 2
            return SelectiveThreshold(
                threshold=found if tolerance == 0 else middle,
                coverage=surely / examples,
                selective_risk=wrong / answered,
                risk_bound=float(beta.isf(delta / _LEVELS, wrong + 1, answered - wrong)),
                risk=risk,
                delta=delta,
                examples=examples,
                tolerance=tolerance,
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
        tolerance=tolerance,
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
    alpha = in_range("alpha", alpha, OpenShare)
    if not len(labels):
        raise UserError("conformal sets: expected calibration examples, found none; give a validation split")
    scores = 1 - probs.double().gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    rank = math.ceil(round((len(scores) + 1) * (1 - alpha), 9))  # 10 * (1 - 0.7) is above 3 in floating point
    return scores.sort().values[rank - 1].item() if rank <= len(scores) else 1.0


def prediction_sets(probs: Tensor, quantile: float, tolerance: float = 0.0) -> Tensor:
    """Classes with 1 - p <= quantile + tolerance, ``[E, C]`` bool; contains the label with probability >= 1 - alpha.

    The probability is over calibration sample and test example together. Classes of probability 0 (absent ones) are
    never in the set.

    A tolerance can only enlarge sets. It keeps the promise where two probabilities of one example in different batches
    differ by at most that much: let s, within half of it of them all, be the example's own score. The quantile of the
    measured scores is within half of it of the quantile of the s, and so is a new example's score of its s.

    Args:
        probs: ``[E, C]``.
        quantile: from `conformal_quantile`, of probabilities made in the same way.
        tolerance: by how much a probability may differ between batches.
    """
    probs = probs.double()
    return (1 - probs <= quantile + tolerance) & (probs > 0)
