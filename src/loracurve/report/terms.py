"""What the measures mean, in plain words, for readers who meet them for the first time."""

from __future__ import annotations

import re
from collections.abc import Iterable

from loracurve.report.blocks import Sheet

__all__ = ["terms_of"]


# A measure, how headings and captions name it, and a sentence.
_TERMS = (
    ("passes", r"\bpasses\b", "Runs of the model for each answer: what it costs to ask."),
    ("ACC", r"\bACC\b|\bacc\b", "Accuracy: the share of right answers."),
    ("NLL", r"\bNLL\b|\bnll", "Negative log-likelihood: how surprised the model is by the right answer, in nats. 0 is "
     "certain and right; a coin toss has 0.693. Lower is better."),
    ("ts", r"\bts\b|_ts\b", "After temperature scaling: one number, chosen on validation rows, that makes all "
     "probabilities bolder or more cautious."),
    ("Brier", r"Brier|\bbrier", "Squared distance between the probabilities and the right answer; 0 is perfect."),
    ("ECE", r"\bECE\b", "Expected calibration error: the mean gap between how sure the model is and how often it is "
     "right, over 15 bins. 0 is perfect."),
    ("AURC", r"\bAURC\b", "Area under the risk-coverage curve: the share of errors among the answers, averaged over "
     "how many of the surest rows are answered. Lower is better."),
    ("AUROC", r"\bAUROC\b", "How well a score tells two groups of rows apart: .5 is chance, 1 perfect."),
    ("entropy", r"\bentropy\b", "Total uncertainty of an answer, in nats: 0 where one class has all the probability."),
    ("expected", r"\bexpected\b(?! calibration)", "Expected entropy, the uncertainty that each point has by itself "
     "(aleatoric): what the data leave open, such as an ambiguous text."),
    ("MI", r"\bMI\b|\bmutual information\b", "Mutual information, the part of the uncertainty that more training data "
     "could settle (epistemic): points of the curve would answer differently."),
    ("within points", r"\bwithin points\b", "Part of MI that is large far from the training data."),
    ("between points", r"\bbetween points\b", "Part of MI that says that the fine-tunes along the curve disagree."),
    ("JSD", r"\bJSD\b", "Jensen-Shannon divergence: how far two answers' probabilities lie apart, in nats. 0 is the "
     "same; pair JSD is its mean over pairs of points."),
    ("disagreement", r"\bdisagreement\b", "Share of pairs of points that would choose another class."),
    ("familiarity", r"\bfamiliarity\b", "Share of known rows that are at least as far from the training data as this "
     "one; near 0 for foreign rows."),
    ("DEE", r"\bDEE\b", "Deep ensemble equivalent: how many separately trained adapters an ensemble needs for the same "
     "score."),
)  # fmt: skip


def terms_of(sheets: Iterable[Sheet], said: set[str]) -> list[tuple[str, str]]:
    """The measures in headings and captions of tables that have not been explained yet, which are added to `said`."""
    text = " | ".join(" | ".join([sheet.caption, *sheet.headings]) for sheet in sheets)
    found = [(name, words) for name, pattern, words in _TERMS if name not in said and re.search(pattern, text)]
    said |= {name for name, _ in found}
    return found
