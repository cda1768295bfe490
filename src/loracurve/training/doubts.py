"""What gives reason to doubt a fit: it learnt nothing, or it was cut off while it still got better.

A fit at a rate near the edge of what it bears can fail by the rounding of one run and succeed in the next, so that
nothing but its own figures tells.
"""

from __future__ import annotations

import math

import torch

from loracurve.inference.information import entropy
from loracurve.tasks.encoding import Encoded
from loracurve.training.loop import FitResult

__all__ = ["constant_nll", "doubts"]


STILL = 0.02
"""Improvement over the last two validations, as a part of the NLL, that says that more steps would help."""


def constant_nll(validation: Encoded) -> float | None:
    """Mean NLL in nats, on these rows, of the prediction that looks at none of them.

    The frequencies of the classes where rows share them, equal chances where choices are a row's own; None for language
    modelling.
    """
    if validation.scoring == "lm":
        return None
    labels = validation.labels
    if validation.scoring == "text":
        return sum(math.log(e.n_choices) for e in validation.examples) / len(labels)
    return float(entropy((torch.bincount(labels).double() / len(labels)).log()))


def doubts(result: FitResult, validation: Encoded, label: str, rate: float) -> list[str]:
    """Sentences about a fit that ends badly; none for most.

    Args:
        result: of the fit.
        validation: the rows by which its best state was chosen.
        label: anchors or curve.
        rate: its peak learning rate.
    """
    found = []
    constant = constant_nll(validation)
    worst, count = max(result.validation_nll), len(result.validation_nll)
    worst_of, mean_of = (f", the {of} of {count} adapters:" if count > 1 else "" for of in ("worst", "mean"))
    if constant is not None and worst >= constant:
        found.append(
            f"{label}: learnt nothing: validation NLL{worst_of} {worst:.3f}, that of guessing by the classes' "
            f"frequencies is {constant:.3f}; lower learning_rate (now {rate:g}) or take more steps"
        )
    validated = [entry["validation_nll"] for entry in result.history if "validation_nll" in entry]
    if len(validated) > 1 and not found and all(step == result.steps for step in result.best_step):
        before, last = (sum(nll) / len(nll) for nll in validated[-2:])
        if before - last > STILL * before:
            found.append(
                f"{label}: still getting better at the last of {result.steps} steps (validation NLL{mean_of} "
                f"{before:.3f}, then {last:.3f}); more steps would help"
            )
    return found
