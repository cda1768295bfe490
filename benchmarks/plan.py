"""What the methods of a suite do, in numbers: which kind of training step, how many, and passes of a prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from loracurve.baselines.curve import Curve
from loracurve.baselines.ensembles import ConvexMix, Ensemble, LongerEnsemble
from loracurve.baselines.flat_lora import FlatLoRA
from loracurve.baselines.laplace import Laplace
from loracurve.baselines.mc_dropout import MCDropout
from loracurve.baselines.method import Setting
from loracurve.baselines.single import Single
from loracurve.baselines.swag import SWAG
from loracurve.baselines.temperature import TemperatureScaled
from loracurve.bench.config import SuiteConfig
from loracurve.training.config import FitConfig, LoopConfig, passes_of


@dataclass(frozen=True)
class Work:
    """Work of a method on one task and seed, the shared anchors apart."""

    kind: str | None
    """of its training steps; None: no training. Laplace: a fit, and predictions, of single examples"""
    steps: int = 0
    validated: int = 1
    """points of a validation"""
    passes: int = 1
    """of a prediction"""


def setting_of(training: LoopConfig, samples: int = 10) -> Setting:
    """A setting without a model, for the options that methods derive from it."""
    return Setting(cast(Any, None), cast(Any, None), {}, training, samples)


def curve_kind(method: Curve, training: FitConfig) -> str:
    """Curves of one kind take equal time for a step: whether anchors are frozen does not matter."""
    extra = [n for n in (training.perturbation.kind, training.objective.jsd) if n != "none"]
    extra += [] if passes_of(training) == 2 else [f"{passes_of(training)} passes"]
    segments = method.curve.spec(method.curve.anchors).segments
    return ", ".join([f"curve of {segments} segment{'s' * (segments > 1)}", *extra])


def work_of(suite: SuiteConfig, task: str, method: Any) -> Work:
    """The work of a method of the suite."""
    training, samples = suite.training_of(task, suite.seeds[0]), suite.samples
    steps = training.steps
    if isinstance(method, TemperatureScaled):
        return work_of(suite, task, method.of)
    if isinstance(method, Single):
        own = method.keep != training.keep or method.weight_decay not in (None, training.weight_decay)
        return Work("1 adapter" if own else None, steps)
    if isinstance(method, Ensemble | ConvexMix):
        return Work(None, passes=method.members)
    if isinstance(method, LongerEnsemble):
        share = round(steps * method.units / method.members)
        return Work(f"{method.members} adapters", share, method.members, method.members)
    if isinstance(method, Curve):
        own_training = method.training_of(setting_of(training, samples))
        kind = curve_kind(method, own_training)
        return Work(kind, own_training.steps, own_training.evaluation_points, samples)
    if isinstance(method, Laplace):
        return Work(f"Laplace, {method.weights}")
    if isinstance(method, FlatLoRA):
        return Work("Flat-LoRA", steps)
    if isinstance(method, SWAG):
        return Work("SWAG", method.steps or steps, passes=samples)
    if isinstance(method, MCDropout):
        return Work("MC dropout", steps, passes=samples)
    kind = type(method).__name__
    return Work(kind if kind in ("IVON", "BLoB") else None, steps, passes=samples)  # lines train nothing
